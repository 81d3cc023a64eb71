"""Victims and placements of random queues, held against the rules applied one by one, to every holding, each time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from orchestrator.api.queue import QLoRAQueueSpec, Quota, UserLimits
from orchestrator.api.reasons import Reason
from orchestrator.core.scheduling.admission import GROUNDS, Ledger, Quotas, place
from orchestrator.core.scheduling.line import Line, RankedLine
from orchestrator.core.scheduling.ordering import Claim, user_of
from orchestrator.core.scheduling.preemption import (
    Holding,
    Hopeless,
    Running,
    choose_victims,
    is_left_alone,
    move,
    nobody,
    reserve_coming_free,
)
from orchestrator.sizing.plan_search import candidates
from tests.builders import POLICY, SMOLLM2_135M, after, gpus, make_spec

CLASSES = ("16Gi", "24Gi", "48Gi")
Served = list[tuple[str, str, str | None, Reason]]
"""Claim, class, victim and ground."""


def a_world(seeded: random.Random) -> tuple[RankedLine, list[Holding], Ledger]:
    """Queues of some cohorts, GPUs that they hold, and claims for more."""
    queues = {
        f"queue-{n}": QLoRAQueueSpec(
            cohort=seeded.choice((None, "a", "b")),
            preemption=seeded.choice(("LowerPriority", "LowerPriority", "Never")),
            queueing_strategy=seeded.choice(("BestEffortFIFO", "BestEffortFIFO", "StrictFIFO")),
            per_user=UserLimits(running=seeded.choice((None, None, 1, 2))),
            quotas=tuple(
                Quota(gpu_class=name, nominal=seeded.randrange(3), borrowing_limit=seeded.choice((None, 0, 2)))
                for name in CLASSES
                if seeded.random() < 0.8
            ),
        )
        for n in range(seeded.randrange(1, 6))
    }
    every = gpus(**{f"_{name}": 8 for name in CLASSES})
    estimates = candidates(make_spec(), SMOLLM2_135M, every)
    assert isinstance(estimates, tuple), "a small model fits all of them"
    names = [*queues, "gone"]
    users = ("ann", "ben", "eve")
    held_of = [seeded.choice(names) for _ in range(seeded.randrange(12))]
    holdings = [
        Holding(
            key=f"job-{n}",
            uid=f"uid-{n:03}",
            queue=queue,
            user=user_of(seeded.choice(users), queues.get(queue)),
            priority=seeded.choice((0, 0, 5, 10)),
            gpu_class=seeded.choice(CLASSES),
            stopping=seeded.random() < 0.2,
            run_seconds=seeded.choice((10.0, 5_000.0)),
            lost_seconds=float(seeded.randrange(3)),
            remaining_seconds=seeded.choice((None, -1_000.0, 5.0, 50.0, 500.0)),
            was_evicted=seeded.random() < 0.2,
            turn_is_over=seeded.random() < 0.3,
            protected_seconds=seeded.choice((0.0, 0.0, 0.0, 7.0)),
        )
        for n, queue in enumerate(held_of)
    ]
    claims = []
    for n in range(seeded.randrange(12)):
        chosen = tuple(e for e in estimates if seeded.random() < 0.7)
        classes = tuple(e.gpu_class for e in chosen)
        queue, priority = seeded.choice(list(queues)), seeded.choice((0, 5, 20))
        claims.append(
            Claim(
                key=f"claim-{n}",
                uid=f"claim-{n}",
                queue=queue,
                priority=priority,
                since=after(-seeded.randrange(5)),
                estimates=chosen,
                classes=classes,
                user=user_of(seeded.choice(users), queues[queue]),
            )
        )
    held = [sum(h.gpu_class == name for h in holdings) for name in CLASSES]
    capacity = {name: count + seeded.choice((-1, 0, 1)) for name, count in zip(CLASSES, held, strict=True)}
    ledger = Ledger(capacity=capacity, quotas=Quotas.of(queues))
    for holding in holdings:
        ledger.take(holding.queue, holding.gpu_class, holding.user)
    line = Line()
    line.change((), claims)
    shares, steps = ({name: (seeded.uniform(0, most), seeded.uniform(0, most)) for name in queues} for most in (5, 2))
    return RankedLine(line=line, shares=shares, steps=steps), holdings, ledger


def rank(claim: Claim, line: RankedLine) -> tuple[object, ...]:
    """The order of the line in its plainest form: the k-th of a queue counts as if those before it had started."""
    own = sorted(
        (-other.priority, other.since, other.uid) for other in line.line.claims.values() if other.queue == claim.queue
    )
    place = own.index((-claim.priority, claim.since, claim.uid))
    share = max(had + place * more for had, more in zip(line.shares[claim.queue], line.steps[claim.queue], strict=True))
    return -claim.priority, share, claim.since, claim.uid


def running(holdings: list[Holding]) -> Running:
    movable = nobody()
    for each in holdings:
        if not (each.stopping or is_left_alone(each, POLICY)):
            move(movable, each, 1)
    return Running(movable, lambda name: [each for each in holdings if each.gpu_class == name], POLICY)


def placed_one_by_one(claims: list[Claim], ledger: Ledger) -> Iterator[tuple[str, str]]:
    served: set[str] = set()
    for ground in GROUNDS:
        stuck: set[str] = set()
        for claim in claims:
            for name in claim.classes:
                is_free = claim.key not in served and claim.queue not in stuck
                may_have = not is_full(claim, [each for each in claims if each.key not in served], ledger)
                if is_free and ledger.has_room_for(claim.queue, name, ground) and may_have:
                    served.add(claim.key)
                    ledger.take(claim.queue, name, claim.user)
                    yield claim.key, name
            if claim.key not in served and is_strict(claim, ledger):
                stuck.add(claim.queue)


def is_strict(claim: Claim, books: Ledger) -> bool:
    return books.quotas.queues[claim.queue].queueing_strategy == "StrictFIFO"


def is_full(claim: Claim, waiting: list[Claim], books: Ledger) -> bool:
    """Whether its user has as many as he may, but for the one that is kept for whoever of his is next."""
    limit = books.quotas.queues[claim.queue].per_user.running
    theirs = (each for each in waiting if (each.queue, each.user) == (claim.queue, claim.user))
    first = next((each for each in theirs if can_ever_start(each, books)), claim)
    return limit is not None and books.by_user.get((claim.queue, claim.user), 0) + (first is not claim) >= limit


def can_ever_start(claim: Claim, books: Ledger) -> bool:
    """Whether it would get something if nobody held anything."""
    nobody = Ledger(capacity=books.capacity, quotas=books.quotas)
    return any(nobody.has_room(claim.queue, name, borrow=True) for name in claim.classes)


def victims_one_by_one(claims: list[Claim], holdings: list[Holding], books: Ledger) -> Served:
    """The rules of `core/scheduling/preemption` in their plainest form."""
    for each in holdings:
        if each.stopping:
            books.release(each.queue, each.gpu_class, each.user)
    found: Served = [(key, name, None, Reason.PREEMPTED) for key, name in placed_one_by_one(claims, books)]
    reserved = {key for key, _, _, _ in found}
    running = [each for each in holdings if not each.stopping]
    stuck: set[str] = set()
    for claim in claims:
        if claim.queue in stuck:
            continue
        options: list[tuple[tuple[int, bool, int, float, int, str], Holding, Reason]] = []
        for each in running if claim.key not in reserved else ():
            reason = reason_to_move(claim, each, books)
            if reason is Reason.TURN_ENDED and not is_next(claim, each, claims, found, books):
                reason = None
            left = [other for other in claims if other.key not in {key for key, _, _, _ in found}]
            if reason is not None and room_without(each, claim, left, books):
                turn, is_own = {5: 0, 50: 2}.get(each.remaining_seconds or 0, 1), each.queue == claim.queue
                preference = claim.classes.index(each.gpu_class)
                rank = turn, is_own, each.priority, each.lost_seconds, preference, each.uid
                options.append((rank, each, reason))
        if options:
            _, victim, reason = min(options, key=lambda option: option[0])
            running.remove(victim)
            books.release(victim.queue, victim.gpu_class, victim.user)
            books.take(claim.queue, victim.gpu_class, claim.user)
            asked = None if victim.remaining_seconds in (5, 50) else victim.key
            found.append((claim.key, victim.gpu_class, asked, reason))
        elif claim.key not in reserved and is_strict(claim, books):
            stuck.add(claim.queue)
    return found


def reason_to_move(claim: Claim, holding: Holding, books: Ledger) -> Reason | None:
    name = holding.gpu_class
    cools_down = holding.was_evicted and holding.run_seconds < POLICY.preemption_cooldown_seconds
    is_foreign = holding.queue != claim.queue
    is_protected = holding.protected_seconds > 0
    if (
        name not in claim.classes
        or cools_down
        or is_protected
        or (is_foreign and not books.is_over_guarantee(holding.queue, name))
    ):
        return None
    may_preempt = books.quotas.queues[claim.queue].preemption == "LowerPriority"
    if may_preempt and holding.priority < claim.priority:
        return Reason.PREEMPTED
    if not is_foreign and holding.turn_is_over and holding.priority <= claim.priority:
        return Reason.TURN_ENDED
    return Reason.QUOTA_RECLAIMED if is_foreign and books.is_within_nominal(claim.queue, name) else None


def is_next(claim: Claim, holding: Holding, claims: list[Claim], found: Served, books: Ledger) -> bool:
    """Whether the GPU would be the claim's, of all who have none yet."""
    after, served = books.copy(), {key for key, _, _, _ in found}
    after.release(holding.queue, holding.gpu_class, holding.user)
    got = next(placed_one_by_one([other for other in claims if other.key not in served], after), None)
    return got is not None and got[0] == claim.key


def room_without(holding: Holding, claim: Claim, waiting: list[Claim], books: Ledger) -> bool:
    after = books.copy()
    after.release(holding.queue, holding.gpu_class, holding.user)
    has_room = after.has_room(claim.queue, holding.gpu_class, borrow=holding.queue == claim.queue)
    return has_room and not is_full(claim, waiting, after)


@pytest.mark.parametrize("seed", range(40))
def test_who_is_placed_and_who_makes_way_is_what_the_rules_say_one_by_one(seed: int) -> None:
    seeded = random.Random(seed)
    for _ in range(50):
        line, holdings, ledger = a_world(seeded)
        claims, plain = list(line.in_order()), ledger.copy()
        assert claims == sorted(claims, key=lambda claim: rank(claim, line))
        placements = place(line, ledger)
        assert [(p.claim.key, p.estimate.gpu_class) for p in placements] == list(placed_one_by_one(claims, plain))
        served = {p.claim.key for p in placements}
        blocked = [claim for claim in claims if claim.key not in served]
        expected, left = victims_one_by_one(blocked, holdings, ledger.copy()), line.without(served)
        stopping = [(each.queue, each.gpu_class, each.user) for each in holdings if each.stopping]
        reserved = reserve_coming_free(left, stopping, ledger)
        left, hopeless = left.without(p.claim.key for p in reserved), Hopeless()
        chosen = (*reserved, *choose_victims(left, running(holdings), ledger.copy(), hopeless))
        again = choose_victims(left, running(holdings), ledger, hopeless)
        assert (*reserved, *again) == chosen, "what is known of the hopeless changes nothing"
        assert [
            (p.claim.key, p.estimate.gpu_class, p.victim.key if p.victim is not None else None, p.reason)
            for p in chosen
        ] == expected
