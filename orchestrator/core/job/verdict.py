"""How an attempt ended: the verdict on a stage that exited, vanished, or never came to be.

The exit code is the stage's own verdict; what we asked for and what the platform did explain a stop that the stage did
not choose. What follows from a verdict is in `core/job/recovery`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from orchestrator.api.job import Attempt
from orchestrator.api.reasons import Reason, exit_reason
from orchestrator.api.results import StageResult
from orchestrator.api.stage_name import StageKind
from orchestrator.core.job.progress import between
from orchestrator.core.snapshot import StageFact

STOPPED = frozenset({Reason.PREEMPTED, Reason.KILLED})
"""How a stage ends when it is asked to stop: with a checkpoint in time, or killed after the grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An attempt's end. `reason` is SUCCEEDED only where the result of its stage is there."""

    reason: Reason
    message: str
    start_time: datetime | None
    finish_time: datetime
    exit_code: int | None
    result: StageResult
    node: str | None = None

    @property
    def seconds(self) -> float:
        """How long the stage ran."""
        return 0.0 if self.start_time is None else max(0.0, (self.finish_time - self.start_time).total_seconds())


def judge(attempt: Attempt, fact: StageFact | None, now: datetime) -> Verdict:
    """The end of an attempt whose stage exited or, where there is no fact, does not exist any more."""
    result = (fact.result if fact else None) or StageResult()
    exit_code = fact.exit_code if fact else None
    reason = _reason(attempt, fact, result)
    node = (fact.node if fact else "") or attempt.node
    message = _message(attempt, exit_code, reason, result)
    started = attempt.start_time or _start_time(attempt, fact, now)
    return Verdict(
        reason=reason,
        message=f"{message} (on node {node})" if reason is Reason.BROKEN_GPU and node else message,
        start_time=started,
        finish_time=_finish_time(started or attempt.created_time, fact, now),
        exit_code=exit_code,
        result=result,
        node=node,
    )


def _start_time(attempt: Attempt, fact: StageFact | None, now: datetime) -> datetime | None:
    """When it started, by a machine's clock that may be wrong: not before it was made, and not after now."""
    told = fact.start_time if fact else None
    return between(attempt.created_time, told, now) if told is not None else None


def _finish_time(started: datetime, fact: StageFact | None, now: datetime) -> datetime:
    """When it ended; a time that cannot be is somebody's wrong clock, and it was just now."""
    told = fact.finish_time if fact else None
    return told if told is not None and started <= told <= now else max(started, now)


def _reason(attempt: Attempt, fact: StageFact | None, result: StageResult) -> Reason:
    """Success first, then our own request, then the platform's doing, then the stage's verdict."""
    disruption = fact.disruption if fact else None
    if fact is None or fact.exit_code is None:
        return attempt.stop_reason or disruption or Reason.LOST
    claimed = exit_reason(fact.exit_code)
    if claimed is Reason.SUCCEEDED:
        return Reason.SUCCEEDED if _has_result(attempt.stage, result) else Reason.INTERNAL_ERROR
    if claimed in STOPPED and attempt.stop_reason is not None:
        return attempt.stop_reason
    if disruption is not None:
        return disruption
    return Reason.DISRUPTED if claimed is Reason.PREEMPTED else claimed


def _has_result(stage: StageKind, result: StageResult) -> bool:
    """Whether a stage that claims success says what came of it."""
    if stage == "prepare":
        return result.prepare is not None
    if stage == "publish":
        return result.publish is not None
    return result.train is not None and result.train.complete and result.train.adapter_uri is not None


def _message(attempt: Attempt, exit_code: int | None, reason: Reason, result: StageResult) -> str:
    name = f"{attempt.stage} attempt {attempt.number}"
    if reason is Reason.SUCCEEDED:
        return f"{name} succeeded"
    if result.failure is not None and attempt.stop_reason is not reason:
        return result.failure.message
    if attempt.stop_reason is reason:
        unseen = f"; {result.failure.message}" if exit_code is None and result.failure is not None else ""
        return f"{name} stopped: {attempt.message or reason.value}{unseen}"
    if exit_code is None:
        return f"{name} vanished before anyone saw its end: {reason.value}"
    if exit_code == 0:
        return f"{name} exited with code 0 but without a result; see its logs"
    return f"{name} exited with code {exit_code}: {reason.value}; see its logs"
