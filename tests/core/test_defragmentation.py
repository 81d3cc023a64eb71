"""Who gives a large card to a job that waits and goes on on a free smaller one, when, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.api.job import Attempt, CheckpointStatus, EvictionBudget, EvictionBudgetStatus, QLoRAJob
from orchestrator.api.queue import UserLimits
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.forecast import forecast
from orchestrator.core.scheduling.cycle import Schedule, schedule
from orchestrator.core.snapshot import Snapshot
from tests.builders import (
    LLAMA_3_70B,
    POLICY,
    after,
    exited,
    gpus,
    make_job,
    make_queue,
    prepared_status,
    progress,
    running_status,
    snapshot,
    stage,
    train_result,
    written,
)

DEFRAGMENTS = replace(POLICY, defragmentation_gain=2.0)
ALLOWED = {"class_change": "allowed"}
HOUR = 3_600.0


def holder(
    name: str = "small",
    *,
    left_seconds: float | None = HOUR,
    gpu_class: str = "48Gi",
    status: dict[str, Any] | None = None,
    **spec: Any,
) -> QLoRAJob:
    """A small job on a large card, with a checkpoint of a minute ago, that says how long it will take."""
    alone = make_job(name, status=prepared_status(), gpu_classes=(gpu_class,))
    [placement] = schedule(snapshot(alone, gpu_classes=gpus(**{f"_{gpu_class}": 1}))).placements
    known = running_status(gpu_class=gpu_class, checkpoint_age_seconds=60, estimate=placement.estimate)
    if left_seconds is not None:
        attempt = known.attempts[-1].model_copy(update={"progress_time": after(0)})
        known = known.model_copy(
            update={"progress": progress(4, eta_seconds=left_seconds), "attempts": (*known.attempts[:-1], attempt)}
        )
    return make_job(name, status=known.model_copy(update=status or {}), age_seconds=9_000, **{**ALLOWED, **spec})


def large(name: str = "large", **spec: Any) -> QLoRAJob:
    return make_job(name, status=prepared_status(LLAMA_3_70B), age_seconds=50, **spec)


def world(*jobs: QLoRAJob, free_24: int = 1, cards_48: int = 1, gain: float = 2.0, **facts: Any) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    seen = snapshot(*jobs, stages=stages, gpu_classes=gpus(_24Gi=free_24, _48Gi=cards_48), **facts)
    return replace(seen, policy=replace(POLICY, defragmentation_gain=gain))


def moves(found: Schedule) -> list[tuple[str, str, str]]:
    """Who makes room for whom, and goes on where."""
    return [
        (p.victim.key.split("/")[1], p.claim.key.split("/")[1], p.onto)
        for p in found.preemptions
        if p.victim is not None and p.reason is Reason.DEFRAGMENTED
    ]


MOVED = [("small", "large", "24Gi")]


def test_a_small_job_makes_room_and_goes_on_where_a_card_is_free() -> None:
    seen = world(holder(), large())
    found = schedule(seen)
    assert moves(found) == MOVED
    [move] = found.preemptions
    assert move.victim is not None
    assert move.gain_seconds == HOUR
    assert 2 * move.victim.lost_seconds <= HOUR
    assert move.victim.lost_seconds >= 60 + POLICY.restart_cost_seconds + POLICY.stop_cost_seconds
    attempt = written(decide(seen), "small").active_attempt
    assert attempt is not None
    assert (attempt.stop_reason, attempt.moves_to) == (Reason.DEFRAGMENTED, "24Gi")
    assert attempt.message.startswith("makes room on 48Gi for default/large, which starts about 60 minutes sooner; ")


def budget_spent() -> dict[str, Any]:
    return {"evictions": {"Preempted": 1}, "eviction_budget": EvictionBudgetStatus(times=(after(-2_000),))}


OWNER = make_queue("owner", {"24Gi": 1, "48Gi": 1})


@pytest.mark.parametrize(
    "seen",
    [
        world(holder(), large(), gain=0),
        world(holder(), large(), free_24=0),
        world(holder(), make_job("none", status=prepared_status(), suspend=True)),
        world(holder(class_change="auto"), large()),
        world(holder(class_change="forbidden"), large()),
        world(holder(left_seconds=400), large()),
        world(holder(), large(), gain=50),
        world(holder(), holder("about-to-end", left_seconds=100), large(), cards_48=2),
        world(holder(priority=1), large()),
        world(holder(status={"step_ups": 1}), large()),
        world(holder(gpu_classes=("48Gi",)), large()),
        world(holder(status=budget_spent(), eviction_budget=EvictionBudget(max_evictions=1)), large()),
        world(holder(queue="owner"), large(), queues=(OWNER,)),
        world(holder(), large(), queues=(make_queue("default", preemption="Never"),)),
        world(holder(), large(), queues=(make_queue("default", queueing_strategy="StrictFIFO"),)),
        world(holder(), large(), queues=(make_queue("default", per_user=UserLimits(running=9)),)),
        world(holder(queue="closed"), large(), queues=(make_queue("closed", hold=True),)),
        world(holder(), large(), queues=(make_queue("default", {"48Gi": 1, "24Gi": 0}),)),
    ],
    ids=[
        "where the service moves nobody for that",
        "with no smaller card free",
        "for nobody",
        "who goes on bit for bit",
        "who never changes its class",
        "for a gain of less than the margin",
        "by another margin",
        "where another ends soon",
        "for a lower priority",
        "who ran out of memory",
        "who may have this class alone",
        "whose budget is spent",
        "out of what its queue owns",
        "for a queue that moves nobody",
        "in a strict queue",
        "of a user who is bounded",
        "whose queue would not start it again",
        "whose queue may not use the smaller card",
    ],
)
def test_nobody_is_moved(seen: Snapshot) -> None:
    assert moves(schedule(seen)) == []


def test_who_could_be_preempted_is_preempted() -> None:
    found = schedule(world(holder(), large(priority=5)))
    assert [(p.reason, p.onto) for p in found.preemptions] == [(Reason.PREEMPTED, "")]


def test_the_one_that_loses_least_is_moved_and_each_free_card_serves_once() -> None:
    dear = {"checkpoint": CheckpointStatus(step=1, uri="file:///c", time=after(-500))}
    jobs = (holder("dear", status=dear), holder(), large(), large("second"))
    assert moves(schedule(world(*jobs, cards_48=2))) == MOVED
    both = moves(schedule(world(*jobs, cards_48=2, free_24=2)))
    assert both == [*MOVED, ("dear", "second", "24Gi")]


def stopping(**attempt: Any) -> QLoRAJob:
    job = holder()
    changes = {"stop_time": after(0), "stop_reason": Reason.DEFRAGMENTED, "moves_to": "24Gi", **attempt}
    attempts: tuple[Attempt, ...] = (job.status.attempts[-1].model_copy(update=changes),)
    return job.model_copy(update={"status": job.status.model_copy(update={"attempts": attempts})})


def test_the_free_card_is_kept_while_it_stops() -> None:
    late = make_job("late", status=prepared_status(), gpu_classes=("24Gi",))
    assert schedule(world(stopping(), large(), late)).placements == ()
    [other] = schedule(world(stopping(stop_reason=Reason.PREEMPTED, moves_to=None), large(), late)).placements
    assert other.claim.key == "default/late"


def test_then_it_goes_on_on_the_smaller_card_and_the_other_starts() -> None:
    job = stopping()
    done = exited(job, ExitCode.PREEMPTED, train_result(9, complete=False))
    seen = replace(world(job, large()), stages={done.key: done})
    stopped = tuple(c for c in decide(seen) if isinstance(c, WriteStatus) and c.job.key == job.key)
    first = written(stopped, "small")
    assert first.evictions == {"Defragmented": 1}
    got = {p.claim.key: p.estimate.gpu_class for p in schedule(seen).placements}
    assert got == {"default/small": "24Gi", "default/large": "48Gi"}


def test_explain_says_who_makes_room_and_what_it_costs() -> None:
    seen = world(holder(), large())
    told = explain(seen, "default/large")
    assert (
        "default/small makes room for it on 48Gi and goes on on a free 24Gi GPU: that costs 150 GPU-seconds, and lets "
        "it start 1.0 hours sooner."
    ) in told
    assert "It makes room for default/large and goes on on a free 24Gi GPU." in explain(seen, "default/small")


def test_a_forecast_counts_on_it() -> None:
    starts = [
        {key: each.start for key, each in forecast(world(holder(), large(), gain=gain)).jobs.items()}
        for gain in (0.0, 2.0)
    ]
    soon = after(POLICY.stop_cost_seconds)
    assert starts == [
        {"default/small": None, "default/large": after(HOUR)},
        {"default/small": soon, "default/large": soon},
    ]
