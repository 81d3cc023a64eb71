"""Why a job is where it is, by the very code that decides.

The world is put together from what the store holds: a stage counts as running when its job's status says so.
`core/explain` then decides as the controller would, and nothing is carried out. An account that may read no more than
its own jobs is told what the controller has put on record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.core.explain import explain, explain_recorded
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.core.snapshot import Policy, Snapshot, StageFact, StagePhase
from orchestrator.errors import Forbidden
from orchestrator.sdk.connection import Connection
from orchestrator.sizing.hardware import GpuClass, priced

ON_RECORD = (
    "This is what the controller has put on record: other jobs, queues or nodes are not this account's to read, so "
    "what is decided this moment is not worked out here."
)

NOT_RUNNING = "The service is not running, so nothing happens until it is started: qlora up."


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where a job is, and why."""

    job: str
    state: JobState
    sentences: tuple[str, ...]
    """The reasons, in the order in which to read them."""

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        return {"job": self.job, "state": self.state.value, "sentences": list(self.sentences)}


def explain_job(job: QLoRAJob, connection: Connection, policy: Policy) -> Explanation:
    """The decision of this moment about the job, in words."""
    try:
        sentences = explain(read_snapshot(connection, policy), job.key)
    except Forbidden:
        sentences = (*explain_recorded(job, policy, datetime.now(UTC)), ON_RECORD)
    state = state_of(job.status)
    if state not in TERMINAL_STATES and not connection.is_running():
        sentences = (*sentences, NOT_RUNNING)
    return Explanation(job=job.key, state=state, sentences=sentences)


def read_snapshot(connection: Connection, policy: Policy) -> Snapshot:
    """What a decision of this moment would see; raises Forbidden where that is not this account's to read."""
    store = connection.store
    return snapshot_of(store.list_jobs(), store.list_queues(), connection.gpu_classes(), policy, datetime.now(UTC))


def snapshot_of(
    jobs: Iterable[QLoRAJob],
    queues: Iterable[QLoRAQueue],
    gpu_classes: Iterable[GpuClass],
    policy: Policy,
    now: datetime,
) -> Snapshot:
    """The world that objects and cards tell of."""
    jobs = tuple(jobs)
    return Snapshot(
        now=now,
        jobs=jobs,
        queues=tuple(queues),
        stages=_stages(jobs),
        gpu_classes=priced(gpu_classes, policy.gpu_prices),
        policy=policy,
    )


def _stages(jobs: Iterable[QLoRAJob]) -> Mapping[str, StageFact]:
    """The stages that the jobs' statuses speak of."""
    facts = (
        StageFact(
            namespace=job.metadata.namespace,
            name=job.stage_name(attempt),
            uid=job.metadata.uid,
            phase=StagePhase.PENDING if attempt.start_time is None else StagePhase.RUNNING,
            start_time=attempt.start_time,
        )
        for job in jobs
        if (attempt := job.status.active_attempt) is not None
    )
    return {fact.key: fact for fact in facts}
