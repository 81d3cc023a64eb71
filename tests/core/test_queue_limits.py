"""What a queue lets its jobs have: limits by user, strict order, budgets, holds, drains, and what its status says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import (
    Budget,
    BudgetUse,
    ClassUse,
    MonthlyUsage,
    QLoRAQueue,
    QLoRAQueueStatus,
    UserLimits,
)
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import EnsureStage, StopStage, WriteQueueStatus, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Policy, Snapshot
from tests.builders import (
    LLAMA_3_70B,
    NOW,
    after,
    gpus,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
)
from tests.core.world import World


def of(namespace: str, job: QLoRAJob) -> QLoRAJob:
    meta = job.metadata.model_copy(update={"namespace": namespace, "uid": f"uid-{namespace}-{job.metadata.name}"})
    return job.model_copy(update={"metadata": meta})


def waiting(name: str, namespace: str = "default", age_seconds: float = 0, **spec: object) -> QLoRAJob:
    return of(namespace, make_job(name, status=prepared_status(), age_seconds=age_seconds, **spec))


def running(name: str, namespace: str = "default", gpu_class: str = "24Gi", **spec: object) -> QLoRAJob:
    return of(namespace, make_job(name, status=running_status(gpu_class=gpu_class), **spec))


def world(*jobs: QLoRAJob, queues: tuple[QLoRAQueue, ...], **facts: object) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    facts.setdefault("gpu_classes", gpus(_24Gi=2))
    return snapshot(*jobs, stages=stages, queues=queues, **facts)


def placed(seen: Snapshot) -> list[str]:
    return [placement.claim.key for placement in schedule(seen).placements]


def moved(seen: Snapshot) -> dict[str, str]:
    return {p.claim.key: p.victim.key for p in schedule(seen).preemptions if p.victim is not None}


def refusal(seen: Snapshot, key: str) -> tuple[Reason, str]:
    found = schedule(seen).refusals[key]
    return found.reason, found.message


# --- limits by user ----------------------------------------------------------------------------------------------

ONE_EACH = make_queue("default", per_user=UserLimits(running=1))


def test_a_user_runs_no_more_jobs_than_the_queue_lets_him_and_the_others_go_on() -> None:
    jobs = (waiting("a", "ann", 9), waiting("b", "ann", 8), waiting("c", "ben", 7))
    seen = world(*jobs, queues=(ONE_EACH,), gpu_classes=gpus(_24Gi=3))
    assert placed(seen) == ["ann/a", "ben/c"]
    assert refusal(seen, "ann/b") == (
        Reason.USER_LIMIT,
        "queue default lets a namespace hold 1 GPUs (perUser.running), and ann does; waits for one of its jobs to end, "
        "or raise the limit",
    )
    assert "UserLimit" in explain(seen, "ann/b")[0]


def test_nobody_else_makes_way_for_a_user_who_runs_as_much_as_he_may_but_his_own_job_does() -> None:
    urgent = waiting("urgent", "ann", priority=9)
    assert moved(world(running("theirs", "ben"), running("mine", "ann"), urgent, queues=(ONE_EACH,))) == {
        "ann/urgent": "ann/mine"
    }
    elsewhere = running("mine", "ann", "48Gi", priority=10)
    seen = world(running("theirs", "ben"), elsewhere, urgent, queues=(ONE_EACH,), gpu_classes=gpus(_24Gi=1, _48Gi=1))
    assert moved(seen) == {}
    assert refusal(seen, "ann/urgent")[0] is Reason.USER_LIMIT


def test_only_so_many_of_a_users_jobs_are_prepared_as_may_wait() -> None:
    queue = make_queue("default", per_user=UserLimits(waiting=2))
    new = [of("ann", make_job(f"new-{n}", age_seconds=100 - n)) for n in range(3)]
    others = of("ben", make_job("new", age_seconds=1))
    seen = world(*new, others, waiting("waits", "ann"), running("runs", "ann"), queues=(queue,), gpu_classes=())
    commands = decide(seen)
    begun = {f"{c.task.namespace}/{c.task.job}" for c in commands if isinstance(c, EnsureStage)}
    assert begun == {"ann/new-0", "ben/new"}
    told = {c.job.key: c.status.condition(ConditionType.PREPARED) for c in commands if isinstance(c, WriteStatus)}
    assert {key for key, said in told.items() if said is not None and said.reason is Reason.USER_LIMIT} == {
        "ann/new-1",
        "ann/new-2",
    }


# --- order -------------------------------------------------------------------------------------------------------


def big(name: str, age_seconds: float) -> QLoRAJob:
    return make_job(name, status=prepared_status(LLAMA_3_70B), age_seconds=age_seconds)


@pytest.mark.parametrize(("strategy", "expected"), [("StrictFIFO", []), ("BestEffortFIFO", ["default/small"])])
def test_in_a_strict_queue_nobody_goes_before_the_one_who_is_next(strategy: str, expected: list[str]) -> None:
    queue = make_queue("default", queueing_strategy=strategy)
    holder = running("runs", gpu_class="48Gi")
    seen = world(holder, big("big", 9), waiting("small"), queues=(queue,), gpu_classes=gpus(_24Gi=1, _48Gi=1))
    assert placed(seen) == expected
    if not expected:
        assert refusal(seen, "default/small") == (
            Reason.WAITING_IN_ORDER,
            "queue default is StrictFIFO, and the job that is next waits; waits for that one to start",
        )
        assert refusal(seen, "default/big")[0] is Reason.WAITING_FOR_GPU


def test_other_queues_do_not_wait_for_a_strict_one() -> None:
    queues = (make_queue("default", queueing_strategy="StrictFIFO"), make_queue("other"))
    jobs = (running("runs", gpu_class="48Gi"), big("big", 9), waiting("free", queue="other"))
    assert placed(world(*jobs, queues=queues, gpu_classes=gpus(_24Gi=1, _48Gi=1))) == ["default/free"]


# --- stop policy -------------------------------------------------------------------------------------------------


def test_a_drained_queues_jobs_save_a_checkpoint_and_wait() -> None:
    queue = make_queue("default", stop_policy="HoldAndDrain")
    job = running("runs")
    [write] = [c for c in decide(world(job, queues=(queue,))) if isinstance(c, WriteStatus)]
    assert write.status.active_attempt.stop_reason is Reason.QUEUE_DRAINED
    assert write.events[-1].message == "queue default is drained; goes on once it is released"
    stopping = job.model_copy(update={"status": write.status})
    [stop] = [c for c in decide(world(stopping, queues=(queue,))) if isinstance(c, StopStage)]
    assert stop.reason is Reason.QUEUE_DRAINED
    assert Reason.QUEUE_DRAINED.recovery.name == "RESUME"


@pytest.mark.parametrize("spec", [{"stop_policy": "Hold"}, {"hold": True}])
def test_a_held_queues_jobs_run_on_and_no_other_is_admitted(spec: dict[str, object]) -> None:
    seen = world(running("runs"), waiting("waits"), queues=(make_queue("default", **spec),))
    assert placed(seen) == []
    assert refusal(seen, "default/waits")[0] is Reason.QUEUE_HELD
    assert not [c for c in decide(seen) if isinstance(c, WriteStatus) and c.job.metadata.name == "runs" and c.events]


# --- budgets -----------------------------------------------------------------------------------------------------


def spent(month: str, hours: float, cost: float = 0.0, **budget: object) -> QLoRAQueue:
    had = MonthlyUsage(month=month, user="default", gpu_class="24Gi", gpu_seconds=3600 * hours, dollars=cost)
    status = QLoRAQueueStatus(counted_until=NOW, months=(had,))
    return make_queue("default", budget=Budget(**budget)).model_copy(update={"status": status})


@pytest.mark.parametrize(
    ("queue", "admits"),
    [
        (spent("2026-01", 9.9, gpu_hours=10), True),
        (spent("2026-01", 10, gpu_hours=10), False),
        (spent("2025-12", 10, gpu_hours=10), True),
        (spent("2026-01", 10, gpu_hours=10, when_spent="Warn"), True),
        (spent("2026-01", 1, 50.0, dollars=50), False),
        (spent("2026-01", 1, 49.99, dollars=50, gpu_hours=2), True),
    ],
)
def test_a_spent_budget_holds_the_queue_until_the_next_month(queue: QLoRAQueue, admits: bool) -> None:
    seen = world(waiting("job"), queues=(queue,))
    assert bool(placed(seen)) is admits
    if not admits:
        reason, message = refusal(seen, "default/job")
        assert reason is Reason.BUDGET_SPENT
        assert message.endswith("for 2026-01; waits for the next month, or raise it")
        later = replace(seen, now=after(31 * 86_400))
        assert placed(later) == ["default/job"]


def test_a_budget_of_nothing_is_none() -> None:
    with pytest.raises(ValidationError, match="budget must name gpuHours or dollars"):
        Budget()


# --- what the status says ------------------------------------------------------------------------------------------


def test_a_status_says_what_is_used_borrowed_lent_and_waited_for() -> None:
    queues = (
        make_queue("default", {"24Gi": 1}, cohort="c"),
        make_queue("lender", {"24Gi": 2, "48Gi": 1}, cohort="c"),
        make_queue("warned", budget=Budget(gpu_hours=0, when_spent="Warn")),
    )
    jobs = (running("a"), running("b"), waiting("old", age_seconds=500), waiting("young", age_seconds=5))
    jobs = (*jobs, running("c", queue="lender"))
    commands = decide(world(*jobs, queues=queues, gpu_classes=gpus(_24Gi=3)))
    told = {c.queue.metadata.name: c.status for c in commands if isinstance(c, WriteQueueStatus)}
    assert told["default"].classes == (ClassUse(gpu_class="24Gi", nominal=1, used=2, borrowed=1, lent=0),)
    assert (told["default"].running, told["default"].pending, told["default"].pending_since) == (2, 2, after(-500))
    assert told["lender"].classes == (
        ClassUse(gpu_class="24Gi", nominal=2, used=1, borrowed=0, lent=1),
        ClassUse(gpu_class="48Gi", nominal=1),
    )
    assert told["warned"].budget == BudgetUse(month="2026-01", spent=True)


# --- in any story --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    jobs=st.lists(st.tuples(st.sampled_from(("ann", "ben")), st.integers(0, 3), st.booleans()), max_size=10),
    running_limit=st.integers(1, 3),
    waiting_limit=st.integers(1, 3),
    strategy=st.sampled_from(("StrictFIFO", "BestEffortFIFO")),
)
@example(
    jobs=[*[("ann", 0, False)] * 4, ("ben", 0, False), ("ben", 1, False), ("ben", 0, False), ("ben", 1, False)],
    running_limit=1,
    waiting_limit=1,
    strategy="BestEffortFIFO",
)
def test_limits_hold_at_every_moment_and_nobody_waits_for_ever(
    jobs: list[tuple[str, int, bool]], running_limit: int, waiting_limit: int, strategy: str
) -> None:
    limits = UserLimits(running=running_limit, waiting=waiting_limit)
    queue = make_queue("default", per_user=limits, queueing_strategy=strategy)
    policy = Policy(store_uri="file:///store", minimum_run_seconds=30, preemption_cooldown_seconds=10)
    story = World(policy=policy, gpu_classes=list(gpus(_24Gi=2, _48Gi=1)), queues=(queue,))
    for number, (user, priority, large) in enumerate(jobs):
        if large:
            story.models[f"job-{number}"] = LLAMA_3_70B
        story.submit(of(user, make_job(f"job-{number}", priority=priority)))
    for _ in range(200):
        if all(job.status.finish_time is not None for job in story.jobs.values()):
            break
        story.pass_once()
        for user in ("ann", "ben"):
            theirs = [job.status for job in story.jobs.values() if job.metadata.namespace == user]
            attempts = [status.active_attempt for status in theirs]
            assert sum(attempt is not None and attempt.stage == "train" for attempt in attempts) <= running_limit
        for key in story.live_stages():
            story.run_stage(key)
        story.pass_time(20)
    assert [job.key for job in story.jobs.values() if job.status.finish_time is None] == []
