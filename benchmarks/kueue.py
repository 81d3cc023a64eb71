"""Kueue's own performance test, and ours beside it on the same machine, one after the other.

    python -m benchmarks.kueue [--scale 1.0] [--limits 50/100 300/500 none] [--kueue REPOSITORY] [--save kueue]

For each limit of the controller's client (requests a second, and at once) three runs, each with an etcd and an API
server of its own, of the same programs: Kueue on its own baseline; Kueue on the same with one unit of quota a workload;
ours on that. See `kueue_peer` for how Kueue is built, `kueue_ours` for what stands for what on our side. Requests are
those of the controller's account, by the API server's own record.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kueue_ours import run_ours
from benchmarks.kueue_peer import REPOSITORY, Kueue, Limit, run_kueue, versions
from benchmarks.kueue_shape import Shape
from benchmarks.report import argument_parser, emit
from benchmarks.scale import others_cpu_seconds
from tests.cluster.binaries import KUBERNETES_VERSION

Figures = dict[str, Any]  # Any: JSON


def main() -> None:
    """Run all of it and keep the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 15,000 workloads")
    parser.add_argument("--limits", nargs="+", default=["50/100", "300/500", "none"], metavar="RATE/BURST")
    parser.add_argument("--kueue", default=REPOSITORY, metavar="REPOSITORY", help="git repository with its source")
    parser.add_argument("--sides", nargs="+", default=["kueue_baseline", "kueue", "ours"])
    arguments = parser.parse_args()
    kueue = Kueue.fetch(arguments.kueue)
    baseline = kueue.shape().scaled(arguments.scale)
    shape = baseline.one_gpu()
    limits = [Limit.parse(text) for text in arguments.limits]
    for limit in limits:  # or the compiler would be in the figures
        kueue.controller(limit)
    kueue.runner()
    results: Figures = {
        "kubernetes": KUBERNETES_VERSION,
        **versions(),
        "scale": arguments.scale,
        "workloads": shape.workloads,
        "baseline": described(baseline),
        "one_gpu": described(shape),
    }
    with tempfile.TemporaryDirectory() as name:
        for limit in limits:
            runs: dict[str, Callable[[Path], Figures]] = {
                "kueue_baseline": lambda folder, limit=limit: run_kueue(folder, kueue, baseline, limit),
                "kueue": lambda folder, limit=limit: run_kueue(folder, kueue, shape, limit),
                "ours": lambda folder, limit=limit: run_ours(folder, shape, limit),
            }
            results[limit.name] = found = {}
            for side in arguments.sides:
                found[side] = measured(runs[side], Path(name) / f"{limit.name}-{side}")
                print(f"{limit.name} {side}: {in_short(found[side])}", file=sys.stderr)
            emit(results, save=arguments.save)  # it takes long: what is there is kept


def measured(run: Callable[[Path], Figures], folder: Path) -> Figures:
    """The figures of a run, and how much of the machine others took meanwhile."""
    before, began = others_cpu_seconds(), time.monotonic()
    found = run(folder)
    shutil.rmtree(folder)
    machine_seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
    return {**found, "machine_share_of_others": round((others_cpu_seconds() - before) / machine_seconds, 3)}


def described(shape: Shape) -> Figures:
    """Quota of a queue, and what is asked of it."""
    least_seconds = shape.work / shape.quota
    return {
        "queues": shape.cohorts * shape.queues,
        "nominal": shape.nominal,
        "borrowing_limit": shape.borrowing_limit,
        "work_over_quota_seconds": round(least_seconds, 1),
    }


def in_short(found: Figures) -> str:
    """The most telling figures in a line."""
    waits = {name: each["mean"] for name, each in found["wait_seconds"].items()}
    return (
        f"{found['workloads_per_second']} workloads/s, mean waits {waits} s, "
        f"{found['requests_per_workload']} requests each, {found['peak_mib']} MiB"
    )


if __name__ == "__main__":
    main()
