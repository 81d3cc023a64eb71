"""A thousand poison objects beside a healthy job, through the real loop: the healthy one succeeds in its usual rounds.

`QLORA_POISON` says how many. The store is the real one, on disk; stages and MLflow are fakes that answer at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import QLoRAJob
from orchestrator.api.results import StageResult
from orchestrator.api.task import StageTask
from orchestrator.controller.loop import Controller, Ports
from orchestrator.core.decide import decide
from orchestrator.core.snapshot import StagePhase
from orchestrator.settings import Settings
from orchestrator.sizing.hardware import GpuClass, gpu_class
from tests.builders import make_attempt, prepare_result, running_status, submitted_job
from tests.controller.fakes import RESULTS, FakeNotifier, FakeRuntime, FakeTracking
from tests.strangers.test_fuzz import JOB, any_value, mutated

Json = dict[str, Any]
POISON = int(os.environ.get("QLORA_POISON", "1000"))
SEED = 1
MAX_GROWTH_BYTES = 1_000_000
"""Over thirty rounds, in which statuses get longer: each of the objects has at most a few KiB of it."""
GPUS = 1000
"""More than poison can hold: what it may not do to others' GPUs is the core's tests' business."""
LATER = "2099-01-01T00:00:00Z"
"""Poison is younger and of lower priority, so that only what is wrong with it could keep the healthy job waiting."""


class PoisonedRuntime(FakeRuntime):
    """Whatever a poison job's stage is asked for goes wrong, in one of many ways."""

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        if task.job.startswith("unstartable"):
            raise ValueError(f"{task.spec.model.source} cannot be split")
        super().ensure(task, gpu_class)

    def gpu_classes(self) -> Sequence[GpuClass]:
        return [gpu_class("24Gi", GPUS)]

    def finish_healthy(self) -> None:
        """Its stages do what they should."""
        for key, fact in self.stages.items():
            if fact.phase is not StagePhase.EXITED and fact.name.startswith("healthy"):
                ended = {"phase": StagePhase.EXITED, "exit_code": 0, "finish_time": datetime.now(UTC)}
                self.stages[key] = replace(fact, result=RESULTS[fact.name.split("-")[-2]], **ended)

    def poison(self, dice: random.Random) -> None:
        """Poison jobs' stages end with results that nobody expects."""
        for key, fact in self.stages.items():
            if fact.phase is not StagePhase.EXITED and not fact.name.startswith("healthy"):
                exit_code = dice.choice([0, 0, 1, 80, 82, 137, -9, 10**9, None])
                self.stages[key] = replace(fact, phase=StagePhase.EXITED, exit_code=exit_code, result=any_result(dice))


def any_result(dice: random.Random) -> StageResult | None:
    """What a stage may say that lies, as far as it parses."""
    prepare = prepare_result().to_wire()
    model = dict(prepare_result().model.to_wire())
    model |= {dice.choice(list(model)): dice.choice([1, 1024, 10**6, "olmoe", "qwen2_moe", "x", 10**30, None])}
    texts = [
        json.dumps({"prepare": {**prepare, "model": model}}),
        json.dumps({"prepare": {**prepare, "steps": dice.choice([1, 2**53 - 1, 10**30])}}),
        json.dumps({"train": {"step": 1, "complete": True, "adapterUri": "x", "trainLoss": float("nan")}}),
        json.dumps({"failure": {"reason": "UserError", "message": "\x1b[2J" * 400}}),
        json.dumps(any_value(dice)),
    ]
    try:
        return StageResult.model_validate_json(dice.choice(texts))
    except ValueError:
        return None


def any_status(dice: random.Random) -> object:
    """A status that no controller wrote, or one that is as odd as its rules allow."""
    wire: Json = json.loads(running_status().model_dump_json(by_alias=True))
    match dice.randrange(5):
        case 0:
            return any_value(dice)
        case 1:
            wire["prepared"]["model"] |= {"modelType": "olmoe", "mixture": None}
            return {**wire, "attempts": []}
        case 2:
            return {**wire, "attempts": [], "attemptsTotal": 2**53 - 1}
        case 3:
            return mutated(dice, wire)
        case _:
            return {
                **wire,
                "attempts": [json.loads(make_attempt(number=n).model_dump_json(by_alias=True)) for n in (2, 3)],
            }


def rows(dice: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """Names and bodies of objects that somebody wrote."""
    for number in range(count):
        kind = dice.choice(["unparsable", "mutated", "odd", "unstartable", "large"])
        name = f"{kind}-{number}"
        body: Json = json.loads(submitted_job(name).model_dump_json(by_alias=True))
        body["metadata"] |= {"uid": f"uid-{number}", "resourceVersion": "1", "creationTimestamp": LATER}
        match kind:
            case "unparsable":
                text = dice.choice(["", "{", "[]", "null", '{"metadata": {}}', "[" * 5000, '"x"', "\x00"])
                yield name, text
                continue
            case "mutated":
                body["spec"] = mutated(dice, JOB["spec"]) if dice.random() < 0.5 else any_value(dice)
            case "odd":
                body["status"] = any_status(dice)
            case "large":
                body["spec"]["model"]["chatTemplate"] = "{{ x }}" + f"{number:08}" * 5000
                body["spec"]["suspend"] = True
            case _:
                body["spec"]["priority"] = dice.choice([-5, 0])
        if dice.random() < 0.1:
            body["metadata"]["deletionTimestamp"] = LATER
        yield name, json.dumps(body)


class World:
    """A service with one healthy job, and with poison."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home, command_backoff_base_seconds=0.001, tick_minimum_seconds=0.0)
        self.store, self.runtime, self.tracking = SqliteStore(settings), PoisonedRuntime(), FakeTracking()
        ports = Ports(store=self.store, runtime=self.runtime, tracking=self.tracking, notifier=FakeNotifier())
        self.controller = Controller(settings, ports, decide)
        self.database = settings.database
        self.dice = random.Random(SEED)
        self.store.create_job(submitted_job("healthy", priority=1_000_000))

    def poison(self, count: int) -> None:
        """Write so many objects into the database, as nobody should."""
        with sqlite3.connect(self.database) as database:
            database.executemany(
                "INSERT OR REPLACE INTO objects VALUES ('QLoRAJob', 'team-a', ?, 1, ?)", rows(self.dice, count)
            )
        database.close()

    def healthy(self) -> QLoRAJob:
        return self.store.get_job("team-a", "healthy")

    def rounds_until(self, done: Callable[[], bool], most: int) -> int:
        """How many rounds it took."""
        for number in range(most):
            if done():
                return number
            self.controller.round()
            self.runtime.finish_healthy()
            self.runtime.poison(self.dice)
            time.sleep(0.02)  # MLflow is asked beside the loop
        return most


def is_published(world: World) -> bool:
    return world.healthy().status.mlflow.model_version is not None


def test_a_healthy_job_succeeds_in_its_usual_rounds_beside_poison(tmp_path: Path) -> None:
    alone = World(tmp_path / "alone")
    usual = alone.rounds_until(lambda: is_published(alone), most=50)
    assert usual < 20
    world = World(tmp_path / "poisoned")
    world.poison(POISON)
    assert len(world.store.list_unreadable()) > POISON / 10
    assert len(world.store.list_jobs()) > POISON / 10
    assert world.rounds_until(lambda: is_published(world), most=50) <= usual + 1
    assert {attempt.exit_code for attempt in world.healthy().status.attempts} == {0}


def test_poison_comes_to_its_end_and_the_memory_stays_as_it_is(tmp_path: Path) -> None:
    """What cannot be gone on with fails in words, what is deleted goes, and rounds leave nothing behind."""
    world = World(tmp_path)
    world.poison(POISON // 4)
    logging.disable()  # pytest keeps every record
    tracemalloc.start()
    try:
        sizes = [_bytes_held_after(world, rounds=15) for _ in range(4)]
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert sizes[3] - sizes[1] < MAX_GROWTH_BYTES
    failed = [job for job in world.store.list_jobs() if job.metadata.name.startswith("unstartable")]
    assert any("cannot be split" in job.status.summary for job in failed)
    assert not [job for job in world.store.list_unreadable() if job.deleted]


def _bytes_held_after(world: World, rounds: int) -> int:
    world.rounds_until(lambda: False, most=rounds)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
