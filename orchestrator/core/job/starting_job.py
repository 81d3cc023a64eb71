"""The job whose adapter another one goes on from: there, of the same namespace, and succeeded.

Who names a job that has not ended waits for it; who names one that is not there, or that ended otherwise, fails. What
is known of it is put on record before anything is prepared: its object may be deleted then.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.api.adapter import StartingJob
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.core.job.recovery import fail
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.core.job.status_draft import Draft

FIELD = "spec.adapter.from"
MOST_IN_A_RING = 64
"""Jobs of a longer ring wait, in words, until somebody cancels one: looking is done in every decision."""


def begins_with(draft: Draft, jobs: Callable[[str], QLoRAJob | None]) -> Draft | Refusal:
    """A new job with the one that it goes on from on record, or failed; a refusal where it waits for that one."""
    name, status = draft.job.spec.adapter.starting_job, draft.status
    if name is None or status.starting_job is not None or draft.state is not JobState.NEW:
        return draft
    namespace = draft.job.metadata.namespace
    if name == draft.job.metadata.name:
        return fail(draft, Reason.USER_ERROR, f"{FIELD}: a job cannot go on from itself; name another")
    other = jobs(f"{namespace}/{name}")
    if other is None:
        message = (
            f"{FIELD}: there is no job {name} in namespace {namespace}; name one that is there, or the version that it "
            "published (models:/name/version)"
        )
        return fail(draft, Reason.USER_ERROR, message)
    state = state_of(other.status)
    found = _adapter_of(other) if state is JobState.SUCCEEDED else None
    if found is not None:
        return draft.amend(starting_job=found)
    if state in TERMINAL_STATES:
        message = f"{FIELD}: job {name} has ended without an adapter ({state.value}); name another"
        return fail(draft, Reason.USER_ERROR, message)
    if ring := _ring(draft.job, other, jobs):
        message = f"{FIELD}: the jobs go on from each other ({ring}), and none can begin; let one name another adapter"
        return fail(draft, Reason.USER_ERROR, message)
    return Refusal(reason=Reason.PREPARING, message=f"waits for job {name}, from whose adapter it goes on, to succeed")


def _ring(job: QLoRAJob, other: QLoRAJob, jobs: Callable[[str], QLoRAJob | None]) -> str:
    """The names of a ring of jobs that wait for each other, from this one to itself; empty where it is in none."""
    names, at = [job.metadata.name], other
    while len(names) <= MOST_IN_A_RING:
        names.append(at.metadata.name)
        if at.metadata.name == job.metadata.name:
            return " -> ".join(names)
        name = at.spec.adapter.starting_job
        if name is None or at.status.starting_job is not None:
            return ""
        following = jobs(f"{job.metadata.namespace}/{name}")
        if following is None or state_of(following.status) in TERMINAL_STATES:
            return ""
        at = following
    return ""


def _adapter_of(job: QLoRAJob) -> StartingJob | None:
    status = job.status
    if status.adapter_uri is None or status.adapter_digest is None or status.prepared is None:
        return None
    return StartingJob(
        uid=job.metadata.uid,
        adapter_uri=status.adapter_uri,
        adapter_digest=status.adapter_digest,
        base=job.spec.model.source,
        base_revision=status.prepared.model.revision,
    )
