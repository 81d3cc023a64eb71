"""What follows from an attempt's end: go on, resume, retry, wait, escalate, or fail.

`Reason.recovery` says which it is, and `core/job/setbacks` how often and for how long. Only failures count against
spec.backoffLimit. A publish that finds MLflow away is retried for as long as it takes, because the adapter is safe in
the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from orchestrator.api.job import Attempt, MlflowStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import VOLUNTARY_EVICTIONS, ConditionType, Reason, Recovery, Refusal
from orchestrator.api.results import PrepareResult, ProgressReport, PublishResult, TrainResult
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import Finding, clip, plan_words
from orchestrator.core.job.eviction_budget import spend_eviction
from orchestrator.core.job.outages import hits_others
from orchestrator.core.job.progress import record_checkpoint
from orchestrator.core.job.promotion import event_of, finding_of
from orchestrator.core.job.setbacks import (
    WAITED_FOR_EVER,
    backoff_seconds,
    counted_failures,
    host_memory_factor,
    outage_limit_seconds,
    outage_pause_seconds,
    setback,
    with_setback,
)
from orchestrator.core.job.state_machine import JobEvent
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.job.verdict import Verdict
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.sizing.margins import DEFAULT, learned
from orchestrator.sizing.plan_search import escalate
from orchestrator.sizing.step_time import Work

_ENDED: Mapping[str, JobEvent] = {
    "prepare": JobEvent.PREPARE_ENDED,
    "train": JobEvent.TRAIN_ENDED,
    "publish": JobEvent.PUBLISH_ENDED,
}
_PROGRESS_CONDITION: Mapping[str, ConditionType] = {
    "prepare": ConditionType.PREPARED,
    "train": ConditionType.RUNNING,
    "publish": ConditionType.PUBLISHED,
}


def end_attempt(draft: Draft, verdict: Verdict, snapshot: Snapshot) -> Draft:
    """Record the end of the active attempt and do about it what its reason asks for."""
    if (train := verdict.result.train) is not None and train.checkpoint_uri is not None:
        draft = record_checkpoint(draft, step=train.step, time=verdict.finish_time, policy=snapshot.policy)
    if verdict.reason is Reason.SUCCEEDED:
        return _go_on(draft, verdict)
    attempt = draft.attempt
    assert attempt is not None, "only an active attempt can end"
    draft = _back(draft, attempt, verdict)
    if verdict.reason.recovery is Recovery.FAIL:
        return fail(draft, verdict.reason, verdict.message)
    return _AGAIN[verdict.reason.recovery](draft, attempt, verdict, snapshot)


def fail(draft: Draft, reason: Reason, message: str) -> Draft:
    """The job ends without success; no stage of it is active.

    Finished is true of every end, as of a Job's or of Kueue's Workload; its reason says which end it was.
    """
    event = JobEvent.CANCELLED if reason is Reason.CANCELLED else JobEvent.FAILED
    finding = Finding(kind=ConditionType.FINISHED, status="True", reason=reason, message=message)
    draft = draft.move(event, finding, finish_time=draft.now, retry_after=None)
    return draft.tell(Event(reason=reason, message=message, warning=reason is not Reason.CANCELLED))


def give_up_attempt(draft: Draft, reason: Reason, message: str) -> Draft:
    """The active attempt ends unjudged, and nothing follows from it."""
    attempt = draft.attempt
    assert attempt is not None, "only an active attempt can be given up"
    ended = draft.change_attempt(finish_time=draft.now, reason=reason, message=clip(message))
    return draft.move(_ENDED[attempt.stage], attempts=ended)


# --- an attempt that did what it should -----------------------------------------------------------------------


def _go_on(draft: Draft, verdict: Verdict) -> Draft:
    result = verdict.result
    if result.prepare is not None:
        return _prepared(draft, verdict, result.prepare)
    if result.train is not None:
        return _trained(draft, verdict, result.train)
    assert result.publish is not None, "success comes with a result"
    return _published(draft, verdict, result.publish)


def _prepared(draft: Draft, verdict: Verdict, result: PrepareResult) -> Draft:
    message = (
        f"{result.train_records} records in {result.train_sequences} sequences of {result.train_tokens} tokens; "
        f"{result.steps} steps"
    ) + "".join(f"; warning: {warning}" for warning in result.warnings)
    finding = Finding(kind=ConditionType.PREPARED, status="True", reason=Reason.PREPARED, message=message)
    draft = draft.move(
        JobEvent.PREPARED, finding, prepared=result, retry_after=None, setbacks=(), **_books(draft, verdict)
    )
    return draft.tell(Event(reason=Reason.PREPARED, message=message))


def _trained(draft: Draft, verdict: Verdict, result: TrainResult) -> Draft:
    message = f"trained {result.step} steps; the adapter is at {result.adapter_uri}"
    released = "training is done, the GPU is free"
    draft = draft.move(
        JobEvent.TRAINED,
        Finding(kind=ConditionType.ADMITTED, status="False", reason=Reason.TRAINED, message=released),
        Finding(kind=ConditionType.RUNNING, status="False", reason=Reason.TRAINED, message=message),
        adapter_uri=result.adapter_uri,
        adapter_digest=result.adapter_digest,
        progress=_last_progress(draft, verdict, result),
        retry_after=None,
        setbacks=(),
        **_books(draft, verdict),
    )
    return draft.tell(Event(reason=Reason.TRAINED, message=message))


def _last_progress(draft: Draft, verdict: Verdict, result: TrainResult) -> ProgressReport:
    """The result as a last report, so that the status shows the final losses even if no report came through."""
    known = draft.status.progress
    return ProgressReport(
        stage="train",
        step=result.step,
        steps=draft.status.prepared.steps if draft.status.prepared else result.step,
        detail="training is done",
        loss=result.train_loss,
        eval_loss=result.eval_loss,
        skipped_steps=known.skipped_steps if known is not None else None,
        rollbacks=known.rollbacks if known is not None else None,
        checkpoint_step=result.step if result.checkpoint_uri else None,
        checkpoint_uri=result.checkpoint_uri,
        time=verdict.finish_time,
    )


def _published(draft: Draft, verdict: Verdict, result: PublishResult) -> Draft:
    where = f"{result.registered_model} version {result.model_version}"
    known = draft.status.mlflow
    mlflow: MlflowStatus = known.model_copy(
        update={
            "run_id": result.run_id or known.run_id,
            "registered_model": result.registered_model,
            "model_version": result.model_version,
        }
    )
    promotion = result.promotion
    draft = draft.move(
        JobEvent.PUBLISHED,
        Finding(kind=ConditionType.PUBLISHED, status="True", reason=Reason.PUBLISHED, message=where),
        *(() if promotion is None else (finding_of(promotion),)),
        Finding(kind=ConditionType.FINISHED, status="True", reason=Reason.SUCCEEDED, message=f"published as {where}"),
        mlflow=mlflow,
        finish_time=draft.now,
        retry_after=None,
        **_books(draft, verdict),
    )
    draft = draft.tell(Event(reason=Reason.SUCCEEDED, message=f"published as {where}"))
    if promotion is None:
        return draft
    return draft.tell(event_of(promotion))


# --- an attempt that did not ----------------------------------------------------------------------------------


def _back(draft: Draft, attempt: Attempt, verdict: Verdict) -> Draft:
    """Puts the job back to where it was before the attempt."""
    findings = [
        Finding(kind=_PROGRESS_CONDITION[attempt.stage], status="False", reason=verdict.reason, message=verdict.message)
    ]
    if attempt.stage == "train":
        findings.append(
            Finding(kind=ConditionType.ADMITTED, status="False", reason=verdict.reason, message=verdict.message)
        )
        if verdict.reason.recovery is Recovery.RESUME:
            findings.append(
                Finding(kind=ConditionType.EVICTED, status="True", reason=verdict.reason, message=verdict.message)
            )
    return draft.move(_ENDED[attempt.stage], *findings, **_books(draft, verdict))


def _resume(draft: Draft, attempt: Attempt, verdict: Verdict, snapshot: Snapshot) -> Draft:
    """Again, at no cost to the job.

    Attempts start at least the base backoff apart, so a place where stages vanish at once is not hammered. A stop
    that we asked for cannot repeat itself like that and waits for nothing.
    """
    evictions = dict(draft.status.evictions)
    evictions[verdict.reason.value] = evictions.get(verdict.reason.value, 0) + 1
    asked = attempt.stop_reason is verdict.reason
    apart = attempt.created_time + timedelta(seconds=snapshot.policy.backoff_base_seconds)
    draft = draft.amend(evictions=evictions, retry_after=apart if not asked and apart > draft.now else None)
    if verdict.reason in VOLUNTARY_EVICTIONS:
        draft = spend_eviction(draft, attempt.stop_time or draft.now, snapshot.policy)
    return draft.tell(Event(reason=verdict.reason, message=verdict.message))


def _retry(draft: Draft, _attempt: Attempt, verdict: Verdict, snapshot: Snapshot) -> Draft:
    """Again after a backoff, as long as failures remain."""
    draft = _failed(draft, verdict).tell(_warning(verdict))
    failures = counted_failures(draft.status, verdict.reason)
    if failures > draft.job.spec.backoff_limit:
        return _give_up(draft, verdict, failures)
    return draft.amend(retry_after=_after(draft.now, backoff_seconds(snapshot.policy, failures)))


def _wait(draft: Draft, attempt: Attempt, verdict: Verdict, snapshot: Snapshot) -> Draft:
    """Again after a pause, as long as the surroundings may take; no GPU is held meanwhile."""
    policy, reason = snapshot.policy, verdict.reason
    known = setback(draft.status, reason)
    count = known.count + 1 if known is not None else 1
    pause = outage_pause_seconds(policy, count, draft.job.metadata.uid, attempt.number)
    tried = min(max(0.0, (draft.now - attempt.created_time).total_seconds()), policy.backoff_max_seconds)
    is_free = attempt.stage == "publish" or reason in WAITED_FOR_EVER
    is_free = is_free or hits_others(draft.job, attempt, reason, snapshot)
    spent = with_setback(draft.status, reason, 0.0 if is_free else tried + pause)
    draft = draft.amend(setbacks=spent, retry_after=_after(draft.now, pause)).tell(_warning(verdict))
    now_known, limit = setback(draft.status, reason), outage_limit_seconds(draft.job, policy)
    if now_known is None or now_known.seconds <= limit:
        return draft
    message = (
        f"{reason.value} for {now_known.count} attempts and longer than outageLimitSeconds {limit:.0f}, without a new "
        f"checkpoint; the last one: {verdict.message}"
    )
    return fail(draft, Reason.OUTAGE_LIMIT_EXCEEDED, message)


def _escalate(draft: Draft, attempt: Attempt, verdict: Verdict, snapshot: Snapshot) -> Draft:
    """Again with more memory, as long as failures remain: of the host, under a fallback plan, or on a larger class."""
    if verdict.reason is Reason.HOST_OUT_OF_MEMORY:
        return _escalate_host_memory(draft, verdict, snapshot.policy)
    failed, prepared = draft.status.estimate, draft.status.prepared
    if attempt.stage != "train" or failed is None or prepared is None:
        return _retry(draft, attempt, verdict, snapshot)
    draft = _failed(draft, verdict).tell(_warning(verdict))
    failures = counted_failures(draft.status, verdict.reason)
    if failures > draft.job.spec.backoff_limit:
        return _give_up(draft, verdict, failures)
    margins = learned(snapshot.jobs).get((draft.job.metadata.namespace, prepared.model.architecture), DEFAULT)
    spec = draft.job.spec.settled(prepared.start)
    chosen = escalate(spec, prepared.model, failed, snapshot.gpu_classes, work=Work.of(prepared), margins=margins)
    if isinstance(chosen, Refusal):
        return fail(draft, chosen.reason, chosen.message)
    draft = draft.amend(estimate=chosen, step_ups=draft.status.step_ups + 1)
    return draft.tell(Event(reason=Reason.OUT_OF_MEMORY, message=_escalated(failed, chosen)))


def _escalate_host_memory(draft: Draft, verdict: Verdict, policy: Policy) -> Draft:
    """Again with twice the host memory, within the bound that a setting names."""
    escalations = draft.status.host_memory_escalations
    before, after = host_memory_factor(escalations, policy), host_memory_factor(escalations + 1, policy)
    draft = _failed(draft, verdict).tell(_warning(verdict))
    if after <= before:
        message = (
            f"{verdict.message}; that was {before:g} times what such a stage is given at first, and no more is allowed:"
            " raise QLORA_HOST_MEMORY_FACTOR_MAX, or QLORA_TRAIN_MEMORY_BYTES for all stages"
        )
        return fail(draft, Reason.HOST_OUT_OF_MEMORY, message)
    message = f"out of host memory; the next attempt gets {after:g} times what the first one got"
    draft = draft.amend(host_memory_escalations=escalations + 1, retry_after=None)
    return draft.tell(Event(reason=Reason.HOST_OUT_OF_MEMORY, message=message))


def _failed(draft: Draft, verdict: Verdict) -> Draft:
    """The draft with one more failure on its books, unless the first one is free."""
    spent = draft.amend(setbacks=with_setback(draft.status, verdict.reason, 0.0))
    is_counted = counted_failures(spent.status, verdict.reason) > 0
    return spent.amend(failures_total=draft.status.failures_total + 1) if is_counted else spent


def _escalated(failed: Estimate, chosen: Estimate) -> str:
    return f"out of memory under {_in_words(failed)}; resuming under {_in_words(chosen)}"


def _in_words(chosen: Estimate) -> str:
    return f"{plan_words(chosen.plan)}, on {chosen.gpu_class}"


_AGAIN: Mapping[Recovery, Callable[[Draft, Attempt, Verdict, Snapshot], Draft]] = {
    Recovery.RESUME: _resume,
    Recovery.RETRY: _retry,
    Recovery.WAIT: _wait,
    Recovery.ESCALATE: _escalate,
    # A reason that is no end at all can only come from a stage that mixes up its words; trying again is safe.
    Recovery.NONE: _retry,
}


def _give_up(draft: Draft, verdict: Verdict, failures: int) -> Draft:
    limit = draft.job.spec.backoff_limit
    message = f"{failures} failed attempts are more than backoffLimit {limit}; the last one: {verdict.message}"
    return fail(draft, Reason.BACKOFF_LIMIT_EXCEEDED, message)


def _warning(verdict: Verdict) -> Event:
    return Event(reason=verdict.reason, message=verdict.message, warning=True)


def _after(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=seconds)


# --- what every end is booked as -------------------------------------------------------------------------------


def _books(draft: Draft, verdict: Verdict) -> dict[str, object]:
    """The status changes that any end brings: the attempt closed, its seconds counted."""
    attempt = draft.attempt
    assert attempt is not None, "only an active attempt can end"
    on_gpu = verdict.seconds if attempt.stage == "train" else 0.0
    train = verdict.result.train
    return {
        "attempts": draft.change_attempt(
            start_time=verdict.start_time,
            finish_time=verdict.finish_time,
            exit_code=verdict.exit_code,
            reason=verdict.reason,
            message=clip(verdict.message),
            node=verdict.node,
            measured_bytes=train.peak_allocated_bytes if train is not None else None,
            versions=train.versions if train is not None else None,
        ),
        "active_seconds": draft.status.active_seconds + verdict.seconds,
        "gpu_seconds": draft.status.gpu_seconds + on_gpu,
    }
