"""What must hold in every world: random users, random failures, random kills of the controller itself."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.notification import EVENT_MEANINGS, Webhook
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ConditionType, ExitCode, Reason
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.job.state_machine import JobState
from orchestrator.core.snapshot import Policy
from tests.builders import LLAMA_3_70B, gpus, make_job, make_queue
from tests.core.world import World

POLICY = Policy(store_uri="file:///store", minimum_run_seconds=30, preemption_cooldown_seconds=10, cpu_stages_limit=3)
MAX_PASSES = 400
EVERYTHING = Webhook(name="ci", url="https://ci.example.com/hook", events=tuple(EVENT_MEANINGS))
CODES = (1, 81, 82, 85, 137, -9)

QUEUES: tuple[tuple[QLoRAQueue, ...], ...] = (
    (),
    (make_queue("default", weight=3), make_queue("b", preemption="Never")),
    (
        make_queue("default", {"24Gi": 1, "48Gi": 1}, cohort="c"),
        make_queue("b", {"24Gi": (1, 1), "48Gi": 0}, cohort="c"),
    ),
    (make_queue("default", {"24Gi": 1, "48Gi": 1}), make_queue("b")),
)

actions = st.one_of(
    st.tuples(st.just("pass"), st.none() | st.integers(0, 6)),
    st.tuples(st.just("run"), st.integers(0, 7)),
    st.tuples(st.just("run"), st.integers(0, 7)),
    st.tuples(st.just("fail"), st.integers(0, 7), st.sampled_from(CODES)),
    st.tuples(st.just("lose"), st.integers(0, 7)),
    st.tuples(st.just("time"), st.sampled_from((0.3, 5, 60, 700))),
    st.tuples(st.just("suspend"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("mlflow"), st.booleans()),
    st.tuples(st.just("webhooks"), st.booleans()),
    st.tuples(st.just("capacity"), st.sampled_from(("24Gi", "48Gi")), st.integers(0, 3)),
    st.tuples(st.just("beat"), st.booleans()),
    st.tuples(
        st.just("intrude"),
        st.integers(0, 5),
        st.sampled_from(("prepare", "train", "publish")),
        st.integers(0, 3),
        st.booleans(),
    ),
    st.tuples(st.just("submit"), st.integers(0, 3), st.sampled_from(("default", "b")), st.booleans()),
)


def make_world(queues: tuple[QLoRAQueue, ...]) -> World:
    return World(policy=POLICY, gpu_classes=list(gpus(_24Gi=2, _48Gi=1)), queues=queues)


def submit(world: World, priority: int, queue: str, large: bool) -> None:
    name = f"job-{len(world.jobs)}"
    if queue not in {"default", *(q.metadata.name for q in world.queues)}:
        queue = "default"
    if large:
        world.models[name] = LLAMA_3_70B
    world.submit(make_job(name, priority=priority, queue=queue, backoff_limit=3, notifications=(EVERYTHING,)))


def happen(world: World, action: tuple) -> None:
    kind, *details = action
    live = world.live_stages()
    keys = list(world.jobs)
    match kind:
        case "pass":
            world.pass_once(details[0])
        case "run" if live:
            world.run_stage(live[details[0] % len(live)])
        case "fail" if live:
            world.fail_stage(live[details[0] % len(live)], details[1])
        case "lose" if live:
            world.lose(live[details[0] % len(live)])
        case "time":
            world.pass_time(details[0])
        case "suspend" if keys:
            world.suspend(keys[details[0] % len(keys)], details[1])
        case "cancel" if keys:
            world.cancel(keys[details[0] % len(keys)])
        case "mlflow":
            world.mlflow_away = details[0]
        case "webhooks":
            world.webhooks_away = details[0]
        case "capacity":
            world.set_capacity(*details)
        case "beat":
            world.beat(ended=details[0])
        case "intrude" if keys:
            world.intrude(keys[details[0] % len(keys)], details[1], details[2], ended=details[3])
        case "submit" if len(keys) < 8:
            submit(world, *details)


def be_fair(world: World) -> None:
    """From here on nothing goes wrong: everything runs, nobody interferes, and there is a card of each size."""
    world.mlflow_away = world.webhooks_away = False
    for name in ("24Gi", "48Gi"):
        world.set_capacity(name, 2)
    for key in world.jobs:
        world.suspend(key, False)


def unfinished(world: World) -> list[QLoRAJob]:
    return [job for job in world.jobs.values() if job.status.finish_time is None]


def settle(world: World) -> None:
    for _ in range(MAX_PASSES):
        world.pass_once()
        for key in world.live_stages():
            world.run_stage(key)
        world.pass_time(20)
        released = not world.runs and not any(job.metadata.finalizers for job in world.jobs.values())
        if not unfinished(world) and not world.stages and released:
            break
    world.pass_once()


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(queues=st.sampled_from(QUEUES), story=st.lists(actions, min_size=5, max_size=60))
@example(queues=QUEUES[0], story=[("submit", 0, "default", False)])
@example(queues=QUEUES[0], story=[("cancel", 0), ("pass", None), ("run", 0), ("run", 0), ("cancel", 1), ("pass", 2)])
@example(queues=QUEUES[3], story=[("pass", None), ("run", 0), ("run", 0), *[("submit", 2, "default", False)] * 2])
def test_in_any_story_the_invariants_hold_and_every_job_finishes_once_the_world_is_fair(
    queues: tuple[QLoRAQueue, ...], story: list[tuple]
) -> None:
    world = make_world(queues)
    submit(world, 0, "default", False)
    submit(world, 1, "b", True)
    for action in story:
        happen(world, action)  # every pass checks the invariants
    be_fair(world)
    settle(world)
    assert unfinished(world) == []
    assert world.stages == {}
    assert world.runs == {}
    assert [key for key, job in world.jobs.items() if job.metadata.finalizers] == []
    for job in world.jobs.values():
        finished = job.status.condition(ConditionType.FINISHED)
        assert finished is not None
        assert finished.status == "True"
        ends = {Reason.SUCCEEDED: "FINISHED", Reason.CANCELLED: "KILLED"}
        expected = ends.get(finished.reason, "FAILED")
        assert job.status.mlflow.run_status in ({expected} if job.status.mlflow.run_id else {None})
        assert world.mlflow.get(job.metadata.uid) == job.status.mlflow.run_status
        check_told(world, job)


ARRIVED: dict[JobState, set[str]] = {
    JobState.NEW: {"job.retrying"},
    JobState.STARTING: {"job.admitted"},
    JobState.TRAINING: {"job.running"},
    JobState.SUCCEEDED: {"job.succeeded"},
    JobState.FAILED: {"job.failed"},
    JobState.CANCELLED: {"job.cancelled"},
}
"""What is told of a job that has come to be so."""


def check_told(world: World, job: QLoRAJob) -> None:
    """Whatever its statuses have been was told at least once, in order, and never under another's number."""
    heard = {number: event for key, number, event in world.told if key == job.key}
    assert {(n, e) for key, n, e in world.told if key == job.key} == set(heard.items()), "a number is one event's"
    events = [heard[number] for number in sorted(heard)]
    told = job.status.notifications
    assert told is not None
    assert (told.outstanding, told.undelivered) == ((), 0), "too little happens here for anything to be given up"
    assert sorted(heard) == list(range(1, told.total + 1))
    states = world.states[job.key]
    for before, state in pairwise(states):
        expected = ARRIVED.get(state, set())
        if state is JobState.QUEUED:
            is_new = before in (JobState.NEW, JobState.PREPARING)
            expected = {"job.queued"} if is_new else {"job.preempted", "job.retrying"}
        if state is JobState.TRAINED:
            expected = {"job.retrying"} if before is JobState.PUBLISHING else {"job.trained"}
        if not expected:
            continue
        while events and events[0] not in expected:
            events.pop(0)
        assert events, f"{before} -> {state} was never told: {states}, {heard}"
        events.pop(0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(queues=st.sampled_from(QUEUES), story=st.lists(actions, min_size=5, max_size=40))
def test_a_world_in_which_nothing_happens_is_soon_left_alone(
    queues: tuple[QLoRAQueue, ...], story: list[tuple]
) -> None:
    """Passes without events in between must come to rest: no write follows from a write for ever."""
    world = make_world(queues)
    submit(world, 0, "default", False)
    submit(world, 3, "default", True)
    for action in story:
        happen(world, action)
    for _ in range(6):
        world.pass_once()
    assert [c for c in decide(world.snapshot()) if isinstance(c, WriteStatus)] == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(queues=st.sampled_from(QUEUES), story=st.lists(actions, min_size=5, max_size=40))
def test_every_job_can_be_explained_at_any_time(queues: tuple[QLoRAQueue, ...], story: list[tuple]) -> None:
    world = make_world(queues)
    submit(world, 0, "default", False)
    for action in story:
        happen(world, action)
    for key in world.jobs:
        sentences = explain(world.snapshot(), key)
        assert sentences[0].startswith(f"{key} is ")
        assert all(sentence.endswith(".") for sentence in sentences)


def test_the_last_exit_code_of_the_stories_is_the_contracts() -> None:
    """The stories use bare numbers; they must go on meaning what they were chosen for."""
    assert set(CODES) > {ExitCode.INTERNAL_ERROR, ExitCode.TRANSIENT_ERROR, ExitCode.OUT_OF_MEMORY, ExitCode.PREEMPTED}
