"""How long from SIGTERM to the exit with a durable checkpoint, at random instants of a real training run,
and what checkpoints cost a run that nobody stops.

    python -m benchmarks.stop --model FOLDER [--stops 12] [--seed 0] [--save stop]

Stops SmolLM2-135M on `examples/medical-es` again and again, each time at an instant drawn from the seed: while Python
starts, while the model
loads, inside a step, inside a checkpoint, inside an evaluation. Then lets it end, and compares the adapter with an
undisturbed run's.
"""

from __future__ import annotations

import random
import signal
import statistics
import tempfile
from pathlib import Path

from benchmarks.report import argument_parser, emit
from benchmarks.stages import Bench, Ended, Stop, next_attempt, prepare, train
from orchestrator.api.formats import Metric
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import ExitCode

EXAMPLE = Path(__file__).parents[1] / "examples" / "medical-es"
STEPS = 40


def main() -> None:
    """Stop, measure, compare."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--stops", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    instants = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(folder=Path(name), spec=spec(arguments.model.resolve()), plan=PLAN)
        calm = train(bench, prepare(bench, "calm"))
        task = prepare(bench, "stopped")
        stops: list[Ended] = []
        while len(stops) < arguments.stops:
            stop = Stop(signal_number=signal.SIGTERM, after_seconds=instants.uniform(2.0, 30.0))
            stops.append(train(bench, task, stop))
            task = next_attempt(task)
        last = train(bench, task)
        emit(results(calm, stops, last), save=arguments.save)


PLAN = MemoryPlan(micro_batch_size=2, accumulation_steps=1, recompute_layers=0)


def spec(model: Path) -> QLoRAJobSpec:
    """The demo's job, with steps enough for all the stops."""
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": model.as_uri()},
            "dataset": {
                "source": (EXAMPLE / "train.jsonl").as_uri(),
                "evalSource": (EXAMPLE / "heldout.jsonl").as_uri(),
            },
            "adapter": {"rank": 16, "alpha": 32},
            "training": {
                "maxSteps": STEPS,
                "sequenceLength": 512,
                "globalBatchSize": 2,
                "learningRate": "1e-3",
                "optimizer": "paged_adamw_8bit",
            },
            "evaluation": {"everySteps": 10},
            "checkpoint": {"everySeconds": 60},
        }
    )


def results(calm: Ended, stops: list[Ended], last: Ended) -> dict[str, object]:
    """Seconds from the signal to the exit, and whether anything was lost."""
    seconds = [round(stop.stop_seconds or 0.0, 2) for stop in stops]
    return {
        "stops": [
            {"exit_code": stop.exit_code, "durable_step": stop.trained.step, "seconds": s}
            for stop, s in zip(stops, seconds, strict=True)
        ],
        "all_exits_are_preempted": all(stop.exit_code == ExitCode.PREEMPTED for stop in stops),
        "median_seconds": statistics.median(seconds),
        "worst_seconds": max(seconds),
        "checkpoint_cost_fraction": checkpoint_cost_fraction(calm),
        "same_adapter": last.trained.adapter_digest == calm.trained.adapter_digest is not None,
    }


def checkpoint_cost_fraction(ended: Ended) -> float:
    """Share of a run's time, first step to last, in which the training thread waited for checkpoints."""
    records = ended.journal()
    stalled_seconds = sum(record["metrics"].get(Metric.CHECKPOINT_STALL_SECONDS, 0.0) for record in records)
    return stalled_seconds / ((records[-1]["timeMs"] - records[0]["timeMs"]) / 1000)


if __name__ == "__main__":
    main()
