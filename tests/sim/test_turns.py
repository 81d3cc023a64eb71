"""Turns (`turnSeconds`) through random stories: what they cost, how long anybody waits, and that all get on.

`QLORA_SEEDS` says how many stories are told: one for each thirty of them: each takes long.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime

import pytest

from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.core.snapshot import Policy
from tests.builders import gpus, make_job, make_queue, progress, train_result
from tests.core.world import World

SEEDS = max(10, int(os.environ.get("QLORA_SEEDS", "100")) // 30)
TICK, TURN, STEPS = 60, 300, 14
"""Seconds of a tick and of a turn; the steps of a job, one a tick."""
POLICY = Policy(store_uri="file:///store", minimum_run_seconds=120, preemption_cooldown_seconds=60, cpu_stages_limit=20)


@dataclass(slots=True)
class TurnsWorld(World):
    """Stages that save checkpoints every now and then, and may be killed before the one that they are asked for."""

    chance: random.Random = field(default_factory=random.Random)
    every: int = 2
    """Steps between checkpoints."""
    killed: float = 0.0
    """Of so many stops no checkpoint comes."""
    made: Counter[str] = field(default_factory=Counter[str])
    """Steps made, those made twice included, by job."""
    reached: dict[str, int] = field(default_factory=dict[str, int])
    """Where a running job is, by job; `steps` is what is durable."""

    def _further(self, key: str) -> None:
        task = self.tasks[key]
        if task.stage != "train":
            World._further(self, key)
            return
        job = f"{task.namespace}/{task.job}"
        step = self.reached[job] = self.reached.get(job, 0) + 1
        self.made[job] += 1
        if step >= STEPS:
            self._exit(key, 0, train_result(STEPS))
            return
        if step % self.every == 0:
            self.steps[job] = step
        durable = self.steps.get(job, 0)
        saved = {"checkpoint_step": durable, "checkpoint_uri": f"file:///checkpoints/{durable}"} if durable else {}
        report = progress(step, **saved).model_copy(update={"time": self.now, "steps": STEPS})
        self.stages[key] = replace(self.stages[key], progress=report)

    def _stopped(self, key: str) -> None:
        job = f"{self.tasks[key].namespace}/{self.tasks[key].job}"
        if self.tasks[key].stage != "train":
            World._stopped(self, key)
        elif self.chance.random() < self.killed:
            self.reached[job] = self.steps.get(job, 0)
            self._exit(key, 137)
        else:
            self.steps[job] = self.reached.get(job, 0)
            self._exit(key, ExitCode.PREEMPTED, train_result(self.steps[job], complete=False))

    def tick(self) -> None:
        """A tick of the world after as many decisions as follow from each other."""
        for _ in range(4):
            self.pass_once()
        for key in self.live_stages():
            self.run_stage(key)
        self.pass_time(TICK)

    def is_over(self) -> bool:
        return all(job.status.finish_time is not None for job in self.jobs.values())


def told(world: TurnsWorld, most_ticks: int) -> None:
    """The story to its end."""
    for _ in range(most_ticks):
        if world.is_over():
            return
        world.tick()
    unfinished = [job.key for job in world.jobs.values() if job.status.finish_time is None]
    raise AssertionError(f"after {most_ticks} ticks {unfinished} are not over")


def world_of(seed: int, *, killed: float = 0.0, turn_seconds: int | None = TURN) -> TurnsWorld:
    chance = random.Random(seed)
    queue = make_queue("default", turn_seconds=turn_seconds)
    world = TurnsWorld(policy=POLICY, gpu_classes=list(gpus(_24Gi=chance.randint(1, 3))), queues=(queue,))
    world.chance, world.killed, world.every = chance, killed, chance.choice((1, 2, 7))
    for number in range(chance.randint(2, 7)):
        world.submit(make_job(f"job-{number}"))
        world.pass_time(chance.choice((0, 1, 30)))
    return world


def trains(job: QLoRAJob) -> list[Attempt]:
    return [attempt for attempt in job.status.attempts if attempt.stage == "train"]


def seconds(start: datetime | None, end: datetime | None) -> float:
    assert start is not None, "it began"
    assert end is not None, "it is over"
    return (end - start).total_seconds()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_turns_lose_no_more_than_a_stop_and_a_start_each_and_nobody_waits_for_longer_than_a_round(seed: int) -> None:
    world = world_of(seed)
    cards, jobs = world.gpu_classes[0].capacity, len(world.jobs)
    told(world, 40 * jobs)
    every = [attempt for job in world.jobs.values() for attempt in trains(job)]
    ended = [attempt for attempt in every if attempt.reason is Reason.TURN_ENDED]
    # 1. No step is made twice, and a turn's end costs one stop and one start.
    assert world.made == dict.fromkeys(world.jobs, STEPS)
    held = sum(seconds(each.created_time, each.finish_time) for each in every)
    assert held - TICK * STEPS * jobs <= 3 * TICK * len(every)
    # 2. There are no more of them than there is time for.
    assert all(seconds(each.start_time, each.stop_time) >= TURN for each in ended)
    assert len(ended) <= held / TURN
    # 3. Whoever waits for a card gets one when everybody before him has had a turn, or is done.
    longest = TURN + (world.every + 4) * TICK
    for job in world.jobs.values():
        times = [job.status.attempts[0].finish_time, *(each.finish_time for each in trains(job))]
        waits = [seconds(end, each.created_time) for end, each in zip(times, trains(job), strict=False)]
        assert max(waits) <= math.ceil((jobs - 1) / cards) * longest, f"{job.key} waited {max(waits)} s"
    assert bool(ended) == (jobs > cards)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whoever_is_killed_at_the_end_of_his_turn_gets_on_all_the_same(seed: int) -> None:
    world = world_of(seed, killed=1.0 if seed % 2 else 0.5)
    durable: dict[tuple[str, int], int] = {}
    for _ in range(80 * len(world.jobs)):
        if world.is_over():
            break
        for job in world.jobs.values():
            attempt = job.status.active_attempt
            if attempt is not None and attempt.stage == "train":
                durable.setdefault((job.key, attempt.number), world.steps.get(job.key, 0))
        world.tick()
        for job in world.jobs.values():
            for attempt in trains(job)[-1:]:
                if attempt.reason is Reason.TURN_ENDED:
                    assert world.steps[job.key] > durable[job.key, attempt.number], f"{job.key}: a turn for nothing"
    assert world.is_over()


def test_without_turns_the_first_runs_to_its_end() -> None:
    world = world_of(3, turn_seconds=None)
    told(world, 400)
    assert all(len(trains(job)) == 1 for job in world.jobs.values())
