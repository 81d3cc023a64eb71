"""A cluster on paper for `benchmarks.policies`: cards, jobs of one card each, a clock, and the books of what is lost.

Every scheduler sees the same cluster, jobs and trainer; it decides when something has happened, and once a minute while
somebody waits. A job needs so many seconds of work on any card that it fits, and `Trainer` says what stopping and
starting cost.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

TICK_SECONDS = 60.0
GIB = {"24Gi": 24, "48Gi": 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job of the trace."""

    name: str
    queue: str
    priority: int
    classes: tuple[str, ...]
    """That it fits, the smallest first."""
    work_seconds: float
    submit_seconds: float
    planned_seconds: float = 0.0
    """What its plan says that the work takes, where somebody looks at plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What a move costs: the same for every scheduler."""

    checkpoint_seconds: float = 1800.0
    """Work between two checkpoints."""
    restart_seconds: float = 60.0
    """On the GPU before the first step."""
    stop_seconds: float = 20.0
    """From being asked to stop until the GPU is free."""
    saves_when_asked: bool = False
    """Whether a stop is preceded by a checkpoint."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A job on its card."""

    task: Task
    gpu_class: str
    since: float
    saved_seconds: float
    """Work that was durable when it began."""
    number: int
    stopping: bool = False


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one scheduler made of the trace."""

    starts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    end: dict[str, float] = field(default_factory=dict[str, float])
    moves: int = 0
    lost_seconds: float = 0.0
    """GPU-seconds that stops cost: work done again, the time to stop, the time to start again."""
    worked_seconds: float = 0.0
    """GPU-seconds of work that counted, up to the last arrival."""
    contended_seconds: float = 0.0
    share_seconds: float = 0.0
    """Of the waiting queue that has least of its due, that part, over the contended seconds."""

    def next_start(self, name: str, after: float) -> float:
        """When the job got its next card after that moment."""
        return next(start for start in self.starts[name] if start >= after)


class Scheduler(Protocol):
    """Who decides."""

    def arrived(self, task: Task, cluster: Cluster) -> None:
        """The job waits."""
        ...

    def left(self, run: Run, cluster: Cluster, *, complete: bool) -> None:
        """The job has given its card back, for good or to wait again."""
        ...

    def decide(self, cluster: Cluster) -> None:
        """Start and stop by the cluster's methods."""
        ...


@dataclass(slots=True)
class Cluster:
    """Who waits and who runs."""

    capacity: Mapping[str, int]
    weights: Mapping[str, int]
    """Of the queues."""
    trainer: Trainer
    now: float = 0.0
    waiting: dict[str, Task] = field(default_factory=dict[str, Task])
    running: dict[str, Run] = field(default_factory=dict[str, Run])
    free: Counter[str] = field(default_factory=Counter[str])
    outcome: Outcome = field(default_factory=Outcome)
    saved: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of work that jobs which were stopped had done and saved."""
    _events: list[tuple[float, int, str, str, int]] = field(default_factory=list[tuple[float, int, str, str, int]])
    _order: count[int] = field(default_factory=count)
    _numbers: count[int] = field(default_factory=count)
    _last_arrival: float = 0.0

    def live(self, tasks: Iterable[Task], scheduler: Scheduler) -> Outcome:
        """The whole trace, until every job is done."""
        self.free.update(self.capacity)
        by_name = {task.name: task for task in tasks}
        for task in by_name.values():
            self._at(task.submit_seconds, "arrive", task.name)
            self._last_arrival = max(self._last_arrival, task.submit_seconds)
        ticking = False
        while self._events:
            self._advance(self._events[0][0])
            while self._events and self._events[0][0] <= self.now:
                _, _, what, name, number = heapq.heappop(self._events)
                ticking = ticking and what != "tick"
                self._happen(what, by_name.get(name), number, scheduler)
            scheduler.decide(self)
            if self.waiting and not ticking:
                ticking = True
                self._at(self.now + TICK_SECONDS, "tick")
        assert len(self.outcome.end) == len(by_name), "every job ends"
        return self.outcome

    # --- what a scheduler does ---------------------------------------------------------------------------------

    def start(self, name: str, gpu_class: str) -> None:
        """A waiting job gets a free card."""
        task = self.waiting.pop(name)
        assert gpu_class in task.classes, f"{name} does not fit {gpu_class}"
        assert self.free[gpu_class] > 0, f"no {gpu_class} is free for {name}"
        self.free[gpu_class] -= 1
        saved = self.saved.get(name, 0.0)
        run = Run(task=task, gpu_class=gpu_class, since=self.now, saved_seconds=saved, number=next(self._numbers))
        self.running[name] = run
        self.outcome.starts.setdefault(name, []).append(self.now)
        left = task.work_seconds - saved
        self._at(self.now + self.trainer.restart_seconds + left, "finish", name, run.number)

    def stop(self, name: str) -> None:
        """A running job is asked to give its card back."""
        run = self.running[name]
        assert not run.stopping, f"{name} is stopping already"
        done, durable = self.done(run), self.durable(run)
        if self.trainer.saves_when_asked:
            durable = done
        run.stopping = True
        self.saved[name] = durable
        self.outcome.moves += 1
        if self.now <= self._last_arrival:
            self.outcome.worked_seconds -= done - durable
        started = min(self.now - run.since, self.trainer.restart_seconds)
        self.outcome.lost_seconds += done - durable + self.trainer.stop_seconds + started
        self._at(self.now + self.trainer.stop_seconds, "freed", name, run.number)

    # --- what is so ----------------------------------------------------------------------------------------------

    def done(self, run: Run) -> float:
        """Seconds of work that are done."""
        return run.saved_seconds + max(0.0, self.now - run.since - self.trainer.restart_seconds)

    def durable(self, run: Run) -> float:
        """Seconds of work that are in the last checkpoint."""
        fresh = self.done(run) - run.saved_seconds
        return run.saved_seconds + fresh // self.trainer.checkpoint_seconds * self.trainer.checkpoint_seconds

    # --- what happens --------------------------------------------------------------------------------------------

    def _at(self, seconds: float, what: str, name: str = "", number: int = -1) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), what, name, number))

    def _happen(self, what: str, task: Task | None, number: int, scheduler: Scheduler) -> None:
        if task is None:
            return
        if what == "arrive":
            self.waiting[task.name] = task
            scheduler.arrived(task, self)
            return
        run = self.running.get(task.name)
        if run is None or run.number != number or (what == "finish" and run.stopping):
            return
        del self.running[task.name]
        self.free[run.gpu_class] += 1
        if what == "finish":
            self.outcome.end[task.name] = self.now
        else:
            self.waiting[task.name] = task
        scheduler.left(run, self, complete=what == "finish")

    def _advance(self, to: float) -> None:
        """Time passes: the books of it."""
        until = min(to, self._last_arrival)
        for run in self.running.values():
            if not run.stopping:
                begin = max(self.now, run.since + self.trainer.restart_seconds)
                self.outcome.worked_seconds += max(0.0, until - begin)
        if self.waiting:
            self.outcome.contended_seconds += to - self.now
            self.outcome.share_seconds += (to - self.now) * self._least_share()
        self.now = to

    def _least_share(self) -> float:
        """Of all queues that wait, what the one with least has of what its weight is due."""
        held: Counter[str] = Counter()
        for run in self.running.values():
            held[run.task.queue] += GIB[run.gpu_class]
        backlogged = {task.queue for task in self.waiting.values()}
        whole = sum(GIB[name] * count for name, count in self.capacity.items())
        weights = sum(self.weights[queue] for queue in backlogged | held.keys())
        return min(min(1.0, held[queue] * weights / (whole * self.weights[queue])) for queue in backlogged)
