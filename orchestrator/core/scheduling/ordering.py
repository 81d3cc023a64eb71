"""Whose turn it is: what the order of waiting jobs (`core/scheduling/line`) rests on.

Priority first, then fair share between queues, then age, then uid. A queue's share is its GPU time, weighted by
the card's VRAM and divided by the queue's weight. The k-th job in a queue's own line counts as if those before it
had started, so queues take turns even when nobody has run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

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
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND, MICROSECONDS = timedelta(microseconds=1), 1_000_000


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


def created(job: QLoRAJob, now: datetime) -> datetime:
    """When the job was created; a job without that time is the youngest."""
    return job.metadata.creation_timestamp or now


def weight(name: str, queues: Mapping[str, QLoRAQueueSpec]) -> int:
    """The queue's weight; one that is gone has the least."""
    spec = queues.get(name)
    return spec.weight if spec else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """GPU time of one job, by VRAM, at any time: `had + gib x (now - since)`, in GiB-microseconds.

    Whole numbers, so that a sum over jobs is the same in whatever order they came and went.
    """

    had: int = 0
    gib: int = 0
    """Of the card that it has, once it has run for its minimum: until then that counts at once, in `had`."""
    since: int = 0
    """In microseconds of `microseconds`."""

    @classmethod
    def of(cls, draft: Draft, gib: Mapping[str, int], policy: Policy) -> Usage:
        """What the job has had until its draft's `now`, and goes on to have."""
        status, attempt = draft.status, draft.attempt
        if attempt is None and not status.gpu_seconds:
            return NO_USAGE
        past_class = status.estimate.gpu_class if status.estimate else ""
        had = round(status.gpu_seconds * MICROSECONDS) * gib.get(past_class, UNKNOWN_CLASS_GIB)
        if attempt is None or attempt.stage != "train":
            return cls(had=had)
        card_gib = gib.get(attempt.gpu_class or "", UNKNOWN_CLASS_GIB)
        minimum = round(policy.minimum_run_seconds * MICROSECONDS)
        since = microseconds(attempt.start_time or draft.now)
        if microseconds(draft.now) - since < minimum:
            return cls(had=had + minimum * card_gib)
        return cls(had=had, gib=card_gib, since=since)


NO_USAGE = Usage()


@dataclass(slots=True, kw_only=True)
class Shares:
    """What each queue has had, kept up to date job by job."""

    queues: Mapping[str, QLoRAQueueSpec]
    next_gib: int
    """Of the smallest card here."""
    minimum: int
    """Microseconds that a job counts for at once."""
    _sums: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """By queue: what was had, GiB that run, and the sum of `gib x since`."""

    @classmethod
    def empty(cls, queues: Mapping[str, QLoRAQueueSpec], classes: Iterable[GpuClass], policy: Policy) -> Shares:
        """Nobody has had anything."""
        smallest_gib = min((c.marketed_gib for c in classes), default=UNKNOWN_CLASS_GIB)
        return cls(queues=queues, next_gib=smallest_gib, minimum=round(policy.minimum_run_seconds * MICROSECONDS))

    def count(self, queue: str, usage: Usage, times: Literal[1, -1]) -> None:
        """A job's usage comes to the queue's, or goes."""
        sums = self._sums.setdefault(queue, [0, 0, 0])
        sums[0] += times * usage.had
        sums[1] += times * usage.gib
        sums[2] += times * usage.gib * usage.since

    def at(self, now: datetime) -> Mapping[str, float]:
        """GiB-microseconds of each queue over its weight."""
        present = microseconds(now)
        return {
            name: (had + gib * present - started) / weight(name, self.queues)
            for name, (had, gib, started) in self._sums.items()
        }

    def step(self, queue: str) -> float:
        """What one more job adds to its queue's share: a minimum run on the smallest card here."""
        return self.minimum * self.next_gib / weight(queue, self.queues)


def microseconds(time: datetime) -> int:
    """Since EPOCH, exactly."""
    return (time - EPOCH) // MICROSECOND
