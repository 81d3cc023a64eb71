"""What `benchmarks.policies` compares with, each by the rules that it publishes, on the same paper cluster.

Jobs take one card each, so one victim is always enough, and a blocked head of the line leaves nothing free that it
could have used: backfill that reserves for it (EASY) is then to start whatever fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.policy_cluster import Cluster, Run, Task


class Stateless:
    """One that reads all it needs from the cluster."""

    def arrived(self, task: Task, cluster: Cluster) -> None:
        """Nothing is kept."""

    def left(self, run: Run, cluster: Cluster, *, complete: bool) -> None:
        """Nothing is kept."""


@dataclass(slots=True)
class Fifo(Stateless):
    """Whoever came first; nobody passes a head that is blocked."""

    def decide(self, cluster: Cluster) -> None:
        """Start from the front while there is room."""
        for task in sorted(cluster.waiting.values(), key=_age):
            free = _first_free(task, cluster)
            if free is None:
                return
            cluster.start(task.name, free)


@dataclass(slots=True)
class Easy(Stateless):
    """SLURM's backfill by priority and age: nobody is stopped."""

    def decide(self, cluster: Cluster) -> None:
        """Start whatever fits, in order."""
        for task in sorted(cluster.waiting.values(), key=_by_priority):
            free = _first_free(task, cluster)
            if free is not None:
                cluster.start(task.name, free)


@dataclass(slots=True)
class Kueue(Stateless):
    """ClusterQueues of one cohort: a head of each a cycle, borrowing, LowerPriority within a queue, reclaim of Any.

    As Kueue 0.20 documents it, with its defaults: BestEffortFIFO, fair sharing off, a class that fits before one where
    somebody has to go; victims are those on their way already, then other queues' jobs, then the lowest priority, then
    whoever was admitted last. Whoever waits for victims to stop stays the head of its queue (its pull request 7157) and
    goes before other queues' heads (13797): without these two it would start a victim again on the card it had left.
    """

    nominal: Mapping[str, Mapping[str, int]]
    """By queue and class."""
    _used: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    _preempting: dict[str, str] = field(default_factory=dict[str, str])
    """The job that waits for victims to stop, by queue."""

    def decide(self, cluster: Cluster) -> None:
        """Cycle after cycle, until one changes nothing."""
        self._used = Counter((run.task.queue, run.gpu_class) for run in cluster.running.values())
        pending = {queue: sorted(_of(queue, cluster), key=self._place) for queue in self.nominal}
        promised: set[str] = set()
        while any(pending.values()):
            heads = [tasks.pop(0) for tasks in pending.values() if tasks]
            heads.sort(
                key=lambda task: (not self._is_preempting(task), self._borrows(task, cluster), *_by_priority(task))
            )
            for head in heads:
                if self._admit(head, cluster, promised):
                    self._preempting[head.queue] = head.name
                    pending[head.queue] = []
                elif self._is_preempting(head):
                    del self._preempting[head.queue]

    def _is_preempting(self, task: Task) -> bool:
        return self._preempting.get(task.queue) == task.name

    def _place(self, task: Task) -> tuple[bool, int, float, str]:
        return not self._is_preempting(task), *_by_priority(task)

    def _admit(self, task: Task, cluster: Cluster, promised: set[str]) -> bool:
        """Give the job a card, or have somebody make way for it: whether it waits for that."""
        free = _first_free(task, cluster)
        if free is not None:
            self._used[task.queue, free] += 1
            cluster.start(task.name, free)
            return False
        for gpu_class in task.classes:
            victims = (run for run in self._candidates(task, gpu_class, cluster) if run.task.name not in promised)
            victim = min(victims, key=lambda run: self._rank(run, task), default=None)
            if victim is not None:
                promised.add(victim.task.name)
                self._used[victim.task.queue, gpu_class] -= 1
                self._used[task.queue, gpu_class] += 1
                if not victim.stopping:
                    cluster.stop(victim.task.name)
                return True
        return False

    def _candidates(self, task: Task, gpu_class: str, cluster: Cluster) -> Iterator[Run]:
        reclaims = self._used[task.queue, gpu_class] < self.nominal[task.queue].get(gpu_class, 0)
        for run in cluster.running.values():
            if run.gpu_class != gpu_class:
                continue
            queue = run.task.queue
            if queue == task.queue:
                if run.task.priority < task.priority:
                    yield run
            elif reclaims and self._used[queue, gpu_class] > self.nominal[queue].get(gpu_class, 0):
                yield run

    def _rank(self, run: Run, task: Task, /) -> tuple[bool, bool, int, float]:
        """Least first."""
        return not run.stopping, run.task.queue == task.queue, run.task.priority, -run.since

    def _borrows(self, task: Task, cluster: Cluster) -> bool:
        """Whether what the job would be given now is beyond its queue's own."""
        free = _first_free(task, cluster)
        classes = task.classes if free is None else (free,)
        return all(self._used[task.queue, name] >= self.nominal[task.queue].get(name, 0) for name in classes)


@dataclass(slots=True)
class PriorityOnly(Kueue):
    """The same queues, where nothing but its priority says who makes way."""

    def _rank(self, run: Run, _: Task, /) -> tuple[bool, bool, int, float]:
        return not run.stopping, False, run.task.priority, run.task.submit_seconds


def _of(queue: str, cluster: Cluster) -> Iterable[Task]:
    return (task for task in cluster.waiting.values() if task.queue == queue)


def _first_free(task: Task, cluster: Cluster) -> str | None:
    return next((name for name in task.classes if cluster.free[name] > 0), None)


def _age(task: Task) -> tuple[float, str]:
    return task.submit_seconds, task.name


def _by_priority(task: Task) -> tuple[int, float, str]:
    return -task.priority, *_age(task)


RIVALS: Mapping[str, Callable[[Mapping[str, Mapping[str, int]]], Fifo | Easy | Kueue]] = {
    "fifo": lambda _: Fifo(),
    "easy": lambda _: Easy(),
    "priority-only": PriorityOnly,
    "kueue": Kueue,
}
"""By name, each made from the queues' nominal quotas."""
