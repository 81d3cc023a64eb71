"""Acting on commands, over the real store: what is dropped, what waits, and who must not suffer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.base import utc
from orchestrator.api.job import RELEASE_FINALIZER, MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.promotion import moved
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweepStatus, TrialStatus
from orchestrator.controller.act import TRIES_BEFORE_REFUSED, Actor, Bounds
from orchestrator.controller.throttle import Allowance, Backoff
from orchestrator.controller.webhook_workers import WebhookWorkers
from orchestrator.core.commands import (
    CancelJob,
    CreateJob,
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    Event,
    FinishRun,
    FinishSweep,
    PromoteVersion,
    ReleaseJob,
    ReportDefect,
    StopStage,
    WriteStatus,
    WriteSweepStatus,
)
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import InvalidObject, RuntimeLost, StoreUnavailable, TrackingUnavailable
from orchestrator.settings import Settings
from tests.builders import make_task, submitted_job, submitted_sweep
from tests.controller.fakes import FakeNotifier, FakeRuntime, FakeTracking


class World:
    def __init__(self, home: Path, bounds: Bounds | None = None) -> None:
        self.store = SqliteStore(Settings(home=home))
        self.runtime = FakeRuntime()
        self.tracking = FakeTracking()
        self.now = 0.0
        backoff = Backoff(1, 8, clock=lambda: self.now)
        webhooks = WebhookWorkers(FakeNotifier(), Backoff(1, 8), 1)
        self.actor = Actor(self.store, self.runtime, self.tracking, webhooks, backoff, bounds)

    def job(self, name: str = "medical") -> QLoRAJob:
        return self.store.create_job(submitted_job(name))

    def stored(self, name: str = "medical") -> QLoRAJob:
        return self.store.get_job("team-a", name)

    def status(self, name: str = "medical") -> QLoRAJobStatus:
        return self.stored(name).status


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
            DeleteStage(namespace="team-a", name="medical-train-3", recorded=True),
            DeleteJob(job=job),
        ]
    )
    assert world.runtime.calls == [
        "ensure medical-prepare-1",
        "stop medical-train-2",
        "delete medical-train-2",
        "delete medical-train-3 recorded",
    ]
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


def test_a_run_that_mlflow_has_is_a_fact_until_it_is_on_record(world: World) -> None:
    job = world.job()
    world.tracking.open.clear()
    world.actor.act([EnsureRun(job=job), write(job, "went on meanwhile")])
    assert world.status().summary == "went on meanwhile"
    assert world.actor.runs() == {}
    world.tracking.open.set()
    wait_for(world.actor.runs)
    fact = world.actor.runs()[job.metadata.uid]
    assert (fact.job, fact.mlflow.run_id, fact.mlflow.run_status) == (job, "run-of-medical", "RUNNING")
    world.actor.act([WriteStatus(job=world.stored(), status=QLoRAJobStatus(mlflow=fact.mlflow))])
    assert world.actor.runs() == {}


def test_a_tracking_server_that_hangs_stops_no_job(world: World) -> None:
    one, two = world.job("one"), world.job("two")
    world.tracking.open.clear()
    start = time.monotonic()
    world.actor.act([EnsureRun(job=one), EnsureRun(job=one), EnsureRun(job=two), ensure(one), ensure(two)])
    assert time.monotonic() - start < 5
    assert world.runtime.calls == ["ensure one-prepare-1", "ensure two-prepare-1"]
    world.tracking.open.set()
    wait_for(lambda: len(world.actor.runs()) == 2)


def test_a_call_that_hangs_in_one_worker_leaves_the_others_free(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(mlflow_workers=2))
    slow, quick = world.job("slow"), world.job("quick")
    world.tracking.held = "slow"
    world.tracking.open.clear()
    world.actor.act([EnsureRun(job=slow), EnsureRun(job=quick)])
    wait_for(world.actor.runs)
    assert [fact.job for fact in world.actor.runs().values()] == [quick]
    world.tracking.open.set()
    wait_for(lambda: len(world.actor.runs()) == 2)


def test_what_mlflow_refused_is_tried_again_after_the_wait(world: World) -> None:
    job = world.job()
    world.tracking.error = TrackingUnavailable("away")
    world.actor.act([EnsureRun(job=job)])
    time.sleep(0.3)
    world.tracking.error = None
    world.actor.act([EnsureRun(job=job)])
    time.sleep(0.3)
    assert world.actor.runs() == {}, "its second has not passed"
    world.now = 2.0
    world.actor.act([EnsureRun(job=job)])
    wait_for(world.actor.runs)


def test_a_job_that_may_not_have_a_run_is_a_fact(world: World) -> None:
    job = world.job()
    world.tracking.error = InvalidObject("the experiment theirs belongs to namespace b, not to a")
    world.actor.act([EnsureRun(job=job)])
    wait_for(world.actor.refused)
    assert world.actor.refused() == {job.metadata.uid: "the experiment theirs belongs to namespace b, not to a"}
    assert world.actor.runs() == {}


def test_a_run_gets_its_last_status_and_then_the_job_is_released(world: World) -> None:
    open_run = MlflowStatus(run_id="r", run_status="RUNNING", registered_model="medical", model_version="4")
    job = world.store.update_status(world.job(), QLoRAJobStatus(mlflow=open_run))
    ended = open_run.model_copy(update={"run_status": "FINISHED"})
    job = world.store.update_status(job, QLoRAJobStatus(mlflow=ended, finish_time=utc(1)))
    assert job.metadata.finalizers == (RELEASE_FINALIZER,)
    world.tracking.open.clear()
    world.actor.act([FinishRun(job=job, run_status="FINISHED")])
    assert world.stored().metadata.finalizers == (RELEASE_FINALIZER,)
    world.tracking.open.set()
    wait_for(lambda: not world.stored().metadata.finalizers)
    assert world.tracking.runs == {job.metadata.uid: "FINISHED"}
    assert world.status().mlflow == ended


def test_a_deleted_job_goes_without_its_runs_end_where_that_is_decided_and_the_log_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    ended = MlflowStatus(run_id="r", run_status="KILLED")
    open_run = ended.model_copy(update={"run_status": "RUNNING"})
    job = world.store.update_status(world.job(), QLoRAJobStatus(mlflow=open_run))
    job = world.store.update_status(job, QLoRAJobStatus(mlflow=ended, finish_time=utc(1)))
    world.store.delete_job("team-a", "medical")
    world.tracking.open.clear()
    event = Event(reason=Reason.TRACKING_UNAVAILABLE, message="run r is left", warning=True)
    world.actor.act([FinishRun(job=job, run_status="KILLED"), ReleaseJob(job=job, event=event)])
    assert world.store.list_jobs() == []
    assert "run r is left" in caplog.text
    world.tracking.open.set()


def test_the_run_of_a_job_that_is_gone_is_ended_and_forgotten(world: World) -> None:
    job = world.job()
    world.actor.act([EnsureRun(job=job)])
    wait_for(world.actor.runs)
    world.store.delete_job("team-a", "medical")
    world.actor.act([FinishRun(job=job, run_status="KILLED")])
    wait_for(lambda: not world.actor.runs())
    assert world.tracking.runs == {job.metadata.uid: "KILLED"}


def test_what_came_of_a_promotion_is_a_fact_and_is_asked_again_while_mlflow_is_away(world: World) -> None:
    job = world.job()
    world.tracking.error = TrackingUnavailable("away")
    world.actor.act([PromoteVersion(job=job, forced="")])
    time.sleep(0.3)
    assert world.actor.runs() == {}
    world.tracking.error, world.now = None, 2.0
    world.actor.act([PromoteVersion(job=job, forced="")])
    wait_for(world.actor.runs)
    fact = world.actor.runs()[job.metadata.uid]
    assert (fact.job, fact.promotion) == (job, moved("champion", "1", "approved"))


# --- the bounds of a round ------------------------------------------------------------------------------------------


def test_a_round_begins_nothing_more_once_its_time_is_over(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(seconds=0.2))
    world.runtime.error = lambda call: time.sleep(0.05)
    commands = [ensure(world.job(f"job-{number}")) for number in range(20)]
    world.actor.act(commands)
    done = world.runtime.calls
    assert done == [f"ensure job-{number}-prepare-1" for number in range(len(done))], "the first come first"
    assert 1 <= len(done) <= 5


def test_a_round_that_took_long_to_decide_may_act_longer(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(seconds=0.01))
    world.runtime.error = lambda call: time.sleep(0.02)
    world.actor.act([ensure(world.job(f"job-{number}")) for number in range(5)], looked_seconds=10.0)
    assert len(world.runtime.calls) == 5


def test_what_follows_a_write_waits_for_the_next_round_once_the_time_is_over(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(seconds=-1.0))
    job = world.job()
    world.actor.act([write(job, "too late"), ensure(job)])
    assert (world.status().summary, world.runtime.calls) == ("", [])


def test_several_jobs_are_served_at_one_time_and_each_in_its_order(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(writers=4))
    together = threading.Barrier(4)
    world.runtime.error = lambda call: (together.wait(20), None)[1]  # nobody gets on alone
    jobs = [world.job(f"job-{number}") for number in range(4)]
    world.actor.act([command for job in jobs for command in (write(job, "recorded"), ensure(job))])
    assert sorted(world.runtime.calls) == [f"ensure job-{number}-prepare-1" for number in range(4)]
    assert [world.status(job.metadata.name).summary for job in jobs] == ["recorded"] * 4


def test_of_several_jobs_at_one_time_the_one_whose_runtime_is_lost_ends_the_round(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(writers=4))
    world.runtime.error = lambda call: RuntimeLost("Ray is gone") if "job-2" in call else None
    with pytest.raises(RuntimeLost):
        world.actor.act([ensure(world.job(f"job-{number}")) for number in range(4)])


def test_words_about_jobs_that_wait_come_no_faster_than_allowed_and_hold_no_deed_up(tmp_path: Path) -> None:
    world = World(tmp_path, Bounds(words_per_second=2 / 60))  # a minute's worth of which are two
    jobs = [world.job(f"job-{number}") for number in range(5)]
    world.actor.act([replace(write(job, "waits"), words_only=True) for job in jobs[:4]])
    world.actor.act([write(jobs[4], "starts")])
    said = [world.status(job.metadata.name).summary for job in jobs]
    assert said == ["waits", "waits", "", "", "starts"]


def test_an_allowance_saves_up_to_its_bound_what_is_not_used() -> None:
    now = 0.0
    allowance = Allowance(2.0, saved_seconds=3.0, clock=lambda: now)
    assert [allowance.take() for _ in range(7)] == [True] * 6 + [False]
    now = 0.5
    assert [allowance.take() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [allowance.take() for _ in range(7)] == [True] * 6 + [False]


def test_a_status_that_the_store_refuses_for_good_becomes_a_fact(world: World) -> None:
    """It is one until a status of the job is stored, which says how it ended."""
    job = world.job()
    world.actor.act([WriteStatus(job=job, status=QLoRAJobStatus().model_copy(update={"attempts_total": 1e30}))])
    [why] = world.actor.refused().values()
    assert "attemptsTotal" in why or "attempts_total" in why
    world.now += 100
    world.actor.act([write(job, "failed in words")])
    assert world.actor.refused() == {}


def test_a_stage_that_cannot_be_created_however_often_it_is_tried_becomes_a_fact(world: World) -> None:
    job = world.job()
    world.runtime.error = lambda call: ValueError("no such claim") if call.startswith("ensure") else None
    for _ in range(TRIES_BEFORE_REFUSED):
        assert world.actor.refused() == {}
        world.actor.act([ensure(job)])
        world.now += 100
    assert world.actor.refused() == {job.metadata.uid: "medical-prepare-1 cannot be created: ValueError: no such claim"}


def test_what_nobody_asks_for_any_more_is_no_fact(world: World) -> None:
    job = world.job()
    world.actor.act([WriteStatus(job=job, status=QLoRAJobStatus().model_copy(update={"attempts_total": 1e30}))])
    world.actor.act([])
    assert world.actor.refused() == {}


def test_a_defect_is_logged_with_its_traceback(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.actor.act([ReportDefect(job=world.job(), trace="Traceback: here")])
    assert "Traceback: here" in caplog.text


def test_a_trial_is_made_once_and_cancelled_as_a_person_would(world: World) -> None:
    sweep = world.store.create_sweep(submitted_sweep())
    create = CreateJob(sweep=sweep, job=trial_job(sweep, 0))
    world.actor.act([create])
    made = world.stored("search-0")
    world.actor.act([create, CancelJob(job=made)])
    assert world.stored("search-0").metadata.uid == made.metadata.uid
    assert world.stored("search-0").cancelled
    assert world.actor.refused() == {}


def test_a_sweep_of_which_the_store_takes_no_job_is_told_so(world: World) -> None:
    sweep = world.store.create_sweep(submitted_sweep())
    bad = trial_job(sweep, 0)
    bad = bad.model_copy(update={"spec": bad.spec.model_copy(update={"priority": 10**9})})
    for _ in range(TRIES_BEFORE_REFUSED):
        world.actor.act([CreateJob(sweep=sweep, job=bad)])
        world.now += 100
    assert "job search-0 cannot be created: " in world.actor.refused()[sweep.metadata.uid]


def test_no_trial_comes_of_a_sweep_whose_status_was_not_written(world: World) -> None:
    stale = world.store.create_sweep(submitted_sweep())
    world.store.update_sweep_status(stale, QLoRASweepStatus(summary="somebody was faster"))
    write_it = WriteSweepStatus(sweep=stale, status=QLoRASweepStatus(summary="late"))
    world.actor.act([write_it, CreateJob(sweep=stale, job=trial_job(stale, 0))])
    assert world.store.list_jobs() == []


def test_what_mlflow_says_of_a_sweep_is_a_fact_until_it_is_on_record(world: World) -> None:
    sweep = world.store.create_sweep(submitted_sweep())
    trial = TrialStatus(index=0, job="search-0", parameters={})
    world.actor.act([FinishSweep(sweep=sweep, run_status="FINISHED", promoted=trial)])
    wait_for(world.actor.sweep_runs)
    fact = world.actor.sweep_runs()[sweep.metadata.uid]
    assert (fact.mlflow.run_status, fact.promotion) == ("FINISHED", moved("champion", "1", "search-0"))
    world.actor.act([WriteSweepStatus(sweep=sweep, status=QLoRASweepStatus(mlflow=fact.mlflow))])
    assert world.actor.sweep_runs() == {}
