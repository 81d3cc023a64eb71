"""Eviction budgets through random stories: nobody is moved oftener than the budget says, and no owner waits for longer.

Two queues of one cohort share a few cards. The owner's jobs come in bursts and take back what is theirs, the guest's
borrow it; priorities differ within both. `QLORA_SEEDS` says how many stories are told: one for each thirty of them.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest

from orchestrator.api.job import Attempt, EvictionBudget, QLoRAJob
from orchestrator.api.reasons import VOLUNTARY_EVICTIONS
from orchestrator.core.commands import Command, WriteStatus
from orchestrator.core.snapshot import Policy
from tests.builders import gpus, make_job, make_queue
from tests.sim.test_turns import TICK, TurnsWorld

SEEDS = max(10, int(os.environ.get("QLORA_SEEDS", "100")) // 30)
PROTECTION, COOLDOWN, SOON = 420, 60, 5 * TICK
"""Seconds; within the last of them whoever is asked has stopped, and whoever waits has started."""
POLICY = Policy(
    store_uri="file:///store",
    preemption_cooldown_seconds=COOLDOWN,
    cpu_stages_limit=20,
    eviction_protection_seconds=PROTECTION,
)
BUDGETS = (EvictionBudget(max_evictions=1), EvictionBudget(max_evictions=2, window_seconds=3_600))
FOR_EVER, TICKS, MOST_JOBS = 10**9, 200, 8


@dataclass(slots=True)
class OwnersWorld(TurnsWorld):
    """Knows by books of its own who was moved when, and for how long somebody waits for what he has a right to."""

    asked: dict[str, list[datetime]] = field(default_factory=dict[str, list[datetime]])
    """When each job was asked to make way."""
    waits_since: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """Since when a queue has waited for its own, or a job for one of lower priority in its queue."""

    def _act(self, command: Command) -> None:
        if isinstance(command, WriteStatus):
            before, after = (each.active_attempt for each in (self.jobs[command.job.key].status, command.status))
            was_asked = before is not None and before.stop_time is not None
            if after is not None and after.stop_reason in VOLUNTARY_EVICTIONS and not was_asked:
                self._hold_to_budget(command.job, after)
        TurnsWorld._act(self, command)

    def _hold_to_budget(self, job: QLoRAJob, attempt: Attempt) -> None:
        times = self.asked.setdefault(job.key, [])
        budget = job.spec.eviction_budget
        if budget is not None:
            window = timedelta(seconds=budget.window_seconds or FOR_EVER)
            spent = sum(time + window > self.now for time in times)
            ran = (self.now - (attempt.start_time or attempt.created_time)).total_seconds()
            assert spent < budget.max_evictions or ran >= PROTECTION, (
                f"{job.key}: {spent} spent, and moved after {ran} s"
            )
        times.append(self.now)

    def look(self) -> None:
        """Nobody waits for longer than somebody may be protected."""
        waiting = set[str]()
        for queue in self.queues:
            name, nominal = queue.metadata.name, sum(quota.nominal for quota in queue.spec.quotas)
            jobs = [job for job in self.jobs.values() if job.spec.queue == name]
            holders = [job for job in jobs if _holds_gpu(job)]
            waits = [job for job in jobs if _is_ready(job)]
            if waits and len(holders) < nominal:
                waiting.add(name)
            least = min((job.spec.priority for job in holders), default=FOR_EVER)
            waiting |= {job.key for job in waits if job.spec.priority > least}
        self.waits_since = {name: self.waits_since.get(name, self.now) for name in waiting}
        for name, since in self.waits_since.items():
            seconds = (self.now - since).total_seconds()
            assert seconds <= max(PROTECTION, COOLDOWN) + SOON, f"{name} has waited for {seconds} s"


def _holds_gpu(job: QLoRAJob) -> bool:
    attempt = job.status.active_attempt
    return attempt is not None and attempt.stage == "train"


def _is_ready(job: QLoRAJob) -> bool:
    status = job.status
    is_over = status.finish_time is not None or status.adapter_uri is not None
    return status.prepared is not None and status.active_attempt is None and not is_over


def a_story(seed: int, policy: Policy = POLICY) -> OwnersWorld:
    """The story of a seed, told to its end."""
    chance = random.Random(seed)
    cards = chance.randint(1, 2)
    owned = chance.randint(1, cards)
    queues = (
        make_queue("owner", {"24Gi": owned}, cohort="c"),
        make_queue("guest", {"24Gi": (cards - owned, cards)}, cohort="c"),
    )
    world = OwnersWorld(policy=policy, gpu_classes=list(gpus(_24Gi=cards)), queues=queues)
    world.chance, world.every = chance, 1
    for _ in range(chance.randint(cards, 3)):
        submit(world, "guest", chance)
    for _ in range(TICKS):
        is_calm = not any(job.spec.queue == "owner" and job.status.finish_time is None for job in world.jobs.values())
        if len(world.jobs) < MOST_JOBS and is_calm and chance.random() < 0.3:
            for _ in range(chance.choice((1, 1, owned))):
                submit(world, "owner", chance)
        if world.is_over() and len(world.jobs) == MOST_JOBS:
            break
        world.tick()
        world.look()
    assert world.is_over()
    return world


def submit(world: OwnersWorld, queue: str, chance: random.Random) -> None:
    budget = chance.choice((None, *BUDGETS, *BUDGETS)) if queue == "guest" else chance.choice((None, None, *BUDGETS))
    priority = chance.choice((0, 0, 5, 9))
    world.submit(make_job(f"job-{len(world.jobs)}", queue=queue, priority=priority, eviction_budget=budget))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nobody_is_moved_oftener_than_its_budget_says_and_nobody_waits_for_longer_than_that_protects(seed: int) -> None:
    world = a_story(seed)
    for job in world.jobs.values():
        moved = sum(job.status.evictions.get(reason, 0) for reason in VOLUNTARY_EVICTIONS)
        assert moved == len(world.asked.get(job.key, ()))
        kept = job.status.eviction_budget
        assert (kept.times if kept is not None else ()) == tuple(world.asked.get(job.key, ()))


def test_without_protection_a_story_breaks_a_budget() -> None:
    with pytest.raises(AssertionError, match="2 spent, and moved after"):
        a_story(3, replace(POLICY, eviction_protection_seconds=0))
