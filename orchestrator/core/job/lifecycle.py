"""One job by itself: what happened to its stage, and what its user wants.

It looks at no other job, and starts no stage: that is decided for all jobs together (`core/scheduling/cycle`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from operator import itemgetter

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason, Recovery
from orchestrator.api.stage_name import STAGES_ON_GPU
from orchestrator.core.commands import Event
from orchestrator.core.job.addresses import refused_address
from orchestrator.core.job.attempts import request_stop
from orchestrator.core.job.conditions import Finding, is_said
from orchestrator.core.job.eviction_budget import with_eviction_budget
from orchestrator.core.job.finalizer import outstanding, owes_run_its_end
from orchestrator.core.job.notifications import note_deliveries
from orchestrator.core.job.progress import between, fold_progress, never_heard, stalled
from orchestrator.core.job.promotion import event_of, finding_of
from orchestrator.core.job.recovery import end_attempt, fail
from orchestrator.core.job.setbacks import (
    WAITED_FOR_EVER,
    counted_failures,
    is_paused,
    outage_limit_seconds,
    setback,
)
from orchestrator.core.job.stage_commands import claimant_of, stage_of
from orchestrator.core.job.state_machine import LAST_RUN_STATUS, TERMINAL_STATES, JobEvent, JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.job.verdict import judge
from orchestrator.core.job.webhook_urls import refused_notifications
from orchestrator.core.snapshot import Policy, Snapshot, StageFact, StagePhase

WAITING_CONDITION: Mapping[JobState, ConditionType] = {
    JobState.NEW: ConditionType.PREPARED,
    JobState.QUEUED: ConditionType.ADMITTED,
    JobState.TRAINED: ConditionType.PUBLISHED,
}
"""The condition that says what an idle job waits for."""
CLOCKED = ("created_time", "seen_time", "start_time", "progress_time", "stop_time", "finish_time")
"""An attempt's times by the controller's clock, from which durations are counted."""
_clocked_of = itemgetter(*CLOCKED)


def reconcile(opened: Draft, snapshot: Snapshot) -> Draft:
    """The job's draft, opened now, after the facts and the user's wishes."""
    draft = noted = _with_clock(_note_run(opened, snapshot), timedelta(seconds=snapshot.clock_step_seconds))
    draft = with_eviction_budget(_note_promotion(draft, snapshot), snapshot.policy)
    if (
        draft.job.metadata.deletion_timestamp is not None
        and draft.status.release_since is None
        and (owes_run_its_end(draft.job) or outstanding(draft.status))
    ):
        draft = draft.amend(release_since=draft.now)  # when it was deleted, another clock says
    draft = note_deliveries(draft, snapshot.deliveries.get(draft.job.metadata.uid, ()), snapshot.policy)
    if draft.state not in TERMINAL_STATES:
        draft = _observe(draft, snapshot)  # 1. what happened outside
    if draft.state not in TERMINAL_STATES:
        draft = _obey(draft)  # 2. what the user wants
    if draft.state is JobState.NEW:
        draft = _refuse_address(draft, snapshot.policy)  # before anything of the job's is read or written
    if draft.state in WAITING_CONDITION:
        draft = _hold(draft, snapshot.policy)  # 3. what of the job's own keeps it from going on
    # A run that comes while a job is prepared needs no write of its own: the end of that stage is the next one.
    return opened if draft is noted and draft.state is JobState.PREPARING else draft


def is_ready(draft: Draft, policy: Policy) -> bool:
    """Whether nothing of the job's own keeps its next stage from starting."""
    paused = is_paused(draft.status, draft.now, policy)
    return draft.state in WAITING_CONDITION and not draft.job.spec.suspend and not paused


def wait(draft: Draft, reason: Reason, message: str) -> Draft:
    """Say what an idle job waits for."""
    kind = WAITING_CONDITION[draft.state]
    if is_said(draft.status, kind, reason, message, draft.job.metadata.generation):
        return draft
    return draft.say(Finding(kind=kind, status="False", reason=reason, message=message))


def _with_clock(draft: Draft, step: timedelta) -> Draft:
    """The draft by a clock that was put: whatever durations are counted from is as long ago as before.

    A step that nobody noticed shows in a time that is still to come: that is now, and nothing waits for it.
    """
    status, now = draft.status, draft.now
    if not step and all(time is None or time <= now for time in _clocked(status)):
        return draft

    def put(time: datetime | None) -> datetime | None:
        return None if time is None else min(time + step, now)

    changes: dict[str, object] = {"finish_time": put(status.finish_time), "release_since": put(status.release_since)}
    changes["attempts"] = tuple(
        attempt.model_copy(update={name: put(getattr(attempt, name)) for name in CLOCKED})
        for attempt in status.attempts
    )
    if status.eviction_budget is not None:
        times = tuple(min(time + step, now) for time in status.eviction_budget.times)
        changes["eviction_budget"] = status.eviction_budget.model_copy(update={"times": times})
    if draft.state not in TERMINAL_STATES:
        changes["retry_after"] = None if status.retry_after is None else status.retry_after + step
    return draft.amend(**changes)


def _clocked(status: QLoRAJobStatus) -> Iterator[datetime | None]:
    """The latest of the times that durations are counted from, and others before them."""
    yield from (status.finish_time, status.release_since)
    if status.eviction_budget is not None and status.finish_time is None:
        yield from status.eviction_budget.times
    if status.attempts and status.finish_time is None:
        yield from _clocked_of(vars(status.attempts[-1]))


def _note_run(draft: Draft, snapshot: Snapshot) -> Draft:
    """The draft with the run that MLflow has for the job, which may have come when the job was over."""
    fact, known = snapshot.runs.get(draft.job.metadata.uid), draft.status.mlflow
    if fact is None or known.run_id is not None:
        return draft
    run_status = LAST_RUN_STATUS.get(draft.state, fact.mlflow.run_status)
    found = {"run_id": fact.mlflow.run_id, "experiment_id": fact.mlflow.experiment_id, "run_status": run_status}
    return draft.amend(mlflow=known.model_copy(update=found))


def _note_promotion(draft: Draft, snapshot: Snapshot) -> Draft:
    """The draft with what came of a request to promote the job; what is on record as promoted stays so."""
    fact = snapshot.runs.get(draft.job.metadata.uid)
    if fact is None or fact.promotion is None or draft.status.is_true(ConditionType.PROMOTED):
        return draft
    return draft.amend(finding_of(fact.promotion)).tell(event_of(fact.promotion))


# --- 1. what happened outside ---------------------------------------------------------------------------------


def _observe(draft: Draft, snapshot: Snapshot) -> Draft:
    attempt = draft.attempt
    if attempt is None:
        return draft
    fact = stage_of(draft.job, attempt, snapshot)
    if fact is None:
        return _missing(draft, attempt, snapshot)
    draft = _note_existence(draft, attempt, fact, snapshot)
    if fact.phase is not StagePhase.PENDING and attempt.start_time is None and _is_told(attempt, fact, snapshot):
        draft = _seen_running(draft, attempt, fact)
    if fact.progress is not None:
        draft = fold_progress(draft, fact.progress, snapshot.policy)
    if fact.phase is not StagePhase.EXITED:
        return _while_it_runs(draft, fact, snapshot.policy)
    current = draft.attempt
    assert current is not None, "seeing a stage run does not end its attempt"
    return end_attempt(draft, judge(current, fact, snapshot.now), snapshot)


def _missing(draft: Draft, attempt: Attempt, snapshot: Snapshot) -> Draft:
    """What an attempt without a stage comes to: it has ended, is still to come, or has not come for too long."""
    if claimant_of(draft.job, attempt, snapshot) is not None:
        return draft  # the runtime is asked what that is, and its answer is a fact
    verdict = judge(attempt, None, snapshot.now)
    if _is_gone(attempt):
        return end_attempt(draft, verdict, snapshot)
    age_seconds = (snapshot.now - attempt.created_time).total_seconds()
    if age_seconds < snapshot.policy.creation_limit_seconds:
        return draft
    message = f"no stage came of {attempt.stage} attempt {attempt.number} in {age_seconds:.0f} s"
    return end_attempt(draft, replace(verdict, reason=Reason.START_FAILED, message=message), snapshot)


def _is_gone(attempt: Attempt) -> bool:
    """Whether a stage that does not exist will not be created either: it was there already, or it was called off.

    Its number is used up with that: a second stage of the same number would be taken for the first by the job's store.
    """
    return attempt.seen_time is not None or attempt.start_time is not None or attempt.stop_time is not None


def _note_existence(draft: Draft, attempt: Attempt, fact: StageFact, snapshot: Snapshot) -> Draft:
    """The draft with what became known of where the stage is."""
    news: dict[str, object] = {}
    if attempt.seen_time is None and _is_told(attempt, fact, snapshot):
        news |= {"seen_time": draft.now, "stage_uid": fact.stage_uid or None}
    elif attempt.stage_uid is None and fact.stage_uid and attempt.seen_time is not None:
        news["stage_uid"] = fact.stage_uid
    if fact.node and fact.node != attempt.node and _is_told(attempt, fact, snapshot):
        news["node"] = fact.node
    return draft.amend(attempts=draft.change_attempt(**news)) if news else draft


def _while_it_runs(draft: Draft, fact: StageFact, policy: Policy) -> Draft:
    """The draft with what keeps the stage from going on: its machine goes away, or it is stuck."""
    if fact.disruption is not None:
        return request_stop(draft, fact.disruption, _why_disrupted(fact))
    if fact.phase is not StagePhase.RUNNING:
        return draft
    attempt = draft.attempt
    if attempt is not None and attempt.stage not in STAGES_ON_GPU:
        return _within_deadline(draft, attempt, fact, policy)
    why = never_heard(draft, policy) if fact.progress is None else stalled(draft, fact.progress, policy)
    return request_stop(draft, Reason.NO_PROGRESS, why) if why else draft


def _within_deadline(draft: Draft, attempt: Attempt, fact: StageFact, policy: Policy) -> Draft:
    """A CPU stage is stopped at its deadline. What prepare does it would do again, so its job fails; a publish may have
    waited for a store or registry that hangs, and is tried again."""
    is_prepare = attempt.stage == "prepare"
    limit_seconds = policy.prepare_deadline_seconds if is_prepare else policy.publish_deadline_seconds
    started = attempt.start_time or between(attempt.created_time, fact.start_time or draft.now, draft.now)
    if (draft.now - started).total_seconds() < limit_seconds:
        return draft
    message = (
        f"{attempt.stage} attempt {attempt.number} ran for longer than QLORA_{attempt.stage.upper()}_DEADLINE_SECONDS, "
        f"{limit_seconds:.0f} s; see its log for what it was at"
    )
    return request_stop(draft, Reason.DEADLINE_EXCEEDED if is_prepare else Reason.NO_PROGRESS, message)


def _is_told(attempt: Attempt, fact: StageFact, snapshot: Snapshot) -> bool:
    """Whether it is worth a write that the stage runs: of a CPU stage, only once it takes longer than most."""
    age_seconds = (snapshot.now - attempt.created_time).total_seconds()
    at_once = attempt.stage in STAGES_ON_GPU or fact.phase is StagePhase.EXITED
    return at_once or age_seconds >= snapshot.policy.progress_interval_seconds


def _why_disrupted(fact: StageFact) -> str:
    """What the runtime says about a stage that is about to be taken away."""
    if fact.result is not None and fact.result.failure is not None:
        return fact.result.failure.message
    return "its machine is being taken away"


def _seen_running(draft: Draft, attempt: Attempt, fact: StageFact) -> Draft:
    """Note when the stage began. One that ended unseen, without a start time, never ran."""
    told = fact.start_time
    if told is None and fact.phase is StagePhase.RUNNING:
        told = draft.now
    if told is None:
        return draft
    start_time = between(attempt.created_time, told, draft.now)
    attempts = draft.change_attempt(start_time=start_time)
    if attempt.stage != "train" or attempt.stop_time is not None:
        return draft.amend(attempts=attempts)
    message = f"train attempt {attempt.number} on {attempt.gpu_class}"
    running = Finding(kind=ConditionType.RUNNING, status="True", reason=Reason.TRAINING, message=message)
    draft = draft.move(JobEvent.TRAIN_STARTED, running, attempts=attempts)
    return draft.tell(Event(reason=Reason.TRAINING, message=message))


# --- 2. what the user wants -----------------------------------------------------------------------------------


def _obey(draft: Draft) -> Draft:
    """Cancel, deadline, suspend: the first that applies. An active stage is stopped first."""
    spec = draft.job.spec
    if draft.job.cancelled:
        return _stop_or_fail(draft, Reason.CANCELLED, "cancelled on request")
    if _is_over_deadline(draft):
        message = f"spent activeDeadlineSeconds {spec.active_deadline_seconds} in stages"
        return _stop_or_fail(draft, Reason.DEADLINE_EXCEEDED, message)
    if spec.suspend:
        return request_stop(draft, Reason.SUSPENDED, "suspended on request")
    return draft


def _stop_or_fail(draft: Draft, reason: Reason, message: str) -> Draft:
    return fail(draft, reason, message) if draft.attempt is None else request_stop(draft, reason, message)


def _is_over_deadline(draft: Draft) -> bool:
    deadline_seconds = draft.job.spec.active_deadline_seconds
    if deadline_seconds is None:
        return False
    attempt = draft.attempt
    running = timedelta(0)
    if attempt is not None and attempt.start_time is not None:
        running = max(draft.now - attempt.start_time, timedelta(0))
    return draft.status.active_seconds + running.total_seconds() >= deadline_seconds


# --- 3. what of the job's own keeps it from going on ------------------------------------------------------------


def _refuse_address(draft: Draft, policy: Policy) -> Draft:
    refusal = refused_address(draft.job, policy.store_uri, policy.addresses)
    refusal = refusal or refused_notifications(draft.job.spec.notifications, policy.webhook_allowed_hosts)
    return draft if refusal is None else fail(draft, Reason.USER_ERROR, refusal)


def _hold(draft: Draft, policy: Policy) -> Draft:
    if draft.job.spec.suspend:
        return wait(draft, Reason.SUSPENDED, f"spec.suspend is true, until: qlora resume {_named(draft.job)}")
    retry_after = draft.status.retry_after
    if retry_after is not None and is_paused(draft.status, draft.now, policy):
        when = retry_after.strftime("%H:%M:%SZ")
        return wait(draft, Reason.BACKING_OFF, f"tries again at {when}{_spent(draft, policy)}")
    return draft


def _named(job: QLoRAJob) -> str:
    """How commands name it."""
    meta = job.metadata
    return meta.name if meta.namespace == "default" else f"{meta.name} -n {meta.namespace}"


def _spent(draft: Draft, policy: Policy) -> str:
    """What the cause that ended the last attempt has used up of its budget, in words."""
    last = draft.status.attempts[-1] if draft.status.attempts else None
    known = setback(draft.status, last.reason) if last is not None and last.reason is not None else None
    if last is None or known is None:
        return ""
    if known.reason.recovery is not Recovery.WAIT:
        failures, limit = counted_failures(draft.status, known.reason), draft.job.spec.backoff_limit
        return f"; {failures} of {limit} failures used"
    told = f"; {known.reason.value} for {known.count} attempts: {last.message}"
    if known.reason in WAITED_FOR_EVER or last.stage == "publish":
        return told
    limit_seconds = outage_limit_seconds(draft.job, policy)
    return f"{told}; {known.seconds:.0f} of {limit_seconds:.0f} s of outageLimitSeconds used"
