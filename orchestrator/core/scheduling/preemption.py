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

from orchestrator.api.job import MIN_PRIORITY, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import Reason
from orchestrator.core.scheduling.admission import Ledger, granted
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
    return (*reserved, *_evict(left, _Running(holdings, policy), books))


def _reserve_coming_free(blocked: Sequence[Claim], books: Ledger) -> Iterator[Preemption]:
    """Hand out what is coming free just as placement will."""
    for claim, estimate in granted(blocked, books):
        yield Preemption(claim=claim, estimate=estimate, victim=None)


def _evict(claims: Iterable[Claim], running: _Running, books: Ledger) -> Iterator[Preemption]:
    """The best victim for each claim that has one; claims alike fare alike until somebody is chosen."""
    hopeless: set[tuple[str, int, tuple[str, ...]]] = set()
    for claim in claims:
        kind = claim.queue, claim.priority, claim.classes
        if kind in hopeless:
            continue
        chosen = running.choose(claim, books)
        if chosen is None:
            hopeless.add(kind)
            continue
        hopeless.clear()
        victim = running.take(chosen.victim)
        books.release(victim.queue, victim.gpu_class)
        books.take(claim.queue, victim.gpu_class)
        yield chosen


class _Running:
    """Those who may be asked to stop, by class and queue; in each, whoever is to be asked first comes first."""

    def __init__(self, holdings: Iterable[Holding], policy: Policy) -> None:
        self._policy = policy
        self._by_class: dict[str, dict[str, list[Holding]]] = {}
        may_move = (each for each in holdings if not (each.stopping or _is_cooling_down(each, policy)))
        for holding in sorted(may_move, key=lambda each: self._rank(each, 0)):
            self._by_class.setdefault(holding.gpu_class, {}).setdefault(holding.queue, []).append(holding)
        self._over: dict[str, list[str]] = {}
        """The queues with more GPUs of a class than are their own, by class, until somebody of it is taken."""

    def choose(self, claim: Claim, books: Ledger) -> Preemption | None:
        """The victim that does for the claim and costs least; changes nothing."""
        spec = books.quotas.queues.get(claim.queue)
        if spec is None:
            return None
        lower = claim.priority if spec.preemption == "LowerPriority" else MIN_PRIORITY
        best: tuple[Holding, Estimate] | None = None
        least: tuple[bool, float, int, int, str] | None = None
        for preference, estimate in enumerate(claim.estimates):
            for victim in self._of_class(claim, estimate.gpu_class, lower, books):
                rank = self._rank(victim, preference)
                if least is None or rank < least:
                    best, least = (victim, estimate), rank
        if best is None:
            return None
        victim, estimate = best
        reason = Reason.PREEMPTED if victim.priority < lower else Reason.QUOTA_RECLAIMED
        return Preemption(claim=claim, estimate=estimate, victim=victim, reason=reason)

    def take(self, victim: Holding | None) -> Holding:
        """The victim, which is no one's to choose any more."""
        assert victim is not None, "chosen from here"
        self._over.pop(victim.gpu_class, None)
        self._by_class[victim.gpu_class][victim.queue].remove(victim)
        return victim

    def _of_class(self, claim: Claim, gpu_class: str, lower: int, books: Ledger) -> Iterator[Holding]:
        """Of each queue the first that would do; `lower` is what a victim's priority has to be below."""
        by_queue = self._by_class.get(gpu_class, {})
        if gpu_class not in self._over:
            self._over[gpu_class] = [queue for queue in by_queue if books.is_over_guarantee(queue, gpu_class)]
        foreign = (queue for queue in self._over[gpu_class] if queue != claim.queue)
        owns = books.is_within_nominal(claim.queue, gpu_class)
        room: dict[tuple[bool, str | None], bool] = {}
        for queue in (claim.queue, *foreign):
            takes_any = owns and queue != claim.queue
            victim = next((each for each in by_queue.get(queue, ()) if takes_any or each.priority < lower), None)
            if victim is None:
                continue
            kind = queue == claim.queue, books.quotas.cohort(queue, gpu_class)
            if kind not in room:
                room[kind] = _makes_room(claim, victim, books)
            if room[kind]:
                yield victim

    def _rank(self, victim: Holding, preference: int) -> tuple[bool, float, int, int, str]:
        """Least first: past its minimum run, fewest GPU-seconds lost, lowest priority, the claim's preferred class."""
        too_young = victim.run_seconds < self._policy.minimum_run_seconds
        return too_young, victim.lost_seconds, victim.priority, preference, victim.uid


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
