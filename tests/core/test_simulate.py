"""What if: held against a world that is so."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from orchestrator.core.forecast import Expectation, forecast
from orchestrator.core.job.state_machine import JobState
from orchestrator.core.simulate import Simulation, simulate
from orchestrator.core.snapshot import Snapshot
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


def world(cards: int = 2, waiting: int = 5) -> Snapshot:
    """Two that train on 24Gi GPUs for 600 and 9000 seconds, and others that wait."""
    attempt = make_attempt(start_time=after(-1000), progress_time=NOW, stage_uid="pod")
    training = [
        make_job(name, status=prepared_status(attempts=(attempt,), attempts_total=2, progress=report))
        for name, report in (("short", progress(10, eta_seconds=600)), ("long", progress(10, eta_seconds=9000)))
    ]
    ready = prepared_status(LLAMA_3_8B)
    others = [
        make_job(f"waits-{number}", age_seconds=100 - number, status=ready, gpu_classes=("24Gi",))
        for number in range(waiting)
    ]
    stages = tuple(stage(job, stage_uid="pod") for job in training)
    return snapshot(*training, *others, stages=stages, gpu_classes=gpus(_24Gi=cards))


def starts(found: Simulation) -> dict[str, tuple[datetime | None, datetime | None]]:
    return {each.job: (each.before.start, each.after.start) for each in found.jobs}


def test_two_more_cards_bring_starts_forward_as_a_cluster_that_has_them() -> None:
    present = world()
    found = simulate(present, replace(present, gpu_classes=gpus(_24Gi=4)))
    really, without = forecast(world(cards=4)), forecast(present)
    assert {each.job: each.after for each in found.jobs} == really.jobs
    assert {each.job: each.before for each in found.jobs} == without.jobs
    assert [each.later_seconds for each in found.jobs if each.holds_gpu] == [0.0, 0.0]
    assert all(each.later_seconds is not None and each.later_seconds < 0 for each in found.jobs if not each.holds_gpu)
    assert [each.job for each in found.jobs[:4]] == [
        "default/short",
        "default/long",
        "default/waits-0",
        "default/waits-1",
    ]


def test_a_card_less_is_taken_from_nobody_who_has_it() -> None:
    present = world()
    found = simulate(present, replace(present, gpu_classes=gpus(_24Gi=1)))
    assert {each.job: each.later_seconds for each in found.jobs if each.holds_gpu} == {
        "default/short": 0.0,
        "default/long": 0.0,
    }
    assert starts(found)["default/waits-0"] == (after(600), after(9000))


def test_a_job_that_is_added_changes_nobody_before_it() -> None:
    present = world()
    ready = prepared_status(LLAMA_3_8B)
    last = make_job("added", status=ready, gpu_classes=("24Gi",))
    found = simulate(present, replace(present, jobs=(*present.jobs, last)))
    assert [each.later_seconds for each in found.jobs] == [0.0] * 7 + [None]
    assert found.jobs[-1].job == "default/added"
    assert found.jobs[-1].before == Expectation()
    latest = max(each.after.start for each in found.jobs[:-1] if each.after.start is not None)
    assert found.jobs[-1].after.start is not None
    assert found.jobs[-1].after.start >= latest
    first = make_job("added", status=ready, gpu_classes=("24Gi",), priority=5)
    told = starts(simulate(present, replace(present, jobs=(*present.jobs, first))))
    assert told["default/added"] == (None, after(POLICY.stop_cost_seconds)), "somebody makes way for it"
    assert any(became is not None and was is None for job, (was, became) in told.items() if job != "default/added")


def test_another_quota_is_decided_as_a_queue_that_has_it() -> None:
    present = replace(world(), queues=(make_queue("default", {"24Gi": 2}),), gpu_classes=gpus(_24Gi=4))
    wider = replace(present, queues=(make_queue("default", {"24Gi": 4}),))
    found = simulate(present, wider)
    assert {each.job: each.after for each in found.jobs} == forecast(wider).jobs
    assert starts(found)["default/waits-0"] == (after(600), NOW)


def test_who_is_not_expected_to_start_comes_last_and_who_needs_no_gpu_is_left_out() -> None:
    held = make_job("held", queue="held", status=prepared_status())
    done = make_job("done", status=prepared_status(adapter_uri="file:///adapter"))
    present = world(waiting=1)
    present = replace(
        present, jobs=(held, make_job("fresh"), done, *present.jobs), queues=(make_queue("held", hold=True),)
    )
    found = simulate(present, present)
    assert [(each.job, each.state) for each in found.jobs[-2:]] == [
        ("default/fresh", JobState.NEW),
        ("default/held", JobState.QUEUED),
    ]
    assert len(found.jobs) == 5
    assert found.jobs[-1].later_seconds is None


def test_both_forecasts_are_bounded_and_say_so() -> None:
    present = world(cards=1, waiting=20)
    found = simulate(present, present, most_events=3)
    assert found.before == found.after
    assert found.before.is_cut
    assert len(found.before.jobs) < 22
    assert not simulate(present, present).before.is_cut


def test_a_simulation_changes_nothing_and_is_the_same_again() -> None:
    present = world()
    jobs = present.jobs
    assert simulate(present, present) == simulate(present, present)
    assert present.jobs is jobs
