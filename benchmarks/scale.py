"""A thousand GPUs on paper and ten thousand jobs: how fast jobs get their pods, and what that costs.

    python -m benchmarks.scale [--fraction 1.0] [--jobs 5000] [--save scale]

Runs the trial of `make test-scale` (`tests/scale/trial`): etcd, kube-apiserver and kube-scheduler as they are, KWOK for
the nodes, and the controller's own program. All of them share this machine, so let nothing else run meanwhile; how much
of it others took all the same is kept with the figures.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import argument_parser, emit
from tests.cluster.binaries import KUBERNETES_VERSION
from tests.scale.trial import Size, run


def main() -> None:
    """Run the trial and keep its figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--fraction", type=float, default=1.0, help="of a thousand nodes and ten thousand jobs")
    parser.add_argument("--jobs", type=int, default=Size().jobs, help="of ten thousand; all others are suspended")
    arguments = parser.parse_args()
    before, began = others_cpu_seconds(), time.monotonic()
    size = Size(jobs=arguments.jobs, suspended=Size().jobs + Size().suspended - arguments.jobs)
    size = size if arguments.fraction >= 1 else size.scaled(arguments.fraction)
    with tempfile.TemporaryDirectory() as name:
        outcome = run(Path(name), size, lambda line: print(line, file=sys.stderr))
    machine_seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
    others = round((others_cpu_seconds() - before) / machine_seconds, 3)
    results = {"kubernetes": KUBERNETES_VERSION, "machine_share_of_others": others, "size": asdict(size)}
    wave = outcome.figures["wave"]
    ratio = wave["admitted_per_second"] / wave["scheduler_placed_per_second"]
    emit({**results, **outcome.figures, "admitted_per_scheduler_placed": round(ratio, 3)}, save=arguments.save)


def others_cpu_seconds() -> float:
    """Spent on this machine since it started, but by this process and the children that it has seen end."""
    user, nice, system, _, _, interrupt, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    everybody = (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return everybody - sum(os.times()[:4])


if __name__ == "__main__":
    main()
