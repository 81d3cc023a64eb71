"""Until when nothing becomes of a job by time alone.

Most jobs are as they were a moment ago. One that `core/job/lifecycle` leaves as it is, given the same facts, it leaves
so until the time that `rests_until` tells; every comparison with the present that it makes for such a job is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.job.eviction_budget import protected_until
from orchestrator.core.job.finalizer import outstanding
from orchestrator.core.job.notifications import gives_up_at
from orchestrator.core.job.progress import patience_seconds
from orchestrator.core.job.promotion import awaits_mlflow
from orchestrator.core.job.revision import revision_of
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Policy, Snapshot, StageFact, StagePhase

FOR_EVER = datetime.max.replace(tzinfo=UTC)
EARLY = timedelta(seconds=1)
"""Where a bound is compared in seconds: looked at again a little before, whatever rounding does."""


def rests_until(draft: Draft, fact: StageFact | None, policy: Policy) -> datetime:
    """The time; one that has come for a job of which something becomes now.

    `fact` is the stage of the active attempt, which is there.
    """
    if draft.says_something_new or draft.events or draft.defect:
        return draft.now
    return min((_own_rest(draft, fact, policy), *gives_up_at(draft, policy), *_renewed(draft)))


def _own_rest(draft: Draft, fact: StageFact | None, policy: Policy) -> datetime:
    """Whatever is told of it."""
    if draft.state in TERMINAL_STATES:
        return _next(draft.now, _ends(draft.job))
    attempt = draft.attempt
    if attempt is None and draft.status.retry_after is None and not draft.status.attempts:
        return FOR_EVER
    if attempt is None:
        return _next(draft.now, (*_pause(draft, policy), *_avoided(draft, policy)))
    if attempt.stage != "train" or attempt.stop_time is not None or fact is None or fact.phase is StagePhase.EXITED:
        return draft.now
    return _next(draft.now, _training(draft, attempt, fact, policy))


def waits_untried(job: QLoRAJob, snapshot: Snapshot) -> bool:
    """Whether the job is prepared, has never had a GPU, and `reconcile` leaves it as it is for ever.

    Of thousands that wait most are so, and to see it takes no look at them. False says nothing.
    """
    return (
        revision_of(job).is_untried
        and not snapshot.clock_step_seconds
        and not (snapshot.runs and job.status.mlflow.run_id is None and job.metadata.uid in snapshot.runs)
        and not (snapshot.refused and job.metadata.uid in snapshot.refused)
    )


def is_expired(draft: Draft) -> bool:
    """Whether a finished job's object is to go: it is deleted, or its time is up."""
    job, finished = draft.job, draft.status.finish_time
    if job.status.finish_time is None or finished is None or awaits_mlflow(job) or outstanding(job.status):
        return False
    ttl_seconds = job.spec.ttl_seconds_after_finished
    is_over = ttl_seconds is not None and (draft.now - finished).total_seconds() >= ttl_seconds
    return is_over or job.metadata.deletion_timestamp is not None


def _next(now: datetime, times: Iterator[datetime] | tuple[datetime, ...]) -> datetime:
    return min((time for time in times if time > now), default=FOR_EVER)


def _ends(job: QLoRAJob) -> Iterator[datetime]:
    """When a finished job's object is to go."""
    ttl_seconds, finished = job.spec.ttl_seconds_after_finished, job.status.finish_time
    if ttl_seconds is not None and finished is not None and not awaits_mlflow(job) and not outstanding(job.status):
        yield finished + timedelta(seconds=ttl_seconds)


def _renewed(draft: Draft) -> Iterator[datetime]:
    """When an eviction counts no more in the budget, of which the status tells."""
    budget = draft.status.eviction_budget
    if budget is not None and budget.renew_time is not None and draft.state not in TERMINAL_STATES:
        yield budget.renew_time


def _pause(draft: Draft, policy: Policy) -> Iterator[datetime]:
    """When `is_paused` changes."""
    after = draft.status.retry_after
    if after is not None:
        yield after
        yield after - timedelta(seconds=max(policy.backoff_max_seconds, policy.backoff_base_seconds))


def _avoided(draft: Draft, policy: Policy) -> Iterator[datetime]:
    """When `avoided_classes` changes."""
    if draft.state is not JobState.QUEUED:
        return
    for attempt in draft.status.attempts:
        if attempt.reason in (Reason.UNSCHEDULABLE, Reason.BROKEN_GPU) and attempt.finish_time is not None:
            yield attempt.finish_time
            yield attempt.finish_time + timedelta(seconds=policy.avoid_seconds)


def _training(draft: Draft, attempt: Attempt, fact: StageFact, policy: Policy) -> Iterator[datetime]:
    """When it has run for long enough to be moved, or counts for what it holds alone, when its deadline comes, when it
    is taken for stuck."""
    since = attempt.start_time or attempt.created_time
    yield since + timedelta(seconds=policy.minimum_run_seconds)
    yield since + timedelta(seconds=policy.preemption_cooldown_seconds)
    yield attempt.created_time + timedelta(seconds=policy.minimum_run_seconds)
    protected = protected_until(draft.job.spec, draft.status, policy)
    if protected is not None:
        yield protected
    if attempt.start_time is None:
        return
    deadline = draft.job.spec.active_deadline_seconds
    if deadline is not None:
        yield from _about(attempt.start_time + timedelta(seconds=deadline - draft.status.active_seconds), draft.now)
    if fact.phase is not StagePhase.RUNNING:
        return
    if fact.progress is None:
        yield from _about(attempt.start_time + timedelta(seconds=policy.stall_start_seconds), draft.now)
    else:
        heard = attempt.progress_time or min(max(attempt.start_time, fact.progress.time), draft.now)
        yield from _about(heard + timedelta(seconds=patience_seconds(draft, fact.progress, policy)), draft.now)


def _about(time: datetime, now: datetime) -> Iterator[datetime]:
    """A bound that is about to be reached: from `EARLY` before it on, every moment is looked at."""
    yield max(time - EARLY, now + timedelta(microseconds=1)) if time + EARLY >= now else time
