"""How far off the starts are that `explain` tells, on traces' statistics: with everybody there, and while others come.

    python -m benchmarks.forecasts [--jobs 500] [--seeds 2] [--save forecasts]

The cluster, jobs and trainer are those of `benchmarks.policies`, on cards of one class. What a plan says of a job's
time is off by SPREAD (the standard deviation of its logarithm); a trainer that runs knows its time. Whoever waits is
told a start again and again; each is held against the start that came.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from statistics import median
from typing import Any

from benchmarks.policies import RUN_SECONDS, WEIGHTS, drawn
from benchmarks.policy_cluster import Cluster, Run, Task, Trainer
from benchmarks.policy_ours import Ours, policy_of
from benchmarks.report import argument_parser, emit
from tests.builders import NOW

CARDS = 32
CAPACITY = {"24Gi": CARDS}
NOMINAL = {"research": {"24Gi": 8}, "product": {"24Gi": 16}, "batch": {"24Gi": 8}}
SPREAD = 0.1
EVERY, ASKED = 40, 4
"""Arrivals or ends between two looks ahead, and who is told each time."""
SHORTEST_WAIT = 60.0
"""Of shorter waits nobody asks."""
PERCENT_OFF = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A start that was told."""

    name: str
    at: float
    wait_seconds: float
    early_seconds: float
    late_seconds: float


@dataclass(slots=True, kw_only=True)
class Asking:
    """Ours, asked every now and then when who waits will start."""

    ours: Ours
    draw: random.Random
    told: list[Told] = field(default_factory=list[Told])
    _seen: int = 0

    def arrived(self, task: Task, cluster: Cluster) -> None:
        """Somebody comes."""
        self.ours.arrived(task, cluster)
        self._seen += 1

    def left(self, run: Run, cluster: Cluster, *, complete: bool) -> None:
        """Somebody goes."""
        self.ours.left(run, cluster, complete=complete)
        self._seen += 1

    def decide(self, cluster: Cluster) -> None:
        """As ours does, and ask."""
        self.ours.decide(cluster)
        if self._seen < EVERY or not cluster.waiting:
            return
        self._seen = 0
        names = self.draw.sample(sorted(cluster.waiting), min(ASKED, len(cluster.waiting)))
        present = NOW + timedelta(seconds=cluster.now)
        for name, ahead in self.ours.look_ahead(cluster, names).items():
            if ahead.expected is None or ahead.expected.start is None or ahead.early is None:
                continue
            late = ahead.late - present if ahead.late is not None else timedelta.max
            self.told.append(
                Told(
                    name=name,
                    at=cluster.now,
                    wait_seconds=(ahead.expected.start - present).total_seconds(),
                    early_seconds=(ahead.early - present).total_seconds(),
                    late_seconds=late.total_seconds(),
                )
            )


def main() -> None:
    """Both ways on every trace."""
    parser = argument_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    results = {
        f"{trace}, {way}": figures(
            [off for seed in range(arguments.seeds) for off in tried(trace, way, seed, arguments)]
        )
        for trace in RUN_SECONDS
        for way in ("nobody comes", "others come")
    }
    emit({"jobs": arguments.jobs, "seeds": arguments.seeds, "traces": results}, save=arguments.save)


def tried(trace: str, way: str, seed: int, arguments: Namespace) -> Iterator[tuple[float, bool]]:
    """Of each that was told: how many times its wait the real one was, and whether it came in the range."""
    draw = random.Random(seed)
    trainer = replace(Trainer(), saves_when_asked=True)
    tasks = [
        replace(
            task,
            classes=("24Gi",),
            planned_seconds=task.work_seconds * draw.lognormvariate(0.0, SPREAD),
            submit_seconds=0.0 if way == "nobody comes" else task.submit_seconds,
        )
        for task in drawn(trace, arguments.jobs, seed)
    ]
    ours = Ours(trainer=trainer, capacity=CAPACITY, nominal=NOMINAL, weights=WEIGHTS, policy=policy_of(trainer))
    asking = Asking(ours=ours, draw=draw)
    outcome = Cluster(CAPACITY, WEIGHTS, trainer).live(tasks, asking)
    for told in asking.told:
        if told.wait_seconds >= SHORTEST_WAIT:
            waited = outcome.next_start(told.name, told.at) - told.at
            yield waited / told.wait_seconds, told.early_seconds <= waited <= told.late_seconds


def figures(found: list[tuple[float, bool]]) -> dict[str, Any]:
    """Of so many, how many came near, and how many in the range that they were told."""
    ordered = sorted(ratio for ratio, _ in found)
    if not ordered:
        return {"told": 0}
    return {
        "told": len(ordered),
        "within_20_percent": round(sum(abs(1 - ratio) <= PERCENT_OFF for ratio in ordered) / len(ordered), 3),
        "in_the_range": round(sum(inside for _, inside in found) / len(found), 3),
        "median": round(median(ordered), 3),
        "tenth": round(ordered[len(ordered) // 10], 3),
        "nine_tenths": round(ordered[len(ordered) * 9 // 10], 3),
    }


if __name__ == "__main__":
    main()
