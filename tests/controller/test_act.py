"""Acting on commands, over the real store: what is dropped, what waits, and who must not suffer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.adapters.sqlite_store import SqliteStore
from orchestrator.api.base import utc
from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.controller.act import Actor, Backoff
from orchestrator.core.facts import (
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    Event,
    FinishRun,
    StopStage,
    WriteStatus,
)
from orchestrator.errors import RuntimeLost, StoreUnavailable, TrackingUnavailable
from orchestrator.settings import Settings
from tests.adapters.builders import make_job, make_task
from tests.controller.fakes import FakeRuntime, FakeTracking


class World:
    def __init__(self, home: Path) -> None:
        self.store = SqliteStore(Settings(home=home))
        self.runtime = FakeRuntime()
        self.tracking = FakeTracking()
        self.now = 0.0
        self.actor = Actor(self.store, self.runtime, self.tracking, Backoff(1, 8, clock=lambda: self.now))

    def job(self, name: str = "medical") -> QLoRAJob:
        return self.store.create_job(make_job(name))

    def status(self, name: str = "medical") -> QLoRAJobStatus:
        return self.store.get_job("team-a", name).status


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def ensure(job: QLoRAJob) -> EnsureStage:
    return EnsureStage(task=make_task(job, "prepare", store=Path("/store")), gpu_class=None)


def write(job: QLoRAJob, summary: str) -> WriteStatus:
    return WriteStatus(
        job=job, status=QLoRAJobStatus(summary=summary), events=(Event(reason=Reason.PREPARING, message=summary),)
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_a_status_is_written_with_its_events(world: World) -> None:
    world.actor.act([write(world.job(), "hello")])
    assert world.status().summary == "hello"
    assert [event.message for _, event in world.store.list_events("team-a", "medical")] == ["hello"]


def test_every_command_reaches_its_port(world: World) -> None:
    job = world.job()
    world.actor.act(
        [
            ensure(job),
            StopStage(namespace="team-a", name="medical-train-2", grace_seconds=5, reason=Reason.PREEMPTED),
            DeleteStage(namespace="team-a", name="medical-train-2"),
            DeleteJob(job=job),
        ]
    )
    assert world.runtime.calls == ["ensure medical-prepare-1", "stop medical-train-2", "delete medical-train-2"]
    assert world.store.list_jobs() == []


def test_nothing_comes_of_an_intent_that_was_not_recorded(world: World) -> None:
    stale = world.job()
    world.store.update_status(stale, QLoRAJobStatus(summary="somebody was faster"))
    world.actor.act([write(stale, "mine"), ensure(stale)])
    assert world.runtime.calls == []
    assert world.status().summary == "somebody was faster"
    assert world.store.list_events("team-a", "medical") == []


def test_a_conflict_is_decided_anew_without_waiting(world: World) -> None:
    stale = world.job()
    fresh = world.store.update_status(stale, QLoRAJobStatus())
    world.actor.act([write(stale, "stale")])
    world.actor.act([write(fresh, "fresh")])
    assert world.status().summary == "fresh"


def test_a_job_that_is_gone_stops_nobody(world: World) -> None:
    gone, other = world.job("gone"), world.job("other")
    world.store.delete_job("team-a", "gone")
    world.actor.act([write(gone, "late"), DeleteJob(job=gone), write(other, "fine")])
    assert world.status("other").summary == "fine"


def test_one_bad_job_never_stops_the_others(world: World) -> None:
    bad, good = world.job("bad"), world.job("good")
    world.runtime.error = lambda call: ZeroDivisionError("a defect") if "bad" in call else None
    world.actor.act([ensure(bad), ensure(good), write(good, "fine")])
    assert world.runtime.calls == ["ensure bad-prepare-1", "ensure good-prepare-1"]
    assert world.status("good").summary == "fine"


def test_a_command_that_failed_waits_twice_as_long_each_time_up_to_the_bound(world: World) -> None:
    job = world.job()
    world.runtime.error = lambda call: StoreUnavailable("away")
    tried_at = []
    for tick in range(400):
        world.now = tick / 10
        before = len(world.runtime.calls)
        world.actor.act([ensure(job)])
        if len(world.runtime.calls) > before:
            tried_at.append(world.now)
    assert tried_at == [0, 1, 3, 7, 15, 23, 31, 39]


def test_success_forgets_the_failures(world: World) -> None:
    job = world.job()
    world.runtime.error = lambda call: StoreUnavailable("away") if len(world.runtime.calls) in (1, 2, 4) else None
    for world.now in (0, 1, 3, 3, 4):
        world.actor.act([ensure(job)])
    # Failed at 0 and 1, done at 3, failed at 3 again: the wait begins at one second again.
    assert len(world.runtime.calls) == 5


def test_a_lost_runtime_ends_the_round(world: World) -> None:
    job = world.job()
    world.runtime.error = lambda call: RuntimeLost("Ray is gone")
    with pytest.raises(RuntimeLost):
        world.actor.act([ensure(job)])


def test_a_run_is_recorded_on_the_newest_status(world: World) -> None:
    job = world.job()
    world.tracking.open.clear()
    world.actor.act([EnsureRun(job=job), write(job, "went on meanwhile")])
    assert world.status().summary == "went on meanwhile"
    world.tracking.open.set()
    wait_for(lambda: world.status().mlflow.run_id)
    status = world.status()
    assert (status.summary, status.mlflow.run_id, status.mlflow.run_status) == (
        "went on meanwhile",
        "run-of-medical",
        "RUNNING",
    )


def test_a_tracking_server_that_hangs_stops_no_job(world: World) -> None:
    one, two = world.job("one"), world.job("two")
    world.tracking.open.clear()
    start = time.monotonic()
    world.actor.act([EnsureRun(job=one), EnsureRun(job=one), EnsureRun(job=two), ensure(one), ensure(two)])
    assert time.monotonic() - start < 5
    assert world.runtime.calls == ["ensure one-prepare-1", "ensure two-prepare-1"]
    world.tracking.open.set()
    wait_for(lambda: world.status("two").mlflow.run_id)


def test_what_mlflow_refused_is_tried_again_after_the_wait(world: World) -> None:
    job = world.job()
    world.tracking.error = TrackingUnavailable("away")
    world.actor.act([EnsureRun(job=job)])
    time.sleep(0.3)
    world.tracking.error = None
    world.actor.act([EnsureRun(job=job)])
    time.sleep(0.3)
    assert world.status().mlflow.run_id is None, "its second has not passed"
    world.now = 2.0
    world.actor.act([EnsureRun(job=job)])
    wait_for(lambda: world.status().mlflow.run_id)


def test_the_last_status_of_a_run_keeps_what_publish_found(world: World) -> None:
    job = world.job()
    attempt = Attempt(stage="publish", number=3, created_time=utc(0), finish_time=utc(1))
    status = QLoRAJobStatus(attempts=(attempt,))
    mlflow = status.mlflow.model_copy(update={"registered_model": "medical", "model_version": "4"})
    job = world.store.update_status(job, status.model_copy(update={"mlflow": mlflow}))
    world.actor.act([FinishRun(job=job, run_status="FINISHED")])
    wait_for(lambda: world.status().mlflow.run_status == "FINISHED")
    assert (world.status().mlflow.registered_model, world.status().mlflow.model_version) == ("medical", "4")


def test_a_run_whose_job_was_deleted_meanwhile_is_ended(world: World) -> None:
    job = world.job()
    world.tracking.open.clear()
    world.actor.act([EnsureRun(job=job)])
    world.store.delete_job("team-a", "medical")
    world.tracking.open.set()
    wait_for(lambda: world.tracking.runs.get(job.metadata.uid) == "KILLED")
