"""What keeps going wrong for a job: budgets by cause, the pauses between attempts, and the places to pass over.

- A setback counts the attempts that one cause has ended since the last durable progress. A new checkpoint, or a stage
  that succeeds, forgets them all: a job of a week is not ended by four hiccups.
- What may be the job's own fault is counted against `spec.backoffLimit`. What the surroundings do costs time instead,
  `outageLimitSeconds` in all; waiting for a GPU is no such time.
- Pauses double up to a bound. Those after an outage are shortened by up to JITTER, by the job's uid and the attempt,
  so that jobs do not come back all at once; the same job always waits the same.
- Ages come from the controller's own times, and a clock that was put back makes nothing young or old for ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from datetime import datetime, timedelta

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus, Setback
from orchestrator.api.reasons import Reason
from orchestrator.core.snapshot import Policy

JITTER = 0.2
MAX_BACKOFF_DOUBLINGS = 32  # keeps 2**n small; the pause is bounded by policy.backoff_max_seconds long before
FREE_OF_CHARGE = frozenset({Reason.NO_PROGRESS})
"""Causes whose first time in a row is not counted against spec.backoffLimit."""
WAITED_FOR_EVER = frozenset({Reason.UNSCHEDULABLE, Reason.QUOTA_EXCEEDED})
"""Causes that are a place in a line: nobody is to blame, and waiting helps."""
NODES_AVOIDED = 8


def setback(status: QLoRAJobStatus, reason: Reason) -> Setback | None:
    """What the cause has cost since the last durable progress, if anything."""
    return next((known for known in status.setbacks if known.reason is reason), None)


def with_setback(status: QLoRAJobStatus, reason: Reason, seconds: float) -> tuple[Setback, ...]:
    """The setbacks with one more attempt that the cause has ended, which cost so long."""
    known = setback(status, reason)
    count, spent = (known.count, known.seconds) if known is not None else (0, 0.0)
    others = tuple(other for other in status.setbacks if other.reason is not reason)
    return (*others, Setback(reason=reason, count=count + 1, seconds=spent + seconds))


def counted_failures(status: QLoRAJobStatus, reason: Reason) -> int:
    """How many of the cause's setbacks count against spec.backoffLimit."""
    known = setback(status, reason)
    if known is None:
        return 0
    return known.count - (1 if reason in FREE_OF_CHARGE else 0)


def outage_limit_seconds(job: QLoRAJob, policy: Policy) -> float:
    """How long the surroundings may keep the job from progress."""
    limit = job.spec.outage_limit_seconds
    return policy.outage_limit_seconds if limit is None else limit


def backoff_seconds(policy: Policy, failures: int) -> float:
    """The pause before the next attempt: doubles with every failure up to a bound."""
    doublings = min(max(failures - 1, 0), MAX_BACKOFF_DOUBLINGS)
    return min(policy.backoff_base_seconds * 2**doublings, policy.backoff_max_seconds)


def outage_pause_seconds(policy: Policy, failures: int, uid: str, attempt: int) -> float:
    """The same after an outage, shortened by the job's and the attempt's own share of the jitter."""
    share = zlib.crc32(f"{uid} {attempt}".encode()) / 2**32
    return backoff_seconds(policy, failures) * (1 - JITTER * share)


def host_memory_factor(escalations: int, policy: Policy) -> float:
    """How much more host memory than at first a stage gets after so many times that it ran out."""
    return min(2.0**escalations, policy.host_memory_factor_max)


def is_paused(status: QLoRAJobStatus, now: datetime, policy: Policy) -> bool:
    """Whether the pause before the next attempt lasts; one longer than any that is given is a clock put back."""
    if status.retry_after is None:
        return False
    left = status.retry_after - now
    return timedelta(0) < left <= timedelta(seconds=max(policy.backoff_max_seconds, policy.backoff_base_seconds))


def avoided_classes(status: QLoRAJobStatus, now: datetime, policy: Policy) -> frozenset[str]:
    """GPU classes that took no stage of this job lately, or whose broken card has no node's name."""
    return frozenset(
        attempt.gpu_class
        for attempt in status.attempts
        if attempt.gpu_class is not None
        and (attempt.reason is Reason.UNSCHEDULABLE or (attempt.reason is Reason.BROKEN_GPU and attempt.node is None))
        and _is_recent(attempt, now, policy)
    )


def broken_nodes(jobs: Iterable[QLoRAJob], now: datetime, policy: Policy) -> tuple[str, ...]:
    """Nodes on which a card broke lately, whichever job it happened to; the latest NODES_AVOIDED of them."""
    found = {
        attempt.node: attempt.finish_time
        for job in jobs
        for attempt in job.status.attempts
        if attempt.reason is Reason.BROKEN_GPU and attempt.node is not None and _is_recent(attempt, now, policy)
    }
    latest = sorted(found, key=lambda node: (found[node] or now, node), reverse=True)
    return tuple(sorted(latest[:NODES_AVOIDED]))


def _is_recent(attempt: Attempt, now: datetime, policy: Policy) -> bool:
    if attempt.finish_time is None:
        return False
    return timedelta(0) <= now - attempt.finish_time < timedelta(seconds=policy.avoid_seconds)
