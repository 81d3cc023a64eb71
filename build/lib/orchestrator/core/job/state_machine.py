"""The job's state machine, as data.

A job has no phase field: its state is derived from its status (`state_of`). Each event that moves a job is named here,
and `TABLE` says from which state to which. `core/job/status_draft` puts every status change through `next_state` and
compares the outcome with the derived state, so a change that the table does not know cannot be emitted. The diagram in
the documentation is `mermaid()`.

Terminal states have an empty row. An illegal event raises `IllegalTransitionError`; that is a defect of this program,
never of the world.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from orchestrator.api.job import QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason


class JobState(StrEnum):
    """Where a job is on its way from spec to registry."""

    NEW = "New"
    """Nothing is known of its model and data yet, and no stage exists."""
    PREPARING = "Preparing"
    QUEUED = "Queued"
    """Prepared, and waiting for a GPU."""
    STARTING = "Starting"
    """A GPU is given to it; its train stage has not been seen running."""
    TRAINING = "Training"
    STOPPING = "Stopping"
    """The train stage was asked to stop; its GPU is still taken."""
    TRAINED = "Trained"
    """The adapter is in the store; no GPU is held any more."""
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class JobEvent(StrEnum):
    """What can happen to a job."""

    PREPARE_STARTED = "PrepareStarted"
    PREPARE_ENDED = "PrepareEnded"
    """Without a result."""
    PREPARED = "Prepared"
    ADMITTED = "Admitted"
    TRAIN_STARTED = "TrainStarted"
    TRAIN_STOP_REQUESTED = "TrainStopRequested"
    TRAIN_ENDED = "TrainEnded"
    """Before training was complete."""
    TRAINED = "Trained"
    PUBLISH_STARTED = "PublishStarted"
    PUBLISH_ENDED = "PublishEnded"
    """Without a result."""
    PUBLISHED = "Published"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


_S, _E = JobState, JobEvent
_END: Mapping[JobEvent, JobState] = {_E.FAILED: _S.FAILED, _E.CANCELLED: _S.CANCELLED}

TABLE: Mapping[JobState, Mapping[JobEvent, JobState]] = MappingProxyType(
    {
        _S.NEW: {_E.PREPARE_STARTED: _S.PREPARING, **_END},
        _S.PREPARING: {_E.PREPARED: _S.QUEUED, _E.PREPARE_ENDED: _S.NEW},
        _S.QUEUED: {_E.ADMITTED: _S.STARTING, **_END},
        _S.STARTING: {
            _E.TRAIN_STARTED: _S.TRAINING,
            _E.TRAIN_STOP_REQUESTED: _S.STOPPING,
            _E.TRAIN_ENDED: _S.QUEUED,
            _E.TRAINED: _S.TRAINED,
        },
        _S.TRAINING: {
            _E.TRAIN_STOP_REQUESTED: _S.STOPPING,
            _E.TRAIN_ENDED: _S.QUEUED,
            _E.TRAINED: _S.TRAINED,
        },
        _S.STOPPING: {_E.TRAIN_ENDED: _S.QUEUED, _E.TRAINED: _S.TRAINED},
        _S.TRAINED: {_E.PUBLISH_STARTED: _S.PUBLISHING, **_END},
        _S.PUBLISHING: {_E.PUBLISHED: _S.SUCCEEDED, _E.PUBLISH_ENDED: _S.TRAINED},
        _S.SUCCEEDED: {},
        _S.FAILED: {},
        _S.CANCELLED: {},
    }
)

_ENDS: Mapping[Reason | None, JobState] = {Reason.SUCCEEDED: _S.SUCCEEDED, Reason.CANCELLED: _S.CANCELLED}
"""Reason of the condition Finished -> the end that it stands for; every other reason is a failure."""
TERMINAL_STATES: frozenset[JobState] = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
LAST_RUN_STATUS: Mapping[JobState, Literal["FINISHED", "FAILED", "KILLED"]] = {
    _S.SUCCEEDED: "FINISHED",
    _S.FAILED: "FAILED",
    _S.CANCELLED: "KILLED",
}
"""What a job's MLflow run ends as."""
GPU_STATES: frozenset[JobState] = frozenset({_S.STARTING, _S.TRAINING, _S.STOPPING})
"""Where a job has a GPU."""


class IllegalTransitionError(Exception):
    """An event that the state machine does not allow where the job is."""

    def __init__(self, job: str, state: JobState, event: JobEvent | None, detail: str = "") -> None:
        self.job, self.state, self.event = job, state, event
        what = f"{event.value} is not allowed" if event else "a change without an event is not allowed"
        super().__init__(f"job {job}: {what} in state {state.value}{': ' + detail if detail else ''}")


def next_state(job: str, state: JobState, event: JobEvent) -> JobState:
    """The state after the event; raises IllegalTransitionError where the table has none."""
    target = TABLE[state].get(event)
    if target is None:
        raise IllegalTransitionError(job, state, event)
    return target


def state_of(status: QLoRAJobStatus) -> JobState:
    """The state that a status describes; every status describes exactly one."""
    if status.finish_time is not None:
        return _terminal_state(status)
    attempt = status.active_attempt
    if attempt is None:
        return _idle_state(status)
    if attempt.stage == "prepare":
        return JobState.PREPARING
    if attempt.stage == "publish":
        return JobState.PUBLISHING
    if attempt.stop_time is not None:
        return JobState.STOPPING
    return JobState.STARTING if attempt.start_time is None else JobState.TRAINING


def _terminal_state(status: QLoRAJobStatus) -> JobState:
    finished = status.condition(ConditionType.FINISHED)
    reason = finished.reason if finished is not None else None
    return _ENDS.get(reason, JobState.FAILED)


def _idle_state(status: QLoRAJobStatus) -> JobState:
    if status.adapter_uri is not None:
        return JobState.TRAINED
    return JobState.NEW if status.prepared is None else JobState.QUEUED


def mermaid() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.NEW.value}"]
    for state, row in TABLE.items():
        lines += [f"    {state.value} --> {target.value}: {event.value}" for event, target in row.items()]
    lines += [f"    {state.value} --> [*]" for state in TABLE if state in TERMINAL_STATES]
    return "\n".join(lines) + "\n"
