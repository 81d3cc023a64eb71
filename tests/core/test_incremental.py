"""A decision that follows others equals one that nothing came before, whatever has changed in between.

`tests/core/world` and `tests/sim` hold every pass of their stories to the same; here are crowds that contend for
quotas, whose order changes with time, and objects that change behind the controller's back.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from orchestrator.api.job import (
    Attempt,
    CheckpointStatus,
    EvictionBudget,
    EvictionBudgetStatus,
    QLoRAJob,
    QLoRAJobStatus,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import Budget, QLoRAQueue, UserLimits
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Command, DeleteJob, DeleteStage, EnsureStage, WriteQueueStatus, WriteStatus
from orchestrator.core.decide import Decider, decide
from orchestrator.core.job.lifecycle import reconcile
from orchestrator.core.job.rest import FOR_EVER, rests_until, waits_untried
from orchestrator.core.job.stage_commands import stage_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.cycle import Scheduler, schedule
from orchestrator.core.snapshot import Policy, Snapshot, StagePhase
from orchestrator.sizing.plan_search import candidates
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    SMOLLM2_135M,
    after,
    exited,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    make_spec,
    prepared_status,
    progress,
    stage,
)

POLICY = Policy(
    store_uri="file:///store",
    words_limit=40,
    minimum_run_seconds=30,
    preemption_cooldown_seconds=400,
    usage_half_life_seconds=3_000,
    max_evictions=2,
    eviction_window_seconds=4_000,
    eviction_protection_seconds=500,
    defragmentation_gain=1.0,
)
CLASSES = ("24Gi", "48Gi")
NAMES = ("a", "b", "c")
EVERY_HOUR = EvictionBudget(max_evictions=1, window_seconds=3_600)
ENDS = (Reason.TRANSIENT_ERROR, Reason.BROKEN_GPU, Reason.UNSCHEDULABLE, Reason.PREEMPTED)


def a_queue(name: str, seeded: random.Random) -> QLoRAQueue:
    sharing = seeded.choice(({}, {"fair_sharing": "PerUser"}, {"turn_seconds": 300}, {"turn_seconds": 600}))
    quotas = {of: seeded.choice((0, 2, (1, 2), 9)) for of in CLASSES if seeded.random() < 0.8}
    return make_queue(
        name,
        quotas if seeded.random() < 0.8 else None,
        cohort=seeded.choice((None, "one", "one", "two")),
        weight=seeded.choice((1, 1, 3)),
        hold=seeded.random() < 0.1,
        preemption=seeded.choice(("LowerPriority", "LowerPriority", "Never")),
        max_priority=seeded.choice((None, None, 5)),
        stop_policy="HoldAndDrain" if seeded.random() < 0.05 else "None",
        **sharing,
        queueing_strategy=seeded.choice(("BestEffortFIFO", "BestEffortFIFO", "StrictFIFO")),
        per_user=UserLimits(running=seeded.choice((None, 1, 2)), waiting=seeded.choice((None, None, 3))),
        budget=Budget(gpu_hours=seeded.choice((0, 1, 2))) if seeded.random() < 0.1 else None,
    )


def past(seeded: random.Random) -> tuple[Attempt, ...]:
    """What came of the attempt before, now and then."""
    if seeded.random() < 0.8:
        return ()
    ended = after(-seeded.uniform(0, 2_000))
    reason, node = seeded.choice(ENDS), seeded.choice((None, "node-1", "node-2"))
    return (
        make_attempt(created_time=ended, finish_time=ended, reason=reason, node=node, gpu_class=seeded.choice(CLASSES)),
    )


@cache
def estimate_on(gpu_class: str, model: ModelFacts) -> Estimate | None:
    """What such a job has there."""
    found = candidates(make_spec(), model, gpus(**{f"_{gpu_class}": 1}))
    return found[0] if isinstance(found, tuple) else None


def a_status(seeded: random.Random) -> QLoRAJobStatus:
    before, model = past(seeded), seeded.choice((SMOLLM2_135M, LLAMA_3_8B))
    kind = seeded.choice(("new", "queued", "queued", "queued", "running", "running", "stopping", "over"))
    if kind == "new":
        return QLoRAJobStatus()
    if kind == "over":
        return prepared_status(model, finish_time=after(-seeded.uniform(0, 500)), attempts=before, attempts_total=2)
    if kind == "queued":
        retry_after = after(seeded.uniform(-50, 200)) if before else None
        return prepared_status(model, attempts=before, attempts_total=2, retry_after=retry_after, gpu_seconds=9.5)
    began = after(-seeded.uniform(0, 900))
    gpu_class = seeded.choice(CLASSES)
    told = seeded.choice((None, progress(1, eta_seconds=seeded.choice((0.0, 50.0, 5_000.0, 90_000.0)))))
    attempt = make_attempt(
        number=3,
        gpu_class=gpu_class,
        created_time=began,
        seen_time=began,
        start_time=seeded.choice((began, began, None)),
        stop_time=NOW if kind == "stopping" else None,
        stop_reason=Reason.PREEMPTED if kind == "stopping" else None,
        moves_to=seeded.choice((None, "24Gi")) if kind == "stopping" else None,
        progress_time=seeded.choice((None, began)),
    )
    checkpoint = CheckpointStatus(
        step=1, uri="file:///c", time=after(-seeded.uniform(0, 300)), attempt=seeded.choice((3, 3, None))
    )
    moved = sorted(after(-seeded.uniform(0, 6_000)) for _ in range(seeded.choice((0, 0, 1, 2, 3))))
    return prepared_status(
        model,
        attempts=(*before, attempt),
        attempts_total=3,
        checkpoint=seeded.choice((None, checkpoint)),
        estimate=estimate_on(gpu_class, model),
        progress=told,
        evictions={"Preempted": len(moved)} if moved else {},
        eviction_budget=EvictionBudgetStatus(times=tuple(moved)) if moved else None,
    )


class Crowd:
    """Jobs of a few queues on a few cards, and what a controller sees of them."""

    def __init__(self, seed: int, size: int) -> None:
        self.seeded = random.Random(seed)
        self.seen = Snapshot(
            now=NOW,
            jobs=(),
            queues=tuple(a_queue(name, self.seeded) for name in NAMES),
            gpu_classes=gpus(_24Gi=6, _48Gi=4),
            policy=POLICY,
        )
        self.jobs: dict[str, QLoRAJob] = {}
        self.names = 0
        self.is_fragmented = self.seeded.random() < 0.4
        for _ in range(size):
            self.submit()
        if self.is_fragmented:  # all large cards are taken, by no more than there are, and small ones are free
            active = (job.status.active_attempt for job in self.jobs.values())
            held = sum(attempt is not None and attempt.gpu_class == "48Gi" for attempt in active)
            self.seen = replace(self.seen, gpu_classes=gpus(_24Gi=size, _48Gi=held))

    def submit(self) -> None:
        seeded, status = self.seeded, a_status(self.seeded)
        self.names += 1
        job = make_job(
            f"job-{self.names}",
            status=status,
            age_seconds=seeded.choice((0, 10, seeded.uniform(0, 5_000))),
            queue="default" if self.is_fragmented else seeded.choice((*NAMES, "default", "nowhere")),
            priority=seeded.choice((0, 0, 3, 9)),
            ttl_seconds_after_finished=seeded.choice((None, 100)),
            active_deadline_seconds=seeded.choice((None, None, 1_000)),
            gpu_classes=seeded.choice(((), (), ("48Gi",))),
            class_change="allowed" if self.is_fragmented else seeded.choice(("auto", "allowed")),
            eviction_budget=seeded.choice((None, EvictionBudget(max_evictions=1), EVERY_HOUR)),
        )
        meta = job.metadata.model_copy(update={"namespace": seeded.choice(("default", "default", "team-b"))})
        job = job.model_copy(update={"metadata": meta})
        self.put(job)
        if status.active_attempt is not None and seeded.random() < 0.9:
            phase = StagePhase.RUNNING if seeded.random() < 0.8 else StagePhase.PENDING
            fact = stage(job, phase, gpus=1, gpu_class=status.active_attempt.gpu_class)
            self.seen = replace(self.seen, stages={**self.seen.stages, fact.key: fact})

    def put(self, job: QLoRAJob) -> None:
        self.jobs[job.key] = job
        self.seen = replace(self.seen, jobs=tuple(self.jobs.values()))

    def happen(self, what: str) -> None:
        seeded, key = self.seeded, self.seeded.choice([*self.jobs, ""])
        job, stages = self.jobs.get(key), dict(self.seen.stages)
        match what:
            case "submit":
                self.submit()
            case "time":
                passed = seeded.choice((0.0, 0.5, 7.0, 29.9, 60.0, 400.0, 2_000.0))
                self.seen = replace(self.seen, now=self.seen.now + (after(passed) - NOW))
            case "clock":
                step = seeded.choice((-100, 100))
                self.seen = replace(self.seen, now=self.seen.now + (after(step) - NOW), clock_step_seconds=step)
            case "queue":
                others = [queue for queue in self.seen.queues if queue.metadata.name != "a"]
                self.seen = replace(self.seen, queues=(a_queue("a", seeded), *others))
            case "cards":
                self.seen = replace(self.seen, gpu_classes=gpus(_24Gi=seeded.randrange(30), _48Gi=4))
            case "delete" if job is not None:
                del self.jobs[key]
                self.seen = replace(self.seen, jobs=tuple(self.jobs.values()))
            case "edit" if job is not None:
                changes = seeded.choice(({"priority": 7}, {"suspend": True}, {"suspend": False}, {"queue": "b"}))
                meta = job.metadata.model_copy(update={"generation": job.metadata.generation + 1})
                self.put(job.model_copy(update={"metadata": meta, "spec": job.spec.model_copy(update=changes)}))
            case "refuse" if job is not None:
                self.seen = replace(self.seen, refused={job.metadata.uid: "no"})
            case "report" | "exit" | "vanish" if stages:
                self.happen_to_stage(what, seeded.choice(list(stages)))
            case _:
                pass

    def happen_to_stage(self, what: str, key: str) -> None:
        stages = dict(self.seen.stages)
        fact = stages.pop(key)
        owner = next((job for job in self.jobs.values() if job.metadata.uid == fact.uid), None)
        since = (self.seen.now - NOW).total_seconds()
        if what == "report":
            stages[key] = replace(fact, progress=progress(self.seeded.randrange(9), age_seconds=-since))
        elif what == "exit" and owner is not None and owner.status.active_attempt is not None:
            ended = exited(owner, self.seeded.choice((85, 82, 1, None)))
            stages[key] = replace(ended, gpus=1, gpu_class=fact.gpu_class)
        self.seen = replace(self.seen, stages=stages)

    def obey(self, commands: tuple[Command, ...]) -> None:
        """Carry out what was decided, as far as it is about these objects."""
        self.seen = replace(self.seen, clock_step_seconds=0.0)
        for command in commands:
            match command:
                case WriteStatus(job=job, status=status) if job.key in self.jobs:
                    self.put(job.model_copy(update={"status": status}))
                case WriteQueueStatus(queue=queue, status=status):
                    others = (other for other in self.seen.queues if other.metadata.name != queue.metadata.name)
                    told = queue.model_copy(update={"status": status})
                    self.seen = replace(self.seen, queues=(*others, told))
                case DeleteJob(job=job) if job.key in self.jobs:
                    del self.jobs[job.key]
                case DeleteStage(namespace=namespace, name=name):
                    kept = {key: fact for key, fact in self.seen.stages.items() if key != f"{namespace}/{name}"}
                    self.seen = replace(self.seen, stages=kept)
                case EnsureStage(task=task, gpu_class=gpu_class):
                    job = self.jobs[f"{task.namespace}/{task.job}"]
                    if job.status.active_attempt is not None:
                        fact = stage(job, gpus=int(gpu_class is not None), gpu_class=gpu_class)
                        self.seen = replace(self.seen, stages={**self.seen.stages, fact.key: fact})
                case _:
                    pass
        self.seen = replace(self.seen, jobs=tuple(self.jobs.values()))


changes = st.sampled_from(
    (
        *("submit", "time", "time", "time", "report", "report", "exit", "exit", "vanish", "edit", "edit", "delete"),
        *("obey", "obey", "obey", "queue", "cards", "clock", "refuse"),
    )
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), size=st.sampled_from((3, 15, 60, 130)), story=st.lists(changes, max_size=14))
@example(seed=1, size=130, story=["obey", "obey", "obey", "obey", "time", "exit", "obey", "time", "submit", "obey"])
def test_a_decision_does_not_depend_on_those_before(seed: int, size: int, story: list[str]) -> None:
    crowd, decider, scheduler = Crowd(seed, size), Decider(), Scheduler()
    for change in story:
        commands = decider.decide(crowd.seen)
        assert commands == decide(crowd.seen)
        assert scheduler.round(crowd.seen).whole(crowd.seen) == schedule(crowd.seen)
        if change == "obey":
            crowd.obey(commands)
        else:
            crowd.happen(change)
    assert decider.decide(crowd.seen) == decide(crowd.seen)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), story=st.lists(changes, max_size=6))
def test_a_job_that_waits_untried_is_left_as_it_is_for_ever(seed: int, story: list[str]) -> None:
    crowd = Crowd(seed, 40)
    crowd.obey(decide(crowd.seen))
    for change in story:
        crowd.happen(change)
    untried = [job for job in crowd.jobs.values() if waits_untried(job, crowd.seen)]
    assume(untried)  # nearly every crowd has one; where few had, this would fail
    for job in untried:
        draft = reconcile(Draft.open(job, crowd.seen.now), crowd.seen)
        assert draft == Draft.untried(job, crowd.seen.now)
        assert rests_until(draft, None, POLICY) == FOR_EVER


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), passed=st.floats(0, 1))
def test_by_itself_a_job_at_rest_stays_as_it_is_until_the_time_that_is_told(seed: int, passed: float) -> None:
    crowd = Crowd(seed, 40)
    crowd.obey(decide(crowd.seen))
    rested = 0
    for job in crowd.jobs.values():
        attempt = job.status.active_attempt
        draft = reconcile(Draft.open(job, NOW), crowd.seen)
        until = rests_until(draft, stage_of(job, attempt, crowd.seen) if attempt else None, POLICY)
        if until <= NOW:
            continue
        rested += 1
        later = NOW + passed * min(until - NOW, after(100_000) - NOW)
        if later < until:
            again = reconcile(Draft.open(job, later), replace(crowd.seen, now=later))
            assert (again.status, again.word, again.events) == (job.status, None, ())
    assert rested, "nobody in a crowd of 40 was at rest"


def test_what_raised_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd, decider = Crowd(1, 20), Decider()
    decider.decide(crowd.seen)
    crowd.happen("submit")
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.core.scheduling.cycle.place", None)
        with pytest.raises(TypeError):
            decider.decide(crowd.seen)
    assert decider.decide(crowd.seen) == decide(crowd.seen)
