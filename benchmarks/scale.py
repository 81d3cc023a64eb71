"""A thousand GPUs on paper and ten thousand jobs: how fast jobs get their pods, and what that costs.

    python -m benchmarks.scale [--fraction 1.0] [--save scale]

Runs the trial of `make test-scale` (`tests/scale/trial`): etcd, kube-apiserver and kube-scheduler as they are, KWOK for
the nodes, and the controller's own program. All of them share this machine, so let nothing else run meanwhile; the load
that was found before is kept with the figures.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import argument_parser, emit
from tests.cluster.binaries import KUBERNETES_VERSION
from tests.scale.trial import Size, run


def main() -> None:
    """Run the trial and keep its figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--fraction", type=float, default=1.0, help="of a thousand nodes and ten thousand jobs")
    arguments = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    size = Size() if arguments.fraction >= 1 else Size().scaled(arguments.fraction)
    with tempfile.TemporaryDirectory() as name:
        outcome = run(Path(name), size, lambda line: print(line, file=sys.stderr))
    results = {"kubernetes": KUBERNETES_VERSION, "load_before": load_before, "size": asdict(size)}
    wave = outcome.figures["wave"]
    ratio = wave["admitted_per_second"] / wave["scheduler_placed_per_second"]
    emit({**results, **outcome.figures, "admitted_per_scheduler_placed": round(ratio, 3)}, save=arguments.save)


if __name__ == "__main__":
    main()
