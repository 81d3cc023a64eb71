"""Outages: a cause that many jobs fail for at one time, which is the surroundings' fault and nobody's own.

All of it is read off the jobs' statuses, so whoever takes over sees the same outages. Rules:

- A cause is a reason of the surroundings, the stage that it ended, and what those jobs share: a store for errors that
  pass, a namespace for what is refused or missing there, nothing more for images and starts.
- It is an outage once `outage_jobs` jobs wait whose last attempt it ended, the latest within `outage_window_seconds`.
- While it lasts nobody's time is spent, and one job at a time is tried: the probe. Nobody else takes a GPU for it.
- It is over when somebody got through after the last failure, that is, ran for `outage_probe_seconds` or ended well; or
  when nobody has failed for it for the window, with no probe under way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.stage_name import StageKind
from orchestrator.core.snapshot import Policy, Snapshot

Told = tuple[QLoRAJob, QLoRAJobStatus]
"""A job, and the status to go by: the stored one, or the one that it shall have."""

_OF_A_NAMESPACE = frozenset({Reason.ADMISSION_REFUSED, Reason.VOLUME_UNAVAILABLE, Reason.CONFIG_MISSING})
_OF_EVERYBODY = frozenset({Reason.IMAGE_UNAVAILABLE, Reason.INIT_FAILED, Reason.START_FAILED})
SHARED_REASONS = frozenset({Reason.TRANSIENT_ERROR, Reason.CREDENTIALS_REFUSED}) | _OF_A_NAMESPACE | _OF_EVERYBODY
"""Reasons that may hit many jobs at one time; a broken card or a full cluster is met by one job after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What several jobs may fail for together."""

    reason: Reason
    stage: StageKind
    shared: str
    """What those jobs have in common: a store, a namespace, or nothing in particular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A cause that is on."""

    cause: Cause
    jobs: tuple[str, ...]
    """Keys of the jobs whose last attempt it ended, in order."""
    probe: str | None
    """The key of the job that tries whether it is over, if one does."""

    @property
    def sentence(self) -> str:
        """What is going on, and what becomes of it."""
        where = f" ({self.cause.shared})" if self.cause.shared else ""
        return (
            f"{len(self.jobs)} jobs fail for {self.cause.reason.value} in {self.cause.stage}{where}: nobody's limit is "
            "spent, one job at a time tries again, and the others go on once it gets through"
        )


def cause_of(job: QLoRAJob, stage: StageKind, reason: Reason, policy: Policy) -> Cause | None:
    """The cause that an attempt at a stage ended for, if others may fail for the same."""
    if reason not in SHARED_REASONS:
        return None
    if reason in _OF_EVERYBODY:
        shared = ""
    elif reason in _OF_A_NAMESPACE:
        shared = f"namespace {job.metadata.namespace}"
    else:
        parts = urlsplit(job.spec.store.uri if job.spec.store else policy.store_uri)
        shared = f"store {parts.scheme}://{parts.netloc}"
    return Cause(reason=reason, stage=stage, shared=shared)


def hits_others(job: QLoRAJob, attempt: Attempt, reason: Reason, snapshot: Snapshot) -> bool:
    """Whether enough other jobs fail for the cause that ends this attempt to call it an outage."""
    cause, policy = cause_of(job, attempt.stage, reason, snapshot.policy), snapshot.policy
    if cause is None:
        return False
    needed = policy.outage_jobs - 1
    for other in snapshot.jobs:
        if needed <= 0:
            break
        if other.metadata.uid != job.metadata.uid and hit_by((other, other.status), policy) == cause:
            needed -= 1
    return needed <= 0


def current_outages(told: Iterable[Told], snapshot: Snapshot) -> Mapping[Cause, Outage]:
    """The outages that are on."""
    everybody = list(told)
    hit: defaultdict[Cause, list[Told]] = defaultdict(list)
    for one in everybody:
        cause = hit_by(one, snapshot.policy)
        if cause is not None:
            hit[cause].append(one)
    found = {cause: _outage(cause, members, everybody, snapshot) for cause, members in hit.items()}
    return {cause: outage for cause, outage in found.items() if outage is not None}


def _outage(cause: Cause, hit: Sequence[Told], everybody: Iterable[Told], snapshot: Snapshot) -> Outage | None:
    """The outage that the cause is, for those it hit after the last attempt that got through; None where it is none."""
    policy = snapshot.policy
    if len(hit) < policy.outage_jobs:
        return None
    exposed = [(job, a) for job, status in everybody for a in status.attempts if _would_meet(job, a, cause, policy)]
    worked = max((a.created_time for _, a in exposed if _got_through(a, snapshot)), default=None)
    ends = {job.key: _end_of(status) for job, status in hit}
    jobs = tuple(sorted(key for key, end in ends.items() if worked is None or end > worked))
    if len(jobs) < policy.outage_jobs:
        return None
    last = max(ends[key] for key in jobs)
    probe = next((job.key for job, attempt in exposed if attempt.active and attempt.created_time >= last), None)
    is_recent = snapshot.now - last <= timedelta(seconds=policy.outage_window_seconds)
    return Outage(cause=cause, jobs=jobs, probe=probe) if is_recent or probe is not None else None


def holds_back(outages: Mapping[Cause, Outage], job: QLoRAJob, stage: StageKind, policy: Policy) -> Outage | None:
    """The outage that a job's next stage would run into, if any."""
    causes = (cause_of(job, stage, reason, policy) for reason in SHARED_REASONS)
    met = [outages[cause] for cause in causes if cause is not None and cause in outages]
    return min(met, key=lambda outage: outage.cause.reason.value, default=None)


def hit_by(told: Told, policy: Policy) -> Cause | None:
    """The cause that ended a waiting job's last attempt."""
    job, status = told
    last = status.attempts[-1] if status.attempts else None
    if last is None or last.active or last.reason is None or status.finish_time is not None or job.spec.suspend:
        return None
    return cause_of(job, last.stage, last.reason, policy)


def _end_of(status: QLoRAJobStatus) -> datetime:
    end = status.attempts[-1].finish_time
    assert end is not None, "an attempt that was hit has ended"
    return end


def _would_meet(job: QLoRAJob, attempt: Attempt, cause: Cause, policy: Policy) -> bool:
    """Whether the attempt runs, or ran, into the cause where it is on."""
    return attempt.stage == cause.stage and cause_of(job, attempt.stage, cause.reason, policy) == cause


def _got_through(attempt: Attempt, snapshot: Snapshot) -> bool:
    """Whether the attempt is proof that it can be done."""
    if attempt.reason is Reason.SUCCEEDED:
        return True
    if attempt.start_time is None or attempt.reason in SHARED_REASONS:
        return False
    ran = (attempt.finish_time or snapshot.now) - attempt.start_time
    return ran >= timedelta(seconds=snapshot.policy.outage_probe_seconds)
