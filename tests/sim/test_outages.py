"""A cluster's bad days, seed by seed: every fault alone, then one or two at random instants for a random time.

`QLORA_SEEDS` says how many random days are tried. A seed that fails becomes a day with a name of its own below.
"""

from __future__ import annotations

import os
import random

import pytest

from orchestrator.core.snapshot import Policy
from tests.builders import gpus, make_job
from tests.sim.faulty_world import TICK_SECONDS, Fault, FaultyWorld, Trouble

POLICY = Policy(
    store_uri="file:///store", minimum_run_seconds=30, preemption_cooldown_seconds=10, stall_start_seconds=3600
)
SEEDS = int(os.environ.get("QLORA_SEEDS", "100"))
SEEDS_A_TEST = 50
DAY_SECONDS = 3600.0
LONGEST_SECONDS = 7200.0
SETTLE_SECONDS = 4 * 3600.0
DEADLINE_SECONDS = 4 * 3600


def live_through(seed: int, troubles: tuple[Trouble, ...]) -> FaultyWorld:
    """Three jobs on two small cards and a large one, through all of it and until they are done; the world then.

    One has a deadline, which neither waiting uses nor a clock that is put ahead.
    """
    world = FaultyWorld(policy=POLICY, gpu_classes=list(gpus(_24Gi=2, _48Gi=1)), seed=seed, troubles=troubles)
    for number in range(3):
        deadline = DEADLINE_SECONDS if number == 2 else None
        job = make_job(f"job-{number}", priority=number % 2, backoff_limit=3, active_deadline_seconds=deadline)
        world.submit(job)
    settled = max((trouble.end_seconds for trouble in troubles), default=0.0) + SETTLE_SECONDS
    while world.seconds < settled and (world.unfinished() or world.stages):
        world.tick()
    return world


def random_day(seed: int) -> tuple[Trouble, ...]:
    """One fault or two, each at a random instant for a random time."""
    chance = random.Random(seed)
    faults = chance.sample(sorted(Fault), chance.choice((1, 2)))
    troubles: list[Trouble] = []
    for fault in faults:
        begin = chance.uniform(0, DAY_SECONDS / 4)
        lasts = chance.choice((60.0, 180.0, 600.0, 1800.0, LONGEST_SECONDS))
        troubles.append(Trouble(fault=Fault(fault), begin_seconds=begin, end_seconds=begin + lasts))
    return tuple(troubles)


def assert_all_is_well(world: FaultyWorld, troubles: tuple[Trouble, ...]) -> None:
    left = [f"{job.key}: {job.status.summary}" for job in world.unfinished()]
    assert left == [], f"after {troubles}"
    assert world.stages == {}, f"stages are left after {troubles}"


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("seconds", [180.0, LONGEST_SECONDS])
def test_every_fault_alone_ends_with_every_job_succeeded(fault: Fault, seconds: float) -> None:
    begin = (4 if seconds < LONGEST_SECONDS else 8) * TICK_SECONDS  # as stages start, and in the midst of training
    troubles = (Trouble(fault=fault, begin_seconds=begin, end_seconds=begin + seconds),)
    assert_all_is_well(live_through(1, troubles), troubles)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_random_days_end_with_every_job_succeeded(first: int) -> None:
    for seed in range(first, min(first + SEEDS_A_TEST, SEEDS)):
        troubles = random_day(seed)
        try:
            assert_all_is_well(live_through(seed, troubles), troubles)
        except AssertionError as error:
            error.add_note(f"seed {seed}: {troubles}")
            raise


def test_jobs_go_on_elsewhere_while_a_node_is_out_of_reach() -> None:
    trouble = Trouble(fault=Fault.NODE_UNREACHABLE, begin_seconds=240.0, end_seconds=24 * 3600.0)
    world = live_through(1, (trouble,))
    assert world.strays, "no stage was on the node when it went out of reach"
    assert_all_is_well(world, (trouble,))
    assert world.seconds < 3600


def test_a_day_without_faults_takes_no_longer_than_its_stages() -> None:
    world = live_through(0, ())
    assert world.unfinished() == []
    assert world.seconds <= 1200
