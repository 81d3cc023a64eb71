"""The whole loop with the real decision and the real store; stages and runs are fakes."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import (
    PROMOTE_ANNOTATION,
    DatasetSource,
    EvaluationSpec,
    GenerationSpec,
    QLoRAJob,
    TrackingSpec,
)
from orchestrator.api.promotion import stays
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.controller.loop import Controller, Ports
from orchestrator.core.commands import Command
from orchestrator.core.decide import decide
from orchestrator.core.job.conditions import set_condition
from orchestrator.core.job.promotion import finding_of
from orchestrator.core.snapshot import Policy, Snapshot, StagePhase
from orchestrator.errors import RuntimeLost, StoreUnavailable
from orchestrator.settings import Settings
from tests.builders import submitted_job
from tests.controller.fakes import FakeNotifier, FakeRuntime, FakeTracking


class World:
    def __init__(self, home: Path, decision: Callable[[Snapshot], tuple[Command, ...]] = decide) -> None:
        self.settings = Settings(
            home=home, command_backoff_base_seconds=0.01, tick_seconds=0.1, tick_minimum_seconds=0.0
        )
        self.store = SqliteStore(self.settings)
        self.runtime = FakeRuntime()
        self.tracking = FakeTracking()
        self.decision = decision
        self.start()

    def start(self) -> None:
        """A controller that remembers nothing of those before."""
        ports = Ports(store=self.store, runtime=self.runtime, tracking=self.tracking, notifier=FakeNotifier())
        self.controller = Controller(self.settings, ports, self.decision)

    def job(self, name: str = "medical") -> QLoRAJob:
        return self.store.get_job("team-a", name)

    def is_settled(self) -> bool:
        """Whether the job has finished, and its run has its last status."""
        job = self.job()
        return job.status.mlflow.run_status == "FINISHED" and not job.metadata.finalizers

    def rounds(self, until: Callable[[], object], *, finish_stages: bool = True) -> None:
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline, self.job().status.summary
            self.controller.round()
            if finish_stages:
                self.runtime.finish()


def test_a_job_goes_all_the_way(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.create_job(submitted_job())
    world.rounds(lambda: world.is_settled() and not world.runtime.stages)
    status = world.job().status
    assert [(attempt.stage, attempt.exit_code) for attempt in status.attempts] == [
        ("prepare", 0),
        ("train", 0),
        ("publish", 0),
    ]
    assert [call for call in world.runtime.calls if call.startswith("ensure")] == [
        "ensure medical-prepare-1",
        "ensure medical-train-2",
        "ensure medical-publish-3",
    ]
    assert status.adapter_uri == "file:///adapter"
    assert status.mlflow.model_version == "1"
    assert set(world.tracking.runs.values()) == {"FINISHED"}


def test_a_settled_world_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.create_job(submitted_job())
    world.rounds(lambda: world.is_settled() and not world.runtime.stages)
    version = world.job().metadata.resource_version
    calls = len(world.runtime.calls)
    for _ in range(3):
        assert world.controller.round() == ()
    assert world.job().metadata.resource_version == version
    assert len(world.runtime.calls) == calls


def test_any_controller_carries_on_where_another_was_killed(tmp_path: Path) -> None:
    """A new controller for every two rounds: what the first of them asks of MLflow, the second one may know."""
    world = World(tmp_path)
    world.store.create_job(submitted_job())
    deadline = time.monotonic() + 20
    while not world.is_settled():
        assert time.monotonic() < deadline, world.job().status.summary
        ports = Ports(store=world.store, runtime=world.runtime, tracking=world.tracking, notifier=FakeNotifier())
        controller = Controller(world.settings, ports, decide)
        controller.round()
        time.sleep(0.02)
        controller.round()
        world.runtime.finish()
    ensured = [call for call in world.runtime.calls if call.startswith("ensure")]
    assert len(ensured) == len(set(ensured)) == 3


def test_the_stages_of_a_job_that_does_not_parse_are_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in ("future", "medical"):
        world.store.create_job(submitted_job(name))
    world.rounds(lambda: len(world.runtime.stages) == 2, finish_stages=False)
    with sqlite3.connect(world.settings.database) as database:
        database.execute("UPDATE objects SET body = '{}' WHERE name = 'future'")
    database.close()
    world.rounds(world.is_settled)
    touched = [call for call in world.runtime.calls if "future" in call]
    assert touched == ["ensure future-prepare-1"]
    assert "team-a/future-prepare-1" in world.runtime.stages


def test_a_deleted_job_is_stopped_settled_and_removed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.create_job(submitted_job())
    world.rounds(lambda: world.runtime.stages, finish_stages=False)
    world.store.delete_job("team-a", "medical")
    world.rounds(lambda: "stop medical-prepare-1" in world.runtime.calls, finish_stages=False)
    world.runtime.finish(exit_code=85)
    world.rounds(lambda: not world.store.list_jobs())
    world.controller.round()
    assert world.runtime.stages == {}


def run_in_background(world: World) -> tuple[threading.Thread, threading.Event, threading.Event, list[BaseException]]:
    stop, ready = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            world.controller.run(stop, ready.set)
        except RuntimeLost as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, stop, ready, errors


def test_a_round_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path)
    failures = [StoreUnavailable("away"), ZeroDivisionError("a defect")]
    world.runtime.error = lambda call: failures.pop(0) if failures and call == "observe" else None
    with caplog.at_level(logging.WARNING):
        thread, stop, ready, _ = run_in_background(world)
        assert ready.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("this round failed" in message for message in messages) == 2


def test_a_change_wakes_the_loop_before_its_tick(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.controller = Controller(
        world.settings.model_copy(update={"tick_seconds": 60.0}),
        Ports(store=world.store, runtime=world.runtime, tracking=world.tracking, notifier=FakeNotifier()),
        decide,
    )
    thread, stop, ready, _ = run_in_background(world)
    assert ready.wait(10)
    start = time.monotonic()
    world.store.create_job(submitted_job())
    while "ensure medical-prepare-1" not in world.runtime.calls:
        assert time.monotonic() - start < 20
        time.sleep(0.01)
    stop.set()
    world.store.create_job(submitted_job("wake-it-up"))
    thread.join(10)
    assert not thread.is_alive()


def test_losing_the_runtime_ends_the_loop(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.runtime.error = lambda call: RuntimeLost("Ray is gone")
    thread, _, ready, errors = run_in_background(world)
    thread.join(10)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["Ray is gone"]
    assert not ready.is_set()


def test_rounds_are_timed(tmp_path: Path) -> None:
    def slow(snapshot: Snapshot) -> tuple[Command, ...]:
        time.sleep(0.02)
        return decide(snapshot)

    world = World(tmp_path, slow)
    for _ in range(3):
        world.controller.round()
    latencies = world.controller.metrics.latencies()
    assert latencies.rounds == 3
    assert 0.02 <= latencies.decide_median_seconds <= latencies.decide_p99_seconds <= latencies.round_p99_seconds


def test_every_part_of_the_policy_is_a_setting(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    derived = {"has_agents", "addresses"}  # follow from whether there is a Ray, and from where stores and claims are
    assert {field.name for field in fields(Policy)} - derived <= set(Settings.model_fields)
    changed = settings.model_copy(update={"minimum_run_seconds": 7.0})
    assert changed.policy().minimum_run_seconds == 7.0


def test_a_finished_stage_is_forgotten_only_after_its_end_is_recorded(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.create_job(submitted_job())
    world.rounds(lambda: world.runtime.stages, finish_stages=False)
    world.runtime.finish()
    while "delete medical-prepare-1 recorded" not in world.runtime.calls:
        recorded = world.job().status.attempts[0].finish_time is not None
        world.controller.round()
        if "delete medical-prepare-1 recorded" in world.runtime.calls:
            assert recorded
    assert StagePhase.EXITED not in {fact.phase for fact in world.runtime.stages.values()}


def awaiting_approval() -> QLoRAJob:
    """A job that `submit` takes, whose alias has a gate that a person is to approve."""
    return submitted_job(
        dataset=DatasetSource(source="file:///data/tiny.jsonl", eval_fraction="0.1"),
        evaluation=EvaluationSpec(generation=GenerationSpec(metrics=("f1",))),
        tracking=TrackingSpec.model_validate(
            {"promote": {"alias": "champion", "approval": "manual", "when": [{"metric": "f1", "atLeast": "0.5"}]}}
        ),
    )


def test_a_controller_that_is_killed_between_alias_and_status_promotes_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.create_job(awaiting_approval())
    world.rounds(world.is_settled)
    judged = finding_of(stays("champion", "2", Reason.AWAITING_APPROVAL, "f1 is 0.6"))
    status = world.job().status
    conditions = set_condition(status.conditions, judged, now=status.conditions[-1].last_transition_time, generation=1)
    job = world.store.update_status(world.job(), status.model_copy(update={"conditions": conditions}))
    asked = job.metadata.model_copy(update={"annotations": {PROMOTE_ANNOTATION: "forced: it is better"}})
    world.store.update_job(job.model_copy(update={"metadata": asked}))

    world.start()  # one that has nothing in hand
    world.controller.round()  # which asks MLflow, and is killed before the next one writes what came of it
    deadline = time.monotonic() + 20
    while not world.tracking.promoted:
        assert time.monotonic() < deadline, "MLflow was not asked"
        time.sleep(0.01)
    assert not world.job().status.is_true(ConditionType.PROMOTED)
    world.start()
    world.rounds(lambda: world.job().status.is_true(ConditionType.PROMOTED))
    for _ in range(3):
        world.controller.round()
    assert world.tracking.promoted == {job.metadata.uid: "it is better"}
    told = [event for _, event in world.store.list_events("team-a", "medical") if event.reason is Reason.PROMOTED]
    assert [event.message for event in told] == ["the alias champion moved to version 1: it is better"]
    found = world.job().status.condition(ConditionType.PROMOTED)
    assert found is not None
    assert found.message == told[0].message
