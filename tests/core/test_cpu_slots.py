"""Slots for prepare and publish stages: shared between namespaces, whatever their jobs do with them."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from math import ceil
from typing import Literal

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ConditionType, ExitCode, Reason
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import Policy, StagePhase
from tests.builders import NOW, gpus, make_job
from tests.core.world import World

Fault = Literal["never starts", "never ends", "fails at once", "none"]
FAULTS: tuple[Fault, ...] = ("never starts", "never ends", "fails at once", "none")
DEADLINE_SECONDS = 600.0
START_SECONDS = 60.0
GIVEN_UP_SECONDS = 300.0
"""When a runtime gives up a stage that does not start."""
TICK_SECONDS = 10.0
STOP_SECONDS = 4 * TICK_SECONDS
"""From a deadline to the end of a stage, its record, and the next start."""


def policy(limit: int) -> Policy:
    return Policy(
        store_uri="file:///store",
        cpu_stages_limit=limit,
        cpu_start_seconds=START_SECONDS,
        prepare_deadline_seconds=DEADLINE_SECONDS,
    )


def job_in(namespace: str, name: str, priority: int = 0) -> QLoRAJob:
    job = make_job(name, priority=priority, backoff_limit=100)
    return job.model_copy(
        update={"metadata": job.metadata.model_copy(update={"namespace": namespace, "uid": f"{namespace}-{name}"})}
    )


def make_world(limit: int) -> World:
    return World(policy=policy(limit), gpu_classes=list(gpus(_24Gi=1)))


def tick(world: World, faults: dict[str, Fault]) -> None:
    """The world goes on by one tick, each stage as its job's fault has it; then the controller looks at it."""
    world.pass_time(TICK_SECONDS)
    for key in world.live_stages():
        job = f"{world.tasks[key].namespace}/{world.tasks[key].job}"
        fault, fact = faults.get(job, "none"), world.stages[key]
        created = world.jobs[job].status.attempts[-1].created_time
        if fault == "never starts" and key not in world.stopping:
            if world.now - created >= timedelta(seconds=GIVEN_UP_SECONDS):
                world.stages[key] = replace(fact, phase=StagePhase.EXITED, disruption=Reason.VOLUME_UNAVAILABLE)
                world.ever_ended.add(key)
        elif fault == "never ends" and fact.phase is StagePhase.RUNNING and key not in world.stopping:
            continue
        elif fault == "fails at once" and fact.phase is StagePhase.RUNNING:
            world.fail_stage(key, ExitCode.TRANSIENT_ERROR)
        else:
            world.run_stage(key)
    world.pass_once()


def began(job: QLoRAJob) -> datetime:
    """When its first stage was given a slot."""
    return job.status.attempts[0].created_time


crowds = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(FAULTS), st.integers(-3, 1_000_000)), min_size=1, max_size=24
)
"""Jobs of others: whose, what is wrong with them, and the priority that they claim."""


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(limit=st.integers(1, 4), crowd=crowds, head_start=st.sampled_from((0, 1, 7, 40)))
@example(limit=4, crowd=[(0, "never starts", 0)] * 24, head_start=40)
@example(limit=1, crowd=[(n % 5, "never ends", 1_000_000) for n in range(24)], head_start=7)
def test_whoever_holds_the_slots_a_healthy_job_of_another_namespace_has_its_own_within_the_bound(
    limit: int, crowd: list[tuple[int, Fault, int]], head_start: int
) -> None:
    world = make_world(limit)
    faults: dict[str, Fault] = {}
    for number, (team, fault, priority) in enumerate(crowd):
        job = job_in(f"team-{team}", f"job-{number}", priority)
        faults[job.key] = fault
        world.submit(job)
    for _ in range(head_start):
        tick(world, faults)
    healthy = job_in("healthy", "job")
    world.submit(healthy)
    came, others = world.now, len({team for team, _, _ in crowd})
    turn_seconds = DEADLINE_SECONDS + STOP_SECONDS
    bound_seconds = TICK_SECONDS if others == 1 else turn_seconds * (1 + ceil(others / limit))
    while not world.jobs[healthy.key].status.attempts:
        tick(world, faults)
        assert (world.now - came).total_seconds() <= bound_seconds


def test_sixty_four_jobs_whose_claim_does_not_exist_leave_the_slots_to_others() -> None:
    world = make_world(4)
    faults: dict[str, Fault] = {}
    for number in range(64):
        job = job_in(f"team-{number % 8}", f"job-{number}")
        faults[job.key] = "never starts"
        world.submit(job)
    for _ in range(3):
        tick(world, faults)
    world.submit(job_in("healthy", "job"))
    for _ in range(int(START_SECONDS / TICK_SECONDS) * 3):
        tick(world, faults)
    assert state_of(world.jobs["healthy/job"].status) not in (JobState.NEW, JobState.PREPARING)


def test_a_namespace_that_floods_the_line_makes_its_own_jobs_wait_and_nobody_elses() -> None:
    world = make_world(2)
    for number in range(20):
        world.submit(job_in("flood", f"job-{number}", priority=1_000_000))
    world.pass_once()
    world.submit(job_in("other", "job"))
    world.pass_once()
    assert state_of(world.jobs["other/job"].status) is JobState.PREPARING
    held = [job for job in world.jobs.values() if state_of(job.status) is JobState.PREPARING]
    assert len(held) == 3
    waiting = next(job for job in world.jobs.values() if state_of(job.status) is JobState.NEW)
    told = waiting.status.condition(ConditionType.PREPARED)
    assert told is not None
    assert told.message == "all 2 slots for prepare and publish stages are in use; waits for one"


def test_namespaces_take_turns_whatever_their_priorities() -> None:
    world = make_world(1)
    world.gpu_classes = []  # so that nothing but prepare is asked for
    for namespace in ("a", "b", "c"):
        for number in range(3):
            world.submit(job_in(namespace, f"job-{number}", priority=5 if namespace == "a" else 0))
    for _ in range(40):
        tick(world, {})
    starts = {
        namespace: sorted(began(job) for job in world.jobs.values() if job.metadata.namespace == namespace)
        for namespace in ("a", "b", "c")
    }
    for own in starts.values():
        for before, after in pairwise([NOW, *own]):
            for others in starts.values():
                assert sum(before < start < after for start in others) <= 1


def test_a_job_that_was_tried_goes_to_the_end_of_its_namespaces_line() -> None:
    world = make_world(1)
    world.submit(job_in("team", "bad"))
    world.pass_time(1)
    world.submit(job_in("team", "good"))
    for _ in range(60):
        tick(world, {"team/bad": "never starts"})
    assert world.jobs["team/good"].status.prepared is not None


def test_a_prepare_that_never_ends_is_stopped_at_its_deadline_and_says_so() -> None:
    world = make_world(4)
    world.submit(job_in("team", "endless"))
    for _ in range(int((DEADLINE_SECONDS + STOP_SECONDS) / TICK_SECONDS) + 2):
        tick(world, {"team/endless": "never ends"})
    status = world.jobs["team/endless"].status
    finished = status.condition(ConditionType.FINISHED)
    assert finished is not None
    assert finished.reason is Reason.DEADLINE_EXCEEDED
    assert "prepare attempt 1 ran for longer than QLORA_PREPARE_DEADLINE_SECONDS, 600 s" in finished.message
    assert not world.live_stages()
    assert [attempt.reason for attempt in status.attempts] == [Reason.DEADLINE_EXCEEDED]


def test_a_publish_that_hangs_is_stopped_and_tried_again() -> None:
    world = make_world(4)
    world.policy = replace(world.policy, publish_deadline_seconds=DEADLINE_SECONDS)
    world.submit(job_in("team", "job"))
    while world.jobs["team/job"].status.adapter_uri is None:
        tick(world, {})
    for _ in range(int((DEADLINE_SECONDS + STOP_SECONDS) / TICK_SECONDS) + 2):
        tick(world, {"team/job": "never ends"})
    attempt = world.jobs["team/job"].status.attempts[2]
    assert (attempt.stage, attempt.reason) == ("publish", Reason.NO_PROGRESS)
    assert "QLORA_PUBLISH_DEADLINE_SECONDS" in attempt.message
    for _ in range(10):
        tick(world, {})
    assert world.jobs["team/job"].status.is_true(ConditionType.PUBLISHED)


def test_a_stage_within_its_deadline_is_left_alone() -> None:
    world = make_world(4)
    world.submit(job_in("team", "slow"))
    for _ in range(int(DEADLINE_SECONDS / TICK_SECONDS) - 4):
        tick(world, {"team/slow": "never ends"})
    assert world.jobs["team/slow"].status.active_attempt is not None
    assert not world.stopping
    for _ in range(20):
        tick(world, {})
    assert world.jobs["team/slow"].status.prepared is not None
