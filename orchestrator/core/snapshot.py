"""The facts that go into a decision.

A `Snapshot` holds everything that a decision may depend on: time, objects, stages, cards and settings. All of it is
frozen, so a decision can be repeated, explained and simulated with the very same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal

from orchestrator.api.job import MlflowStatus, ObjectMeta, QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import Reason
from orchestrator.api.results import ProgressReport, Promotion, StageResult
from orchestrator.api.sweep import QLoRASweep
from orchestrator.core.job.addresses import AddressRules
from orchestrator.sizing.hardware import GpuClass


class StagePhase(StrEnum):
    """Where a stage is, as the runtime sees it."""

    PENDING = "Pending"
    RUNNING = "Running"
    EXITED = "Exited"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFact:
    """What the runtime knows of one stage."""

    namespace: str
    name: str
    phase: StagePhase
    start_time: datetime | None = None
    finish_time: datetime | None = None
    exit_code: int | None = None
    """Set when EXITED; absent there if nobody saw the end (the stage was lost)."""
    result: StageResult | None = None
    """The termination message, if the stage wrote one that parses."""
    disruption: Reason | None = None
    """Set where the platform, not the stage, brought about the end or, before the end, is about to."""
    progress: ProgressReport | None = None
    uid: str = ""
    """The uid of the job that the stage was made for; empty where the runtime does not keep it."""
    node: str = ""
    """The machine it was put on; empty before that, and where there is only one."""
    stage_uid: str = ""
    """What tells it from others of its name; empty where the runtime alone makes stages."""
    vouched: bool = True
    """Whether the runtime knows by itself that it made this stage; otherwise a status has to name its `stage_uid`."""
    gpus: int = 0
    """GPUs that it keeps from others, where the runtime counts them."""
    gpu_class: str | None = None
    """The class of those."""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFact:
    """What MLflow has of a job, and no status has on record yet: its run, or what came of a request to promote it."""

    job: QLoRAJob
    """As it was when MLflow was asked."""
    mlflow: MlflowStatus
    """What MLflow answered."""
    promotion: Promotion | None = None
    """What came of the request, where that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFact:
    """What MLflow has of a sweep that is over, and no status has on record yet."""

    mlflow: MlflowStatus
    promotion: Promotion | None = None
    """What came of the alias, where one was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFact:
    """What came of telling a webhook something, and no status has on record yet."""

    number: int
    """Of the notification."""
    recipient: str
    outcome: Literal["delivered", "failed", "refused"]
    """Failed: it is tried again. Refused: the webhook wants no more of it, or is none any more."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableJob:
    """What can be told of a job whose object does not parse: another version wrote it, or accepted it."""

    namespace: str
    name: str
    uid: str = ""
    queue: str = ""
    """Empty where it cannot be told."""
    stage: str = ""
    """The name of its active attempt's stage; empty where there is none, or it cannot be told."""
    gpu_class: str | None = None
    """What that stage has, where it has a GPU."""
    stop: bool = False
    """Whether its user wants nothing of it to run: it is suspended, cancelled or deleted."""
    deleted: bool = False
    held: bool = False
    """Whether a finalizer of ours keeps its object."""
    seconds_left: float | None = None
    """Of its deadline, at the start of the active attempt; absent where it has none, or it cannot be told."""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableSweep:
    """A sweep whose object does not parse: nothing is decided about it, and deleting it is not held up."""

    metadata: ObjectMeta

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.metadata.namespace}/{self.metadata.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings that decisions depend on; every bound has its name here."""

    store_uri: str
    """Where jobs that name no store keep their data."""
    grace_seconds: int = 120
    """Between asking a train stage to stop and killing it."""
    checkpoint_lag_seconds: float = 900.0
    """Training waits for a checkpoint that has not reached the store for so long."""
    backoff_base_seconds: float = 10.0
    """Wait before the first retry; doubles with every failure."""
    backoff_max_seconds: float = 600.0
    outage_limit_seconds: float = 21_600.0
    """How long the surroundings may keep a job from progress before it fails, unless its spec says otherwise."""
    outage_jobs: int = 3
    """So many jobs that fail for the same cause are an outage: nobody's fault, and waited for together."""
    outage_window_seconds: float = 900.0
    """An outage is over when nobody has failed for its cause for so long."""
    outage_probe_seconds: float = 120.0
    """A stage that has run for so long has got through."""
    avoid_seconds: float = 1800.0
    """A node with a broken card, or a class whose nodes took no pod, is passed over for so long."""
    creation_limit_seconds: float = 300.0
    """An attempt of which no stage has come for so long is given up, and its GPU with it."""
    release_limit_seconds: float = 3600.0
    """A finished job that is deleted waits for so long for MLflow to take the end of its run."""
    stall_seconds: float = 1800.0
    """A stage that trains is never taken for stuck before so long without a step."""
    stall_start_seconds: float = 14_400.0
    """The same before its first step: the model is fetched and loaded."""
    has_agents: bool = True
    """Whether stages can be heard at all; where they cannot, silence says nothing."""
    stall_steps: int = 20
    """A stage is stuck after so many times a step's length, and an evaluation's, without a step."""
    host_memory_factor_max: float = 4.0
    """How far a stage's host memory is raised, by doubling, after it has run out."""
    minimum_run_seconds: float = 300.0
    """A start counts in fair share for at least so long."""
    restart_cost_seconds: float = 60.0
    """GPU seconds that a move costs on top of the work since the last checkpoint."""
    stop_cost_seconds: float = 30.0
    """From being asked to stop until the GPU is free: a checkpoint is written, and the process ends."""
    preemption_cooldown_seconds: float = 60.0
    """A job that was just evicted is not chosen as a victim again for so long after it restarted."""
    max_evictions: int = 0
    """The eviction budget of jobs that name none; 0: they have none."""
    eviction_window_seconds: float = 86_400.0
    """Only evictions within so long count in that."""
    eviction_protection_seconds: float = 3600.0
    """A job whose eviction budget is spent keeps a GPU for so long before it may be moved again."""
    defragmentation_gain: float = 0.0
    """A job is moved from a large card to a free smaller one where somebody then starts sooner by so many times what
    the move costs; 0: nobody is."""
    history_limit: int = 32
    """Attempts kept in a job's status."""
    cpu_stages_limit: int = 4
    """Prepare and publish stages that may run at one time."""
    cpu_start_seconds: float = 60.0
    """One that has not started after so long holds no slot while it waits."""
    prepare_deadline_seconds: float = 21_600.0
    """A prepare stage that runs for longer is stopped, and its job fails."""
    publish_deadline_seconds: float = 21_600.0
    """A publish stage that runs for longer is stopped, and tried again."""
    trainer_threads: int = 1
    progress_interval_seconds: float = 1.0
    """A running stage's progress is written to the status at most this often."""
    words_limit: int = 100
    """Jobs of which one decision says something new while nothing else about them changes."""
    usage_half_life_seconds: float = 604_800.0
    """GPU time that a queue has had counts for half after so long."""
    usage_write_seconds: float = 30.0
    """What a queue's jobs have had is written to its status so often while they hold GPUs."""
    gpu_prices: str = ""
    """Dollars for an hour of a GPU, by class: `24Gi=0.5,48Gi=0.8`."""
    gpu_class_definitions: str = ""
    """GPU classes that the operator has defined: JSON, as the setting has it."""
    webhook_limit_seconds: float = 259_200.0
    """What a webhook has not taken for so long is given up."""
    webhook_allowed_hosts: str = ""
    """Hosts that webhooks may name whatever their addresses, and by http://."""
    addresses: AddressRules = field(default_factory=AddressRules)
    """Which URIs jobs may name."""
    gpu_classes_are_fixed: bool = False
    """Whether no other GPU can ever appear here: a job that fits none of them then fails instead of waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a decision may depend on."""

    now: datetime
    clock_step_seconds: float = 0.0
    """How far the clock of `now` was put ahead since the last decision, below zero back: seconds that did not pass."""
    jobs: tuple[QLoRAJob, ...]
    queues: tuple[QLoRAQueue, ...] = ()
    sweeps: tuple[QLoRASweep, ...] = ()
    stages: Mapping[str, StageFact] = field(default_factory=dict[str, StageFact])
    """Every stage there is, by `namespace/name`: one that is not here does not exist."""
    taken_names: frozenset[str] = frozenset()
    """`namespace/name` of whatever else keeps a stage of the name from being made."""
    gpu_classes: tuple[GpuClass, ...] = ()
    runs: Mapping[str, RunFact] = field(default_factory=dict[str, RunFact])
    """By the job's uid; may be lost at any time, since asking MLflow again gives the same answer."""
    sweep_runs: Mapping[str, SweepFact] = field(default_factory=dict[str, SweepFact])
    """The same of sweeps, by the sweep's uid."""
    deliveries: Mapping[str, tuple[DeliveryFact, ...]] = field(default_factory=dict[str, tuple[DeliveryFact, ...]])
    """What came of notifications, by the job's uid; may be lost at any time: they are sent again."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why nothing can come of a job or a sweep, by its uid: the store takes no status of it, or no job of a trial, or
    the runtime no stage."""
    unreadable: tuple[UnreadableJob, ...] = ()
    """Jobs that this version cannot parse: their GPUs are taken all the same, and their stages can be stopped."""
    unreadable_sweeps: tuple[UnreadableSweep, ...] = ()
    policy: Policy
