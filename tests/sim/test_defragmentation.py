"""Room that is made on large cards, through random stories: each move does what it says, and goes round in no circle.

Small jobs may go on on any class, large ones fit the largest alone; all are of one queue, nearly all of one priority.
`QLORA_SEEDS` says how many stories are told: one for each thirty of them.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise

import pytest

from orchestrator.api.job import Attempt, EvictionBudget, QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Command, WriteStatus
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.hardware import CLASS_NAMES
from tests.builders import LLAMA_3_70B, gpus, make_job
from tests.sim.test_evictions import FOR_EVER
from tests.sim.test_turns import STEPS, TICK, TurnsWorld, trains

SEEDS = max(10, int(os.environ.get("QLORA_SEEDS", "100")) // 30)
GAIN, SOON, TICKS, MOST_JOBS = 1.0, 5 * TICK, 250, 8
POLICY = Policy(
    store_uri="file:///store",
    cpu_stages_limit=20,
    restart_cost_seconds=30,
    stop_cost_seconds=10,
    defragmentation_gain=GAIN,
)
COST = POLICY.restart_cost_seconds + POLICY.stop_cost_seconds
BUDGETS = (None, EvictionBudget(max_evictions=1))


@dataclass(slots=True)
class FragmentedWorld(TurnsWorld):
    """Trainers say for how long they go on, and each move is held to what it is for."""

    moved: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    """Who made room, for whom, and where it was to go on."""
    owed: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """Since when those wait who made room, or for whom it was made."""

    def _further(self, key: str) -> None:
        TurnsWorld._further(self, key)
        report = self.stages[key].progress
        if report is not None:
            self.stages[key] = replace(
                self.stages[key], progress=report.model_copy(update={"eta_seconds": (STEPS - report.step) * TICK})
            )

    def _act(self, command: Command) -> None:
        if isinstance(command, WriteStatus):
            before, after = (each.active_attempt for each in (self.jobs[command.job.key].status, command.status))
            was_asked = before is not None and before.stop_time is not None
            if after is not None and after.stop_reason is Reason.DEFRAGMENTED and not was_asked:
                self._hold_to_its_purpose(command.job, after)
        TurnsWorld._act(self, command)

    def _hold_to_its_purpose(self, job: QLoRAJob, attempt: Attempt) -> None:
        """It pays by what the trainers know, and is for somebody of no lower priority who fits nothing smaller."""
        [waiting] = [key for key in self.jobs if f"for {key}," in attempt.message]
        assert self.jobs[waiting].metadata.name in self.models, "only large jobs need a large card"
        assert self.jobs[waiting].spec.priority >= job.spec.priority
        assert attempt.gpu_class == "48Gi"
        assert attempt.moves_to == "24Gi"
        holders = [each for each in self.jobs.values() if _holds(each, "48Gi")]
        sooner = min((STEPS - self.reached.get(each.key, 0)) * TICK for each in holders)
        assert sooner >= GAIN * COST, f"{job.key} was moved for {sooner} s"
        assert sum(_holds(each, "24Gi") for each in self.jobs.values()) < self.gpu_classes[0].capacity
        self.moved.append((job.key, waiting, attempt.moves_to))
        self.owed |= {job.key: self.now, waiting: self.now}

    def look(self) -> None:
        """Whoever made room, and for whom it was made, gets a GPU soon."""
        for key, since in list(self.owed.items()):
            attempts = trains(self.jobs[key])
            if attempts and attempts[-1].created_time > since:
                del self.owed[key]
            else:
                waits = (self.now - since).total_seconds()
                assert waits <= SOON, f"{key} waits for {waits} s after room was made"


def _holds(job: QLoRAJob, gpu_class: str) -> bool:
    attempt = job.status.active_attempt
    return attempt is not None and attempt.gpu_class == gpu_class


def a_story(seed: int, policy: Policy = POLICY) -> FragmentedWorld:
    """The story of a seed, told to its end."""
    chance = random.Random(seed)
    small, large = chance.randint(1, 2), chance.randint(1, 2)
    world = FragmentedWorld(policy=policy, gpu_classes=list(gpus(_24Gi=small, _48Gi=large)))
    world.chance, world.every = chance, 1
    for cards in (small, large):  # the small cards are taken first, so they come free first
        for _ in range(cards):
            submit(world, chance, is_large=False)
        for _ in range(chance.randint(6, 9)):
            world.tick()
    for _ in range(TICKS):
        if len(world.jobs) < MOST_JOBS and chance.random() < 0.3:
            submit(world, chance, is_large=chance.random() < 0.85)
        if len(world.jobs) == MOST_JOBS and world.is_over():
            break
        world.tick()
        world.look()
    assert world.is_over()
    return world


def submit(world: FragmentedWorld, chance: random.Random, *, is_large: bool) -> None:
    name = f"job-{len(world.jobs)}"
    if is_large:
        world.models[name] = LLAMA_3_70B
    priority = chance.choice((0, 0, 0, 0, 0, 0, 0, 0, -1, 5))
    budget = chance.choice(BUDGETS)
    world.submit(make_job(name, class_change="allowed", priority=priority, eviction_budget=budget))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_room_is_made_where_it_pays_and_nobody_comes_back(seed: int) -> None:
    world = a_story(seed)
    for job in world.jobs.values():
        ran = trains(job)
        for attempt, following in pairwise(ran):
            if attempt.reason is Reason.DEFRAGMENTED:
                assert following.gpu_class == attempt.moves_to
                before, after = (CLASS_NAMES.index(each.gpu_class or "") for each in (attempt, following))
                assert after < before
        moves = job.status.evictions.get(Reason.DEFRAGMENTED.value, 0)
        assert moves == sum(key == job.key for key, _, _ in world.moved)
        assert moves <= 1, "there are two classes, and every move is to the smaller one"
    assert world.made == dict.fromkeys(world.jobs, STEPS), "no step is made twice"


def test_somebody_makes_room_in_these_stories_and_a_larger_margin_asks_for_more() -> None:
    moved = [len(a_story(seed).moved) for seed in range(4)]
    assert sum(moved) >= 2
    assert a_story(moved.index(max(moved)), replace(POLICY, defragmentation_gain=FOR_EVER)).moved == []
