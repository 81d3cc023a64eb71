"""Turns: when a running job yields to its equals, and where it then waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from orchestrator.api.job import CheckpointStatus, QLoRAJob
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Recovery
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import Decider, decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from tests.builders import (
    after,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
)

TURNS = make_queue("default", turn_seconds=600)


def holder(name: str = "holder", *, ran_seconds: float = 900, durable: int | None = 2, **spec: object) -> QLoRAJob:
    """A job that trains; `durable` is the attempt that its last checkpoint is of."""
    status = running_status(ran_seconds=ran_seconds)
    saved = CheckpointStatus(step=4, uri="file:///c", time=after(-100), attempt=durable) if durable else None
    return make_job(name, status=status.model_copy(update={"checkpoint": saved}), age_seconds=5_000, **spec)


def waits(name: str = "waits", *, age_seconds: float = 50, **spec: object) -> QLoRAJob:
    return make_job(name, status=prepared_status(), age_seconds=age_seconds, **spec)


def world(*jobs: QLoRAJob, **facts: object) -> Snapshot:
    facts = {"gpu_classes": gpus(_24Gi=1), "queues": (TURNS,), **facts}
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    return snapshot(*jobs, stages=stages, **facts)


def moved(seen: Snapshot) -> dict[str, Reason]:
    """Who is asked to stop, and why."""
    writes = (command.status for command in decide(seen) if isinstance(command, WriteStatus))
    attempts = (status.active_attempt for status in writes)
    names = {job.metadata.name: job for job in seen.jobs}
    preemptions = schedule(seen).preemptions
    found = {p.victim.key.split("/")[1]: p.reason for p in preemptions if p.victim is not None}
    assert sorted(found.values()) == sorted(a.stop_reason for a in attempts if a is not None and a.stop_reason)
    assert found.keys() <= names.keys()
    return found


def test_whose_turn_is_over_yields_to_an_equal_that_waits() -> None:
    seen = world(holder(), waits())
    assert moved(seen) == {"holder": Reason.TURN_ENDED}
    [stop] = [
        c.status.active_attempt for c in decide(seen) if isinstance(c, WriteStatus) and c.job.key.endswith("holder")
    ]
    assert stop is not None
    assert stop.message == "its turn on 24Gi is over (turnSeconds of queue default); default/waits is next"
    assert Reason.TURN_ENDED.recovery is Recovery.RESUME


@pytest.mark.parametrize(
    ("held", "waiting"),
    [
        (holder(ran_seconds=599), waits()),
        (holder(durable=None), waits()),
        (holder(durable=1), waits()),
        (holder(priority=1), waits()),
        (holder(), waits(queue="other")),
    ],
    ids=[
        "before its time",
        "without a checkpoint",
        "with one of an earlier attempt alone",
        "to a job of lower priority",
        "to another queue",
    ],
)
def test_nobody_yields(held: QLoRAJob, waiting: QLoRAJob) -> None:
    assert moved(world(held, waiting, queues=(TURNS, make_queue("other")))) == {}


def test_nobody_yields_who_has_no_turns() -> None:
    assert moved(world(holder(), waits(), queues=(make_queue("default"),))) == {}


def test_a_queue_whose_jobs_move_nobody_has_turns_all_the_same() -> None:
    never = make_queue("default", turn_seconds=600, preemption="Never")
    assert moved(world(holder(), waits(), queues=(never,))) == {"holder": Reason.TURN_ENDED}


def test_a_lower_priority_makes_way_for_what_it_is() -> None:
    assert moved(world(holder(), waits(priority=3))) == {"holder": Reason.PREEMPTED}


def test_no_turn_ends_for_a_gpu_that_would_be_another_queues() -> None:
    others = waits("other", queue="other", age_seconds=9_000)
    assert moved(world(holder(), waits(), others, queues=(TURNS, make_queue("other")))) == {}


def test_who_has_had_a_turn_waits_behind_those_who_waited_then() -> None:
    had = make_attempt(
        created_time=after(-900), start_time=after(-900), finish_time=after(-20), reason=Reason.TURN_ENDED
    )
    status = prepared_status(attempts=(had,), attempts_total=2, evictions={"TurnEnded": 1})
    old = make_job("old", status=status, age_seconds=5_000)
    line = [claim.key for claim in schedule(world(old, waits("before"), waits("since", age_seconds=10))).line]
    assert line == ["default/before", "default/old", "default/since"]
    without = schedule(world(old, waits("before"), queues=(make_queue("default"),))).line
    assert [claim.key for claim in without] == ["default/old", "default/before"]


def test_what_fails_costs_nobody_his_place() -> None:
    turn = make_attempt(number=2, created_time=after(-900), finish_time=after(-70), reason=Reason.TURN_ENDED)
    failed = make_attempt(number=3, created_time=after(-60), finish_time=after(-9), reason=Reason.TRANSIENT_ERROR)
    status = prepared_status(attempts=(turn, failed), attempts_total=3, evictions={"TurnEnded": 1})
    seen = world(make_job("failed", status=status, age_seconds=5_000), waits(), waits("first", age_seconds=80))
    assert [claim.key for claim in schedule(seen).line] == ["default/first", "default/failed", "default/waits"]


def test_a_turn_ends_by_time_alone() -> None:
    """Nothing else happens meanwhile that would have anybody look again."""
    seen, decider = world(holder(ran_seconds=450), waits()), Decider()
    writes = [command for command in decider.decide(seen) if isinstance(command, WriteStatus)]
    assert len(writes) == 2, "what is said of both is stored, and nobody has anything to say any more"
    seen = replace(seen, jobs=tuple(write.job.model_copy(update={"status": write.status}) for write in writes))
    assert not any(isinstance(command, WriteStatus) for command in decider.decide(seen))
    for passed in (149, 150, 151):
        later = replace(seen, now=after(passed))
        commands = decider.decide(later)
        assert commands == decide(later)
        assert moved(later) == ({"holder": Reason.TURN_ENDED} if passed >= 150 else {})


def test_explain_says_when_the_next_turn_ends() -> None:
    told = explain(world(holder(ran_seconds=480), waits()), "default/waits")
    assert any(
        "Queue default gives turns of 600 s: the next one to end is that of default/holder on 24Gi, in 2 minutes"
        in line
        for line in told
    )
    told = explain(world(holder(durable=None), waits()), "default/waits")
    assert any("once it has saved a checkpoint" in line for line in told)
    told = explain(world(holder(priority=5), waits()), "default/waits")
    assert not any("turn" in line for line in told)


def test_turns_and_shares_by_user_are_two_ways_to_do_one_thing() -> None:
    with pytest.raises(ValidationError, match="turnSeconds gives every job its turn"):
        QLoRAQueueSpec(turn_seconds=600, fair_sharing="PerUser")
    with pytest.raises(ValidationError):
        QLoRAQueueSpec(turn_seconds=299)
