"""A job that goes on from another one's adapter: it waits for that one, is told what became of it, or fails."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.job import Condition, QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import EnsureStage
from orchestrator.core.decide import decide
from orchestrator.core.job.starting_job import MOST_IN_A_RING
from orchestrator.core.job.state_machine import JobState, state_of
from tests.builders import DIGEST, POLICY, gpus, make_job, snapshot, written
from tests.core.world import World

FIRST, SECOND = "default/first", "default/second"


def going_on(name: str = "first", own_name: str = "second", **fields: Any) -> QLoRAJob:
    """A job that goes on from the one of that name."""
    job = make_job(own_name, **fields)
    adapter = AdapterSpec.model_validate({"from": f"job:{name}"})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"adapter": adapter})})


def make_world(*jobs: QLoRAJob) -> World:
    world = World(policy=POLICY, gpu_classes=list(gpus(_24Gi=2)))
    for job in jobs:
        world.submit(job)
    return world


def live(world: World, passes: int) -> None:
    for _ in range(passes):
        world.pass_once()
        world.check()
        world.pass_time(10)
        for key in world.live_stages():
            world.run_stage(key)


def condition(job: QLoRAJob, kind: ConditionType) -> Condition:
    found = job.status.condition(kind)
    assert found is not None
    return found


def test_it_waits_until_the_other_has_succeeded_and_is_told_of_its_adapter() -> None:
    world = make_world(make_job("first"), going_on())
    live(world, 3)
    assert state_of(world.jobs[FIRST].status) not in (JobState.NEW, JobState.SUCCEEDED)
    waits = condition(world.jobs[SECOND], ConditionType.PREPARED)
    assert waits.message == "waits for job first, from whose adapter it goes on, to succeed"
    live(world, 60)
    first, second = world.jobs[FIRST], world.jobs[SECOND]
    assert (state_of(first.status), state_of(second.status)) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
    told = second.status.starting_job
    assert told is not None
    assert (told.uid, told.adapter_uri, told.adapter_digest) == (first.metadata.uid, first.status.adapter_uri, DIGEST)
    assert (told.base, told.base_revision) == ("file:///model", "main")
    begun = [task for task in world.tasks.values() if task.job == "second"]
    assert {task.stage: task.starting_job for task in begun} == {"prepare": told, "train": None, "publish": None}


def test_what_it_was_told_outlives_the_other_job() -> None:
    world = make_world(make_job("first"))
    live(world, 60)
    told = written(decide(snapshot(world.jobs[FIRST], going_on())), "second")
    started = going_on().model_copy(update={"status": told})
    again = [command for command in decide(snapshot(started)) if isinstance(command, EnsureStage)]
    assert [command.task.starting_job for command in again] == [told.starting_job]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("third", "there is no job third in namespace default; name one that is there, or the version"),
        ("second", "a job cannot go on from itself"),
        ("first", r"job first has ended without an adapter \(Cancelled\)"),
    ],
)
def test_it_fails_where_there_will_be_no_such_adapter(name: str, words: str) -> None:
    world = make_world(make_job("first"))
    live(world, 2)
    world.cancel(FIRST)
    live(world, 10)
    world.submit(going_on(name))
    live(world, 2)
    finished = condition(world.jobs[SECOND], ConditionType.FINISHED)
    assert finished.reason is Reason.USER_ERROR
    assert re.search(words, finished.message)


def test_a_job_of_another_namespace_is_none() -> None:
    world = make_world(make_job("first"))
    live(world, 60)
    done = world.jobs[FIRST]
    other = done.model_copy(update={"metadata": done.metadata.model_copy(update={"namespace": "team-b"})})
    status = written(decide(snapshot(other, going_on())), "second")
    finished = status.condition(ConditionType.FINISHED)
    assert finished is not None
    assert "there is no job first in namespace default" in finished.message


@pytest.mark.parametrize("length", [2, 3, MOST_IN_A_RING])
def test_jobs_that_go_on_from_each_other_fail_at_once_and_so_does_who_names_one_of_them(length: int) -> None:
    names = [f"ring-{number}" for number in range(length)]
    ring = [going_on(name, own_name=names[number - 1]) for number, name in enumerate(names)]
    world = make_world(*ring, going_on(names[0], own_name="behind"))
    live(world, 3)
    assert {state_of(job.status) for job in world.jobs.values()} == {JobState.FAILED}
    told = condition(world.jobs["default/ring-0"], ConditionType.FINISHED).message
    assert " -> ".join([*names, names[0]]) in told or "has ended without an adapter" in told
    assert not world.tasks


def test_a_chain_of_jobs_is_no_ring() -> None:
    world = make_world(make_job("first"), going_on(), going_on("second", own_name="third"))
    live(world, 120)
    assert {state_of(job.status) for job in world.jobs.values()} == {JobState.SUCCEEDED}
