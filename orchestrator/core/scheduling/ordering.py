"""Whose turn it is: the order in which waiting jobs are looked at, and the shares that it rests on.

Priority first, then fair share between queues, then age, then uid. A queue's share is its GPU time, weighted by
the card's VRAM and divided by the queue's weight. The k-th job in a queue's own line counts as if those before it
had started, so queues take turns even when nobody has run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.api.job import MIN_PRIORITY, QLoRAJob
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.hardware import GpuClass

DEFAULT_QUEUE = "default"
NO_QUEUE = ""
"""On whose account GPUs are that no queue has given."""
UNKNOWN_CLASS_GIB = 1  # weight of GPU time on a class that is not here any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A waiting job's claim on one GPU."""

    key: str
    uid: str
    queue: str
    priority: int
    created: datetime
    estimates: tuple[Estimate, ...]
    """One for each class that would do, the preferred first."""
    classes: tuple[str, ...]
    """Their names: claims of one queue with the same fare alike."""


def queue_specs(queues: Iterable[QLoRAQueue]) -> Mapping[str, QLoRAQueueSpec]:
    """The queues by name; `default` exists without being described."""
    return {DEFAULT_QUEUE: QLoRAQueueSpec(), **{queue.metadata.name: queue.spec for queue in queues}}


def queue_refusal(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> Refusal | None:
    """Why the job's queue does not admit it, if so."""
    name = job.spec.queue
    spec = queues.get(name)
    if spec is None:
        return Refusal(
            reason=Reason.QUEUE_NOT_FOUND,
            message=(
                f"there is no queue {name}; make it (qlora queue create {name}) or "
                f"set spec.queue to one of {', '.join(sorted(queues))}"
            ),
        )
    refusal = permission_refusal(job, queues)
    if refusal is None and spec.hold:
        return Refusal(reason=Reason.QUEUE_HELD, message=f"queue {name} is held, until: qlora queue release {name}")
    return refusal


def permission_refusal(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> Refusal | None:
    """Why the job may not use the queue that it names, if that is there and so strict."""
    name, namespace, priority = job.spec.queue, job.metadata.namespace, job.spec.priority
    spec = queues.get(name)
    if spec is None:
        return None
    if not _is_open_to(namespace, spec):
        others = ", ".join(sorted(other for other, its in queues.items() if _is_open_to(namespace, its)))
        return Refusal(
            reason=Reason.QUEUE_NOT_ALLOWED,
            message=(
                f"queue {name} is not for jobs of namespace {namespace}; "
                + (f"set spec.queue to one of {others}, or " if others else "")
                + f"have {namespace} added to the queue's spec.namespaces"
            ),
        )
    if spec.max_priority is not None and priority > spec.max_priority:
        return Refusal(
            reason=Reason.PRIORITY_TOO_HIGH,
            message=f"queue {name} takes no priority above {spec.max_priority}; lower spec.priority from {priority}",
        )
    return None


def account(namespace: str, queue: str, queues: Mapping[str, QLoRAQueueSpec]) -> str:
    """The queue on whose account a GPU of the namespace's is: none where it names one that is not for it."""
    spec = queues.get(queue)
    return queue if spec is None or _is_open_to(namespace, spec) else NO_QUEUE


def standing(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> int:
    """The priority with which a job holds its GPU: no higher than its queue allows, and the least in a queue that is
    not for it. Queue and priority may be changed while it runs."""
    if account(job.metadata.namespace, job.spec.queue, queues) == NO_QUEUE:
        return MIN_PRIORITY
    spec = queues.get(job.spec.queue)
    bound = spec.max_priority if spec is not None else None
    return job.spec.priority if bound is None else min(job.spec.priority, bound)


def _is_open_to(namespace: str, spec: QLoRAQueueSpec) -> bool:
    return not spec.namespaces or namespace in spec.namespaces


def in_order(claims: Sequence[Claim], shares: Mapping[str, float], next_share: Mapping[str, float]) -> list[Claim]:
    """The claims in the order in which they are to be placed.

    `shares` is what each queue has had, `next_share` what one more job adds to that.
    """
    ranked: list[tuple[tuple[int, float, datetime, str], Claim]] = []
    places: dict[str, int] = {}
    for claim in sorted(claims, key=lambda c: (-c.priority, c.created, c.uid)):
        place = places.get(claim.queue, 0)
        places[claim.queue] = place + 1
        share = shares.get(claim.queue, 0.0) + place * next_share.get(claim.queue, 0.0)
        ranked.append(((-claim.priority, share, claim.created, claim.uid), claim))
    return [claim for _, claim in sorted(ranked, key=lambda pair: pair[0])]


def queue_shares(
    drafts: Iterable[Draft], queues: Mapping[str, QLoRAQueueSpec], classes: Sequence[GpuClass], policy: Policy
) -> Mapping[str, float]:
    """GPU time that each queue's jobs have had, by VRAM and weight; a running job counts its minimum run at once."""
    gib = {gpu_class.name: gpu_class.marketed_gib for gpu_class in classes}
    shares: dict[str, float] = {}
    for draft in drafts:
        name = account(draft.job.metadata.namespace, draft.job.spec.queue, queues)
        shares[name] = shares.get(name, 0.0) + _gib_seconds(draft, gib, policy) / _weight(name, queues)
    return shares


def next_shares(
    claims: Iterable[Claim], queues: Mapping[str, QLoRAQueueSpec], classes: Sequence[GpuClass], policy: Policy
) -> Mapping[str, float]:
    """What one more job adds to its queue's share: a minimum run on the smallest card here."""
    smallest_gib = min((c.marketed_gib for c in classes), default=UNKNOWN_CLASS_GIB)
    added = policy.minimum_run_seconds * smallest_gib
    return {claim.queue: added / _weight(claim.queue, queues) for claim in claims}


def created(job: QLoRAJob, now: datetime) -> datetime:
    """When the job was created; a job without that time is the youngest."""
    return job.metadata.creation_timestamp or now


def _weight(name: str, queues: Mapping[str, QLoRAQueueSpec]) -> int:
    spec = queues.get(name)
    return spec.weight if spec else 1


def _gib_seconds(draft: Draft, gib: Mapping[str, int], policy: Policy) -> float:
    status, attempt = draft.status, draft.attempt
    past_class = status.estimate.gpu_class if status.estimate else ""
    had = status.gpu_seconds * gib.get(past_class, UNKNOWN_CLASS_GIB)
    if attempt is None or attempt.stage != "train":
        return had
    since = attempt.start_time or draft.now
    seconds = max((draft.now - since).total_seconds(), policy.minimum_run_seconds)
    return had + seconds * gib.get(attempt.gpu_class or "", UNKNOWN_CLASS_GIB)
