"""The controller's own decisions on the paper cluster of `benchmarks.policies`: the same `Decider`, objects and stages.

What the decider is told is what it is told on a cluster: objects, the stages there are, and what trainers report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache

from benchmarks.policy_cluster import Cluster, Run, Task, Trainer
from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ExitCode
from orchestrator.core.commands import Command, DeleteStage, EnsureStage, StopStage
from orchestrator.core.forecast import Outlook, outlook
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Policy, StagePhase
from orchestrator.sizing.hardware import gpu_class
from tests.builders import (
    NOW,
    PUBLISHED,
    make_job,
    make_queue,
    prepare_result,
    prepared_status,
    progress,
    snapshot,
    train_result,
)
from tests.core.world import World

STEPS = 10**6
MOST_ROUNDS = 12
NEVER = 1e9
COHORT = "all"
TELL_SECONDS = 60.0
"""Trainers report so often while somebody waits; nobody looks at it otherwise."""


def policy_of(trainer: Trainer, **parts: float) -> Policy:
    """The settings as they ship, told what a restart costs; `parts` are those of a setting of its own."""
    shipped = Policy(
        store_uri="file:///store",
        restart_cost_seconds=trainer.restart_seconds,
        words_limit=STEPS,
        stall_seconds=NEVER,
        stall_start_seconds=NEVER,
    )
    return replace(shipped, **parts)


@dataclass(slots=True, kw_only=True)
class Ours:
    """The decider and what it sees."""

    trainer: Trainer
    capacity: Mapping[str, int]
    nominal: Mapping[str, Mapping[str, int]]
    weights: Mapping[str, int]
    policy: Policy
    tells: bool = True
    """Whether trainers report how far they are and what is durable."""
    class_change: str = "allowed"
    """Of all jobs."""
    _world: PaperWorld = field(init=False)
    _told: float = -TELL_SECONDS

    def __post_init__(self) -> None:
        """Queues and cards are there from the beginning."""
        self._world = PaperWorld(
            policy=self.policy,
            gpu_classes=[gpu_class(name, count) for name, count in self.capacity.items()],
            queues=tuple(
                make_queue(queue, quotas, cohort=COHORT, weight=self.weights[queue])
                for queue, quotas in self.nominal.items()
            ),
        )

    def arrived(self, task: Task, cluster: Cluster) -> None:
        """Submit it; it is prepared already."""
        self._world.now = _time(cluster)
        status = prepared_status(run_id=f"run-of-{task.name}")
        prepared = prepare_result().model_copy(update={"steps": self._steps(task)})
        job = make_job(
            task.name,
            status=status.model_copy(update={"prepared": prepared}),
            queue=task.queue,
            priority=task.priority,
            gpu_classes=task.classes,
            class_change=self.class_change,
        )
        self._world.submit(job)

    def left(self, run: Run, cluster: Cluster, *, complete: bool) -> None:
        """Its stage has ended: with an adapter, or stopped after a checkpoint."""
        self._world.now = _time(cluster)
        key, saved = self._world.stage_of[run.task.name], cluster.saved.get(run.task.name, 0.0)
        code = 0 if complete else ExitCode.PREEMPTED
        step = self._steps(run.task) if complete else self._step(run.task, saved)
        self._world.end(key, code, step, complete=complete)

    def decide(self, cluster: Cluster) -> None:
        """Round after round, as the controller makes them, until nothing follows any more."""
        world = self._world
        world.now = _time(cluster)
        if self.tells and cluster.waiting and cluster.now - self._told >= TELL_SECONDS:
            self._told = cluster.now
            self._tell(cluster)
        commands: tuple[Command, ...] = ()
        for _ in range(MOST_ROUNDS):
            commands = world.round()
            for name, chosen in world.started:
                cluster.start(name, chosen)
            for name in world.stopped:
                if not cluster.running[name].stopping:
                    cluster.stop(name)
            world.started.clear()
            world.stopped.clear()
            if all(isinstance(command, StopStage) for command in commands):
                return  # said again until they have stopped
        raise AssertionError(f"decisions do not come to rest: {commands}")

    def _tell(self, cluster: Cluster) -> None:
        """What running trainers have done and saved, and for how long they go on."""
        for run in cluster.running.values():
            if run.stopping:
                continue
            restarting = max(0.0, run.since + self.trainer.restart_seconds - cluster.now)
            saved = cluster.durable(run)
            self._world.tell(
                run.task.name,
                self._step(run.task, cluster.done(run)),
                steps=self._steps(run.task),
                saved=self._step(run.task, saved) if saved > run.saved_seconds else None,
                saved_time=NOW
                + timedelta(seconds=run.since + self.trainer.restart_seconds + saved - run.saved_seconds),
                eta_seconds=run.task.work_seconds - cluster.done(run) + restarting,
            )

    def look_ahead(self, cluster: Cluster, names: Iterable[str]) -> Mapping[str, Outlook]:
        """What these are told now."""
        seen = self._world.snapshot()
        return {name: outlook(seen, f"default/{name}") for name in names if name in cluster.waiting}

    def _step(self, task: Task, done_seconds: float) -> int:
        steps = self._steps(task)
        return min(steps - 1, round(steps * done_seconds / task.work_seconds))

    def _steps(self, task: Task) -> int:
        if not task.planned_seconds:
            return STEPS
        return max(2, round(task.planned_seconds / step_seconds(task.classes[0])))


@cache
def step_seconds(name: str) -> float:
    """What the plan of such a job says of a step on that class."""
    job = make_job(status=prepared_status(), gpu_classes=(name,))
    [placement] = schedule(snapshot(job, gpu_classes=(gpu_class(name, 1),))).placements
    assert placement.estimate.step_seconds is not None, f"the cards of {name} are known"
    return placement.estimate.step_seconds


def _time(cluster: Cluster) -> datetime:
    return NOW + timedelta(seconds=cluster.now)


@dataclass(slots=True)
class PaperWorld(World):
    """A world of objects whose stages do as the paper cluster says."""

    stage_of: dict[str, str] = field(default_factory=dict[str, str])
    """The train stage of a job that has one, by the job's name."""
    news: dict[str, int] = field(default_factory=dict[str, int])
    started: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    stopped: list[str] = field(default_factory=list[str])

    def round(self) -> tuple[Command, ...]:
        """Decide and carry out."""
        commands = self.decider.decide(self.snapshot())
        for command in commands:
            self._act(command)
        return commands

    def tell(
        self, job: str, step: int, *, steps: int, saved: int | None, saved_time: datetime, eta_seconds: float
    ) -> None:
        """A trainer reports how far it is, what of that is durable, and for how long it goes on."""
        key = self.stage_of[job]
        is_news = saved is not None and self.news.get(key) != saved
        report = progress(step, eta_seconds=eta_seconds).model_copy(
            update={
                "steps": steps,
                "time": saved_time if is_news else self.now,
                "checkpoint_step": saved,
                "checkpoint_uri": None if saved is None else f"file:///checkpoints/{saved}",
            }
        )
        if saved is not None:
            self.news[key] = saved
        self.stages[key] = replace(self.stages[key], progress=report)

    def end(self, key: str, code: int, step: int, *, complete: bool) -> None:
        """A train stage has ended."""
        self._exit(key, code, train_result(step, complete=complete))

    def _write(self, seen: QLoRAJob, status: QLoRAJobStatus) -> None:
        """Without the way over the wire, which other tests take."""
        stored = self.jobs[seen.key]
        assert stored.metadata.resource_version == seen.metadata.resource_version, "one controller alone writes"
        self._replace(stored, status=status)

    def _act(self, command: Command) -> None:
        match command:
            case EnsureStage(task=task, gpu_class=chosen):
                key = f"{task.namespace}/{task.stage_name}"
                if key in self.stages:
                    return
                World._ensure(self, command)
                self.stages[key] = replace(self.stages[key], phase=StagePhase.RUNNING, start_time=self.now)
                if task.stage == "train":
                    assert chosen is not None, "a GPU stage is of a class"
                    self.stage_of[task.job] = key
                    self.started.append((task.job, chosen))
                else:
                    self._exit(key, 0, PUBLISHED)
            case StopStage(namespace=namespace, name=name):
                self.stopped.append(self.tasks[f"{namespace}/{name}"].job)
            case DeleteStage(namespace=namespace, name=name):
                World._delete(self, f"{namespace}/{name}")
            case _:
                World._act(self, command)
