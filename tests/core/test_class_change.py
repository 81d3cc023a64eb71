"""A job that goes on from its checkpoint on another class than it began on: when it may, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.api.job import Attempt, CheckpointStatus, ClassChange, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from tests.builders import (
    after,
    gpus,
    make_attempt,
    make_job,
    prepared_status,
    running_status,
    snapshot,
    stage,
    written,
)

CHANGES = (ClassChange(step=40, from_class="24Gi", to_class="48Gi"),)


def began_on(gpu_class: str, *, step: int | None = 40, **fields: Any) -> QLoRAJobStatus:
    """Of a job that was moved after so many steps on a class."""
    job = make_job("job", status=prepared_status(), gpu_classes=(gpu_class,))
    [placement] = schedule(snapshot(job, gpu_classes=gpus(**{f"_{gpu_class}": 1}))).placements
    attempt = make_attempt(
        gpu_class=gpu_class,
        start_time=after(-900),
        finish_time=after(-60),
        reason=Reason.PREEMPTED,
        seen_time=after(-900),
    )
    checkpoint = None if step is None else CheckpointStatus(step=step, uri="file:///c", time=after(-60), attempt=2)
    return prepared_status(
        attempts=(attempt,), attempts_total=2, estimate=placement.estimate, checkpoint=checkpoint, **fields
    )


def world(job: QLoRAJob, *, free_24: int = 0, free_48: int = 1) -> Snapshot:
    """One 24Gi GPU in use, and so many free ones."""
    holder = make_job("holder", status=running_status(), priority=1000)
    return snapshot(job, holder, stages=(stage(holder),), gpu_classes=gpus(_24Gi=1 + free_24, _48Gi=free_48))


def got(seen: Snapshot) -> str | None:
    return next((p.estimate.gpu_class for p in schedule(seen).placements), None)


def moved(status: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJob:
    return make_job("job", status=status or began_on("24Gi"), **spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"class_change": "allowed"}, "48Gi"),
        ({"class_change": "forbidden", "deterministic": False}, None),
        ({"class_change": "auto", "deterministic": True}, None),
        ({"class_change": "auto", "deterministic": False}, "48Gi"),
    ],
)
def test_another_class_is_taken_by_who_may_change(spec: dict[str, Any], expected: str | None) -> None:
    assert got(world(moved(**spec))) == expected


def test_the_class_that_it_began_on_comes_first() -> None:
    assert got(world(moved(class_change="allowed"), free_24=1)) == "24Gi"
    large = began_on("48Gi")
    assert got(world(moved(large, class_change="allowed"), free_24=1)) == "48Gi"


def test_before_its_first_checkpoint_a_job_goes_anywhere() -> None:
    assert got(world(moved(began_on("24Gi", step=None), class_change="forbidden"))) == "48Gi"


def test_a_class_that_is_gone_is_waited_for_by_who_may_never_change() -> None:
    elsewhere = {"gpu_classes": gpus(_48Gi=1)}
    assert got(snapshot(moved(), **elsewhere)) == "48Gi"
    assert got(snapshot(moved(class_change="forbidden"), **elsewhere)) is None


def test_after_running_out_of_memory_it_goes_to_no_smaller_class() -> None:
    status = began_on("48Gi", step_ups=1)
    holder = make_job("holder", status=running_status(gpu_class="48Gi"), priority=1000)
    job = moved(status, class_change="allowed")
    assert got(snapshot(job, holder, stages=(stage(holder),), gpu_classes=gpus(_24Gi=1, _48Gi=1))) is None
    assert got(snapshot(job, holder, stages=(stage(holder),), gpu_classes=gpus(_48Gi=1, _80Gi=1))) == "80Gi"


def test_the_status_says_from_which_to_which_and_that_bits_differ() -> None:
    status = written(decide(world(moved(class_change="allowed"))))
    assert status.class_changes == CHANGES
    admitted = status.condition(ConditionType.ADMITTED)
    assert admitted is not None
    assert admitted.message.endswith(
        "goes on from step 40 there instead of on 24Gi, sized anew: not bit for bit what it would have been on 24Gi"
    )
    stayed = written(decide(world(moved(class_change="allowed"), free_24=1)))
    assert stayed.class_changes == ()


def test_a_change_before_which_no_step_became_durable_comes_to_nothing() -> None:
    tried = make_attempt(
        number=3, gpu_class="48Gi", start_time=after(-50), finish_time=after(-10), reason=Reason.PREEMPTED
    )
    before = began_on("24Gi")
    attempts: tuple[Attempt, ...] = (*before.attempts, tried)
    back = before.model_copy(update={"attempts": attempts, "attempts_total": 3, "class_changes": CHANGES})
    assert written(decide(world(moved(back, class_change="allowed"), free_24=1))).class_changes == ()
    later = back.model_copy(
        update={"checkpoint": CheckpointStatus(step=50, uri="file:///c", time=after(-10), attempt=3)}
    )
    found = written(decide(world(moved(later, class_change="allowed"), free_24=1, free_48=0))).class_changes
    assert found == (*CHANGES, ClassChange(step=50, from_class="48Gi", to_class="24Gi"))


def test_who_keeps_its_class_while_others_idle_is_told_what_would_let_it_go_on() -> None:
    told = explain(world(moved()), "default/job")
    assert (
        "It keeps 24Gi, on which it began, to go on bit for bit; with resources.classChange: allowed it could go on on "
        "48Gi, too." in told
    )
    assert not any("classChange" in line for line in explain(world(moved(class_change="allowed")), "default/job"))
