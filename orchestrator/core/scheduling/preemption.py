"""Who has to make way: victims for claims that found no room.

Choosing changes nothing: asking a victim to stop comes later. A victim has a lower priority than the claim, or its
queue has more than its guarantee while the claim's has less (reclaim, whatever the priority). What a queue holds within
its guarantee, its nominal quota, is moved by nobody but its own jobs. Every job takes one GPU, so one victim is always
enough. GPUs whose stage is already stopping count as coming free, and no new victim is taken while enough of them are.
Where a queue gives turns (`core/scheduling/turns`), whoever's is over makes way for its equals, too. Whoever has been
moved as often as its eviction budget allows (`core/job/eviction_budget`) is nobody's victim for some time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple

from orchestrator.api.job import MIN_PRIORITY, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import VOLUNTARY_EVICTIONS, Reason
from orchestrator.core.scheduling.admission import Held, Ledger, depends_on, granted, serve
from orchestrator.core.scheduling.line import Kind, RankedLine, kind_of
from orchestrator.core.scheduling.ordering import Claim
from orchestrator.core.snapshot import Policy

Rank = tuple[int, bool, int, float, int, str]
EVICTIONS_BY_US = frozenset(each.value for each in VOLUNTARY_EVICTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A GPU in use."""

    key: str
    uid: str
    queue: str
    user: str
    """Empty where the queue does not tell its users apart."""
    priority: int
    gpu_class: str
    stopping: bool
    run_seconds: float
    """Since its stage was first seen running; before that, since the GPU was given to it."""
    lost_seconds: float
    """GPU-seconds that a stop now would cost: work since the last checkpoint, and a start."""
    remaining_seconds: float | None
    """Until it makes its last step, by its trainer; below zero where it should have; None where it said nothing."""
    was_evicted: bool
    """Whether the job had to make way before."""
    protected_seconds: float = 0.0
    """For so long its eviction budget, which is spent, keeps it where it is (`core/job/eviction_budget`)."""
    turn_is_over: bool = False
    """Whether it makes way for jobs of its queue whose priority is no lower."""
    moves_to: str = ""
    """The class of the GPU that is kept for it while it stops."""


class Standing(NamedTuple):
    """What decides to whom a job yields that may be moved."""

    user: str
    priority: int
    turn_is_over: bool


Movable = defaultdict[str, defaultdict[str, Counter[Standing]]]
"""How many of each standing may be asked to stop, by class and queue."""


def nobody() -> Movable:
    """Before anyone holds anything."""
    return defaultdict(lambda: defaultdict(Counter[Standing]))


def move(movable: Movable, holding: Holding, count: int) -> None:
    """So many more who stand as the holding does."""
    of_class = movable[holding.gpu_class]
    of_queue = of_class[holding.queue]
    standing = Standing(holding.user, holding.priority, holding.turn_is_over)
    of_queue[standing] += count
    if not of_queue[standing]:
        del of_queue[standing]
    if not of_queue:
        del of_class[holding.queue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """A claim that gets its GPU once a stage has stopped."""

    claim: Claim
    estimate: Estimate
    victim: Holding | None
    """Whom to ask to stop; none where enough stages are stopping already, or one ends by itself."""
    reason: Reason = Reason.PREEMPTED
    finishing: str = ""
    """The key of the job that ends by itself, sooner than a move would take."""
    onto: str = ""
    """The class of the free GPU on which the victim goes on (`core/scheduling/defragmentation`)."""
    gain_seconds: float = 0.0
    """How much sooner the claim starts then."""


def lost_seconds(status: QLoRAJobStatus, now: datetime, policy: Policy) -> float:
    """GPU-seconds that stopping the job now would cost, where it does not save when it is asked to.

    A start that no checkpoint came of is lost as far as it has come; after one, the start is lost, and the work since.
    """
    attempt = status.active_attempt
    if attempt is None or attempt.start_time is None:
        return 0.0
    checkpoint, start = status.checkpoint, attempt.start_time
    if checkpoint is None or checkpoint.time <= start:
        return max(0.0, (now - start).total_seconds())
    return max(0.0, (now - checkpoint.time).total_seconds()) + policy.restart_cost_seconds


def ends_by_itself(holding: Holding, policy: Policy) -> bool:
    """Whether the job gives its GPU back sooner than a move takes; one that should have ended long ago does not."""
    left, move = holding.remaining_seconds, policy.restart_cost_seconds + policy.stop_cost_seconds
    return left is not None and -move < left <= move


def turn_to_go(holding: Holding, policy: Policy) -> int:
    """Whom a claim turns to first: to a job that ends before anybody could have stopped, then to those who would have
    to stop. A job that ends later than that, but sooner than a move takes, is the last, and is waited for as well: to
    move it gains nothing, and to wait for it would take longer than to stop another."""
    if not ends_by_itself(holding, policy):
        return 1
    assert holding.remaining_seconds is not None, "by its trainer it ends by itself"
    return 0 if holding.remaining_seconds <= policy.stop_cost_seconds else 2


@dataclass(slots=True)
class Hopeless:
    """The kinds of claims for which nobody may make way, while the GPUs of their classes are held as they are."""

    kinds: set[Kind] = field(default_factory=set[Kind])
    _changed: defaultdict[Kind, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Of kinds that were among them: of which names something has changed since."""

    def forget(self, names: Set[str]) -> None:
        """Something has changed about who holds what of these names is meant (`depends_on`)."""
        if not names:
            return
        for kind in (*self.kinds, *self._changed):
            if not names.isdisjoint(depends_on(kind[0], kind[2], kind[3])):
                self._changed[kind] |= names
                self.kinds.discard(kind)

    def classes_of(self, kind: Kind) -> tuple[str, ...]:
        """Where somebody may be found by now: of a kind that nobody was found for, where something has changed."""
        queue, _, classes, user = kind
        changed = self._changed.get(kind)
        if changed is None or (user and not changed.isdisjoint(depends_on(queue, (), user))):
            return classes
        return tuple(name for name in classes if name in changed)

    def keep(self, kinds: Set[Kind]) -> None:
        """Of others nobody is in line."""
        self.kinds &= kinds
        for kind in self._changed.keys() - kinds:
            del self._changed[kind]

    def add(self, kind: Kind) -> None:
        """Nobody is found for it."""
        self.kinds.add(kind)
        self._changed.pop(kind, None)

    def clear(self) -> None:
        """Of nothing is anything known."""
        self.kinds.clear()
        self._changed.clear()


def reserve_coming_free(blocked: RankedLine, stopping: Iterable[Held], books: Ledger) -> tuple[Preemption, ...]:
    """Hand out what is coming free just as placement will; the books are then as they will be."""
    for held in stopping:
        books.release(*held)
    return tuple(Preemption(claim=claim, estimate=estimate, victim=None) for claim, estimate in granted(blocked, books))


def choose_victims(blocked: RankedLine, running: Running, books: Ledger, hopeless: Hopeless) -> tuple[Preemption, ...]:
    """A victim for each blocked claim that has one, in their order.

    What is `hopeless` by these books already is not looked at again; who is chosen changes the books, and then nothing
    is known any more.
    """
    hopeless.keep(blocked.line.by_kind.keys())
    for kind in blocked.line.by_kind.keys() - hopeless.kinds:
        claim = _first_of(kind, blocked.line.by_kind[kind], books)
        if running.has_one_for(claim, hopeless.classes_of(kind), books):
            break
        hopeless.add(kind)
    else:
        return ()
    chosen = tuple(_evict(blocked, running, books, hopeless.kinds))
    if chosen:
        hopeless.clear()
    return chosen


def _first_of(kind: Kind, claims: Mapping[str, Claim], books: Ledger) -> Claim:
    """One of those who are alike, but that one of a user's GPUs may be kept for the first of them."""
    queue, _, _, user = kind
    head = claims.get(books.heads.get((queue, user), ""))
    return head if head is not None else next(iter(claims.values()))


def _evict(blocked: RankedLine, running: Running, books: Ledger, hopeless: Iterable[Kind]) -> Iterator[Preemption]:
    """The best victim for each claim that has one; claims alike fare alike until somebody of their classes is taken."""
    asleep: set[Kind] = set()
    """Of those nobody is looked at until somebody is taken of what they depend on."""
    by_name: defaultdict[str, set[Kind]] = defaultdict(set)

    def let_sleep(kind: Kind) -> None:
        asleep.add(kind)
        for name in depends_on(kind[0], kind[2], kind[3]):
            by_name[name].add(kind)

    for kind in hopeless:
        let_sleep(kind)
    stuck: set[str] = set()
    """Queues in which nobody goes before the one who is next, and that one found nobody."""
    served: set[str] = set()
    for claim in blocked.in_order():
        if claim.queue in stuck:
            continue
        kind = kind_of(claim)
        is_asleep = kind in asleep
        chosen = None if is_asleep else _choose(claim, running, books, blocked, served)
        if chosen is None:
            if not is_asleep:
                let_sleep(kind)
            if books.is_strict(claim.queue):
                stuck.add(claim.queue)
            continue
        victim = running.take(claim, chosen.victim)
        for name in (
            *depends_on(victim.queue, (victim.gpu_class,), victim.user),
            *depends_on(claim.queue, (), claim.user),
        ):
            asleep -= by_name.pop(name, set())
        books.release(victim.queue, victim.gpu_class, victim.user)
        books.take(claim.queue, victim.gpu_class, claim.user)
        served.add(claim.key)
        serve(claim, blocked, served, books)
        ends = ends_by_itself(victim, running.policy)
        yield replace(chosen, victim=None, finishing=victim.key) if ends else chosen


def _choose(claim: Claim, running: Running, books: Ledger, blocked: RankedLine, served: Set[str]) -> Preemption | None:
    """The claim's victim; nobody whose turn is over where his GPU would be another's."""
    going_on: set[tuple[str, str]] = set()
    while True:
        chosen = running.choose(claim, books, going_on)
        if chosen is None or chosen.reason is not Reason.TURN_ENDED or would_get(chosen, blocked, served, books):
            return chosen
        assert chosen.victim is not None, "it is somebody's turn that is over"
        going_on.add((chosen.victim.gpu_class, chosen.victim.user))


def would_get(chosen: Preemption, blocked: RankedLine, served: Set[str], books: Ledger) -> bool:
    """Whether what the victim gives back is the claim's: only for that one does an equal make way."""
    assert chosen.victim is not None, "nobody makes way who ends by itself"
    after = books.copy()
    after.release(chosen.victim.queue, chosen.victim.gpu_class, chosen.victim.user)
    first = next(granted(blocked.without(served), after), None)
    return first is not None and first[0].key == chosen.claim.key


class Running:
    """Those who may be asked to stop, by class and queue; in each, whoever is to be asked first comes first.

    `holdings` gives those of a class, and is asked only where somebody is to be chosen.
    """

    def __init__(self, movable: Movable, holdings: Callable[[str], Iterable[Holding]], policy: Policy) -> None:
        self.policy = policy
        self._movable, self._holdings = movable, holdings
        self._by_class: dict[str, dict[str, list[Holding]]] = {}
        self._turns: dict[str, int] = {}
        self._over: dict[str, dict[str, None]] = {}
        """The queues with more GPUs of a class than are their own, by class."""
        self._changed: dict[str, set[str]] = {}
        """Queues that have others than when that was found, by class."""

    def has_one_for(self, claim: Claim, classes: Iterable[str], books: Ledger) -> bool:
        """Whether anybody does for the claim, of those of some of its classes, before anyone was chosen."""
        lower = _lower(claim, books)
        if lower is None:
            return False
        return any(
            takes_any or _yields(standing, queue, claim, name, lower)
            for name in classes
            for queue, takes_any, is_full in self._queues(claim, name, books, self._movable[name])
            for standing in self._movable[name][queue]
            if not is_full or standing.user == claim.user
        )

    def choose(self, claim: Claim, books: Ledger, going_on: Set[tuple[str, str]] = frozenset()) -> Preemption | None:
        """The victim that does for the claim and costs least; changes nothing.

        Of the classes and users in `going_on` nobody's turn ends.
        """
        lower = _lower(claim, books)
        if lower is None:
            return None
        best: tuple[Holding, Estimate] | None = None
        least: Rank | None = None
        for preference, estimate in enumerate(claim.estimates):
            for victim in self._of_class(claim, estimate.gpu_class, lower, books, going_on):
                rank = self._rank(victim, claim.queue, preference)
                if least is None or rank < least:
                    best, least = (victim, estimate), rank
        if best is None:
            return None
        victim, estimate = best
        return Preemption(claim=claim, estimate=estimate, victim=victim, reason=_reason(claim, victim, lower))

    def equals(self, claim: Claim, gpu_class: str, books: Ledger) -> Iterator[Holding]:
        """Those of no higher priority whose GPU would be the claim's, if they needed none."""
        spec, by_queue = books.quotas.queues.get(claim.queue), self._of(gpu_class)
        if spec is None or spec.preemption == "Never":
            return
        for queue, _, is_full in self._queues(claim, gpu_class, books, by_queue):
            if not is_full:
                yield from (each for each in by_queue[queue] if each.priority <= claim.priority)

    def take(self, claim: Claim, victim: Holding | None) -> Holding:
        """The victim, which is no one's to choose any more; the claim's queue gets what it has."""
        assert victim is not None, "chosen from here"
        self._changed.setdefault(victim.gpu_class, set()).update((claim.queue, victim.queue))
        self._by_class[victim.gpu_class][victim.queue].remove(victim)
        return victim

    def _of(self, gpu_class: str) -> Mapping[str, list[Holding]]:
        """Those of a class, by queue."""
        found = self._by_class.get(gpu_class)
        if found is None:
            found = self._by_class[gpu_class] = {}
            here = self._holdings(gpu_class)
            may_move = (each for each in here if not (each.stopping or is_left_alone(each, self.policy)))
            for holding in sorted(may_move, key=lambda each: self._rank(each, each.queue, 0)):
                found.setdefault(holding.queue, []).append(holding)
        return found

    def _of_class(
        self, claim: Claim, gpu_class: str, lower: int, books: Ledger, going_on: Set[tuple[str, str]]
    ) -> Iterator[Holding]:
        """Of each queue the first that would do; `lower` is what a victim's priority has to be below."""
        by_queue = self._of(gpu_class)
        for queue, takes_any, is_full in self._queues(claim, gpu_class, books, by_queue):
            for each in by_queue[queue]:
                if is_full and each.user != claim.user:
                    continue
                if takes_any or _yields(each, queue, claim, gpu_class, lower, going_on):
                    yield each
                    break

    def _queues(
        self, claim: Claim, gpu_class: str, books: Ledger, here: Container[str]
    ) -> Iterator[tuple[str, bool, bool]]:
        """The queues of which somebody may do, whether anybody does, and whether only the claim's user's own do.

        Only his own jobs make way for a user who holds as many GPUs as he may.
        """
        is_full = books.is_full_for(claim)
        if is_full and books.is_full_for(claim, coming_free=1):
            return
        if claim.queue in here and _makes_room(claim, claim.queue, gpu_class, books):
            yield claim.queue, False, is_full
        if is_full:
            return
        spec, owns = books.quotas.queues.get(claim.queue), books.is_within_nominal(claim.queue, gpu_class)
        if spec is None or (spec.quotas and not owns):  # others move for its own alone
            return
        room: dict[bool, bool] = {}
        for queue in self._over_guarantee(gpu_class, books):
            if queue == claim.queue:
                continue
            is_of_cohort = books.quotas.cohort(queue, gpu_class) == spec.cohort
            if is_of_cohort not in room:
                room[is_of_cohort] = _makes_room(claim, queue, gpu_class, books)
            if room[is_of_cohort]:
                yield queue, owns, False

    def _over_guarantee(self, gpu_class: str, books: Ledger) -> Iterable[str]:
        """The queues with more GPUs of the class than are their own, of those that anybody of may be moved."""
        here, over = self._movable[gpu_class], self._over.get(gpu_class)
        if over is None:
            over = self._over[gpu_class] = dict.fromkeys(q for q in here if books.is_over_guarantee(q, gpu_class))
        for queue in self._changed.pop(gpu_class, ()):
            over.pop(queue, None)
            if queue in here and books.is_over_guarantee(queue, gpu_class):
                over[queue] = None
        return over

    def _rank(self, victim: Holding, queue: str, preference: int) -> Rank:
        """Least first: about to end, of another queue, lowest priority, fewest GPU-seconds lost, preferred class.

        Whoever has more than its own, or less priority, moves nobody in his turn: somebody more important would, and
        then two jobs have been moved for one. Whoever is lost least has often just begun: what keeps one job from being
        moved again and again is its cool-down (`python -m benchmarks.policies`).
        """
        turn = self._turns.get(victim.key)
        if turn is None:
            turn = self._turns[victim.key] = turn_to_go(victim, self.policy)
        return turn, victim.queue == queue, victim.priority, victim.lost_seconds, preference, victim.uid


def _lower(claim: Claim, books: Ledger) -> int | None:
    """What a victim's priority has to be below; None where the claim's queue is gone."""
    spec = books.quotas.queues.get(claim.queue)
    if spec is None:
        return None
    return claim.priority if spec.preemption == "LowerPriority" else MIN_PRIORITY


def _yields(
    who: Holding | Standing,
    queue: str,
    claim: Claim,
    gpu_class: str,
    lower: int,
    going_on: Set[tuple[str, str]] = frozenset(),
) -> bool:
    """Whether somebody of a queue makes way for a claim by priority, or because his turn is over."""
    is_equal = queue == claim.queue and who.priority <= claim.priority
    is_over = who.turn_is_over and (gpu_class, who.user) not in going_on
    return who.priority < lower or (is_equal and is_over)


def _reason(claim: Claim, victim: Holding, lower: int) -> Reason:
    if victim.priority < lower:
        return Reason.PREEMPTED
    return Reason.TURN_ENDED if victim.queue == claim.queue else Reason.QUOTA_RECLAIMED


def _makes_room(claim: Claim, queue: str, gpu_class: str, books: Ledger) -> bool:
    """Whether the claim would have room if the queue had one GPU of the class less.

    A claim that would borrow moves nobody but its own queue's jobs: otherwise the owner would take the GPU back.
    """
    return books.has_room(claim.queue, gpu_class, borrow=queue == claim.queue, without=queue)


def is_left_alone(holding: Holding, policy: Policy) -> bool:
    """Whether a job that had to make way lately, or as often as it may, is no one's to choose."""
    is_cooling_down = holding.was_evicted and holding.run_seconds < policy.preemption_cooldown_seconds
    return is_cooling_down or holding.protected_seconds > 0
