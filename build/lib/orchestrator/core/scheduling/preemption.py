"""Who has to make way: victims for claims that found no room.

Choosing changes nothing: asking a victim to stop comes later. A victim has a lower priority than the claim, or its
queue has more than its guarantee while the claim's has less (reclaim, whatever the priority). What a queue holds within
its guarantee, its nominal quota, is moved by nobody but its own jobs. Every job takes one GPU, so one victim is always
enough. GPUs whose stage is already stopping count as coming free, and no new victim is taken while enough of them are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.api.job import QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import Reason
from orchestrator.core.scheduling.admission import GROUNDS, Ledger, first_with_room
from orchestrator.core.scheduling.ordering import Claim
from orchestrator.core.snapshot import Policy

EVICTIONS_BY_US = (Reason.PREEMPTED, Reason.QUOTA_RECLAIMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A GPU in use."""

    key: str
    uid: str
    queue: str
    priority: int
    gpu_class: str
    stopping: bool
    run_seconds: float
    """Since its stage was first seen running; before that, since the GPU was given to it."""
    lost_seconds: float
    """GPU-seconds that a stop now would cost: since the last checkpoint, plus the restart."""
    was_evicted: bool
    """Whether the job had to make way before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """A claim that gets its GPU once a stage has stopped."""

    claim: Claim
    estimate: Estimate
    victim: Holding | None
    """Whom to ask to stop; none where enough stages are stopping already."""
    reason: Reason = Reason.PREEMPTED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One victim that would do for a claim."""

    victim: Holding
    estimate: Estimate
    reason: Reason


def lost_seconds(status: QLoRAJobStatus, now: datetime, policy: Policy) -> float:
    """GPU-seconds that stopping the job now would cost."""
    attempt = status.active_attempt
    if attempt is None or attempt.start_time is None:
        return policy.restart_cost_seconds
    durable = attempt.start_time
    if status.checkpoint is not None:
        durable = max(durable, status.checkpoint.time)
    return max(0.0, (now - durable).total_seconds()) + policy.restart_cost_seconds


def choose_victims(
    blocked: Sequence[Claim], holdings: Sequence[Holding], ledger: Ledger, policy: Policy
) -> tuple[Preemption, ...]:
    """What each blocked claim may count on, in their order: a GPU that is coming free, or a victim's."""
    books = ledger.copy()
    for holding in holdings:
        if holding.stopping:
            books.release(holding.queue, holding.gpu_class)
    reserved = tuple(_reserve_coming_free(blocked, books))
    served = {preemption.claim.key for preemption in reserved}
    left = [claim for claim in blocked if claim.key not in served]
    return (*reserved, *_evict(left, [h for h in holdings if not h.stopping], books, policy))


def _reserve_coming_free(blocked: Sequence[Claim], books: Ledger) -> Iterator[Preemption]:
    """Hand out what is coming free just as placement will."""
    served: set[str] = set()
    for ground in GROUNDS:
        for claim in blocked:
            estimate = first_with_room(claim, books, ground) if claim.key not in served else None
            if estimate is not None:
                served.add(claim.key)
                books.take(claim.queue, estimate.gpu_class)
                yield Preemption(claim=claim, estimate=estimate, victim=None)


def _evict(claims: Iterable[Claim], running: list[Holding], books: Ledger, policy: Policy) -> Iterator[Preemption]:
    """The best victim for each claim that has one; claims alike fare alike until somebody is chosen."""
    hopeless: set[tuple[str, int, tuple[str, ...]]] = set()
    for claim in claims:
        kind = (claim.queue, claim.priority, tuple(estimate.gpu_class for estimate in claim.estimates))
        if kind in hopeless:
            continue
        options = _options(claim, running, books, policy)
        best = min(options, key=lambda option: _rank(option, claim, policy), default=None)
        if best is None:
            hopeless.add(kind)
            continue
        hopeless.clear()
        running.remove(best.victim)
        books.release(best.victim.queue, best.victim.gpu_class)
        books.take(claim.queue, best.estimate.gpu_class)
        yield Preemption(claim=claim, estimate=best.estimate, victim=best.victim, reason=best.reason)


def _options(claim: Claim, running: Iterable[Holding], books: Ledger, policy: Policy) -> list[_Option]:
    by_class = {estimate.gpu_class: estimate for estimate in claim.estimates}
    options: list[_Option] = []
    for holding in running:
        estimate = by_class.get(holding.gpu_class)
        if estimate is None or _is_cooling_down(holding, policy):
            continue
        reason = _may_evict(claim, holding, books)
        if reason is not None and _makes_room(claim, holding, books):
            options.append(_Option(victim=holding, estimate=estimate, reason=reason))
    return options


def _may_evict(claim: Claim, holding: Holding, books: Ledger) -> Reason | None:
    """The ground on which the claim may move the holding, if any."""
    spec = books.queues.get(claim.queue)
    if spec is None:
        return None
    is_foreign = holding.queue != claim.queue
    if is_foreign and not books.is_over_guarantee(holding.queue, holding.gpu_class):
        return None
    if spec.preemption == "LowerPriority" and holding.priority < claim.priority:
        return Reason.PREEMPTED
    owns = books.is_within_nominal(claim.queue, holding.gpu_class)
    return Reason.QUOTA_RECLAIMED if is_foreign and owns else None


def _makes_room(claim: Claim, holding: Holding, books: Ledger) -> bool:
    """Whether the claim would have room without the holding.

    A claim that would borrow moves nobody but its own queue's jobs: otherwise the owner would take the GPU back.
    """
    books.release(holding.queue, holding.gpu_class)
    room = books.has_room(claim.queue, holding.gpu_class, borrow=holding.queue == claim.queue)
    books.take(holding.queue, holding.gpu_class)
    return room


def _is_cooling_down(holding: Holding, policy: Policy) -> bool:
    return holding.was_evicted and holding.run_seconds < policy.preemption_cooldown_seconds


def _rank(option: _Option, claim: Claim, policy: Policy) -> tuple[bool, float, int, int, str]:
    """Least first: past its minimum run, fewest GPU-seconds lost, lowest priority, the claim's preferred class, uid."""
    victim = option.victim
    preference = next(i for i, e in enumerate(claim.estimates) if e.gpu_class == victim.gpu_class)
    too_young = victim.run_seconds < policy.minimum_run_seconds
    return too_young, victim.lost_seconds, victim.priority, preference, victim.uid
