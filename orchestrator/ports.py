"""What the controller and the SDK ask of the world: small protocols.

`Store`: SQLite | Kubernetes. `StageRuntime`: local Ray | Kubernetes pods. `Tracking`: MLflow | a fake for tests.
`Notifier`: HTTP | a fake for tests.
One contract suite runs over every implementation. `AgentChannel` serves the runtime on Kubernetes, which may lack it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.api.job import MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.notification import Notification, Webhook
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.results import ProgressReport, Promotion
from orchestrator.api.stage_name import StageName
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus, TrialStatus
from orchestrator.api.task import StageTask
from orchestrator.core.commands import Event
from orchestrator.core.snapshot import StageFact, SweepFact, UnreadableJob, UnreadableSweep
from orchestrator.sizing.hardware import GpuClass


class Store(Protocol):
    """The truth: job, queue and sweep objects. Writes carry the resource version they were decided on."""

    def list_jobs(self, namespace: str | None = None) -> Sequence[QLoRAJob]:
        """All jobs, ordered by namespace and name."""
        ...

    def list_unreadable(self) -> Sequence[UnreadableJob]:
        """Stored jobs that this version cannot parse, as far as they can be told; list_jobs leaves them out."""
        ...

    def get_job(self, namespace: str, name: str) -> QLoRAJob:
        """One job; raises NotFound."""
        ...

    def create_job(self, job: QLoRAJob) -> QLoRAJob:
        """Store a new job with a uid, resource version and creation time; raises AlreadyExists.

        A trial whose sweep is gone is not kept: the store refuses it with NotFound, or deletes it.
        """
        ...

    def update_job(self, job: QLoRAJob) -> QLoRAJob:
        """Replace spec and metadata, never status; a new spec bumps the generation; raises Conflict, NotFound."""
        ...

    def update_status(self, job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJob:
        """Replace the status alone; raises Conflict if `job.metadata.resource_version` is stale, NotFound.

        With it go our finalizers, on or off, as `core/job/finalizer` says.
        """
        ...

    def release(self, job: QLoRAJob) -> None:
        """Take RELEASE_FINALIZER off a job that owes nothing any more. Idempotent; raises NotFound."""
        ...

    def release_unreadable(self, namespace: str, name: str, uid: str) -> None:
        """Take our finalizers off a job that does not parse; with them goes an object that is marked. Idempotent."""
        ...

    def delete_job(self, namespace: str, name: str) -> None:
        """Remove the object, or mark it deleted while finalizers remain; raises NotFound."""
        ...

    def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        ...

    def apply_queue(self, queue: QLoRAQueue) -> QLoRAQueue:
        """Create a queue, or replace its spec, never its status."""
        ...

    def update_queue_status(self, queue: QLoRAQueue, status: QLoRAQueueStatus) -> QLoRAQueue:
        """Replace the status alone; raises Conflict if `queue.metadata.resource_version` is stale, NotFound."""
        ...

    def delete_queue(self, name: str) -> None:
        """Remove a queue, whatever jobs name it; raises NotFound."""
        ...

    def list_sweeps(self, namespace: str | None = None) -> Sequence[QLoRASweep]:
        """All sweeps that parse, ordered by namespace and name."""
        ...

    def create_sweep(self, sweep: QLoRASweep) -> QLoRASweep:
        """Store a new sweep; raises AlreadyExists, InvalidObject."""
        ...

    def list_unreadable_sweeps(self) -> Sequence[UnreadableSweep]:
        """Stored sweeps that this version cannot parse; list_sweeps leaves them out."""
        ...

    def update_sweep_status(self, sweep: QLoRASweep, status: QLoRASweepStatus) -> QLoRASweep:
        """Replace the status alone; raises Conflict if `sweep.metadata.resource_version` is stale, NotFound.

        With it goes our finalizer, on or off, as `core/sweep/finalizer` says, and with that an object that is marked.
        """
        ...

    def release_sweep(self, sweep: QLoRASweep | UnreadableSweep) -> None:
        """Take our finalizer off a sweep that is marked; with it goes the object. Raises Conflict, NotFound."""
        ...

    def cancel_sweep(self, namespace: str, name: str) -> None:
        """Ask for its end. Idempotent; raises NotFound."""
        ...

    def delete_sweep(self, namespace: str, name: str) -> None:
        """Remove a sweep, and with it its trials, as `delete_job` does; one whose run waits for its end is marked.

        Raises NotFound.
        """
        ...

    def record_event(self, job: QLoRAJob, event: Event) -> None:
        """Keep an event for people; bounded in number."""
        ...

    def list_events(self, namespace: str, name: str) -> Sequence[tuple[str, Event]]:
        """A job's events with their RFC 3339 times, oldest first."""
        ...

    def wait_for_change(self, since: str, timeout_seconds: float) -> str:
        """Block until a change after the cursor `since` ('' is the beginning) or the timeout; the new cursor."""
        ...


class StageRuntime(Protocol):
    """Where stages run."""

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        """Start the stage unless one of its name exists; durable before it returns."""
        ...

    def observe(self) -> Mapping[str, StageFact]:
        """All stages that exist, ended ones included, by `namespace/name`."""
        ...

    def taken_names(self) -> frozenset[str]:
        """`namespace/name` of whatever keeps a stage of the name from being made, forgotten stages included."""
        ...

    def stop(self, namespace: str, name: str, grace_seconds: int, reason: Reason) -> None:
        """Ask for a checkpoint and an end within the grace period, then kill. Idempotent; unknown names are ignored."""
        ...

    def delete(self, namespace: str, name: str, *, recorded: bool = False) -> None:
        """Forget an ended stage. Idempotent. `recorded`: its job's status is known to say how it ended."""
        ...

    def gpu_classes(self) -> Sequence[GpuClass]:
        """The GPU classes of this runtime and how many cards of each exist now."""
        ...


class Tracking(Protocol):
    """The MLflow side that belongs to the controller: the run's existence, its last status, and who is promoted."""

    def ensure_run(self, job: QLoRAJob) -> MlflowStatus:
        """The job's one run, found by its tag or created; sets it RUNNING.

        Raises TrackingUnavailable, and InvalidObject for an experiment that is not the namespace's.
        """
        ...

    def finish_run(self, job: QLoRAJob, run_status: str) -> None:
        """Give the run its last status: FINISHED, FAILED or KILLED. Idempotent. Raises TrackingUnavailable."""
        ...

    def promote(self, job: QLoRAJob, forced: str) -> Promotion:
        """Move the alias of spec.tracking.promote to the published job's version, once, and say what came of it.

        It stays where the version or its owner are others than the job's and, unless a person `forced` it with a
        reason, where another version has it than the one that was compared with. Raises TrackingUnavailable.
        """
        ...

    def finish_sweep(self, sweep: QLoRASweep, run_status: str, promoted: TrialStatus | None) -> SweepFact:
        """Give a sweep's run its last status, and the alias of spec.promote to the trial's version. Idempotent.

        Raises TrackingUnavailable.
        """
        ...


class Notifier(Protocol):
    """The way to webhooks."""

    def send(self, job: QLoRAJob, notification: Notification, webhook: Webhook, namespace: str | None) -> None:
        """Tell a webhook something, and return once it has confirmed it.

        `namespace` is whose secret signs; None is the service's own. Raises TransientError where it should be tried
        again, and PermanentError where the webhook wants no more. No message names the address or the secret.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLog:
    """One attempt that has a log."""

    namespace: str
    name: StageName

    @classmethod
    def of(cls, namespace: str, job: str, name: str) -> StageLog | None:
        """The attempt of this job that a stage's name stands for; None for another job, whose name starts alike."""
        found = StageName.parse(name)
        return cls(namespace=namespace, name=found) if found is not None and found.job == job else None


class Tail(Protocol):
    """One log, read from its beginning, piece by piece."""

    def new_lines(self, closed: bool) -> Iterator[str]:
        """What was written since the last call; an unfinished last line only where the log is `closed`."""
        ...


class StageLogs(Protocol):
    """Where the logs of stages are kept: a folder of the embedded service | the pods of a cluster."""

    def attempts(self, namespace: str, job: str) -> Sequence[StageLog]:
        """The job's logs that exist, in any order."""
        ...

    def tail(self, log: StageLog) -> Tail:
        """One of them, from its beginning."""
        ...


class AgentChannel(Protocol):
    """A word with the trainers, through the agents beside them. Keys are `namespace/name` of stages.

    It is a convenience and may be lost at any time: what it cannot tell is missing, what it cannot pass on is not
    acknowledged, and a signal does the same work. No call waits for the outside.
    """

    def progress(self) -> Mapping[str, ProgressReport]:
        """The latest figures of each stage; a stage of which nothing was heard lately is missing."""
        ...

    def request_checkpoint(self, key: str) -> None:
        """Ask for a checkpoint at the next step boundary, if the stage can be reached."""
        ...

    def preempt(self, key: str, deadline_seconds: float) -> bool:
        """Ask to checkpoint and exit with `ExitCode.PREEMPTED`; whether the trainer is known to have been told.

        The first call passes the request on and its deadline counts; a later one asks how it went. False for long
        means that nobody is there to be told.
        """
        ...
