"""The decision: facts in, commands out.

Level-triggered and pure: the same snapshot gives the same commands, and each of them may be repeated or lost.

1. What a job's status should be is decided for each job, then for all of them together (`core/scheduling/cycle`).
2. Where that differs from what is stored, it is written: at most one `WriteStatus` a job.
3. Stages and runs follow the *stored* status, so an intent is always on record before anything comes of it. The stage
   of an attempt that is decided now comes right after the write that records it: whoever carries commands out goes on
   with a job only once its status is written.
4. What is worked out for one job is contained: an exception fails that job, and a `ReportDefect` tells of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason
from orchestrator.api.stage_name import StageName
from orchestrator.core.commands import (
    Command,
    DeleteJob,
    EnsureRun,
    EnsureStage,
    Event,
    FinishRun,
    PromoteVersion,
    ReleaseJob,
    ReportDefect,
    StopStage,
    WriteStatus,
)
from orchestrator.core.job.containment import failed_by_defect
from orchestrator.core.job.finalizer import owes_run_its_end
from orchestrator.core.job.notifications import with_notifications
from orchestrator.core.job.promotion import owed_promotion
from orchestrator.core.job.stage_commands import ensure_stage, leftover_commands, release_commands, stage_commands
from orchestrator.core.job.state_machine import LAST_RUN_STATUS, JobState, state_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.cycle import Round, Scheduler
from orchestrator.core.scheduling.index import Index
from orchestrator.core.scheduling.ordering import created
from orchestrator.core.scheduling.queue_status import queue_statuses
from orchestrator.core.scheduling.subscriptions import notification_commands, subscriptions_of
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.core.sweep.lifecycle import sweep_commands

Queues = Mapping[str, QLoRAQueueSpec]


def decide(snapshot: Snapshot) -> tuple[Command, ...]:
    """All that is to be done about a snapshot, in the order in which to do it."""
    return Decider().decide(snapshot)


class Decider:
    """Decides again and again: what has not changed since the last decision is not worked out again.

    Each decision equals one that nothing came before. A decision that raised leaves nothing behind.
    """

    def __init__(self) -> None:
        self._scheduler = Scheduler()

    def decide(self, snapshot: Snapshot) -> tuple[Command, ...]:
        """All that is to be done about a snapshot, in the order in which to do it."""
        scheduler, self._scheduler = self._scheduler, Scheduler()
        commands = tuple(_commands(scheduler.round(snapshot), snapshot))
        self._scheduler = scheduler
        return commands


def _commands(decided: Round, snapshot: Snapshot) -> Iterator[Command]:
    index = decided.index
    for key in sorted(index.runners):
        yield from _run_commands(index.entries[key].draft, snapshot)
    yield from _runs_of_gone_jobs(index, snapshot)
    for key in sorted(index.telling):
        yield from notification_commands(index.entries[key].draft.job, index.queues)
    yield from sweep_commands(snapshot)
    yield from queue_statuses(index, snapshot)  # before a job that has ended may be deleted
    # Whoever carries this out may run out of time: what has been decided comes to its end first, then what was decided
    # just now, then figures of jobs that go on as before, and last come words about those who wait.
    moved: list[_OfJob] = []
    figures: list[WriteStatus] = []
    waiting: list[Draft] = []
    for draft in decided.drafts.values():
        if draft.words_only and draft.job.status.active_attempt is None:
            waiting.append(draft)
            continue
        own = _of_job(draft, index.queues, snapshot)
        if own.write is None:
            yield from own.stage
        elif own.draft.state is state_of(draft.job.status) and not own.stage:
            figures.append(own.write)
        else:
            moved.append(own)
        yield from own.defects
    for own in _in_turn(moved, decided):
        yield from own.commands
    yield from leftover_commands(snapshot, snapshot.stages.keys() - index.wanted, index.job)
    yield from release_commands(snapshot)
    yield from figures
    yield from _words(waiting, index.queues, snapshot)
    yield from _expired(index, snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfJob:
    """What is to be done about one job."""

    draft: Draft
    write: WriteStatus | None
    stage: tuple[EnsureStage | StopStage, ...] = ()
    """What its stored attempt asks for."""
    begun: tuple[EnsureStage, ...] = ()
    """The stage of the attempt that the write puts on record."""

    @property
    def commands(self) -> tuple[Command, ...]:
        """All of them, of a job of which something is written."""
        return () if self.write is None else (self.write, *self.stage, *self.begun)

    @property
    def defects(self) -> tuple[ReportDefect, ...]:
        """That deciding about the job raised, if it did."""
        return (ReportDefect(job=self.draft.job, trace=self.draft.defect),) if self.draft.defect else ()


def _in_turn(moved: Iterable[_OfJob], decided: Round) -> list[_OfJob]:
    """Who gets a GPU comes first, in the order of the line: it is idle until then. All others as long as they have been
    at it: by their names, those that come last would not be served while there is more to do than there is time."""
    ranks = {placement.claim.key: rank for rank, placement in enumerate(decided.placements)}

    def turn(own: _OfJob) -> tuple[int, datetime]:
        job = own.draft.job
        attempts = job.status.attempts
        return ranks.get(job.key, len(ranks)), attempts[-1].created_time if attempts else created(job, own.draft.now)

    return sorted(moved, key=turn)


def _of_job(draft: Draft, queues: Queues, snapshot: Snapshot) -> _OfJob:
    """A job's own commands; where they cannot be made, those that end it."""
    try:
        return _made(draft, queues, snapshot)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure
        failed = failed_by_defect(draft.job, snapshot, error)
    try:
        return _made(failed, queues, snapshot)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - as above
        return _OfJob(draft=failed, write=None)  # what is stored leaves nothing to write; the report tells of it


def _made(draft: Draft, queues: Queues, snapshot: Snapshot) -> _OfJob:
    write = draft.close()
    if write is not None:
        write = _telling(draft, write, queues)
    return _OfJob(
        draft=draft,
        write=write,
        stage=tuple(stage_commands(draft, snapshot)),
        begun=tuple(_begun(write, snapshot.policy)) if write is not None else (),
    )


def _telling(draft: Draft, write: WriteStatus, queues: Queues) -> WriteStatus:
    """The write with what is to be told of what it records."""
    subscriptions = subscriptions_of(draft.job, queues)
    told, given_up = with_notifications(draft, write.status, subscriptions)
    if told == write.status.notifications:
        return write
    status = write.status.model_copy(update={"notifications": told})
    return replace(write, status=status, events=(*write.events, *given_up))


def _words(waiting: list[Draft], queues: Queues, snapshot: Snapshot) -> Iterator[Command]:
    """So many at a time; whoever has been told nothing at all comes first."""
    news = [draft for draft in waiting if draft.says_something_new]
    news.sort(key=lambda draft: draft.job.status.observed_generation > 0)
    for own in (_of_job(draft, queues, snapshot) for draft in news[: snapshot.policy.words_limit]):
        yield from own.defects
        if own.write is not None:
            yield own.write


def _begun(write: WriteStatus, policy: Policy) -> Iterator[EnsureStage]:
    """The stage of an attempt that the write puts on record."""
    if write.status.attempts_total == write.job.status.attempts_total:
        return
    attempt = write.status.active_attempt
    assert attempt is not None, "an attempt that begins is active"
    yield ensure_stage(write.job.model_copy(update={"status": write.status}), attempt, policy)


def _run_commands(draft: Draft, snapshot: Snapshot) -> Iterator[EnsureRun | FinishRun | PromoteVersion | ReleaseJob]:
    """A run for every job whose data are prepared, its last status once the job has finished, and then the alias that
    somebody asks for.

    A job that ends before has nothing to show. It is asked for even if the job is over by now: a controller that was
    killed may have opened it.
    """
    job = draft.job
    if owes_run_its_end(job):
        run_status = LAST_RUN_STATUS[state_of(job.status)]
        yield FinishRun(job=job, run_status=run_status)
        if _is_held_too_long(draft, snapshot):
            yield ReleaseJob(job=job, event=_left_behind(job, run_status, snapshot.policy))
        return
    is_known = job.status.mlflow.run_id is not None or job.metadata.uid in snapshot.runs
    if not is_known and job.status.prepared is not None:
        yield EnsureRun(job=job)
    request = owed_promotion(job)
    if request is not None and job.metadata.uid not in snapshot.runs:
        yield PromoteVersion(job=job, forced=request.forced)


def _is_held_too_long(draft: Draft, snapshot: Snapshot) -> bool:
    """Whether somebody who deletes a finished job has waited for MLflow for as long as that may take."""
    since = draft.status.release_since
    return since is not None and (snapshot.now - since).total_seconds() >= snapshot.policy.release_limit_seconds


def _left_behind(job: QLoRAJob, run_status: str, policy: Policy) -> Event:
    message = (
        f"deleted although MLflow has not taken the end of run {job.status.mlflow.run_id} for "
        f"{policy.release_limit_seconds:.0f} s (QLORA_RELEASE_LIMIT_SECONDS): set the run to {run_status} there"
    )
    return Event(reason=Reason.TRACKING_UNAVAILABLE, message=message, warning=True)


def _runs_of_gone_jobs(index: Index, snapshot: Snapshot) -> Iterator[FinishRun]:
    """Runs whose jobs were deleted before they had on record what MLflow answered."""
    for uid in sorted(snapshot.runs):
        if not index.uids.get(uid):
            job = snapshot.runs[uid].job
            last = LAST_RUN_STATUS.get(state_of(job.status), LAST_RUN_STATUS[JobState.CANCELLED])
            yield FinishRun(job=job, run_status=last)


def _expired(index: Index, snapshot: Snapshot) -> Iterator[DeleteJob]:
    """Finished jobs that are to go, once nothing outside is left to settle, and what they had is counted."""
    named: set[str | None] | None = None
    for key in sorted(filter(index.shares.is_counted, index.expired)):
        facts = [snapshot.stages[stage] for stage in index.stages.get(key, ())]
        if facts and named is None:
            named = {attempt.stage_uid for other in snapshot.jobs for attempt in other.status.attempts}
        if not any(StageName.parse(fact.name) and (fact.vouched or fact.stage_uid in (named or ())) for fact in facts):
            yield DeleteJob(job=index.entries[key].job)
