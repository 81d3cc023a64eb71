"""The decision: facts in, commands out.

The controller calls `decide` with a snapshot and carries out what it returns. Level-triggered and pure: the same
snapshot gives the same commands, and each of them may be repeated or lost.

1. What a job's status should be is decided for each job, then for all of them together (`core/scheduling/cycle`).
2. Where that differs from what is stored, it is written: at most one `WriteStatus` a job.
3. Stages and runs follow the *stored* status, so an intent is always on record before anything comes of it. The stage
   of an attempt that is decided now comes right after the write that records it: whoever carries commands out goes on
   with a job only once its status is written.
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.api.job import QLoRAJob
from orchestrator.api.stage_name import StageName
from orchestrator.core.commands import Command, DeleteJob, EnsureRun, EnsureStage, FinishRun, WriteStatus
from orchestrator.core.job.finalizer import owes_run_its_end
from orchestrator.core.job.stage_commands import ensure_stage, leftover_commands, stage_commands
from orchestrator.core.job.state_machine import LAST_RUN_STATUS, TERMINAL_STATES, JobState, state_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Policy, Snapshot


def decide(snapshot: Snapshot) -> tuple[Command, ...]:
    """All that is to be done about a snapshot, in the order in which to do it."""
    drafts = schedule(snapshot).drafts.values()
    return tuple(_commands(list(drafts), snapshot))


def _commands(drafts: list[Draft], snapshot: Snapshot) -> Iterator[Command]:
    for draft in drafts:
        yield from _run_commands(draft.job, snapshot)
    yield from _runs_of_gone_jobs(snapshot)
    # Whoever carries this out may run out of time: what has been decided comes to its end first, then what was decided
    # just now, then figures of jobs that go on as before, and last come words about those who wait.
    moved: list[Command] = []
    figures: list[WriteStatus] = []
    waiting: list[Draft] = []
    for draft in drafts:
        stage = tuple(stage_commands(draft, snapshot))
        if draft.words_only and not stage:
            waiting.append(draft)
        elif (write := draft.close()) is None:
            yield from stage
        elif draft.state is state_of(draft.job.status) and not stage:
            figures.append(write)
        else:
            moved += [write, *stage, *_begun(write, snapshot.policy)]
    yield from moved
    yield from leftover_commands(snapshot)
    yield from figures
    yield from _words(waiting, snapshot.policy)
    yield from _expired(drafts, snapshot)


def _words(waiting: list[Draft], policy: Policy) -> Iterator[WriteStatus]:
    """So many at a time; whoever has been told nothing at all comes first."""
    news = [draft for draft in waiting if draft.says_something_new]
    news.sort(key=lambda draft: draft.job.status.observed_generation > 0)
    yield from filter(None, (draft.close() for draft in news[: policy.words_limit]))


def _begun(write: WriteStatus, policy: Policy) -> Iterator[EnsureStage]:
    """The stage of an attempt that the write puts on record."""
    if write.status.attempts_total == write.job.status.attempts_total:
        return
    attempt = write.status.active_attempt
    assert attempt is not None, "an attempt that begins is active"
    yield ensure_stage(write.job.model_copy(update={"status": write.status}), attempt, policy)


def _run_commands(job: QLoRAJob, snapshot: Snapshot) -> Iterator[EnsureRun | FinishRun]:
    """A run for every job that has begun, and its last status once the job has finished.

    It is asked for even if the job is over by now: a controller that was killed may have opened it.
    """
    if owes_run_its_end(job):
        yield FinishRun(job=job, run_status=LAST_RUN_STATUS[state_of(job.status)])
        return
    is_known = job.status.mlflow.run_id is not None or job.metadata.uid in snapshot.runs
    if not is_known and job.status.attempts_total > 0:
        yield EnsureRun(job=job)


def _runs_of_gone_jobs(snapshot: Snapshot) -> Iterator[FinishRun]:
    """Runs whose jobs were deleted before they had them on record."""
    if snapshot.runs:
        here = {job.metadata.uid for job in snapshot.jobs}
        for uid in sorted(snapshot.runs.keys() - here):
            yield FinishRun(job=snapshot.runs[uid].job, run_status=LAST_RUN_STATUS[JobState.CANCELLED])


def _expired(drafts: list[Draft], snapshot: Snapshot) -> Iterator[DeleteJob]:
    """Finished jobs that are to go, once nothing outside is left to settle."""
    with_stages = {
        (fact.namespace, name.job) for fact in snapshot.stages.values() if (name := StageName.parse(fact.name))
    }
    for draft in drafts:
        job = draft.job
        settled = state_of(job.status) in TERMINAL_STATES and not owes_run_its_end(job)
        has_stages = (job.metadata.namespace, job.metadata.name) in with_stages
        if settled and not has_stages and _is_expired(job, snapshot):
            yield DeleteJob(job=job)


def _is_expired(job: QLoRAJob, snapshot: Snapshot) -> bool:
    if job.metadata.deletion_timestamp is not None:
        return True
    ttl_seconds, finished = job.spec.ttl_seconds_after_finished, job.status.finish_time
    if ttl_seconds is None or finished is None:
        return False
    return (snapshot.now - finished).total_seconds() >= ttl_seconds
