"""Intents: starting an attempt at a stage, and asking one to stop.

Both only change the status. The stage outside follows in a later pass, from the stored status
(`core/job/stage_commands`).
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.api.job import Attempt
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.stage_name import StageKind
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import Finding, clip, plan_words
from orchestrator.core.job.state_machine import JobEvent
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.hardware import GIB

_STARTED: Mapping[StageKind, JobEvent] = {
    "prepare": JobEvent.PREPARE_STARTED,
    "train": JobEvent.ADMITTED,
    "publish": JobEvent.PUBLISH_STARTED,
}


def start_cpu_stage(draft: Draft, stage: StageKind, policy: Policy) -> Draft:
    """Record an attempt at prepare or publish."""
    kind, reason = {
        "prepare": (ConditionType.PREPARED, Reason.PREPARING),
        "publish": (ConditionType.PUBLISHED, Reason.PUBLISHING),
    }[stage]
    finding = Finding(kind=kind, status="False", reason=reason, message=f"{stage} attempt {_next_number(draft)}")
    return _start(draft, Attempt(stage=stage, number=_next_number(draft), created_time=draft.now), policy, finding)


def admit(draft: Draft, estimate: Estimate, policy: Policy, avoid_nodes: tuple[str, ...] = ()) -> Draft:
    """Record an attempt at train on a GPU of the estimate's class, under its plan, and on none of some nodes."""
    message = (
        f"{estimate.gpu_class}: needs {estimate.peak_bytes / GIB:.1f} of {estimate.usable_bytes / GIB:.1f} GiB "
        f"with {plan_words(estimate.plan)}"
    )
    attempt = Attempt(
        stage="train",
        number=_next_number(draft),
        gpu_class=estimate.gpu_class,
        plan=estimate.plan,
        predicted_bytes=estimate.predicted_bytes,
        created_time=draft.now,
        avoid_nodes=avoid_nodes,
    )
    starting = f"train attempt {attempt.number} is being started on {estimate.gpu_class}"
    findings = [
        Finding(kind=ConditionType.ADMITTED, status="True", reason=Reason.ADMITTED, message=message),
        Finding(kind=ConditionType.RUNNING, status="False", reason=Reason.STARTING, message=starting),
        Finding(kind=ConditionType.EVICTED, status="False", reason=Reason.NOT_EVICTED),
    ]
    if draft.status.checkpoint is None:
        findings.append(Finding(kind=ConditionType.CHECKPOINTED, status="False", reason=Reason.NO_CHECKPOINT))
    draft = _start(draft, attempt, policy, *findings, estimate=estimate)
    return draft.tell(Event(reason=Reason.ADMITTED, message=message))


def request_stop(draft: Draft, reason: Reason, message: str) -> Draft:
    """Record that the active attempt shall end; unchanged if it was asked before."""
    attempt = draft.attempt
    if attempt is None or attempt.stop_time is not None:
        return draft
    attempts = draft.change_attempt(stop_time=draft.now, stop_reason=reason, message=clip(message))
    told = Event(reason=reason, message=message, warning=reason is Reason.NO_PROGRESS)
    if attempt.stage != "train":
        return draft.amend(attempts=attempts).tell(told)
    finding = Finding(kind=ConditionType.EVICTED, status="True", reason=reason, message=message)
    return draft.move(JobEvent.TRAIN_STOP_REQUESTED, finding, attempts=attempts).tell(told)


def _next_number(draft: Draft) -> int:
    return draft.status.attempts_total + 1


def _start(draft: Draft, attempt: Attempt, policy: Policy, *findings: Finding, **changes: object) -> Draft:
    """Append the attempt; the oldest ones beyond the history's bound live on in the counters alone."""
    kept = (*draft.status.attempts, attempt)[-policy.history_limit :]
    return draft.move(
        _STARTED[attempt.stage],
        *findings,
        attempts=kept,
        attempts_total=attempt.number,
        retry_after=None,
        **changes,
    )
