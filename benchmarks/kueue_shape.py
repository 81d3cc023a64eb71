"""The shape of Kueue's performance test, which both sides of `benchmarks.kueue` run: queues, workloads, figures.

Read from the `generator.yaml` of its scheduler's performance runner. `one_gpu` is the same with a request of one for
every workload, which is all that a job here may ask for, and quotas cut down by as much as that takes off the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import mean, quantiles
from typing import Any

Document = dict[str, Any]  # Any: YAML


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadClass:
    """Workloads of one kind, in each queue."""

    name: str
    count: int
    interval_seconds: float
    """Between the creation of two of them."""
    run_seconds: float
    priority: int
    request: int

    @property
    def work(self) -> float:
        """Seconds of a unit of quota that all of them take in one queue."""
        return self.count * self.run_seconds * self.request


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Cohorts of queues that are all alike."""

    cohort: str
    cohorts: int
    queue: str
    queues: int
    """In each cohort."""
    nominal: int
    borrowing_limit: int
    reclaim: str
    within_queue: str
    classes: tuple[WorkloadClass, ...]

    @classmethod
    def read(cls, document: Document) -> Shape:
        """A generator's configuration of one kind of cohort with one kind of queue."""
        [cohort] = document["cohorts"]
        [queue] = cohort["queuesSets"]
        return cls(
            cohort=cohort["className"],
            cohorts=cohort["count"],
            queue=queue["className"],
            queues=queue["count"],
            nominal=int(queue["nominalQuota"]),
            borrowing_limit=int(queue["borrowingLimit"]),
            reclaim=queue["reclaimWithinCohort"],
            within_queue=queue["withinClusterQueue"],
            classes=tuple(_workload_class(each) for each in queue["workloadsSets"]),
        )

    @property
    def workloads(self) -> int:
        """Of all queues."""
        return self.cohorts * self.queues * sum(each.count for each in self.classes)

    @property
    def quota(self) -> int:
        """Nominal, of all queues."""
        return self.cohorts * self.queues * self.nominal

    @property
    def work(self) -> float:
        """Seconds of a unit of quota that everything takes."""
        return self.cohorts * self.queues * sum(each.work for each in self.classes)

    def scaled(self, share: float) -> Shape:
        """A share of the workloads, created as fast."""
        return replace(
            self, classes=tuple(replace(each, count=max(1, round(each.count * share))) for each in self.classes)
        )

    def one_gpu(self) -> Shape:
        """Every workload asks for one unit, and quotas are to the work as they were, rounded up."""
        classes = tuple(replace(each, request=1) for each in self.classes)
        before, after = (sum(each.work for each in some) for some in (self.classes, classes))
        nominal = math.ceil(self.nominal * after / before)
        borrowing_limit = self.borrowing_limit * nominal // self.nominal
        return replace(self, nominal=nominal, borrowing_limit=borrowing_limit, classes=classes)

    def queue_names(self) -> Iterator[tuple[str, str]]:
        """(queue, cohort), named as Kueue's generator names them; a queue's jobs have a namespace of its name."""
        for cohort in range(self.cohorts):
            for queue in range(self.queues):
                yield f"{self.queue}-0-{queue}-{self.cohort}-{cohort}", f"{self.cohort}-{cohort}"

    def document(self) -> Document:
        """The generator's configuration."""
        queue = {
            "className": self.queue,
            "count": self.queues,
            "nominalQuota": str(self.nominal),
            "borrowingLimit": str(self.borrowing_limit),
            "reclaimWithinCohort": self.reclaim,
            "withinClusterQueue": self.within_queue,
            "workloadsSets": [_workloads_set(each) for each in self.classes],
        }
        return {"cohorts": [{"className": self.cohort, "count": self.cohorts, "queuesSets": [queue]}]}


def _workload_class(found: Document) -> WorkloadClass:
    [workload] = found["workloads"]
    return WorkloadClass(
        name=workload["className"],
        count=found["count"],
        interval_seconds=found["creationIntervalMs"] / 1000,
        run_seconds=workload["runtimeMs"] / 1000,
        priority=workload["priority"],
        request=int(workload["request"]),
    )


def _workloads_set(each: WorkloadClass) -> Document:
    workload = {
        "className": each.name,
        "runtimeMs": round(each.run_seconds * 1000),
        "priority": each.priority,
        "request": str(each.request),
    }
    return {
        "count": each.count,
        "creationIntervalMs": round(each.interval_seconds * 1000),
        "workloads": [workload],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What became of one workload."""

    kind: str
    """Its class."""
    created: datetime
    admitted: datetime
    """The last time, if it was evicted."""
    finished: datetime
    """When its quota was given back."""


def figures(shape: Shape, lives: Sequence[Life]) -> dict[str, object]:
    """Rate, waits by class and use of quota, by the times that the objects tell."""
    began, ended = min(life.created for life in lives), max(life.finished for life in lives)
    admission_seconds = (max(life.admitted for life in lives) - began).total_seconds()
    seconds = (ended - began).total_seconds()
    requests = {each.name: each.request for each in shape.classes}
    held = sum(requests[life.kind] * (life.finished - life.admitted).total_seconds() for life in lives)
    return {
        "workloads": len(lives),
        "seconds": round(seconds, 1),
        "workloads_per_second": round(len(lives) / seconds, 2),
        "admission_seconds": round(admission_seconds, 1),
        "wait_seconds": {each.name: _waits(lives, each.name) for each in shape.classes},
        "quota_held": round(held / (shape.quota * seconds), 3),
        "quota_worked": round(shape.work / (shape.quota * seconds), 3),
    }


def _waits(lives: Sequence[Life], kind: str) -> Mapping[str, float]:
    waits = [(life.admitted - life.created).total_seconds() for life in lives if life.kind == kind]
    cuts = quantiles(waits, n=20, method="inclusive")
    return {"mean": round(mean(waits), 2), "p50": round(cuts[9], 2), "p95": round(cuts[18], 2)}
