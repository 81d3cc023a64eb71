"""Stop a training run on the card, resume it, and compare with a run that nobody disturbed.

    python -m benchmarks.resume --shape 8b --cap-gib 21.5 [--sequence-length 2048] [--steps 10] [--save resume_8b]

Runs the real trainer as a process of its own, three times over: undisturbed; stopped by SIGTERM and resumed; killed
with SIGKILL and resumed.
All adapters must be the same, byte for byte. The model has the published shape and random weights; the allocator is
capped at what the
class's smallest card offers; the plan is the one that the sizing picks for that class.
"""

from __future__ import annotations

import signal
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.report import argument_parser, emit
from benchmarks.shapes import write_model, write_texts
from benchmarks.stages import Bench, Stop, next_attempt, prepare, train
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import ExitCode


def main() -> None:
    """Run and compare."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cap-gib", type=float, default=21.5)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--recompute-layers", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        job = bench(Path(name), arguments, checkpoint_every=max(1, arguments.steps // 3))
        emit(compare(job, arguments.steps), save=arguments.save)


def bench(folder: Path, arguments: Namespace, *, checkpoint_every: int) -> Bench:
    """The model, the data, the job and the plan."""
    write_model(folder / "model", arguments.shape)
    write_texts(folder / "train.jsonl", records=64, words=arguments.sequence_length // 8)
    spec = QLoRAJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder}/model"},
            "dataset": {"source": f"file://{folder}/train.jsonl", "format": "text", "tooLong": "truncate"},
            "adapter": {"rank": arguments.rank},
            "training": {
                "maxSteps": arguments.steps,
                "sequenceLength": arguments.sequence_length,
                "globalBatchSize": arguments.global_batch_size,
                "optimizer": "paged_adamw_8bit",
            },
            "checkpoint": {"everySeconds": 3600, "everySteps": checkpoint_every},
        }
    )
    plan = MemoryPlan(
        micro_batch_size=arguments.micro_batch_size,
        accumulation_steps=arguments.global_batch_size // arguments.micro_batch_size,
        recompute_layers=arguments.recompute_layers,
    )
    return Bench(folder=folder, spec=spec, plan=plan, cap_gib=arguments.cap_gib)


def compare(bench: Bench, steps: int) -> dict[str, object]:
    """The three runs and what they show."""
    calm = train(bench, prepare(bench, "calm"))
    task = prepare(bench, "stopped")
    stopped = train(bench, task, Stop(signal_number=signal.SIGTERM, at_step=steps // 2))
    resumed = train(bench, next_attempt(task))
    task = prepare(bench, "killed")
    killed = train(bench, task, Stop(signal_number=signal.SIGKILL, at_step=steps // 2 + 1))
    revived = train(bench, next_attempt(task))
    digest = calm.trained.adapter_digest
    same_after_sigterm = digest is not None and resumed.trained.adapter_digest == digest
    same_after_sigkill = digest is not None and revived.trained.adapter_digest == digest
    return {
        "cap_gib": bench.cap_gib,
        "plan": bench.plan.to_wire(),
        "adapter_digest": digest,
        "peak_allocated_gib": gib(calm.trained.peak_allocated_bytes),
        "peak_reserved_gib": gib(calm.trained.peak_reserved_bytes),
        "train_loss": calm.trained.train_loss,
        "undisturbed_seconds": round(calm.seconds, 1),
        "sigterm": {
            "exit_code": stopped.exit_code,
            "exit_code_is_preempted": stopped.exit_code == ExitCode.PREEMPTED,
            "durable_step": stopped.trained.step,
            "seconds_to_exit": round(stopped.stop_seconds or 0.0, 2),
            "resumed_seconds": round(resumed.seconds, 1),
            "same_adapter": same_after_sigterm,
        },
        "sigkill": {
            "exit_code": killed.exit_code,
            "resumed_seconds": round(revived.seconds, 1),
            "same_adapter": same_after_sigkill,
        },
        "same_adapter": same_after_sigterm and same_after_sigkill,
    }


def gib(count: int | None) -> float | None:
    """Bytes as GiB."""
    return None if count is None else round(count / 2**30, 3)


if __name__ == "__main__":
    main()
