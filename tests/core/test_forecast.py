"""When jobs are expected to start and to end: held against what then happens, by the decisions themselves."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.api.job import QLoRAJob
from orchestrator.core.explain import explain
from orchestrator.core.forecast import forecast
from orchestrator.core.job.remaining import MOST_SPEEDUP, remaining_seconds, surely_remaining_seconds
from orchestrator.core.scheduling.cycle import schedule
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    POLICY,
    after,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    progress,
    snapshot,
    stage,
)


def training(name: str, seconds_left: float, **spec: Any) -> QLoRAJob:
    """A job on a 24Gi GPU whose trainer says how long it still takes."""
    began = after(-1000)
    attempt = make_attempt(created_time=began, start_time=began, seen_time=began, progress_time=NOW, stage_uid="pod")
    report = progress(10, eta_seconds=seconds_left)
    return make_job(name, status=prepared_status(attempts=(attempt,), attempts_total=2, progress=report), **spec)


def waiting(name: str, **spec: Any) -> QLoRAJob:
    return make_job(name, status=prepared_status(LLAMA_3_8B), gpu_classes=("24Gi",), **spec)


def test_whoever_is_next_starts_when_the_first_card_comes_free() -> None:
    jobs = (training("long", 9000), training("short", 600), waiting("first", age_seconds=20), waiting("second"))
    world = snapshot(*jobs, stages=tuple(stage(job, stage_uid="pod") for job in jobs[:2]), gpu_classes=gpus(_24Gi=2))
    found = forecast(world)
    first = found.jobs["default/first"]
    assert first.start == after(600)
    assert first.gpu_class == "24Gi"
    assert first.end is not None
    second = found.jobs["default/second"]
    assert second.start == min(first.end, after(9000))
    assert found.jobs["default/long"].end == after(9000)


def test_a_job_for_which_somebody_makes_way_starts_when_that_one_has_stopped() -> None:
    holder = training("holder", 9000)
    world = snapshot(
        holder, waiting("urgent", priority=100), stages=(stage(holder, stage_uid="pod"),), gpu_classes=gpus(_24Gi=1)
    )
    found = forecast(world)
    urgent = found.jobs["default/urgent"]
    assert urgent.start == after(POLICY.stop_cost_seconds)
    assert found.jobs["default/holder"].start == urgent.end


def test_a_job_that_makes_way_later_has_left_what_is_left_then() -> None:
    holder = training("holder", 9000)
    paused = prepared_status(LLAMA_3_8B, retry_after=after(500))
    urgent = make_job("urgent", status=paused, gpu_classes=("24Gi",), priority=100)
    world = snapshot(holder, urgent, stages=(stage(holder, stage_uid="pod"),), gpu_classes=gpus(_24Gi=1))
    found = forecast(world).jobs
    assert found["default/urgent"].start == after(500 + POLICY.stop_cost_seconds)
    again, end = found["default/holder"].start, found["default/holder"].end
    assert again is not None
    assert end is not None
    assert (end - again).total_seconds() == pytest.approx(
        9000 - 500 + POLICY.restart_cost_seconds, abs=POLICY.stop_cost_seconds
    )


def test_who_has_gone_on_for_hours_is_not_taken_for_stuck_ahead_of_time() -> None:
    job = training("long", 90_000)
    fact = stage(job, stage_uid="pod", progress=job.status.progress)
    soon, late = training("soon", 40_000), waiting("late")
    world = snapshot(job, soon, late, stages=(fact, stage(soon, stage_uid="pod")), gpu_classes=gpus(_24Gi=2))
    found = forecast(world)
    assert found.jobs["default/late"].start == after(40_000)
    assert found.jobs["default/long"].end == after(90_000)
    assert found.jobs["default/long"].start is None


@pytest.mark.parametrize("eta", [1e12, 1e300])
def test_nobody_believes_a_trainer_that_says_centuries(eta: float) -> None:
    job = training("for-ever", eta)
    world = snapshot(job, waiting("next"), stages=(stage(job, stage_uid="pod"),), gpu_classes=gpus(_24Gi=1))
    assert forecast(world).endless == ("default/for-ever",)
    assert any("default/for-ever will hold a GPU" in line for line in explain(world, "default/next"))


def test_turns_end_ahead_of_time_as_they_will() -> None:
    holder = training("holder", 9000)
    queue = make_queue("default", turn_seconds=1600)
    jobs = (holder, waiting("first", age_seconds=20), waiting("second", age_seconds=10))
    world = snapshot(*jobs, stages=(stage(holder, stage_uid="pod"),), gpu_classes=gpus(_24Gi=1), queues=(queue,))
    found = forecast(world).jobs
    first, second = found["default/first"], found["default/second"]
    assert first.start == after(600 + POLICY.stop_cost_seconds)
    assert first.end is not None
    assert second.start == min(first.end, after(600 + 1600 + 2 * POLICY.stop_cost_seconds))
    again, end = found["default/holder"].start, found["default/holder"].end
    assert again is not None
    assert again > second.start
    assert end is not None


def test_what_a_queue_may_not_have_is_not_expected() -> None:
    held = waiting("held", queue="held")
    world = snapshot(held, waiting("free"), gpu_classes=gpus(_24Gi=1), queues=(make_queue("held", hold=True),))
    assert {key: found.start for key, found in forecast(world).jobs.items()} == {"default/free": NOW}
    told = explain(world, "default/free")
    assert any(line.startswith("Its last step is expected in") for line in told), told


def test_nobody_knows_who_waits_for_a_job_without_an_end() -> None:
    began = after(-1000)
    attempt = make_attempt(created_time=began, start_time=began, seen_time=began, stage_uid="pod")
    silent = make_job("silent", status=prepared_status(attempts=(attempt,), attempts_total=2))
    world = snapshot(silent, waiting("next"), stages=(stage(silent, stage_uid="pod"),), gpu_classes=gpus(_24Gi=1))
    assert forecast(world).endless == ("default/silent",)
    assert any("default/silent will hold a GPU" in line for line in explain(world, "default/next"))


def test_a_forecast_looks_no_further_than_its_bound() -> None:
    jobs = tuple(waiting(f"job-{number:02}", age_seconds=100 - number) for number in range(20))
    world = snapshot(*jobs, gpu_classes=gpus(_24Gi=1))
    found = forecast(world, most_events=5)
    assert sorted(found.jobs) == [f"default/job-{number:02}" for number in range(6)]
    assert found.until == found.jobs["default/job-04"].end


def test_a_forecast_changes_nothing_and_is_the_same_again() -> None:
    jobs = tuple(waiting(f"job-{number:02}", age_seconds=100 - number) for number in range(5))
    world = snapshot(*jobs, gpu_classes=gpus(_24Gi=2))
    assert forecast(world) == forecast(world)
    assert world.jobs == jobs


@pytest.mark.parametrize(("heard_ago", "eta", "left"), [(0, 500, 500), (100, 500, 400), (900, 500, -400)])
def test_what_is_left_is_what_the_trainer_said_by_the_controllers_clock(
    heard_ago: float, eta: float, left: float
) -> None:
    job = training("job", eta)
    attempts = (job.status.attempts[-1].model_copy(update={"progress_time": after(-heard_ago)}),)
    report = progress(10, eta_seconds=eta, age_seconds=86_400)  # a node's clock, a day off
    heard = job.model_copy(update={"status": job.status.model_copy(update={"attempts": attempts, "progress": report})})
    assert remaining_seconds(heard.status, POLICY, NOW) == left


def test_a_trainer_that_says_it_is_about_to_end_is_not_believed_far_below_its_plan() -> None:
    [placement] = schedule(snapshot(waiting("job"), gpu_classes=gpus(_24Gi=1))).placements
    planned = placement.estimate.seconds
    assert planned is not None
    job = training("job", 5)
    status = job.status.model_copy(update={"estimate": placement.estimate})
    ran_seconds = 1000
    least = (planned + POLICY.restart_cost_seconds - ran_seconds) / MOST_SPEEDUP
    assert surely_remaining_seconds(status, POLICY, NOW) == pytest.approx(max(5, least), rel=0.01)
    assert surely_remaining_seconds(job.status, POLICY, NOW) == 5


def test_before_the_first_word_what_is_left_is_what_the_plan_says() -> None:
    world = snapshot(waiting("job"), gpu_classes=gpus(_24Gi=1))
    [placement] = schedule(world).placements
    assert placement.estimate.seconds is not None
    expected = forecast(world).jobs["default/job"].end
    assert expected is not None
    told = (expected - NOW).total_seconds()
    assert told == pytest.approx(placement.estimate.seconds + POLICY.restart_cost_seconds, rel=0.01)
