"""What changes would mean, in sentences, and how far was looked; a job that is not submitted, as its plan knows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.forecast import MOST_EVENTS
from orchestrator.errors import InvalidObject
from orchestrator.sdk.data_count import DataCount
from orchestrator.sdk.planning import plan_job
from orchestrator.sdk.simulation import as_submitted, what_if
from orchestrator.sizing.step_time import Work
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    after,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    snapshot,
    stage,
)

COUNT = DataCount(records=600, sequences=64, tokens=120_000, steps=40, exact=True)


def test_what_comes_later_than_was_looked_is_said() -> None:
    jobs = [
        make_job(f"job-{number:03}", status=prepared_status(LLAMA_3_8B), gpu_classes=("24Gi",))
        for number in range(MOST_EVENTS + 20)
    ]
    found = what_if(snapshot(*jobs, gpu_classes=gpus(_24Gi=1)), ["24Gi=+1"], (), ())
    assert len(found.jobs) == len(jobs)
    assert found.jobs[-1].after.start is None
    assert "It is not told what comes later than in" in found.notes[-1]
    assert "500 stages that end" in found.notes[-1]


def test_who_holds_a_gpu_for_ever_and_who_is_not_prepared_is_said() -> None:
    attempt = make_attempt(start_time=after(-1000))
    silent = make_job("silent", status=prepared_status(attempts=(attempt,), attempts_total=2))
    world = snapshot(silent, make_job("fresh"), stages=(stage(silent),), gpu_classes=gpus(_24Gi=1))
    assert what_if(world, (), (), ()).notes == (
        "Sooner: 0; later: 0; the same: 0.",
        "Not prepared yet, so nobody knows what they need: default/fresh.",
        "Nobody knows for how long these hold a GPU: default/silent.",
    )


def test_a_job_that_is_not_submitted_is_what_prepare_would_make_of_it() -> None:
    job = make_job("new")
    new = as_submitted(job, plan_job(job, LLAMA_3_8B, gpus(_24Gi=1), data=COUNT), NOW)
    assert new.metadata.creation_timestamp == NOW
    assert new.status.prepared is not None
    assert Work.of(new.status.prepared) == COUNT.work()
    assert new.status.prepared.model == LLAMA_3_8B


def test_without_its_data_a_job_is_as_long_as_its_steps_say_or_nobody_knows() -> None:
    job = make_job("new")
    plan = plan_job(job, LLAMA_3_8B, gpus(_24Gi=1))
    with pytest.raises(InvalidObject, match=r"training\.maxSteps"):
        as_submitted(job, plan, NOW)
    training = job.spec.training.model_copy(update={"max_steps": 10})
    bounded = job.model_copy(update={"spec": job.spec.model_copy(update={"training": training})})
    prepared = as_submitted(bounded, plan, NOW).status.prepared
    assert prepared is not None
    assert (prepared.steps, Work.of(prepared).sequence_tokens) == (10, training.sequence_length)


def test_changes_add_up_and_leave_the_present_alone() -> None:
    queue = make_queue("default", {"24Gi": 1})
    jobs = [make_job(f"job-{n}", status=prepared_status(LLAMA_3_8B), gpu_classes=("24Gi",)) for n in range(4)]
    world = snapshot(*jobs, gpu_classes=gpus(_24Gi=1), queues=(queue,))
    found = what_if(world, ["24Gi=+1", "24Gi=+1"], ["default:24Gi=+2"], ())
    wider = replace(world, gpu_classes=gpus(_24Gi=3), queues=(make_queue("default", {"24Gi": 3}),))
    assert found.simulation.after == what_if(wider, (), (), ()).simulation.before
    assert [each.after.start == NOW for each in found.jobs] == [True, True, True, False]
    assert world.queues == (queue,)
    alone = what_if(world, ["24Gi=+2"], (), ())
    assert [each.later_seconds for each in alone.jobs] == [0.0] * 4, "the quota is what they wait for"
