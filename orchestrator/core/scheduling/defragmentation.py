"""Defragmentation: a job that would do with less gives a large card to one that waits for it, where that pays.

While its own class was full a small job has taken a large card. Later a smaller card is free that nobody who waits can
use, and somebody waits for the large one. Then the small job saves a checkpoint and goes on on the smaller card, which
is kept for it while it stops (`Attempt.moves_to`). Rules:

- Nobody is moved for whom he would not yield a turn to: only for a job of no lower priority, of his own queue or, where
  his queue has more of the class than its own, of another that does not borrow; and only one who may change his class
  (`may_change_class`), who is not left alone, and whose queue lets him start again at once.
- Only for the one who would get the large card, and only if it pays: by as much sooner as that one starts, less what
  the steps that the other still has to make take longer on the smaller card, is `defragmentation_gain` times what the
  move costs, or more. It starts sooner by the time until the first of those who hold its classes is expected to end;
  where nobody knows that of any, nobody is moved.
- What a move costs is counted as for a preemption, and the stop with it.

Each of these moves ends on less memory than it began on, so they go round in no circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import Reason
from orchestrator.core.scheduling.admission import Ledger, serve
from orchestrator.core.scheduling.line import RankedLine, fare_of
from orchestrator.core.scheduling.ordering import Claim
from orchestrator.core.scheduling.preemption import Holding, Preemption, Running, would_get
from orchestrator.core.snapshot import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """Who has a GPU and might do with less."""

    estimate: Estimate
    """What it has."""
    smaller: Sequence[Estimate]
    """Where else it could go on, the preferred first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """What is known of who holds the GPUs of a class."""

    occupants: Callable[[str], Mapping[str, Callable[[], Occupant | None]]]
    """By class: who may be moved and may change its class, by key."""
    ends: Callable[[str], Mapping[str, float]]
    """By class: in how many seconds those who hold its GPUs end, by key; of whom nobody knows that, nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """Somebody who could go on on less."""

    holding: Holding
    onto: str
    cost_seconds: float
    """GPU-seconds, where no checkpoint is saved when it is asked for."""
    longer_seconds: float
    """What its steps take longer there."""

    @property
    def rank(self) -> tuple[float, str]:
        """Whoever loses least first."""
        return self.cost_seconds + self.longer_seconds, self.holding.uid


@dataclass(slots=True)
class _Rooms:
    """What one round has found out of each class, once it was asked."""

    cards: Cards
    running: Running
    policy: Policy
    taken: set[str]
    """Whose GPU somebody gets already."""
    _ends: dict[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    _occupants: dict[str, Mapping[str, Callable[[], Occupant | None]]] = field(
        default_factory=dict[str, Mapping[str, Callable[[], Occupant | None]]]
    )

    def gain_seconds(self, claim: Claim) -> float | None:
        """How much sooner the claim would start: after how long the first of its GPUs comes free by itself."""
        found = (
            seconds for name in claim.classes for key, seconds in self._ends_of(name).items() if key not in self.taken
        )
        return min(found, default=None)

    def occupants(self, gpu_class: str) -> Mapping[str, Callable[[], Occupant | None]]:
        """Those who may be moved, by key."""
        if gpu_class not in self._occupants:
            self._occupants[gpu_class] = self.cards.occupants(gpu_class)
        return self._occupants[gpu_class]

    def move(self, holding: Holding, here: Estimate, there: Estimate) -> _Move:
        """What it would lose."""
        left = self._ends_of(holding.gpu_class).get(holding.key, 0.0)
        longer = left * (there.step_seconds / here.step_seconds - 1) if here.step_seconds and there.step_seconds else 0
        cost = holding.lost_seconds + self.policy.stop_cost_seconds
        return _Move(holding=holding, onto=there.gpu_class, cost_seconds=cost, longer_seconds=max(0.0, longer))

    def pays(self, move: _Move, gain_seconds: float) -> bool:
        """Whether it is worth so much."""
        return gain_seconds - move.longer_seconds >= self.policy.defragmentation_gain * move.cost_seconds

    def _ends_of(self, gpu_class: str) -> Mapping[str, float]:
        if gpu_class not in self._ends:
            self._ends[gpu_class] = self.cards.ends(gpu_class)
        return self._ends[gpu_class]


def make_room(
    blocked: RankedLine, running: Running, cards: Cards, chosen: Iterable[Preemption], books: Ledger
) -> Iterator[Preemption]:
    """A move for each blocked claim that has one; `chosen` is who gets a GPU otherwise, which `books` have already.

    Only where there are free GPUs and somebody may change his class does this take more than a look.
    """
    policy = running.policy
    free = {name for name in books.capacity if books.has_gpu(name)}
    if not policy.defragmentation_gain or not free:
        return
    taken = {key for each in chosen for key in (each.finishing, each.victim.key if each.victim is not None else "")}
    rooms = _Rooms(cards, running, policy, taken)
    fares = {fare for fare in blocked.line.by_fare if any(rooms.occupants(name) for name in fare[1])}
    served = set[str]()
    for claim in blocked.in_order_of(fares) if fares else ():
        found = _best(claim, rooms, free, books, blocked, served)
        if found is None:
            fares.discard(fare_of(claim))
            continue
        move, preemption = found
        running.take(claim, move.holding)
        taken.add(move.holding.key)
        books.release(move.holding.queue, move.holding.gpu_class, move.holding.user)
        books.take(claim.queue, move.holding.gpu_class, claim.user)
        books.take(move.holding.queue, move.onto)
        free = {name for name in free if books.has_gpu(name)}
        served.add(claim.key)
        serve(claim, blocked, served, books)
        yield preemption


def _best(
    claim: Claim, rooms: _Rooms, free: set[str], books: Ledger, blocked: RankedLine, served: set[str]
) -> tuple[_Move, Preemption] | None:
    """The move for the claim that costs least, if one pays."""
    gain = rooms.gain_seconds(claim) if free and not books.is_full_for(claim) else None
    if gain is None:
        return None
    moves = (move for estimate in claim.estimates for move in _moves(claim, estimate.gpu_class, rooms, free, books))
    move = min((move for move in moves if rooms.pays(move, gain)), key=lambda each: each.rank, default=None)
    if move is None:
        return None
    preemption = Preemption(
        claim=claim,
        estimate=next(each for each in claim.estimates if each.gpu_class == move.holding.gpu_class),
        victim=replace(move.holding, lost_seconds=move.cost_seconds),
        reason=Reason.DEFRAGMENTED,
        onto=move.onto,
        gain_seconds=gain,
    )
    return (move, preemption) if would_get(preemption, blocked, served, books) else None


def _moves(claim: Claim, gpu_class: str, rooms: _Rooms, free: set[str], books: Ledger) -> Iterator[_Move]:
    """Who could make room on a class."""
    occupants = rooms.occupants(gpu_class)
    for holding in rooms.running.equals(claim, gpu_class, books) if occupants else ():
        look = occupants.get(holding.key)
        occupant = look() if look is not None and _starts_again(holding, books) else None
        if occupant is None:
            continue
        onto = next((e for e in occupant.smaller if _may_have(e.gpu_class, holding, free, books)), None)
        if onto is not None:
            yield rooms.move(holding, occupant.estimate, onto)


def _may_have(gpu_class: str, holding: Holding, free: set[str], books: Ledger) -> bool:
    return gpu_class in free and books.has_room(holding.queue, gpu_class, borrow=True)


def _starts_again(holding: Holding, books: Ledger) -> bool:
    """Whether nobody of its queue, nor of its user's, would have to start before it."""
    return not books.is_strict(holding.queue) and books.limit(holding.queue, holding.user) is None
