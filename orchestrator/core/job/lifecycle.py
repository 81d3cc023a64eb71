"""One job by itself: what happened to its stage, and what its user wants.

It looks at no other job, and starts no stage: that is decided for all jobs together (`core/scheduling/cycle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.stage_name import STAGES_ON_GPU
from orchestrator.core.commands import Event
from orchestrator.core.job.attempts import request_stop
from orchestrator.core.job.conditions import Finding, says_the_same
from orchestrator.core.job.progress import fold_progress
from orchestrator.core.job.recovery import end_attempt, fail
from orchestrator.core.job.stage_commands import stage_of
from orchestrator.core.job.state_machine import LAST_RUN_STATUS, TERMINAL_STATES, JobEvent, JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.job.verdict import judge
from orchestrator.core.snapshot import Snapshot, StageFact, StagePhase

WAITING_CONDITION: Mapping[JobState, ConditionType] = {
    JobState.NEW: ConditionType.PREPARED,
    JobState.QUEUED: ConditionType.ADMITTED,
    JobState.TRAINED: ConditionType.PUBLISHED,
}
"""The condition that says what an idle job waits for."""


def reconcile(job: QLoRAJob, snapshot: Snapshot) -> Draft:
    """The job's draft after the facts and the user's wishes."""
    opened = Draft.open(job, snapshot.now)
    draft = noted = _note_run(opened, snapshot)
    if draft.state not in TERMINAL_STATES:
        draft = _observe(draft, snapshot)  # 1. what happened outside
    if draft.state not in TERMINAL_STATES:
        draft = _obey(draft)  # 2. what the user wants
    if draft.state in WAITING_CONDITION:
        draft = _hold(draft)  # 3. what of the job's own keeps it from going on
    # A run that comes while a job is prepared needs no write of its own: the end of that stage is the next one.
    return opened if draft is noted and draft.state is JobState.PREPARING else draft


def is_ready(draft: Draft) -> bool:
    """Whether nothing of the job's own keeps its next stage from starting."""
    return draft.state in WAITING_CONDITION and not draft.job.spec.suspend and not _is_backing_off(draft)


def wait(draft: Draft, reason: Reason, message: str) -> Draft:
    """Say what an idle job waits for."""
    kind = WAITING_CONDITION[draft.state]
    before = draft.status.condition(kind)
    finding = Finding(kind=kind, status="False", reason=reason, message=message)
    if before is not None and says_the_same(before, finding, draft.job.metadata.generation):
        return draft
    return draft.say(finding)


def _note_run(draft: Draft, snapshot: Snapshot) -> Draft:
    """The draft with the run that MLflow has for the job, which may have come when the job was over."""
    fact, known = snapshot.runs.get(draft.job.metadata.uid), draft.status.mlflow
    if fact is None or known.run_id is not None:
        return draft
    run_status = LAST_RUN_STATUS.get(draft.state, fact.mlflow.run_status)
    found = {"run_id": fact.mlflow.run_id, "experiment_id": fact.mlflow.experiment_id, "run_status": run_status}
    return draft.amend(mlflow=known.model_copy(update=found))


# --- 1. what happened outside ---------------------------------------------------------------------------------


def _observe(draft: Draft, snapshot: Snapshot) -> Draft:
    attempt = draft.attempt
    if attempt is None:
        return draft
    fact = stage_of(draft.job, attempt, snapshot)
    if fact is None:
        return end_attempt(draft, judge(attempt, None, snapshot.now), snapshot) if _is_gone(attempt) else draft
    if fact.phase is not StagePhase.PENDING and attempt.start_time is None and _is_told(attempt, fact, snapshot):
        draft = _seen_running(draft, attempt, fact)
    if fact.progress is not None:
        draft = fold_progress(draft, fact.progress, snapshot.policy.progress_interval_seconds)
    if fact.phase is not StagePhase.EXITED:
        return draft if fact.disruption is None else request_stop(draft, fact.disruption, _why_disrupted(fact))
    current = draft.attempt
    assert current is not None, "seeing a stage run does not end its attempt"
    return end_attempt(draft, judge(current, fact, snapshot.now), snapshot)


def _is_gone(attempt: Attempt) -> bool:
    """Whether a stage that does not exist will not be created either: it ran already, or it was called off."""
    return attempt.start_time is not None or attempt.stop_time is not None


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
    start_time = fact.start_time
    if start_time is None and fact.phase is StagePhase.RUNNING:
        start_time = draft.now
    if start_time is None:
        return draft
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


def _hold(draft: Draft) -> Draft:
    if draft.job.spec.suspend:
        return wait(draft, Reason.SUSPENDED, "spec.suspend is true; set it to false to go on")
    retry_after = draft.status.retry_after
    if retry_after is not None and _is_backing_off(draft):
        failures, limit = draft.status.failures_total, draft.job.spec.backoff_limit
        when = retry_after.strftime("%H:%M:%SZ")
        return wait(draft, Reason.BACKING_OFF, f"tries again at {when}; {failures} of {limit} failures used")
    return draft


def _is_backing_off(draft: Draft) -> bool:
    retry_after = draft.status.retry_after
    return retry_after is not None and draft.now < retry_after
