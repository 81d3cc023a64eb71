"""How long a job that has a GPU will still have it: by what its trainer said last, or else by its plan."""

from __future__ import annotations

from datetime import datetime

from orchestrator.api.job import QLoRAJobStatus
from orchestrator.core.snapshot import Policy

MOST_SPEEDUP = 4.0
"""No job is so much faster than its plan."""
MOST_SECONDS = 366 * 86_400.0
"""Nobody knows what comes in a year: whoever says so is not believed, and times stay within what a date can hold."""


def remaining_seconds(status: QLoRAJobStatus, policy: Policy, now: datetime) -> float | None:
    """Until a job that has a GPU makes its last step, below zero where it should have; None where nobody knows."""
    told = _by_its_trainer(status, now)
    if told is not None:
        return _believed(told)
    planned, before = _by_the_plan(status, policy, now), status.progress
    if planned is not None or before is None:
        return planned
    return _after_start(before.eta_seconds, status, policy, now)  # what an attempt before this one said


def surely_remaining_seconds(status: QLoRAJobStatus, policy: Policy, now: datetime) -> float | None:
    """The same for whoever is to wait for that: None where its trainer has not said so, who is not believed far below
    the plan."""
    told, planned = _by_its_trainer(status, now), _by_the_plan(status, policy, now)
    return told if told is None or planned is None else max(told, planned / MOST_SPEEDUP)


def _by_its_trainer(status: QLoRAJobStatus, now: datetime) -> float | None:
    """What the active attempt's trainer said last, less what has passed since it was heard."""
    progress, attempt = status.progress, status.active_attempt
    heard = attempt.progress_time if attempt is not None else None
    told = progress.eta_seconds if progress is not None else None
    return None if told is None or heard is None else told - (now - heard).total_seconds()


def _by_the_plan(status: QLoRAJobStatus, policy: Policy, now: datetime) -> float | None:
    return _after_start(_planned_seconds(status), status, policy, now)


def _after_start(work: float | None, status: QLoRAJobStatus, policy: Policy, now: datetime) -> float | None:
    """What is left of a stage that had so much to do when it began, or would begin now."""
    attempt = status.active_attempt
    if work is None:
        return None
    began = attempt.start_time if attempt is not None and attempt.start_time is not None else now
    return _believed(policy.restart_cost_seconds + work - (now - began).total_seconds())


def _planned_seconds(status: QLoRAJobStatus) -> float | None:
    """What the attempt had to do when it began, by the plan; None on a card whose speed is not known."""
    estimate = status.estimate
    if estimate is None or estimate.step_seconds is None:
        return None
    checkpoint, attempt = status.checkpoint, status.active_attempt
    before = checkpoint is not None and (attempt is None or checkpoint.attempt != attempt.number)
    durable = checkpoint.step if checkpoint is not None and before else 0
    return estimate.step_seconds * max(0, estimate.steps - durable) + (estimate.answering_seconds or 0)


def _believed(seconds: float) -> float | None:
    """None for a time that no job takes."""
    return seconds if abs(seconds) <= MOST_SECONDS else None
