"""Intents: starting an attempt at a stage, and asking one to stop.

Both only change the status. The stage outside follows in a later pass, from the stored status
(`core/job/stage_commands`).
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.api.job import Attempt, ClassChange, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.stage_name import StageKind, StageName
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import Finding, clip, plan_words
from orchestrator.core.job.stage_commands import job_store_uri
from orchestrator.core.job.state_machine import JobEvent
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Snapshot
from orchestrator.sizing.hardware import GIB

CLASS_CHANGES_KEPT = 16
_STARTED: Mapping[StageKind, JobEvent] = {
    "prepare": JobEvent.PREPARE_STARTED,
    "train": JobEvent.ADMITTED,
    "publish": JobEvent.PUBLISH_STARTED,
}


def start_cpu_stage(draft: Draft, stage: StageKind, snapshot: Snapshot) -> Draft:
    """Record an attempt at prepare or publish."""
    kind, reason = {
        "prepare": (ConditionType.PREPARED, Reason.PREPARING),
        "publish": (ConditionType.PUBLISHED, Reason.PUBLISHING),
    }[stage]
    draft, number = _numbered(draft, stage, snapshot)
    finding = Finding(kind=kind, status="False", reason=reason, message=f"{stage} attempt {number}")
    return _start(draft, Attempt(stage=stage, number=number, created_time=draft.now), snapshot, finding)


def admit(draft: Draft, estimate: Estimate, snapshot: Snapshot, avoid_nodes: tuple[str, ...] = ()) -> Draft:
    """Record an attempt at train on a GPU of the estimate's class, under its plan, and on none of some nodes."""
    draft, number = _numbered(draft, "train", snapshot)
    message = (
        f"{estimate.gpu_class}: needs {estimate.peak_bytes / GIB:.1f} of {estimate.usable_bytes / GIB:.1f} GiB "
        f"with {plan_words(estimate.plan)}"
    )
    changes = class_changes(draft.status, estimate.gpu_class)
    if changes != draft.status.class_changes and changes:
        message = f"{message}; {_changed(changes[-1])}"
    attempt = Attempt(
        stage="train",
        number=number,
        queue=draft.job.spec.queue,
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
    draft = _start(draft, attempt, snapshot, *findings, estimate=estimate, class_changes=changes)
    return draft.tell(Event(reason=Reason.ADMITTED, message=message))


def class_changes(status: QLoRAJobStatus, gpu_class: str) -> tuple[ClassChange, ...]:
    """Those that count once the job goes on there: a change before which no step became durable comes to nothing."""
    checkpoint = status.checkpoint
    if checkpoint is None:
        return ()
    known = tuple(change for change in status.class_changes if change.step < checkpoint.step)
    writer = next((a.gpu_class for a in status.attempts if a.number == checkpoint.attempt), None)
    before = writer or (status.estimate.gpu_class if status.estimate is not None else gpu_class)
    if before == gpu_class:
        return known
    return (*known, ClassChange(step=checkpoint.step, from_class=before, to_class=gpu_class))[-CLASS_CHANGES_KEPT:]


def _changed(change: ClassChange) -> str:
    return (
        f"goes on from step {change.step} there instead of on {change.from_class}, sized anew: not bit for bit what it "
        f"would have been on {change.from_class}"
    )


def request_stop(draft: Draft, reason: Reason, message: str, moves_to: str | None = None) -> Draft:
    """Record that the active attempt shall end; unchanged if it was asked before. A GPU of the class that it moves to
    is kept for it."""
    attempt = draft.attempt
    if attempt is None or attempt.stop_time is not None:
        return draft
    attempts = draft.change_attempt(stop_time=draft.now, stop_reason=reason, message=clip(message), moves_to=moves_to)
    told = Event(reason=reason, message=message, warning=reason is Reason.NO_PROGRESS)
    if attempt.stage != "train":
        return draft.amend(attempts=attempts).tell(told)
    finding = Finding(kind=ConditionType.EVICTED, status="True", reason=reason, message=message)
    return draft.move(JobEvent.TRAIN_STOP_REQUESTED, finding, attempts=attempts).tell(told)


def _numbered(draft: Draft, stage: StageKind, snapshot: Snapshot) -> tuple[Draft, int]:
    """The first number after the last attempt's under whose name nothing stands, and the draft that tells of others."""
    namespace, job = draft.job.metadata.namespace, draft.job.metadata.name
    first = number = draft.status.attempts_total + 1
    while _is_taken(f"{namespace}/{StageName(job=job, stage=stage, attempt=number)}", snapshot):
        number += 1
    if number == first:
        return draft, number
    message = (
        f"something that is not this job's has the name of {stage} attempt {first} in namespace {namespace}: the job "
        f"goes on with attempt {number}; see who may create pods there"
    )
    return draft.tell(Event(reason=Reason.NAME_TAKEN, message=message, warning=True)), number


def _is_taken(key: str, snapshot: Snapshot) -> bool:
    return key in snapshot.stages or key in snapshot.taken_names


def _start(draft: Draft, attempt: Attempt, snapshot: Snapshot, *findings: Finding, **changes: object) -> Draft:
    """Append the attempt; the oldest ones beyond the history's bound live on in the counters alone."""
    kept = (*draft.status.attempts, attempt)[-snapshot.policy.history_limit :]
    return draft.move(
        _STARTED[attempt.stage],
        *findings,
        attempts=kept,
        attempts_total=attempt.number,
        store_uri=job_store_uri(draft.job, snapshot.policy),
        retry_after=None,
        **changes,
    )
