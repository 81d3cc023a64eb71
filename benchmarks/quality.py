"""Is NF4 as good as 16-bit? QLoRA against 16-bit LoRA: the same model, data, seeds, steps, loop.

    python -m benchmarks.quality --model FOLDER [--seeds 3] [--steps 40] [--save quality]

Trains SmolLM2-135M on `examples/medical-es` with the trainer's own batches, loss, adapter and optimizer; the only
difference is whether the base is quantized to NF4 with double quantization or kept in bfloat16. Reports held-out loss
by seed, the paired gap (NF4 minus 16-bit, in nats a token) with its standard deviation, and bytes of both.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from qlora_trainer.data.micro_batch import PreparedRows, Schedule, micro_batches, supervised_tokens
from qlora_trainer.kernels.packed_attention import NAME, PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.optimizer import AdapterOptimizer, learning_rate
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.report import argument_parser, emit
from benchmarks.stages import Bench, prepare
from benchmarks.stop import PLAN, spec
from orchestrator.api.job import QLoRAJobSpec

EVAL_ROWS_PER_BATCH = 2


def main() -> None:
    """Train every pair and compare."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        job = spec(arguments.model.resolve())
        prepared = prepare(Bench(folder=Path(name), spec=job, plan=PLAN), "quality").prepared
        assert prepared is not None
        data = Path(prepared.uri.removeprefix("file://"))
        runs = [pair(arguments.model, data, job, seed=seed, steps=arguments.steps) for seed in range(arguments.seeds)]
    emit(results(runs, arguments.steps), save=arguments.save)


def pair(model: Path, data: Path, job: QLoRAJobSpec, *, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """One seed, both ways."""
    return {way: train(model, data, job, seed=seed, steps=steps, way=way) for way in ("nf4", "bf16")}


def train(model: Path, data: Path, job: QLoRAJobSpec, *, seed: int, steps: int, way: str) -> dict[str, float]:
    """Held-out loss before and after, and bytes, of one run."""
    attention, device = PackedAttention(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if way == "nf4":
        peft_model = add_adapter(load_base(model, device, attention), job.adapter, seed=seed)
    else:
        peft_model = add_16bit_adapter(model, device, attention, job, seed=seed)
    training = TrainingModel(peft_model, PLAN, attention, neftune_alpha=0.0)
    optimizer = AdapterOptimizer(training.trainable(), job.training)
    rows, heldout = PreparedRows(data / "train.parquet"), PreparedRows(data / "eval.parquet")
    before = evaluate(training, heldout)
    schedule = Schedule(rows=len(rows), global_batch_size=job.training.global_batch_size, seed=seed)
    training.train()
    for step in range(steps):
        chosen = schedule.rows_of_step(step)
        divisor = supervised_tokens(rows, chosen)
        for batch in micro_batches(rows, chosen, PLAN.micro_batch_size):
            training.loss(batch, divisor=divisor).backward()
        clip_grad_norm_([parameter for _, parameter in training.trainable()], float(job.training.max_grad_norm))
        optimizer.step(learning_rate(step, steps, job.training))
    after = evaluate(training, heldout)
    print(f"seed {seed} {way}: {before:.4f} -> {after:.4f}", file=sys.stderr, flush=True)
    return {"before": before, "after": after, "weight_bytes": weight_bytes(peft_model)}


def add_16bit_adapter(
    model: Path, device: torch.device, attention: PackedAttention, job: QLoRAJobSpec, *, seed: int
) -> PeftModel:
    """The same adapter on the base in bfloat16."""
    AttentionInterface.register(NAME, attention)
    base: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation=NAME, use_safetensors=True, local_files_only=True
    )
    base.to(device)
    base.requires_grad_(False)
    base.config.use_cache = False
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.adapter.rank,
        lora_alpha=job.adapter.alpha,
        lora_dropout=float(job.adapter.dropout),
        target_modules="all-linear",
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert isinstance(peft_model, PeftModel), "one adapter is not a mixture of several"
    for parameter in peft_model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return peft_model


@torch.no_grad()
def evaluate(training: TrainingModel, heldout: PreparedRows) -> float:
    """Mean loss of the held-out tokens, in nats."""
    training.eval()
    rows = list(range(len(heldout)))
    divisor = supervised_tokens(heldout, rows)
    batches = micro_batches(heldout, rows, EVAL_ROWS_PER_BATCH)
    return sum(training.loss(batch, divisor=divisor).item() for batch in batches)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the decoder layers' frozen linear weights, quantization constants included."""
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".layers." in name and parameter.dim() == 2:
            total += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                total += sum(value.nbytes for value in state.as_dict(packed=True).values())
    return total


def results(runs: list[dict[str, dict[str, float]]], steps: int) -> dict[str, object]:
    """Losses by seed, the paired gap, and the bytes."""
    gaps = [run["nf4"]["after"] - run["bf16"]["after"] for run in runs]
    falls = [run["nf4"]["before"] - run["nf4"]["after"] for run in runs]
    nf4, bf16 = runs[0]["nf4"]["weight_bytes"], runs[0]["bf16"]["weight_bytes"]
    return {
        "steps": steps,
        "seeds": len(runs),
        "runs": runs,
        "gap_nats": {"mean": statistics.mean(gaps), "standard_deviation": statistics.stdev(gaps)},
        "fall_nats": {"mean": statistics.mean(falls), "smallest": min(falls)},
        "linear_weight_bytes": {"nf4": nf4, "bf16": bf16, "saved_fraction": 1 - nf4 / bf16},
    }


if __name__ == "__main__":
    main()
