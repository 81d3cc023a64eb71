"""What checkpoints cost a training run on the card.

    python -m benchmarks.checkpoints --shape 8b [--steps 60] [--every 10] [--save checkpoints_8b]

Runs the real train stage, and reads its journal. A checkpoint costs what its steps took beyond their median: the time
for which training waits until its state is copied (`stall_seconds`), and what the thread that writes takes from the
steps beside it. The share is that of one checkpoint in ten minutes.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.report import argument_parser, emit
from benchmarks.resume import bench
from benchmarks.stages import Ended, prepare, train
from orchestrator.api.formats import Metric

SECONDS_BETWEEN = 600
WARM_UP = 3


def main() -> None:
    """Train, and tell."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        emit(measure(Path(name), arguments), save=arguments.save)


def measure(folder: Path, arguments: Namespace) -> dict[str, object]:
    """Seconds of steps and checkpoints in one run."""
    settings = Namespace(
        **vars(arguments), global_batch_size=arguments.micro_batch_size, recompute_layers=0, cap_gib=0.0
    )
    job = bench(folder, settings, checkpoint_every=arguments.every)
    ended = train(job, prepare(job, "checkpoints"))
    seconds, stalls = steps_of(ended)
    usual = median(seconds)
    checkpoints = [stall for stall in stalls if stall > 0]
    cost = (sum(seconds) - usual * len(seconds)) / len(checkpoints)
    return {
        "rank": arguments.rank,
        "plan": job.plan.to_wire(),
        "bytes": sum(path.stat().st_size for path in newest_checkpoint(folder).iterdir()),
        "step_seconds": round(usual, 4),
        "steps": len(seconds),
        "stall_seconds": [round(stall, 4) for stall in checkpoints],
        "longest_stall_seconds": round(max(checkpoints), 4),
        "cost_seconds": round(cost, 4),
        "share_of_ten_minutes": round(cost / SECONDS_BETWEEN, 6),
    }


def steps_of(ended: Ended) -> tuple[list[float], list[float]]:
    """Seconds from one step's end to the next one's, and for how long each waited for a checkpoint, once it is warm."""
    steps = [each for each in ended.journal() if Metric.CHECKPOINT_STALL_SECONDS in each["metrics"]][WARM_UP:]
    seconds = [(after["timeMs"] - before["timeMs"]) / 1000 for before, after in pairwise(steps)]
    return seconds, [each["metrics"][Metric.CHECKPOINT_STALL_SECONDS] for each in steps[1:]]


def newest_checkpoint(folder: Path) -> Path:
    """The last checkpoint in the run's store."""
    return max(folder.glob("store/*/checkpoints/*"))


if __name__ == "__main__":
    main()
