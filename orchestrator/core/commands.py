"""The commands that come out of a decision. Each is idempotent: carrying it out again changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.notification import Notification, Webhook
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus, TrialStatus
from orchestrator.api.task import StageTask
from orchestrator.core.snapshot import UnreadableSweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A decision worth telling the user; becomes a Kubernetes event or a row in the embedded store."""

    reason: Reason
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteStatus:
    """Record a job's new status, if the job is still at this resource version."""

    job: QLoRAJob
    status: QLoRAJobStatus
    events: tuple[Event, ...] = ()
    words_only: bool = False
    """Whether nothing changes but what is said about a job that waits; that may come late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteQueueStatus:
    """Record what a queue's jobs have had, if the queue is still at this resource version."""

    queue: QLoRAQueue
    status: QLoRAQueueStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSweepStatus:
    """Record a sweep's new status, if the sweep is still at this resource version."""

    sweep: QLoRASweep
    status: QLoRASweepStatus
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateJob:
    """Make the job of a trial that the sweep's status already records; done if it exists."""

    sweep: QLoRASweep
    job: QLoRAJob


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    """End a trial's job for good, as a person would."""

    job: QLoRAJob


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishSweep:
    """Give the MLflow run of a sweep that is over its last status; what came of it becomes a fact."""

    sweep: QLoRASweep
    run_status: str
    promoted: TrialStatus | None
    """The trial whose version gets the alias of spec.promote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureStage:
    """Create the stage of an attempt that the status already records; done if it exists."""

    task: StageTask
    gpu_class: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStage:
    """Ask a stage to checkpoint and end within the grace period, then kill it; repeating it changes nothing."""

    namespace: str
    name: str
    grace_seconds: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteStage:
    """Forget a stage whose end the status already records."""

    namespace: str
    name: str
    recorded: bool = False
    """Whether the job's status was seen to say how it ended; otherwise the job is gone, or the view of it is old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureRun:
    """Find or create the job's MLflow run; it becomes a fact."""

    job: QLoRAJob


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRun:
    """Give the job's MLflow run its last status, and release the job, which waited for that."""

    job: QLoRAJob
    run_status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteVersion:
    """Move the alias of spec.tracking.promote to a published job's version; what came of it becomes a fact."""

    job: QLoRAJob
    forced: str
    """Why it moves whatever the gate said; empty where a person only approved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendNotification:
    """Tell a webhook something that the status has on record; what came of it becomes a fact."""

    job: QLoRAJob
    notification: Notification
    recipient: str
    webhook: Webhook | None
    """Absent where neither the job nor its queue names it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseJob:
    """Let a deleted job's object go although its MLflow run has not got its last status, and say so."""

    job: QLoRAJob
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    """Remove a finished job's object after its time to live."""

    job: QLoRAJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSweep:
    """Let a deleted sweep's object go although its MLflow run may not have got its last status, and say so."""

    sweep: QLoRASweep | UnreadableSweep
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDefect:
    """Put on record that deciding about a job or a sweep raised; a job's own commands deal with the job."""

    job: QLoRAJob | QLoRASweep
    trace: str
    """The traceback, for whoever maintains the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseUnreadable:
    """Let the object of a deleted job go that does not parse, once nothing of it runs."""

    namespace: str
    name: str
    uid: str


Command = (
    ReleaseUnreadable
    | ReportDefect
    | WriteStatus
    | WriteQueueStatus
    | WriteSweepStatus
    | CreateJob
    | CancelJob
    | FinishSweep
    | ReleaseSweep
    | EnsureStage
    | StopStage
    | DeleteStage
    | EnsureRun
    | FinishRun
    | PromoteVersion
    | SendNotification
    | ReleaseJob
    | DeleteJob
)
