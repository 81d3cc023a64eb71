"""What preemption costs and what it brings: the controller's decisions beside those of others, on traces' statistics.

    python -m benchmarks.policies [--jobs 1000] [--seed 0] [--traces openb philly] [--save policies]

Run times are drawn from what was published of single-GPU tasks of two clusters, gaps between arrivals with openb's mean
over median and coefficient of variation. The same jobs then go through each scheduler on the same paper cluster
(`benchmarks.policy_cluster`): ours as it decides on a cluster (`policy_ours`), ours without each of its parts, and
others by the rules that they publish (`policy_rivals`). All of them have the same trainer; its checkpoints are
periodic, and in a second table it also saves when it is asked to stop.
"""

from __future__ import annotations

import random
import sys
import time
from argparse import Namespace
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from statistics import mean, quantiles
from typing import Any

from benchmarks.policy_cluster import Cluster, Outcome, Scheduler, Task, Trainer
from benchmarks.policy_ours import Ours, policy_of
from benchmarks.policy_rivals import RIVALS
from benchmarks.report import argument_parser, emit

LEVELS = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
RUN_SECONDS: Mapping[str, tuple[float, ...]] = {
    "openb": (30, 80, 208, 758, 2_462, 6_030, 13_278, 243_803, 243_803),
    "philly": (30, 61, 131, 1_186, 3_342, 12_860, 49_969, 287_333, 287_333),
}
"""At the LEVELS: Alibaba's openb, 2023, and Microsoft's Philly, 2017; what is below p10 and above p99 is ours."""
SHORT_GAP, SHORT_GAPS, LONG_GAP = 0.163, 0.995, 167.0
"""Two exponentials, in mean gaps, and how many are of the first: median .113 and variation 16.7, as openb has them."""
CAPACITY = {"24Gi": 24, "48Gi": 8}
WEIGHTS = {"research": 1, "product": 2, "batch": 1}
NOMINAL = {"research": {"24Gi": 6, "48Gi": 2}, "product": {"24Gi": 12, "48Gi": 4}, "batch": {"24Gi": 6, "48Gi": 2}}
JOBS_OF = (("research", 0.35), ("product", 0.35), ("batch", 0.30))
PRIORITIES = {"research": (0, 0, 10), "product": (0, 10, 100), "batch": (0,)}
HIGH_PRIORITY = 100
LARGE_SHARE = 0.2
LOAD = 0.9
DEFRAGMENTATION_GAIN = 2.0
SLACK = (1.5, 6.0)
"""A job's due time is this many times its work after its submission; nobody is told."""


def main() -> None:
    """Every scheduler on every trace."""
    parser = argument_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", nargs="+", default=list(RUN_SECONDS), choices=list(RUN_SECONDS))
    parser.add_argument("--only", nargs="+", help="of the schedulers, these")
    arguments = parser.parse_args()
    tables = [(trace, saves) for trace in arguments.traces for saves in (False, True)]
    with ProcessPoolExecutor() as pool:
        found = pool.map(partial(_table, arguments=arguments), tables)
        results = {_named(*table): figures for table, figures in zip(tables, found, strict=True)}
    emit({"jobs": arguments.jobs, "seed": arguments.seed, "capacity": CAPACITY, "traces": results}, save=arguments.save)


def _named(trace: str, saves: bool) -> str:
    return f"{trace}, {'saves when asked' if saves else 'periodic checkpoints'}"


def _table(table: tuple[str, bool], arguments: Namespace) -> dict[str, dict[str, Any]]:
    """What each scheduler makes of one trace with one kind of trainer."""
    trace, saves = table
    trainer = replace(Trainer(), saves_when_asked=saves)
    tasks = list(drawn(trace, arguments.jobs, arguments.seed))
    due = _due(tasks, arguments.seed)
    results: dict[str, dict[str, Any]] = {}
    for name, make in schedulers(trainer).items():
        if arguments.only and name not in arguments.only:
            continue
        began = time.perf_counter()
        results[name] = told(tasks, Cluster(CAPACITY, WEIGHTS, trainer).live(tasks, make()), due)
        seconds = round(time.perf_counter() - began, 1)
        print(f"{_named(*table)}: {name} {seconds} s: {results[name]}", file=sys.stderr, flush=True)
    return results


def schedulers(trainer: Trainer) -> Mapping[str, Callable[[], Scheduler]]:
    """All, by name, each made anew."""

    def ours(*, tells: bool = True, class_change: str = "allowed", **parts: float) -> Ours:
        return Ours(
            trainer=trainer,
            capacity=CAPACITY,
            nominal=NOMINAL,
            weights=WEIGHTS,
            policy=policy_of(trainer, **parts),
            tells=tells,
            class_change=class_change,
        )

    changed: dict[str, Callable[[], Scheduler]] = {
        "ours, no cool-down": partial(ours, preemption_cooldown_seconds=0.0),
        "ours, large cards made room on": partial(ours, defragmentation_gain=DEFRAGMENTATION_GAIN),
        "ours, budgets of one move a day": partial(ours, max_evictions=1),
        "ours, not told of progress": partial(ours, tells=False),
        "ours, jobs keep their class": partial(ours, class_change="forbidden"),
    }
    rivals = {name: partial(kind, NOMINAL) for name, kind in RIVALS.items()}
    return {"ours": ours, **changed, **rivals}


def drawn(trace: str, jobs: int, seed: int) -> Iterator[Task]:
    """The jobs of a trace, of which a busy cluster would be LOAD busy."""
    draw = random.Random(f"{trace}-{seed}")
    work = [_run_seconds(trace, draw.random()) for _ in range(jobs)]
    gaps = [_gap(draw) for _ in range(jobs)]
    mean_gap = sum(work) / (LOAD * sum(CAPACITY.values())) / sum(gaps)
    now = 0.0
    for number, (seconds, gap) in enumerate(zip(work, gaps, strict=True)):
        now += gap * mean_gap
        [queue] = draw.choices([name for name, _ in JOBS_OF], [share for _, share in JOBS_OF])
        yield Task(
            name=f"job-{number:05}",
            queue=queue,
            priority=draw.choice(PRIORITIES[queue]),
            classes=("48Gi",) if draw.random() < LARGE_SHARE else ("24Gi", "48Gi"),
            work_seconds=seconds,
            submit_seconds=now,
            planned_seconds=seconds,
        )


def _run_seconds(trace: str, level: float) -> float:
    """Between two known levels, logarithmically."""
    known = RUN_SECONDS[trace]
    right = min(bisect(LEVELS, level), len(LEVELS) - 1)
    low, high = known[right - 1], known[right]
    part = (level - LEVELS[right - 1]) / (LEVELS[right] - LEVELS[right - 1])
    return low * (high / low) ** part


def _gap(draw: random.Random) -> float:
    return draw.expovariate(1 / (SHORT_GAP if draw.random() < SHORT_GAPS else LONG_GAP))


def _due(tasks: list[Task], seed: int) -> Mapping[str, float]:
    draw = random.Random(seed)
    return {task.name: task.submit_seconds + draw.uniform(*SLACK) * task.work_seconds for task in tasks}


def told(tasks: list[Task], outcome: Outcome, due: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one outcome."""
    waits = {task.name: outcome.starts[task.name][0] - task.submit_seconds for task in tasks}
    high = [waits[task.name] for task in tasks if task.priority >= HIGH_PRIORITY]
    until = max(task.submit_seconds for task in tasks)
    return {
        "moves": outcome.moves,
        "lost_gpu_seconds": round(outcome.lost_seconds),
        "mean_wait_seconds": round(mean(waits.values())),
        "p99_wait_seconds": round(_p99(list(waits.values()))),
        "high_priority_p99_wait_seconds": round(_p99(high)),
        "mean_completion_seconds": round(mean(outcome.end[task.name] - task.submit_seconds for task in tasks)),
        "utilisation": round(outcome.worked_seconds / (sum(CAPACITY.values()) * until), 4),
        "least_share": round(outcome.share_seconds / max(outcome.contended_seconds, 1e-9), 3),
        "missed_due_times": sum(outcome.end[name] > seconds for name, seconds in due.items()),
        "makespan_seconds": round(max(outcome.end.values())),
    }


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
