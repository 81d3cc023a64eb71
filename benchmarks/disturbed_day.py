"""A day on which everything goes wrong once: 30 jobs on three GPUs, 12 hours of virtual time, one of each fault.

    python -m benchmarks.disturbed_day [--save disturbed_day]

The core decides, as the controller has it decide; cluster, store, MLflow and clocks are those of the bad days that
tests live through (`tests/sim`). The same jobs live through a day without faults beside it. GPU hours that are lost are
those that GPUs were booked for and no step that counts was made in. Fails unless every job has succeeded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.report import argument_parser, emit
from orchestrator.core.job.state_machine import JobState, state_of
from tests.builders import gpus, make_job
from tests.sim.faulty_world import AT_AN_INSTANT, STEP_SECONDS, TICK_SECONDS, Fault, FaultyWorld, Trouble
from tests.sim.test_outages import POLICY

JOBS, STEPS = 30, 40
DAY_SECONDS = 12 * 3600.0
FAULT_SECONDS = 1200.0
LONGEST_SECONDS = 2 * DAY_SECONDS
SEED = 22


@dataclass(slots=True)
class Day:
    """What came of one."""

    world: FaultyWorld
    booked_seconds: float = 0.0
    """GPU seconds that were given away."""

    def tick(self) -> None:
        """A tick, and the books of it."""
        self.world.tick()
        for job in self.world.jobs.values():
            attempt = job.status.active_attempt
            self.booked_seconds += TICK_SECONDS * (attempt is not None and attempt.stage == "train")


def main() -> None:
    """Live through both, and print."""
    save = argument_parser(__doc__).parse_args().save
    disturbed = live_through(troubles())
    before, after = told(live_through(())), told(disturbed)
    emit({"undisturbed": before, "disturbed": after, "faults": [fault.value for fault in Fault]}, save=save)
    if missed := AT_AN_INSTANT - disturbed.world.begun:
        raise SystemExit(f"no stage met that {', '.join(missed)}")
    if not before["succeeded"] == after["succeeded"] == JOBS:
        raise SystemExit("not every job has succeeded")


def troubles() -> tuple[Trouble, ...]:
    """One of each, one after another over the whole day."""
    begins = DAY_SECONDS / len(Fault)
    return tuple(
        Trouble(fault=fault, begin_seconds=number * begins, end_seconds=number * begins + FAULT_SECONDS)
        for number, fault in enumerate(Fault)
    )


def live_through(faults: tuple[Trouble, ...]) -> Day:
    """Jobs are handed in over the whole day, one after another; the last ones are over after it."""
    classes = list(gpus(_24Gi=2, _48Gi=1))
    day = Day(FaultyWorld(policy=POLICY, gpu_classes=classes, seed=SEED, steps_a_job=STEPS, troubles=faults))
    waiting = [make_job(f"job-{number}", priority=number % 3, backoff_limit=3) for number in range(JOBS)]
    while waiting or day.world.unfinished() or day.world.stages:
        if waiting and day.world.seconds >= DAY_SECONDS * (JOBS - len(waiting)) / JOBS:
            day.world.submit(waiting.pop(0))
        day.tick()
        if day.world.seconds > LONGEST_SECONDS:
            break
    return day


def told(day: Day) -> dict[str, object]:
    """The figures of a day."""
    jobs = list(day.world.jobs.values())
    useful = JOBS * STEPS * STEP_SECONDS
    ends = Counter(
        attempt.reason.value for job in jobs for attempt in job.status.attempts if attempt.reason is not None
    )
    return {
        "jobs": len(jobs),
        "succeeded": sum(state_of(job.status) is JobState.SUCCEEDED for job in jobs),
        "over_after_hours": round(day.world.seconds / 3600, 2),
        "gpu_hours_booked": round(day.booked_seconds / 3600, 2),
        "gpu_hours_of_steps": round(useful / 3600, 2),
        "gpu_hours_lost": round((day.booked_seconds - useful) / 3600, 2),
        "attempts_by_end": dict(sorted(ends.items())),
    }


if __name__ == "__main__":
    main()
