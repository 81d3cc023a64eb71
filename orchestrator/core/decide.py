"""The decision: facts in, commands out.

The controller calls `decide` with a snapshot and carries out what it returns. Level-triggered and pure: the same
snapshot gives the same commands, and each of them may be repeated or lost.

1. What a job's status should be is decided for each job, then for all of them together (`core/schedule`).
2. Where that differs from what is stored, it is written: at most one `WriteStatus` a job.
3. Stages and runs follow the *stored* status, so an intent is always on record before anything comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.api.job import QLoRAJob
from orchestrator.core.draft import Draft
from orchestrator.core.facts import (
    Command,
    DeleteJob,
    EnsureRun,
    FinishRun,
    Snapshot,
    WriteStatus,
)
from orchestrator.core.schedule import schedule
from orchestrator.core.stages import leftover_commands, stage_commands
from orchestrator.core.state import TERMINAL_STATES, JobState, state_of

LAST_RUN_STATUS: Mapping[JobState, str] = {
    JobState.SUCCEEDED: "FINISHED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "KILLED",
}


def decide(snapshot: Snapshot) -> tuple[Command, ...]:
    """All that is to be done about a snapshot, in the order in which to do it."""
    drafts = schedule(snapshot).drafts.values()
    return tuple(_commands(list(drafts), snapshot))


def _commands(drafts: list[Draft], snapshot: Snapshot) -> Iterator[Command]:
    # Runs come before status writes: a run's record makes that job's write stale, which is then decided anew. The
    # other way round a job whose progress changes in every pass would never get its run.
    for draft in drafts:
        yield from _run_commands(draft)
    # Whoever carries this out may run out of time: what has been decided comes to its end first, then what was decided
    # just now, and last come words about those who wait.
    waiting: list[WriteStatus] = []
    moved: list[Command] = []
    for draft in drafts:
        write, stage = draft.close(), tuple(stage_commands(draft, snapshot))
        if write is not None and not stage and draft.state is state_of(draft.job.status):
            waiting.append(write)
        elif stage and write is None:
            yield from stage
        else:
            moved += [*((write,) if write else ()), *stage]
    yield from moved
    yield from leftover_commands(snapshot)
    yield from waiting
    yield from _expired(drafts, snapshot)


def _run_commands(draft: Draft) -> Iterator[EnsureRun | FinishRun]:
    """A run for every prepared job, and its last status once the job has finished."""
    status = draft.job.status
    state = state_of(status)
    if status.mlflow.run_id is None:
        if status.prepared is not None and draft.state not in TERMINAL_STATES:
            yield EnsureRun(job=draft.job)
    elif state in TERMINAL_STATES and status.mlflow.run_status != LAST_RUN_STATUS[state]:
        yield FinishRun(job=draft.job, run_status=LAST_RUN_STATUS[state])


def _expired(drafts: list[Draft], snapshot: Snapshot) -> Iterator[DeleteJob]:
    """Finished jobs that are to go, once nothing outside is left to settle."""
    with_stages = {(fact.namespace, _job_name(fact.name)) for fact in snapshot.stages.values()}
    for draft in drafts:
        job = draft.job
        settled = state_of(job.status) in TERMINAL_STATES and not tuple(_run_commands(draft))
        has_stages = (job.metadata.namespace, job.metadata.name) in with_stages
        if settled and not has_stages and _is_expired(job, snapshot):
            yield DeleteJob(job=job)


def _job_name(stage_name: str) -> str:
    return stage_name.rsplit("-", 2)[0]


def _is_expired(job: QLoRAJob, snapshot: Snapshot) -> bool:
    if job.metadata.deletion_timestamp is not None:
        return True
    ttl_seconds, finished = job.spec.ttl_seconds_after_finished, job.status.finish_time
    if ttl_seconds is None or finished is None:
        return False
    return (snapshot.now - finished).total_seconds() >= ttl_seconds
