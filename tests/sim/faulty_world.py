"""A world in which a cluster's bad days happen: faults at some instant, for some time, singly or several at once.

Time is virtual and goes in ticks of TICK_SECONDS. Stages take the time that stages take: they are put on a node, pull
an image, start, make steps, save checkpoints and end; faults say what comes in between. What must always hold is
checked after every pass of the controller; what must hold in the end is asked by `unfinished`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum

from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import ProgressReport, StageResult
from orchestrator.core.commands import Command, EnsureStage
from orchestrator.core.decide import Decider
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.core.snapshot import Snapshot, StageFact, StagePhase
from tests.builders import PUBLISHED, SMOLLM2_135M, failure, prepare_result, train_result
from tests.core.world import World

TICK_SECONDS = 30.0
STEP_SECONDS = 60.0
CPU_STAGE_SECONDS = 30.0
UNSCHEDULABLE_SECONDS, START_FAILURE_SECONDS, STRANDED_SECONDS = 900.0, 300.0, 60.0
"""How long the runtime waits for a pod, as `RuntimeBounds` has it."""
EVICTION_SECONDS = 300.0
"""How long a cluster waits for a node before it deletes the pods there."""
STEP, KNOWN_STEP = timedelta(hours=2), timedelta(hours=26)
"""How far the controller's clock is put: where its steps may go unnoticed, because it is killed, and else."""
NODES = {"24Gi": ("gpu-1", "gpu-2"), "48Gi": ("gpu-3",)}


class Fault(StrEnum):
    """What may go wrong, and is nobody's own fault."""

    STORE_AWAY = "the store answers 503"
    HUB_AWAY = "the hub answers 503"
    MLFLOW_AWAY = "MLflow is gone"
    API_AWAY = "the API server does not answer"
    WEBHOOK_DENIES = "a webhook refuses pods"
    WEBHOOK_FAILS = "a webhook does not answer"
    QUOTA_FULL = "the namespace's quota is full"
    IMAGE_MISSING = "the registry answers 429"
    NO_ROOM = "no node of the small class takes pods"
    BROKEN_CARD = "a card has uncorrectable errors"
    NODE_LOST = "a node vanishes"
    NODE_UNREACHABLE = "a node does not answer"
    DRAINED = "a node is drained"
    HOST_MEMORY = "a trainer runs out of host memory"
    HANG = "a stage makes no steps any more"
    POD_DELETED = "somebody deletes a pod"
    NODE_CLOCKS = "the nodes' clocks are a day off"
    CONTROLLER_CLOCK = "the controller's clock is put back"
    CLOCK_AHEAD = "the controller's clock is put ahead, and back again later"
    CONTROLLER_KILLED = "the controller is killed between two commands"


AT_AN_INSTANT = frozenset({Fault.NODE_LOST, Fault.DRAINED, Fault.HANG, Fault.POD_DELETED, Fault.HOST_MEMORY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A fault from one instant to another, in seconds from the beginning."""

    fault: Fault
    begin_seconds: float
    end_seconds: float


@dataclass(slots=True, kw_only=True)
class _Pod:
    """What the world knows of a stage, besides what the controller is told."""

    created_seconds: float
    node: str = ""
    started_seconds: float | None = None
    first_step: int = 0
    """Steps that were durable when it began: it goes on from there."""
    step: int = 0
    hangs: bool = False
    short_of_memory: bool = False
    deleted_seconds: float | None = None
    """When it was deleted while its node was out of reach."""


@dataclass(slots=True)
class FaultyWorld(World):
    """A `World` with time of its own, nodes, and troubles that come and go."""

    seed: int = 0
    steps_a_job: int = 6
    troubles: tuple[Trouble, ...] = ()
    seconds: float = 0.0
    pods: dict[str, _Pod] = field(default_factory=dict[str, _Pod])
    begun: set[Fault] = field(default_factory=set[Fault])
    on_record: set[str] = field(default_factory=set[str])
    """Stages that a job's status says were there once."""
    unreachable: str = ""
    """The node that does not answer."""
    strays: dict[str, float] = field(default_factory=dict[str, float])
    """Nodes of given-up stages that may still run there, and since when."""
    clock_put: timedelta = timedelta(0)
    """How far the controller's clock was ahead when it last looked."""
    fences: dict[str, int] = field(default_factory=dict[str, int])
    """The attempt that owns a job's store."""
    chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        """The chance of this world follows from its seed."""
        self.chance = random.Random(self.seed)

    # --- time ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """A piece of time: what happens outside, and then a pass of the controller."""
        self.seconds += TICK_SECONDS
        self.pass_time(TICK_SECONDS)
        self.mlflow_away = self.on(Fault.MLFLOW_AWAY)
        for trouble in self.troubles:
            if trouble.fault in AT_AN_INSTANT and trouble.fault not in self.begun and self.on(trouble.fault):
                self._strike(trouble.fault)
        self._lose_sight()
        for key in self.live_stages():
            self._live(key)
        if not self.on(Fault.API_AWAY):
            killed_after = self.chance.randrange(4) if self.on(Fault.CONTROLLER_KILLED) else None
            self.control(killed_after)

    def on(self, fault: Fault) -> bool:
        """Whether the fault is on now."""
        return any(t.fault is fault and t.begin_seconds <= self.seconds < t.end_seconds for t in self.troubles)

    @property
    def all_well(self) -> bool:
        """Whether every trouble is over."""
        return all(trouble.end_seconds <= self.seconds for trouble in self.troubles)

    def snapshot(self) -> Snapshot:
        """What the controller sees, by its own clock."""
        seen = World.snapshot(self)
        held = {self.pods[key].node for key in self.live_stages()}
        gone = ({self.unreachable} | self.strays.keys()) - held
        classes = tuple(replace(c, capacity=c.capacity - len(gone & set(NODES[c.name]))) for c in self.gpu_classes)
        put, before = self._clock_put(), self.clock_put
        step = (put - before).total_seconds()
        return replace(seen, now=seen.now + put, clock_step_seconds=step, gpu_classes=classes)

    def _clock_put(self) -> timedelta:
        """How far the controller's clock is ahead: more than any deadline, where nobody kills who knows that it was
        put."""
        ahead = KNOWN_STEP if all(t.fault is not Fault.CONTROLLER_KILLED for t in self.troubles) else STEP
        return ahead * self.on(Fault.CLOCK_AHEAD) - STEP * self.on(Fault.CONTROLLER_CLOCK)

    def control(self, commands_carried_out: int | None) -> None:
        """One pass of the controller; each command is checked as it is carried out."""
        commands = self.decide()
        self.clock_put = self._clock_put()
        for command in commands[:commands_carried_out]:
            self._act(command)
        if commands_carried_out is not None:
            self.runs.clear()
            self.decider = Decider()
        self._note_records()
        self.check()
        self._check_bookings()
        self._check_ends()

    def _note_records(self) -> None:
        for job in self.jobs.values():
            attempt = job.status.active_attempt
            if attempt is not None and attempt.seen_time is not None:
                self.on_record.add(f"{job.metadata.namespace}/{job.stage_name(attempt)}")

    # --- what the world does with commands -------------------------------------------------------------------------

    def _act(self, command: Command) -> None:
        if isinstance(command, EnsureStage):
            self._create(command)
        else:
            World._act(self, command)

    def _create(self, command: EnsureStage) -> None:
        key = f"{command.task.namespace}/{command.task.stage_name}"
        if self.on(Fault.WEBHOOK_FAILS) or key in self.stages:
            return
        assert key not in self.on_record, f"{key} is made a second time"
        self._ensure(command)
        self.pods[key] = _Pod(created_seconds=self.seconds)
        if self.on(Fault.WEBHOOK_DENIES):
            self._give_up(key, Reason.ADMISSION_REFUSED)
        elif self.on(Fault.QUOTA_FULL):
            self._give_up(key, Reason.QUOTA_EXCEEDED)

    # --- what happens to stages ------------------------------------------------------------------------------------

    def _live(self, key: str) -> None:
        """A tick in the life of a stage."""
        pod = self.pods[key]
        if pod.node and pod.node == self.unreachable:
            self._out_of_sight(key, pod)
        elif key in self.stopping or pod.deleted_seconds is not None:
            self._obey(key)
        elif pod.started_seconds is None:
            self._start(key, pod)
        elif self.tasks[key].stage == "train":
            self._train(key, pod)
        elif self.seconds - pod.started_seconds >= CPU_STAGE_SECONDS:
            self._finish_on_cpu(key)

    def _obey(self, key: str) -> None:
        if self.pods[key].started_seconds is None:
            self._vanish(key)
        elif self.pods[key].hangs:
            self._exit(key, 137)
        else:
            self._stopped(key)

    def _start(self, key: str, pod: _Pod) -> None:
        waited = self.seconds - pod.created_seconds
        if not pod.node and not self._place(key, pod):
            if waited > UNSCHEDULABLE_SECONDS:
                self._give_up(key, Reason.UNSCHEDULABLE)
        elif self.on(Fault.IMAGE_MISSING):
            if waited > START_FAILURE_SECONDS:
                self._give_up(key, Reason.IMAGE_UNAVAILABLE)
        else:
            pod.started_seconds = self.seconds
            self.fences[self._job(key)] = self.tasks[key].attempt
            pod.step = pod.first_step = self.steps.get(self._job(key), 0)
            start = self.now + self._clock_error()
            self.stages[key] = replace(self.stages[key], phase=StagePhase.RUNNING, start_time=start, node=pod.node)

    def _place(self, key: str, pod: _Pod) -> bool:
        gpu_class = self.classes_of[key]
        if gpu_class is None:
            pod.node = "cpu-1"
            return True
        if gpu_class == "24Gi" and self.on(Fault.NO_ROOM):
            return False
        taken = {self.pods[other].node for other in self.live_stages()} | {self.unreachable} | self.strays.keys()
        free = [n for n in NODES[gpu_class] if n not in taken and n not in self.tasks[key].avoid_nodes]
        offered = [n for n in NODES[gpu_class] if self.strays.get(n, pod.created_seconds) < pod.created_seconds]
        avoided = self.tasks[key].avoid_nodes  # its GPU may be that of a node that it is kept off
        assert free or avoided or not offered, f"{key} was given the GPU of {offered}, where something may still run"
        pod.node = free[0] if free else ""
        return bool(free)

    def _train(self, key: str, pod: _Pod) -> None:
        assert pod.started_seconds is not None
        if self.on(Fault.BROKEN_CARD) and pod.node == "gpu-1":
            self._exit(key, ExitCode.BROKEN_GPU, failure(Reason.BROKEN_GPU, "uncorrectable ECC error"))
        elif pod.short_of_memory and self.tasks[key].host_memory_factor < 2:
            self._exit(key, 137, disruption=Reason.HOST_OUT_OF_MEMORY)
        elif self.on(Fault.STORE_AWAY):
            self._exit(key, ExitCode.TRANSIENT_ERROR, failure(Reason.TRANSIENT_ERROR, "the store said 503"))
        elif not pod.hangs and self.seconds - pod.started_seconds >= STEP_SECONDS * (pod.step + 1 - pod.first_step):
            self._step(key, pod)
        self._skew_end(key)

    def _step(self, key: str, pod: _Pod) -> None:
        pod.step += 1
        self.steps[self._job(key)] = pod.step
        if pod.step >= self.steps_a_job:
            self._exit(key, 0, train_result(self.steps_a_job))
            return
        report = ProgressReport(
            stage="train",
            step=pod.step,
            steps=self.steps_a_job,
            tokens_per_second=1000.0,
            eta_seconds=(self.steps_a_job - pod.step) * STEP_SECONDS,
            checkpoint_step=pod.step,
            checkpoint_uri=f"file:///checkpoints/{pod.step}",
            time=self.now + self._clock_error(),
        )
        self.stages[key] = replace(self.stages[key], progress=report)

    def _finish_on_cpu(self, key: str) -> None:
        task = self.tasks[key]
        away = self.on(Fault.STORE_AWAY) or self.on(Fault.HUB_AWAY if task.stage == "prepare" else Fault.MLFLOW_AWAY)
        if away:
            self._exit(key, ExitCode.TRANSIENT_ERROR, failure(Reason.TRANSIENT_ERROR, "it said 503"))
        elif task.stage == "prepare":
            self._exit(key, 0, StageResult(prepare=prepare_result(self.models.get(task.job, SMOLLM2_135M))))
        else:
            self._exit(key, 0, PUBLISHED)
        self._skew_end(key)

    def _skew_end(self, key: str) -> None:
        fact = self.stages.get(key)
        if fact is not None and fact.finish_time is not None:
            self.stages[key] = replace(fact, finish_time=self.now + self._clock_error())

    def _clock_error(self) -> timedelta:
        return timedelta(days=self.chance.choice((-1, 1))) if self.on(Fault.NODE_CLOCKS) else timedelta(0)

    def _give_up(self, key: str, reason: Reason) -> None:
        """As the runtime tells of a pod that came to nothing."""
        self.stages[key] = replace(
            self.stages[key],
            phase=StagePhase.EXITED,
            result=failure(reason, "so the platform says"),
            disruption=reason,
        )
        self.ever_ended.add(key)

    def _vanish(self, key: str) -> None:
        self.stages.pop(key)
        self.stopping.discard(key)
        if key in self.on_record:
            self.ever_ended.add(key)

    # --- a node out of reach ----------------------------------------------------------------------------------------

    def _lose_sight(self) -> None:
        """A node of a stage with a GPU does not answer as long as that is on; afterwards all ends that was deleted."""
        if not self.on(Fault.NODE_UNREACHABLE):
            self.unreachable = ""
            self.strays.clear()
        elif not self.unreachable:
            nodes = sorted(
                {self.pods[key].node for key in self.live_stages() if self.classes_of[key] is not None} - {""}
            )
            self.unreachable = self.chance.choice(nodes) if nodes else ""

    def _out_of_sight(self, key: str, pod: _Pod) -> None:
        """The trainer goes on as far as its fence lets it; the cluster deletes its pod, and nobody hears of its end."""
        self._train_unseen(key, pod)
        begun = max(t.begin_seconds for t in self.troubles if t.fault is Fault.NODE_UNREACHABLE)
        if pod.deleted_seconds is None and (key in self.stopping or self.seconds - begun > EVICTION_SECONDS):
            pod.deleted_seconds = self.seconds
            self.stages[key] = replace(self.stages[key], disruption=Reason.DISRUPTED)
        overdue = self.seconds - (pod.deleted_seconds or self.seconds) - self.policy.grace_seconds
        if overdue > STRANDED_SECONDS:
            self._give_up(key, Reason.LOST)
            self.strays[pod.node] = self.seconds

    def _train_unseen(self, key: str, pod: _Pod) -> None:
        job, is_owner = self._job(key), self.fences.get(self._job(key)) == self.tasks[key].attempt
        if pod.started_seconds is not None and is_owner and not pod.hangs and pod.step < self.steps_a_job - 1:
            pod.step += 1
            self.steps[job] = pod.step

    # --- faults that strike once -----------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        """It comes to a stage on a GPU; while there is none it is still to come."""
        on_gpu = [key for key in self.live_stages() if self.classes_of[key] is not None and key not in self.stopping]
        if not on_gpu:
            return
        self.begun.add(fault)
        key = self.chance.choice(sorted(on_gpu))
        match fault:
            case Fault.NODE_LOST | Fault.POD_DELETED:
                self._vanish(key)
            case Fault.DRAINED:
                self.stages[key] = replace(self.stages[key], disruption=Reason.DISRUPTED)
            case Fault.HANG:
                self.pods[key].hangs = True
            case _:
                self.pods[key].short_of_memory = True

    def _job(self, key: str) -> str:
        return f"{self.tasks[key].namespace}/{self.tasks[key].job}"

    # --- what must always hold --------------------------------------------------------------------------------------

    def _check_bookings(self) -> None:
        """No GPU is booked without a pod for longer than a bound, nor by a pod that does not start."""
        bound = self.policy.creation_limit_seconds + 2 * TICK_SECONDS
        pending_bound = UNSCHEDULABLE_SECONDS + 2 * TICK_SECONDS
        if any(self.on(fault) for fault in (Fault.CONTROLLER_CLOCK, Fault.CLOCK_AHEAD, Fault.CONTROLLER_KILLED)):
            return
        for job in self.jobs.values():
            attempt = job.status.active_attempt
            if attempt is None or attempt.stage != "train" or self.seconds - self._quiet_since() < bound:
                continue
            age = (self.now - attempt.created_time).total_seconds()
            fact: StageFact | None = self.stages.get(f"{job.metadata.namespace}/{job.stage_name(attempt)}")
            assert fact is not None or age <= bound, f"{job.key} books a GPU without a pod for {age:.0f} s"
            if fact is not None and fact.phase is StagePhase.PENDING:
                waited = self.seconds - self.pods[fact.key].created_seconds
                assert waited <= pending_bound, (
                    f"{job.key} books a GPU for a pod that has not started in {waited:.0f} s"
                )

    def _quiet_since(self) -> float:
        """When the last of the faults that keep the controller from looking was over."""
        blind = (Fault.API_AWAY, Fault.CONTROLLER_CLOCK, Fault.CLOCK_AHEAD, Fault.CONTROLLER_KILLED)
        return max(
            (t.end_seconds for t in self.troubles if t.fault in blind and t.begin_seconds <= self.seconds), default=-1e9
        )

    def _check_ends(self) -> None:
        """Nothing of all this is a job's own fault, so none may fail of it."""
        for job in self.jobs.values():
            state = state_of(job.status)
            assert state not in TERMINAL_STATES - {JobState.SUCCEEDED}, f"{job.key} {state}: {job.status.summary}"

    # --- what must hold in the end ----------------------------------------------------------------------------------

    def unfinished(self) -> list[QLoRAJob]:
        """Jobs that have not succeeded, or are not let go."""
        return [
            job
            for job in self.jobs.values()
            if state_of(job.status) is not JobState.SUCCEEDED or job.metadata.finalizers
        ]
