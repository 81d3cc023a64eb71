"""Backfill: who goes on meanwhile delays nobody who is before him, so large jobs do not starve behind small ones."""

from __future__ import annotations

import random
from itertools import product

import pytest

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueueSpec, Quota, UserLimits
from orchestrator.api.reasons import Reason
from orchestrator.core.scheduling.admission import Ledger, Quotas, place
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.scheduling.line import Line, RankedLine
from orchestrator.core.scheduling.ordering import Claim, user_of
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.sizing.plan_search import candidates
from tests.builders import (
    LLAMA_3_70B,
    SMOLLM2_135M,
    after,
    gpus,
    make_job,
    make_queue,
    make_spec,
    prepared_status,
    running_status,
    snapshot,
    stage,
)
from tests.core.world import World

CLASSES = ("24Gi", "48Gi", "80Gi")
USERS = ("ann", "ben")


# --- a user's bound, the one thing that is of all classes ----------------------------------------------------------


def of(user: str, job: QLoRAJob) -> QLoRAJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": user})})


def waits(name: str, *classes: str, age_seconds: float = 0) -> QLoRAJob:
    return of("ann", make_job(name, status=prepared_status(), age_seconds=age_seconds, gpu_classes=classes))


def world(*jobs: QLoRAJob, limit: int = 1, **spec: object) -> Snapshot:
    """The large card is another's, the small ones are free."""
    queue = make_queue("default", per_user=UserLimits(running=limit), **spec)
    other = of("ben", make_job("other", status=running_status(gpu_class="80Gi")))
    facts = {"queues": (queue,), "gpu_classes": gpus(_24Gi=3, _80Gi=1, _141Gi=0)}
    return snapshot(other, *jobs, stages=(stage(other),), **facts)


def placed(seen: Snapshot) -> list[str]:
    return [placement.claim.key for placement in schedule(seen).placements]


def test_the_last_gpu_of_a_user_is_kept_for_his_next_job() -> None:
    seen = world(waits("large", "80Gi", age_seconds=90), waits("small", "24Gi"))
    assert placed(seen) == []
    refusals = schedule(seen).refusals
    assert refusals["ann/large"].reason is Reason.WAITING_FOR_GPU
    assert (refusals["ann/small"].reason, refusals["ann/small"].message) == (
        Reason.USER_LIMIT,
        "queue default lets a namespace hold 1 GPUs (perUser.running), and the last one that ann may have is kept for "
        "its job that is next; waits for that one to start, or raise the limit",
    )


def test_no_more_than_the_last_one_is() -> None:
    jobs = waits("large", "80Gi", age_seconds=90), waits("small", "24Gi", age_seconds=9), waits("third", "24Gi")
    assert placed(world(*jobs, limit=2)) == ["ann/small"]


def test_who_comes_before_the_large_one_goes() -> None:
    assert placed(world(waits("large", "80Gi"), waits("small", "24Gi", age_seconds=9))) == ["ann/small"]


@pytest.mark.parametrize(
    ("wanted", "spec"),
    [("141Gi", {}), ("80Gi", {"quotas": {"24Gi": 9, "80Gi": 0}}), ("80Gi", {"quotas": {"24Gi": 9}})],
    ids=["no card of the class is here", "the quota is none", "the queue may not use the class"],
)
def test_nothing_is_kept_for_a_job_that_cannot_start_anyway(wanted: str, spec: dict[str, object]) -> None:
    assert placed(world(waits("large", wanted, age_seconds=90), waits("small", "24Gi"), **spec)) == ["ann/small"]


# --- in any world --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_free_next_is_as_much_use_to_who_waits_as_if_nobody_behind_him_had_started(seed: int) -> None:
    """Of the first of each user who may have more; quotas of nobody else: who borrows waits for the owners anyway."""
    seeded, delayed = random.Random(seed), 0
    every = candidates(make_spec(), SMOLLM2_135M, gpus(**{f"_{name}": 8 for name in CLASSES}))
    assert isinstance(every, tuple), "a small model fits all of them"
    for _ in range(60):
        queues = {
            name: QLoRAQueueSpec(
                per_user=UserLimits(running=seeded.choice((1, 2, 3))),
                quotas=tuple(Quota(gpu_class=each, nominal=seeded.choice((1, 2, 4))) for each in CLASSES),
            )
            for name in ("a", "b")
        }
        ledger = Ledger(capacity={name: seeded.choice((1, 2, 3)) for name in CLASSES}, quotas=Quotas.of(queues))
        held: list[tuple[str, str, str]] = []
        for _ in range(seeded.randrange(6)):
            queue, name, user = seeded.choice(list(queues)), seeded.choice(CLASSES), seeded.choice(USERS)
            if ledger.has_room(queue, name, borrow=False) and not ledger.is_full(queue, user):
                held.append((queue, name, user))
                ledger.take(*held[-1])
        claims = [_claim(n, every, queues, seeded) for n in range(seeded.randrange(1, 10))]
        line = Line()
        line.change((), claims)
        none = dict.fromkeys(queues, (0.0, 0.0))
        ranked = RankedLine(line=line, shares=none, steps=dict.fromkeys(queues, (0.1, 0.1)))
        placements = place(ranked, ledger)
        got, order = {p.claim.key: p for p in placements}, list(ranked.in_order())
        heads = {(c.queue, c.user): c for c in reversed(order) if c.key not in got}
        for head, free in product(heads.values(), held):
            behind = [got[c.key] for c in order[order.index(head) + 1 :] if c.key in got]
            with_them, without = ledger.copy(), ledger.copy()
            for placement in behind:
                without.release(placement.claim.queue, placement.estimate.gpu_class, placement.claim.user)
            if without.is_full(head.queue, head.user):
                continue
            for books in (with_them, without):
                books.release(*free)
            assert _could_start(head, with_them) == _could_start(head, without), f"{head.key} when {free} comes free"
            delayed += bool(behind)
    assert delayed, "somebody started behind one who waits"


def _claim(number: int, every: tuple, queues: dict[str, QLoRAQueueSpec], seeded: random.Random) -> Claim:
    chosen = tuple(each for each in every if seeded.random() < 0.5) or every[-1:]
    queue = seeded.choice(list(queues))
    return Claim(
        key=f"claim-{number}",
        uid=f"claim-{number}",
        queue=queue,
        priority=seeded.choice((0, 0, 5)),
        since=after(-seeded.randrange(100)),
        estimates=chosen,
        classes=tuple(each.gpu_class for each in chosen),
        user=user_of(seeded.choice(USERS), queues[queue]),
    )


def _could_start(claim: Claim, books: Ledger) -> bool:
    has_room = any(books.has_room(claim.queue, name, borrow=True) for name in claim.classes)
    return has_room and not books.is_full(claim.queue, claim.user)


# --- through a story -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, None])
@pytest.mark.parametrize("fair_sharing", ["None", "PerUser"])
def test_a_large_job_starts_when_the_first_large_card_comes_free_however_many_small_ones_come(
    limit: int | None, fair_sharing: str
) -> None:
    queue = make_queue("default", per_user=UserLimits(running=limit), fair_sharing=fair_sharing)
    story = World(policy=Policy(store_uri="file:///store"), gpu_classes=list(gpus(_24Gi=2, _48Gi=1)), queues=(queue,))
    story.models |= {"holds": LLAMA_3_70B, "large": LLAMA_3_70B}
    story.submit(make_job("holds"))
    _pass(story, 5)
    story.submit(of("ann", make_job("large")))
    freed = started = None
    for number in range(60):
        story.submit(of("ann", make_job(f"small-{number}")))
        _pass(story, 1)
        holder, large = (story.jobs[key].status for key in ("default/holds", "ann/large"))
        if freed is None and holder.active_attempt is None:
            freed = number
        if started is None and any(attempt.stage == "train" for attempt in large.attempts):
            started = number
    assert freed is not None, "the large card came free"
    assert started is not None, "and the large job got it"
    assert started <= freed + 1
    assert sum(job.metadata.namespace == "ann" and bool(job.status.finish_time) for job in story.jobs.values()) > 1


def _pass(story: World, times: int) -> None:
    for _ in range(times):
        for _ in range(3):
            story.pass_once()
        for key in story.live_stages():
            story.run_stage(key)
        story.pass_time(20)
