"""Who gets a free GPU now: admission over the books of GPUs and quotas.

Every job takes one GPU, so this is EASY backfill without a clock: the claims are walked in order, each takes the first
of its classes with room, and a claim that finds none leaves nothing behind that it could have used. GPUs and quotas are
of one class each, and come back together, so who goes on meanwhile delays nobody before him; only a bound on a user's
GPUs is of all classes, so one of those is kept for the user's next job. Claims within their
queue's guarantee, its nominal quota, go first; then those of queues without any quota, and borrowers last: whoever owns
a quota need not wait for someone who uses it meanwhile, whatever the priority.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueueSpec, Quota
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.core.scheduling.line import Fare, RankedLine, fare_of
from orchestrator.core.scheduling.ordering import Claim

Held = tuple[str, str, str]
"""Queue and class of a GPU in use, and the user where the queue tells its users apart."""
Ground = Literal["guarantee", "no quota", "loan"]
"""What a queue takes a GPU on: its nominal quota, that nothing bounds it, or what its cohort does not use."""
GROUNDS: tuple[Ground, ...] = ("guarantee", "no quota", "loan")
"""In the order in which they are served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A claim and what it got."""

    claim: Claim
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What queues may use, looked up thousands of times in one decision."""

    queues: Mapping[str, QLoRAQueueSpec]
    of_queue: Mapping[tuple[str, str], Quota]
    """By queue and class."""
    of_cohort: Mapping[tuple[str, str], int]
    """The nominal quotas of a cohort's queues together, by cohort and class."""

    @classmethod
    def of(cls, queues: Mapping[str, QLoRAQueueSpec]) -> Quotas:
        """Those of the queues by name."""
        of_queue: dict[tuple[str, str], Quota] = {}
        of_cohort: dict[tuple[str, str], int] = {}
        for name, spec in queues.items():
            for quota in spec.quotas:
                of_queue[name, quota.gpu_class] = quota
                if spec.cohort is not None:
                    key = spec.cohort, quota.gpu_class
                    of_cohort[key] = of_cohort.get(key, 0) + quota.nominal
        return cls(queues=queues, of_queue=of_queue, of_cohort=of_cohort)

    def cohort(self, queue: str, gpu_class: str) -> str | None:
        """The cohort that a queue's GPUs of the class count in, if any."""
        return self.queues[queue].cohort if (queue, gpu_class) in self.of_queue else None


@dataclass(slots=True, kw_only=True)
class Ledger:
    """GPUs by class, and who has how many of them. Local to one decision."""

    capacity: Mapping[str, int]
    quotas: Quotas
    used: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """GPUs taken, by queue and class."""
    used_in_cohort: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """GPUs taken by queues that have a quota for their class, by cohort and class."""
    taken: dict[str, int] = field(default_factory=dict[str, int])
    """GPUs taken, by class."""
    by_user: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """GPUs taken, by queue and user, of queues that tell their users apart."""
    heads: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    """Who is next of a user whose GPUs are bounded, and waits, by queue and user: one of those is kept for it."""

    def take(self, queue: str, gpu_class: str, user: str = "") -> None:
        """A GPU of the class goes to the queue."""
        self._add(queue, gpu_class, user, 1)

    def release(self, queue: str, gpu_class: str, user: str = "") -> None:
        """The queue gives a GPU of the class back."""
        self._add(queue, gpu_class, user, -1)

    def copy(self) -> Ledger:
        """The same books, to be changed independently."""
        return replace(
            self,
            used=dict(self.used),
            used_in_cohort=dict(self.used_in_cohort),
            taken=dict(self.taken),
            by_user=dict(self.by_user),
            heads=dict(self.heads),
        )

    def is_strict(self, queue: str) -> bool:
        """Whether nobody of the queue goes before the one who is next."""
        spec = self.quotas.queues.get(queue)
        return spec is not None and spec.queueing_strategy == "StrictFIFO"

    def is_full(self, queue: str, user: str, coming_free: int = 0) -> bool:
        """Whether a user holds as many of the queue's GPUs as it lets one have."""
        limit = self.limit(queue, user)
        return limit is not None and self.by_user.get((queue, user), 0) - coming_free >= limit

    def is_full_for(self, claim: Claim, coming_free: int = 0) -> bool:
        """The same, but for the one that is kept for another job of the user, which is next."""
        is_kept = self.heads.get((claim.queue, claim.user), claim.key) != claim.key
        return self.is_full(claim.queue, claim.user, coming_free - is_kept)

    def limit(self, queue: str, user: str) -> int | None:
        """How many of the queue's GPUs a user may have; None where that is not bounded."""
        spec = self.quotas.queues.get(queue) if user else None
        return spec.per_user.running if spec is not None else None

    def may_come(self, claim: Claim) -> bool:
        """Whether room for the claim can come, but for its user's bound, when others give back what they hold."""
        return any(self.capacity.get(name, 0) > 0 and self._may_have(claim.queue, name) for name in claim.classes)

    def has_room_for(self, queue: str, gpu_class: str, ground: Ground) -> bool:
        """Whether the queue may take a GPU of the class now, on that ground."""
        if ground == "guarantee" and not self.is_within_nominal(queue, gpu_class):
            return False
        return self.has_room(queue, gpu_class, borrow=ground == "loan")

    def has_room(self, queue: str, gpu_class: str, *, borrow: bool, without: str | None = None) -> bool:
        """Whether the queue may take a GPU of the class now, or could if one queue had one less of them."""
        has_gpu = self.has_gpu(gpu_class, 0 if without is None else 1)
        return has_gpu and self.has_quota(queue, gpu_class, borrow=borrow, without=without)

    def has_gpu(self, gpu_class: str, coming_free: int = 0) -> bool:
        """Whether a GPU of the class is free."""
        return self.taken.get(gpu_class, 0) - coming_free < self.capacity.get(gpu_class, 0)

    def has_quota(self, queue: str, gpu_class: str, *, borrow: bool, without: str | None = None) -> bool:
        """Whether the queue's quota, or with `borrow` its cohort's, allows one more GPU of the class."""
        spec = self.quotas.queues.get(queue)
        if spec is None or not spec.quotas:
            return True
        quota = self.quotas.of_queue.get((queue, gpu_class))
        if quota is None:
            return False
        used = self.used.get((queue, gpu_class), 0) - (without == queue)
        if used < quota.nominal:
            return spec.cohort is None or self._cohort_has_room(spec.cohort, gpu_class, without)
        if not borrow or spec.cohort is None or _at_borrowing_limit(quota, used):
            return False
        return self._cohort_has_room(spec.cohort, gpu_class, without)

    def lent(self) -> Mapping[tuple[str, str], int]:
        """What queues hold beyond their own, by queue and class, laid on those of their cohort that leave some, in the
        order of their names."""
        left: dict[tuple[str, str], int] = {}
        beyond: dict[tuple[str, str], int] = {}
        for (queue, gpu_class), quota in sorted(self.quotas.of_queue.items()):
            cohort = self.quotas.cohort(queue, gpu_class)
            if cohort is not None:
                rest = quota.nominal - self.used.get((queue, gpu_class), 0)
                left[queue, gpu_class] = max(0, rest)
                beyond[cohort, gpu_class] = beyond.get((cohort, gpu_class), 0) + max(0, -rest)
        found: dict[tuple[str, str], int] = {}
        for (queue, gpu_class), rest in left.items():
            key = self.quotas.cohort(queue, gpu_class) or "", gpu_class
            found[queue, gpu_class] = min(rest, beyond[key])
            beyond[key] -= found[queue, gpu_class]
        return found

    def is_over_guarantee(self, queue: str, gpu_class: str) -> bool:
        """Whether the queue has more GPUs of the class than are its own; without a quota, or gone, it owns none."""
        quota = self.quotas.of_queue.get((queue, gpu_class))
        return quota is None or self.used.get((queue, gpu_class), 0) > quota.nominal

    def is_within_nominal(self, queue: str, gpu_class: str) -> bool:
        """Whether one more GPU of the class would still be the queue's own."""
        quota = self.quotas.of_queue.get((queue, gpu_class))
        return quota is not None and self.used.get((queue, gpu_class), 0) < quota.nominal

    def _may_have(self, queue: str, gpu_class: str) -> bool:
        """Whether quota allows the queue any GPU of the class."""
        spec, quota = self.quotas.queues.get(queue), self.quotas.of_queue.get((queue, gpu_class))
        if spec is None or not spec.quotas:
            return True
        may_borrow = spec.cohort is not None and self.quotas.of_cohort.get((spec.cohort, gpu_class), 0) > 0
        return quota is not None and (quota.nominal > 0 or (may_borrow and not _at_borrowing_limit(quota, 0)))

    def _cohort_has_room(self, cohort: str, gpu_class: str, without: str | None) -> bool:
        coming_free = without is not None and self.quotas.cohort(without, gpu_class) == cohort
        used = self.used_in_cohort.get((cohort, gpu_class), 0) - coming_free
        return used < self.quotas.of_cohort.get((cohort, gpu_class), 0)

    def _add(self, queue: str, gpu_class: str, user: str, count: int) -> None:
        if user:
            self.by_user[queue, user] = self.by_user.get((queue, user), 0) + count
        self.used[queue, gpu_class] = self.used.get((queue, gpu_class), 0) + count
        self.taken[gpu_class] = self.taken.get(gpu_class, 0) + count
        cohort = self.quotas.cohort(queue, gpu_class)
        if cohort is not None:
            self.used_in_cohort[cohort, gpu_class] = self.used_in_cohort.get((cohort, gpu_class), 0) + count


def depends_on(queue: str, classes: Iterable[str], user: str) -> tuple[str, ...]:
    """What a job's chances change with: who holds GPUs of its classes, and of its user's."""
    return (*classes, f"{queue}/{user}") if user else tuple(classes)


def place(line: RankedLine, ledger: Ledger) -> tuple[Placement, ...]:
    """Give free GPUs to claims in order; the ledger then holds them."""
    return tuple(Placement(claim=claim, estimate=estimate) for claim, estimate in granted(line, ledger))


def granted(line: RankedLine, ledger: Ledger) -> Iterator[tuple[Claim, Estimate]]:
    """The claims that find room, each with the first of its classes that has some, which the ledger then holds.

    Room only gets less on the way, so where one claim found none, those alike need not look.
    """
    ledger.heads = heads(line, ledger)
    for ground in GROUNDS:
        served: set[str] = set()
        hopeful = _with_room(line.line.by_fare, ledger, ground)
        for claim in line.in_order_of(hopeful) if hopeful else ():
            fare = fare_of(claim)
            if fare not in hopeful:
                continue
            estimate = _first_with_room(claim, ledger, ground)
            if estimate is None:
                hopeful -= (
                    {other for other in hopeful if other[0] == claim.queue} if ledger.is_strict(claim.queue) else {fare}
                )
                continue
            ledger.take(claim.queue, estimate.gpu_class, claim.user)
            served.add(claim.key)
            serve(claim, line, served, ledger)
            yield claim, estimate
        line = line.without(served)


def heads(line: RankedLine, ledger: Ledger) -> dict[tuple[str, str], str]:
    """Who is next of each user whose GPUs are bounded, by queue and user.

    It is the first for whom room can come: nobody waits for a job that waits for something else.
    """
    users = ((queue, user) for queue, theirs in line.line.by_user.items() for user in theirs)
    found = ((of, _head(*of, line, ledger)) for of in users if ledger.limit(*of) is not None)
    return {of: head for of, head in found if head is not None}


def _head(queue: str, user: str, line: RankedLine, ledger: Ledger) -> str | None:
    keys = (place[-1] for place in line.line.by_user[queue].get(user, ()) if place[-1] not in line.absent)
    return next((key for key in keys if ledger.may_come(line.line.claims[key])), None)


def serve(claim: Claim, line: RankedLine, served: Set[str], ledger: Ledger) -> None:
    """The claim waits no more, nor do others who are served, and another of its user's is next, if it was."""
    if ledger.heads.get((claim.queue, claim.user)) == claim.key:
        head = _head(claim.queue, claim.user, line.without(served), ledger)
        del ledger.heads[claim.queue, claim.user]
        if head is not None:
            ledger.heads[claim.queue, claim.user] = head


def _with_room(fares: Iterable[Fare], ledger: Ledger, ground: Ground) -> set[Fare]:
    """Those of which a claim would find room now, and all of a queue where one has to wait for the other."""
    free = {name for name in ledger.capacity if ledger.has_gpu(name)}
    if not free:
        return set()
    found = {
        (queue, classes, user)
        for queue, classes, user in fares
        if not free.isdisjoint(classes)
        and not ledger.is_full(queue, user)
        and any(ledger.has_room_for(queue, name, ground) for name in classes)
    }
    strict = {fare[0] for fare in found if ledger.is_strict(fare[0])}
    return found | {fare for fare in fares if fare[0] in strict} if strict else found


def _first_with_room(claim: Claim, ledger: Ledger, ground: Ground) -> Estimate | None:
    if ledger.is_full_for(claim):
        return None
    return next((e for e in claim.estimates if ledger.has_room_for(claim.queue, e.gpu_class, ground)), None)


def why_blocked(claim: Claim, ledger: Ledger) -> Refusal:
    """Why a claim got nothing: its quota allows no class, or no GPU of an allowed class is free."""
    names = claim.classes
    if ledger.is_full_for(claim):
        return Refusal(reason=Reason.USER_LIMIT, message=_user_sentence(claim, ledger))
    if ledger.is_strict(claim.queue) and any(ledger.has_room(claim.queue, name, borrow=True) for name in names):
        message = f"queue {claim.queue} is StrictFIFO, and the job that is next waits; waits for that one to start"
        return Refusal(reason=Reason.WAITING_IN_ORDER, message=message)
    within_quota = [name for name in names if ledger.has_quota(claim.queue, name, borrow=True)]
    if not within_quota:
        return Refusal(reason=Reason.WAITING_FOR_QUOTA, message=_quota_sentence(claim.queue, names, ledger))
    return Refusal(reason=Reason.WAITING_FOR_GPU, message=_gpu_sentence(within_quota, ledger))


def _user_sentence(claim: Claim, ledger: Ledger) -> str:
    limit = ledger.limit(claim.queue, claim.user)
    if not ledger.is_full(claim.queue, claim.user):
        return (
            f"queue {claim.queue} lets a namespace hold {limit} GPUs (perUser.running), and the last one that "
            f"{claim.user} may have is kept for its job that is next; waits for that one to start, or raise the limit"
        )
    return (
        f"queue {claim.queue} lets a namespace hold {limit} GPUs (perUser.running), and {claim.user} does; waits for "
        "one of its jobs to end, or raise the limit"
    )


def _at_borrowing_limit(quota: Quota, used: int) -> bool:
    return quota.borrowing_limit is not None and used >= quota.nominal + quota.borrowing_limit


def _quota_sentence(queue: str, names: Iterable[str], ledger: Ledger) -> str:
    spec = ledger.quotas.queues[queue]
    told: list[str] = []
    for name in names:
        quota = ledger.quotas.of_queue.get((queue, name))
        told.append(f"{ledger.used.get((queue, name), 0)} of {quota.nominal} {name}" if quota else f"no {name}")
    cohort = f", and cohort {spec.cohort} has none to lend" if spec.cohort else ""
    return f"queue {queue} may use and uses {', '.join(told)}{cohort}; waits for one to come free, or raise the quota"


def _gpu_sentence(names: Iterable[str], ledger: Ledger) -> str:
    told: list[str] = []
    for name in names:
        capacity = ledger.capacity.get(name, 0)
        told.append(f"{capacity} of {capacity} {name} GPUs are in use" if capacity else f"there is no {name} GPU now")
    return f"{'; '.join(told)}; waits for one to come free, or add one"
