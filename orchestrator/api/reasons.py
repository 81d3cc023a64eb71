"""Why things are as they are: condition types, reasons, exit codes, and what each of them means.

Enums own their meaning: whoever holds a reason asks it whether a retry helps, instead of keeping a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ConditionType(StrEnum):
    """The conditions of a QLoRAJob, in the order in which they usually become true."""

    PREPARED = "Prepared"
    ADMITTED = "Admitted"
    RUNNING = "Running"
    CHECKPOINTED = "Checkpointed"
    EVICTED = "Evicted"
    PUBLISHED = "Published"
    PROMOTED = "Promoted"
    """Whether spec.tracking.promote has moved its alias to the job's version."""
    FINISHED = "Finished"
    """True of every end; the reason says whether it was success."""


class Recovery(StrEnum):
    """What the controller does about a stage that ended for a reason."""

    NONE = "none"
    """The stage did what it should."""
    RESUME = "resume"
    """Not the job's fault: back to the queue, resume from the checkpoint, no retry is counted."""
    RETRY = "retry"
    """Try again after a backoff; counts against spec.backoffLimit, by cause and since the last new checkpoint."""
    WAIT = "wait"
    """The surroundings failed: no GPU is held, and it is tried again with growing pauses within the outage limit."""
    ESCALATE = "escalate"
    """Resume with more memory: on a fallback plan of less, the next GPU class, or a higher limit of host memory."""
    FAIL = "fail"
    """Trying again gives the same answer: the job fails at once."""


class Reason(StrEnum):
    """Every reason that a condition, an event or an attempt may carry."""

    # progress
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    STARTING = "Starting"
    TRAINING = "Training"
    TRAINED = "Trained"
    PUBLISHING = "Publishing"
    PUBLISHED = "Published"
    PROMOTED = "Promoted"
    GATE_NOT_PASSED = "GateNotPassed"
    """Answers to held-out prompts are not as good as spec.tracking.promote asks."""
    HOLDER_NOT_COMPARED = "HolderNotCompared"
    """The version that has the alias did not answer, so nobody knows whether the adapter is better."""
    HOLDER_CHANGED = "HolderChanged"
    """Another version has the alias now than the one that the adapter was compared with."""
    AWAITING_APPROVAL = "AwaitingApproval"
    """The gate is passed, and spec.tracking.promote.approval is manual: `qlora promote` moves the alias."""
    PROMOTION_REFUSED = "PromotionRefused"
    """The registry does not have the job's version any more, or it is not the job's."""
    NOTIFICATION_UNDELIVERED = "NotificationUndelivered"
    """A webhook has not taken what it was to be told, and it is given up; the job goes on as it would."""
    CHECKPOINT_SAVED = "CheckpointSaved"
    NO_CHECKPOINT = "NoCheckpoint"
    CHECKPOINT_LATE = "CheckpointLate"
    """Checkpoints reach the store later than they may, or than a signal to stop leaves time for."""
    SUCCEEDED = "Succeeded"
    # waiting
    NOT_PREPARED = "NotPrepared"
    ADMITTED = "Admitted"
    WAITING_FOR_GPU = "WaitingForGpu"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    WAITING_FOR_PREEMPTION = "WaitingForPreemption"
    QUEUE_NOT_FOUND = "QueueNotFound"
    QUEUE_HELD = "QueueHeld"
    QUEUE_NOT_ALLOWED = "QueueNotAllowed"
    """The queue is not for jobs of this namespace."""
    PRIORITY_TOO_HIGH = "PriorityTooHigh"
    """Higher than the queue allows."""
    USER_LIMIT = "UserLimit"
    """The queue lets no more jobs of this user run, or wait."""
    BUDGET_SPENT = "BudgetSpent"
    """The queue has no more of its month's budget."""
    WAITING_IN_ORDER = "WaitingInOrder"
    """Its queue is StrictFIFO, and the job that is next waits."""
    BACKING_OFF = "BackingOff"
    OUTAGE = "Outage"
    """Many jobs fail for the same cause: it is waited for, and nobody's budget is spent."""
    TRACKING_UNAVAILABLE = "TrackingUnavailable"
    SUSPENDED = "Suspended"
    # eviction: why a running stage was asked to stop
    NOT_EVICTED = "NotEvicted"
    PREEMPTED = "Preempted"
    QUOTA_RECLAIMED = "QuotaReclaimed"
    TURN_ENDED = "TurnEnded"
    """Its queue gives turns (turnSeconds): its own is over, and an equal waited."""
    DEFRAGMENTED = "Defragmented"
    """It makes room on a large card for a job that fits no smaller one, and goes on on a smaller one that is free."""
    QUEUE_DRAINED = "QueueDrained"
    """The queue's stopPolicy is HoldAndDrain."""
    DISRUPTED = "Disrupted"
    """The platform takes the machine away, or somebody the stage."""
    UNSCHEDULABLE = "Unschedulable"
    """No machine took the stage in time."""
    NO_PROGRESS = "NoProgress"
    """The stage runs, and has made no step for much longer than its own steps take."""
    # ends of a stage that are not success
    USER_ERROR = "UserError"
    TRANSIENT_ERROR = "TransientError"
    CREDENTIALS_REFUSED = "CredentialsRefused"
    """The job's store, MLflow or where the model or data come from does not take the credentials of the stage, or no
    longer."""
    OUT_OF_MEMORY = "OutOfMemory"
    FENCED = "Fenced"
    DIVERGED = "Diverged"
    INTERNAL_ERROR = "InternalError"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    """The host's memory, not the card's."""
    START_FAILED = "StartFailed"
    """The stage's container did not start, or no stage came of an attempt in time."""
    ADMISSION_REFUSED = "AdmissionRefused"
    """The API server, or a webhook of its, refused the pod."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """The namespace's ResourceQuota has no room for the pod."""
    NAME_TAKEN = "NameTaken"
    """Something that the controller would not create stands under the name of the stage's pod."""
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    """The image cannot be pulled: it is missing, refused, or its registry is away."""
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    """A persistent volume claim is missing or not bound."""
    CONFIG_MISSING = "ConfigMissing"
    """A secret or config map that the container needs is missing."""
    INIT_FAILED = "InitFailed"
    """What has to run before the trainer does not."""
    BROKEN_GPU = "BrokenGpu"
    """The card, or its driver, failed: lost, busy, uncorrectable memory errors."""
    KILLED = "Killed"
    LOST = "Lost"
    # ends of a job that are not success
    DOES_NOT_FIT = "DoesNotFit"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    OUTAGE_LIMIT_EXCEEDED = "OutageLimitExceeded"
    """The surroundings failed for longer than the outage limit without any progress."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    TOO_MANY_FAILURES = "TooManyFailures"
    """More trials of a sweep have failed than its maxFailures allows."""
    NO_TRIAL_SUCCEEDED = "NoTrialSucceeded"
    """A sweep is over, and there is no best trial."""
    CANCELLED = "Cancelled"

    @property
    def recovery(self) -> Recovery:
        """What to do about a stage that ended for this reason."""
        return _RECOVERIES.get(self, Recovery.NONE)


VOLUNTARY_EVICTIONS = frozenset({Reason.PREEMPTED, Reason.QUOTA_RECLAIMED, Reason.TURN_ENDED, Reason.DEFRAGMENTED})
"""Those that the scheduler chooses for another job's sake: they spend a job's eviction budget."""

_RECOVERIES = {
    Reason.PREEMPTED: Recovery.RESUME,
    Reason.QUOTA_RECLAIMED: Recovery.RESUME,
    Reason.TURN_ENDED: Recovery.RESUME,
    Reason.DEFRAGMENTED: Recovery.RESUME,
    Reason.QUEUE_DRAINED: Recovery.RESUME,
    Reason.DISRUPTED: Recovery.RESUME,
    Reason.SUSPENDED: Recovery.RESUME,
    Reason.LOST: Recovery.RESUME,
    Reason.FENCED: Recovery.RESUME,
    Reason.UNSCHEDULABLE: Recovery.WAIT,
    Reason.TRANSIENT_ERROR: Recovery.WAIT,
    Reason.CREDENTIALS_REFUSED: Recovery.WAIT,
    Reason.START_FAILED: Recovery.WAIT,
    Reason.ADMISSION_REFUSED: Recovery.WAIT,
    Reason.QUOTA_EXCEEDED: Recovery.WAIT,
    Reason.NAME_TAKEN: Recovery.WAIT,
    Reason.IMAGE_UNAVAILABLE: Recovery.WAIT,
    Reason.VOLUME_UNAVAILABLE: Recovery.WAIT,
    Reason.CONFIG_MISSING: Recovery.WAIT,
    Reason.INIT_FAILED: Recovery.WAIT,
    Reason.BROKEN_GPU: Recovery.WAIT,
    Reason.INTERNAL_ERROR: Recovery.RETRY,
    Reason.KILLED: Recovery.RETRY,
    Reason.NO_PROGRESS: Recovery.RETRY,
    Reason.OUT_OF_MEMORY: Recovery.ESCALATE,
    Reason.HOST_OUT_OF_MEMORY: Recovery.ESCALATE,
    Reason.USER_ERROR: Recovery.FAIL,
    Reason.DIVERGED: Recovery.FAIL,
    Reason.DEADLINE_EXCEEDED: Recovery.FAIL,
    Reason.CANCELLED: Recovery.FAIL,
}


class ExitCode(IntEnum):
    """A stage's verdict on itself. Codes below 64 are left to Python, above 128 to signals."""

    OK = 0
    INTERNAL_ERROR = 1
    USER_ERROR = 80
    TRANSIENT_ERROR = 81
    OUT_OF_MEMORY = 82
    DIVERGED = 83
    FENCED = 84
    PREEMPTED = 85
    """Stopped on request; the termination message names the durable checkpoint."""
    BROKEN_GPU = 86
    CREDENTIALS_REFUSED = 87

    @property
    def reason(self) -> Reason:
        """The reason this code stands for; `OK` stands for success."""
        return _EXIT_REASONS[self]


_EXIT_REASONS = {
    ExitCode.OK: Reason.SUCCEEDED,
    ExitCode.INTERNAL_ERROR: Reason.INTERNAL_ERROR,
    ExitCode.USER_ERROR: Reason.USER_ERROR,
    ExitCode.TRANSIENT_ERROR: Reason.TRANSIENT_ERROR,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    ExitCode.DIVERGED: Reason.DIVERGED,
    ExitCode.FENCED: Reason.FENCED,
    ExitCode.PREEMPTED: Reason.PREEMPTED,
    ExitCode.BROKEN_GPU: Reason.BROKEN_GPU,
    ExitCode.CREDENTIALS_REFUSED: Reason.CREDENTIALS_REFUSED,
}


def exit_reason(exit_code: int) -> Reason:
    """The reason behind any exit code, signals included (128 + n, or -n as Python reports them)."""
    if exit_code in _KNOWN_EXIT_CODES:
        return ExitCode(exit_code).reason
    return Reason.KILLED if exit_code > 128 or exit_code < 0 else Reason.INTERNAL_ERROR


_KNOWN_EXIT_CODES = frozenset(int(code) for code in ExitCode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something was not done, in a sentence that says what would change it."""

    reason: Reason
    message: str
