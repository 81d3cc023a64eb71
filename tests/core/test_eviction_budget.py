"""Eviction budgets: what counts, who is protected and until when, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.api.job import CheckpointStatus, EvictionBudget, EvictionBudgetStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import VOLUNTARY_EVICTIONS, Reason, Recovery
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import Decider, decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Policy, Snapshot
from tests.builders import (
    POLICY,
    after,
    exited,
    gpus,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
    train_result,
    written,
)

ONCE = EvictionBudget(max_evictions=1)
TWICE_A_DAY = EvictionBudget(max_evictions=2, window_seconds=86_400)
HOUR, DAY = 3_600, 86_400
PROTECTION = POLICY.eviction_protection_seconds


def holder(*moved_ago: float, ran_seconds: float = 900, **spec: Any) -> QLoRAJob:
    """A job that trains, and was moved so many seconds ago, the oldest first."""
    status = running_status(ran_seconds=ran_seconds)
    if moved_ago:
        times = tuple(after(-seconds) for seconds in moved_ago)
        changes = {"evictions": {"Preempted": len(times)}, "eviction_budget": EvictionBudgetStatus(times=times)}
        status = status.model_copy(update=changes)
    return make_job("holder", status=status, age_seconds=9_000, **spec)


def urgent(**spec: Any) -> QLoRAJob:
    return make_job("urgent", status=prepared_status(), priority=100, **spec)


def world(*jobs: QLoRAJob, policy: Policy = POLICY, **facts: Any) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    seen = snapshot(*jobs, stages=stages, gpu_classes=gpus(_24Gi=1), **facts)
    return replace(seen, policy=policy)


def victims(seen: Snapshot) -> list[str]:
    return [p.victim.key for p in schedule(seen).preemptions if p.victim is not None]


BY_DEFAULT = replace(POLICY, max_evictions=1)


@pytest.mark.parametrize(
    ("held", "policy", "is_moved"),
    [
        (holder(2_000), POLICY, True),
        (holder(eviction_budget=ONCE), POLICY, True),
        (holder(2_000, eviction_budget=ONCE), POLICY, False),
        (holder(2_000, eviction_budget=ONCE, ran_seconds=PROTECTION - 1), POLICY, False),
        (holder(5_000, eviction_budget=ONCE, ran_seconds=PROTECTION), POLICY, True),
        (holder(2_000, eviction_budget=TWICE_A_DAY), POLICY, True),
        (holder(DAY + 1, 2_000, eviction_budget=TWICE_A_DAY), POLICY, True),
        (holder(DAY - 1, 2_000, eviction_budget=TWICE_A_DAY), POLICY, False),
        (holder(2_000), BY_DEFAULT, False),
        (holder(DAY + 1), BY_DEFAULT, True),
        (holder(2_000, eviction_budget=TWICE_A_DAY), BY_DEFAULT, True),
        (holder(2_000, eviction_budget=ONCE), replace(POLICY, eviction_protection_seconds=0), True),
    ],
    ids=[
        "without a budget",
        "before it is spent",
        "once it is spent",
        "a second before the protection ends",
        "when that is over",
        "when one is left",
        "when the older one counts no more",
        "a second before that",
        "by the service's default",
        "by that, when it counts no more",
        "by its own, which goes before that",
        "where the service protects nobody",
    ],
)
def test_who_is_moved(held: QLoRAJob, policy: Policy, is_moved: bool) -> None:
    assert victims(world(held, urgent(), policy=policy)) == (["default/holder"] if is_moved else [])


def test_it_protects_from_turns_and_from_owners_too() -> None:
    saved = CheckpointStatus(step=4, uri="file:///c", time=after(-60), attempt=2)
    turns = (make_queue("default", turn_seconds=600),)
    owners = (make_queue("default", {"24Gi": (0, 1)}, cohort="c"), make_queue("owner", {"24Gi": 1}, cohort="c"))
    equal = make_job("equal", status=prepared_status())
    owned = make_job("owned", status=prepared_status(), queue="owner")
    for budget, expected in ((None, ["default/holder"]), (ONCE, [])):
        held = holder(2_000, eviction_budget=budget)
        held = held.model_copy(update={"status": held.status.model_copy(update={"checkpoint": saved})})
        assert victims(world(held, owned, queues=owners)) == expected
        assert victims(world(held, equal, queues=turns)) == expected


@pytest.mark.parametrize("reason", [each for each in Reason if each.recovery is Recovery.RESUME])
def test_what_the_scheduler_chose_is_counted_and_nothing_else(reason: Reason) -> None:
    status = running_status(stop_reason=reason)
    job = make_job(status=status, eviction_budget=TWICE_A_DAY)
    end = exited(job, 85, train_result(4, complete=False))
    found = written(decide(snapshot(job, stages=(end,)))).eviction_budget
    if reason in VOLUNTARY_EVICTIONS:
        attempt = status.active_attempt
        assert attempt is not None
        assert attempt.stop_time is not None
        renewed = attempt.stop_time + (after(DAY) - after(0))
        assert found == EvictionBudgetStatus(times=(attempt.stop_time,), left=1, renew_time=renewed)
    else:
        assert found is None


def test_the_status_says_what_is_left_as_time_goes_on() -> None:
    """Nothing else happens meanwhile that would have anybody look again."""
    seen, decider = world(holder(HOUR, 60, eviction_budget=TWICE_A_DAY)), Decider()

    def told(at: float) -> int | None:
        nonlocal seen
        seen = replace(seen, now=after(at))
        commands = decider.decide(seen)
        assert commands == decide(seen)
        for command in commands:
            if isinstance(command, WriteStatus):
                seen = replace(seen, jobs=(command.job.model_copy(update={"status": command.status}),))
        budget = seen.jobs[0].status.eviction_budget
        assert budget is not None
        return budget.left

    assert [told(at) for at in (0, DAY - HOUR - 1, DAY - HOUR, DAY - 61, DAY - 60)] == [0, 0, 1, 1, 2]


def test_by_a_clock_that_was_put_it_lasts_as_long() -> None:
    job = holder(HOUR, eviction_budget=ONCE)
    seen = replace(world(job), now=after(500), clock_step_seconds=500)
    budget = written(decide(seen), "holder").eviction_budget
    assert budget is not None
    assert budget.times == (after(500 - HOUR),)
    ahead = job.model_copy(
        update={
            "status": job.status.model_copy(update={"eviction_budget": EvictionBudgetStatus(times=(after(9_000_000),))})
        }
    )
    budget = written(decide(world(ahead)), "holder").eviction_budget
    assert budget is not None
    assert budget.times == (after(0),), "a time that is still to come is now"


def test_explain_says_who_is_protected_and_what_is_left() -> None:
    seen = world(holder(2_000, eviction_budget=ONCE), urgent())
    told = explain(seen, "default/urgent")
    assert "default/holder may not be moved for 45 minutes: its eviction budget of 1 eviction is spent." in told
    told = explain(seen, "default/holder")
    assert "Of its eviction budget of 1 eviction, 0 are left." in told
    assert "It is not moved for others' sake for 45 minutes." in told
    told = explain(world(holder(HOUR, eviction_budget=TWICE_A_DAY), urgent()), "default/holder")
    assert "Of its eviction budget of 2 evictions within 24 hours, 1 are left; one more in 23.0 hours." in told
    assert not any("may not be moved" in line for line in explain(world(holder(), urgent()), "default/urgent"))


def test_a_budget_lets_a_job_be_moved_once_at_least() -> None:
    for wrong in ({"max_evictions": 0}, {"max_evictions": 65}, {"max_evictions": 1, "window_seconds": 3_599}, {}):
        with pytest.raises(ValidationError):
            EvictionBudget(**wrong)
    assert QLoRAJobStatus().eviction_budget is None
