"""What queues' statuses say was had, held against what jobs had, through a cluster's bad days.

Jobs come and go, and are deleted once they are over; controllers are killed between two commands, and clocks are put.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from orchestrator.api.job import Attempt
from orchestrator.core.commands import Command, WriteQueueStatus
from orchestrator.core.snapshot import Policy
from tests.builders import gpus, make_job, make_queue
from tests.sim.faulty_world import TICK_SECONDS, Fault, FaultyWorld, Trouble

POLICY = Policy(
    store_uri="file:///store", minimum_run_seconds=30, preemption_cooldown_seconds=10, usage_write_seconds=120
)
SEEDS = int(os.environ.get("QLORA_SEEDS", "100"))
JOBS, TICKS = 6, 600


@dataclass(slots=True)
class AccountedWorld(FaultyWorld):
    """A world that keeps books of its own: how long jobs' attempts have had GPUs."""

    had: dict[tuple[str, int], tuple[str, Attempt]] = field(default_factory=dict[tuple[str, int], tuple[str, Attempt]])
    """Queue and attempt as last seen, by job and number."""
    writes: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def tick(self) -> None:
        FaultyWorld.tick(self)
        for job in self.jobs.values():
            for attempt in job.status.attempts:
                if attempt.stage == "train":
                    queue, _ = self.had.get((job.key, attempt.number), (job.spec.queue, None))
                    self.had[job.key, attempt.number] = queue, attempt
        self.delete_some()

    def _act(self, command: Command) -> None:
        if isinstance(command, WriteQueueStatus):
            self.writes.setdefault(command.queue.metadata.name, []).append(self.seconds)
        FaultyWorld._act(self, command)

    def delete_some(self) -> None:
        """Their users delete jobs as soon as they are over."""
        for key, job in list(self.jobs.items()):
            if job.status.finish_time is not None and not job.metadata.finalizers and self.chance.random() < 0.3:
                del self.jobs[key]

    def seconds_had(self, queue: str) -> float:
        spans = [(a.created_time, a.finish_time) for name, a in self.had.values() if name == queue]
        assert all(end is not None for _, end in spans), "all is over"
        return sum((end - start).total_seconds() for start, end in spans if end is not None)

    def seconds_told(self, queue: str) -> float:
        [status] = [each.status for each in self.queues if each.metadata.name == queue]
        return sum(each.gpu_seconds for each in status.months)


def live_through(seed: int, *troubles: Trouble) -> AccountedWorld:
    queues = (make_queue("default"), make_queue("other", weight=2))
    world = AccountedWorld(
        policy=POLICY, gpu_classes=list(gpus(_24Gi=2, _48Gi=1)), queues=queues, seed=seed, troubles=troubles
    )
    for number in range(JOBS):
        name = f"job-{number}"
        world.submit(make_job(name, priority=number % 3, queue=("default", "other")[number % 2], backoff_limit=9))
    for _ in range(TICKS):
        world.tick()
        if world.seconds == 10 * TICK_SECONDS:  # somebody moves a job while it runs
            job = world.jobs["default/job-2"]
            world._replace(job, spec=job.spec.model_copy(update={"queue": "other"}))
        if not world.jobs:
            break
    assert not world.jobs, [job.status.summary for job in world.jobs.values()]
    return world


EXACT = sorted(set(Fault) - {Fault.CONTROLLER_KILLED, Fault.CONTROLLER_CLOCK})


@pytest.mark.parametrize("fault", EXACT)
def test_every_second_of_holding_is_counted_once_though_jobs_are_deleted(fault: Fault) -> None:
    begin = 6 * TICK_SECONDS
    world = live_through(1, Trouble(fault=fault, begin_seconds=begin, end_seconds=begin + 1800))
    for queue in ("default", "other"):
        assert world.seconds_told(queue) == pytest.approx(world.seconds_had(queue), abs=1e-3)
        assert world.seconds_told(queue) > 0


@pytest.mark.parametrize("seed", range(0, SEEDS, 10))
def test_a_controller_that_is_killed_leaves_nothing_out_and_nobody_counts_it_again(seed: int) -> None:
    """A job that is over is deleted at any moment: what no controller lived to write of it is less than is awaited."""
    world = live_through(seed, Trouble(fault=Fault.CONTROLLER_KILLED, begin_seconds=0, end_seconds=3600))
    for queue in ("default", "other"):
        had, told = world.seconds_had(queue), world.seconds_told(queue)
        assert told <= had + 1e-3
        assert told >= had - JOBS * (POLICY.usage_write_seconds + TICK_SECONDS)


def test_a_status_is_written_seldom_unless_a_gpu_comes_free() -> None:
    world = live_through(1)
    for queue, seconds in world.writes.items():
        ends = sum(1 for name, _ in world.had.values() if name == queue)
        soon = sum(1 for before, after in pairwise(seconds) if after - before < POLICY.usage_write_seconds)
        assert soon <= ends
        assert len(seconds) <= ends + seconds[-1] / POLICY.usage_write_seconds
