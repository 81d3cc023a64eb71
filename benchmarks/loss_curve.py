"""Does speed change the loss? The trainer against the Hugging Face recipe, step by step, on a real model.

    python -m benchmarks.loss_curve --model FOLDER [--steps 200] [--save loss_curve]

Both start from the same NF4 weights and the same adapter and see the same rows of `examples/medical-es` in the same
order, each row one stretch of text. The trainer runs as it does in a job: layers computed by hand, CUDA graphs, bf16
adapters, deterministic. A second run of the trainer from another seed of the adapter tells how far apart two good runs
are. The recipe is `benchmarks.recipe`'s. Its `prepare_model_for_kbit_training` makes norms and tables float32, and with
them the states that go from layer to layer. `recipe_in_bfloat16` takes that back: the trainer's precision, in the code
of transformers and PEFT.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.gradients import clip, gradient_norm
from qlora_trainer.training.optimizer import AdapterOptimizer
from transformers import AutoTokenizer

from benchmarks.recipe import MAX_GRAD_NORM, Recipe
from benchmarks.report import argument_parser, emit
from benchmarks.speed import PackedAttention, load_base, runtime
from orchestrator.api.job import AdapterSpec, TrainingSpec
from orchestrator.api.plan import MemoryPlan

DATA = Path(__file__).parents[1] / "examples" / "medical-es" / "train.jsonl"
RATE = 2e-4
LAST_STEPS = 20


def main() -> None:
    """Train four times and compare."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    arguments = parser.parse_args()
    emit(compare(arguments), save=arguments.save)


def compare(arguments: Namespace) -> dict[str, object]:
    """The four curves, and what lies between them in nats a token."""
    device = runtime.set_up(threads=torch.get_num_threads(), deterministic=True)
    steps = list(batches(arguments))
    curves = {
        "trainer": trained(arguments, steps, device, seed=0),
        "trainer_other_seed": trained(arguments, steps, device, seed=1),
        "recipe": recipe(arguments, steps, device, seed=0, dtype=torch.float32),
        "recipe_in_bfloat16": recipe(arguments, steps, device, seed=0, dtype=torch.bfloat16),
    }
    ours, others, theirs, alike = curves.values()
    return {
        "steps": arguments.steps,
        "tokens_a_step": arguments.rows * arguments.sequence,
        "first_loss": {"trainer": ours[0], "recipe": theirs[0]},
        "mean_of_last_steps": {name: round(fmean(curve[-LAST_STEPS:]), 5) for name, curve in curves.items()},
        "mean_gap_nats": round(fmean(np.abs(np.subtract(ours, theirs))), 5),
        "mean_gap_to_recipe_in_bfloat16_nats": round(fmean(np.abs(np.subtract(ours, alike))), 5),
        "mean_gap_of_seeds_nats": round(fmean(np.abs(np.subtract(ours, others))), 5),
        "curves": curves,
    }


def batches(arguments: Namespace) -> Iterator[np.ndarray]:
    """Ids [rows, sequence] of each step: the conversations one after the other, cut into rows, shuffled by epoch."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    lines = DATA.read_text("utf-8").splitlines()
    texts = (tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines)
    stream = np.array(tokenizer("".join(texts))["input_ids"], dtype=np.int32)
    count = len(stream) // arguments.sequence
    assert count >= arguments.rows, f"{DATA.name} has {len(stream)} tokens, too few for {arguments.rows} rows"
    rows = stream[: count * arguments.sequence].reshape(count, arguments.sequence)
    draw, left = np.random.RandomState(0), np.zeros(0, dtype=np.int64)
    for _ in range(arguments.steps):
        if len(left) < arguments.rows:
            left = draw.permutation(count)
        yield rows[left[: arguments.rows]]
        left = left[arguments.rows :]


def trained(arguments: Namespace, steps: list[np.ndarray], device: torch.device, *, seed: int) -> list[float]:
    """The loss of each step with the trainer."""
    attention = PackedAttention()
    peft_model = add_adapter(load_base(arguments.model, device, attention), _adapter(), seed=seed)
    plan = MemoryPlan(micro_batch_size=arguments.rows, accumulation_steps=1, recompute_layers=0)
    model = TrainingModel(peft_model, plan, attention, 0.0)
    optimizer = AdapterOptimizer(model.trainable(), TrainingSpec(optimizer="paged_adamw_8bit", weight_decay="0.01"))
    parameters = [parameter for _, parameter in model.trainable()]
    model.train()
    places = np.arange(arguments.sequence, dtype=np.int32)
    losses: list[float] = []
    for ids in steps:
        batch = collate([(row, row, places) for row in ids])
        losses.append(model.accumulate(batch, divisor=float(len(batch.supervised))).item())
        clip(parameters, gradient_norm(parameters).item(), MAX_GRAD_NORM)
        optimizer.step(RATE)
        _tell(f"trainer, seed {seed}", losses)
    return losses


def recipe(
    arguments: Namespace, steps: list[np.ndarray], device: torch.device, *, seed: int, dtype: torch.dtype
) -> list[float]:
    """The loss of each step with the recipe, from the trainer's adapter; `dtype` is that of norms and tables."""
    start = add_adapter(load_base(arguments.model, device, PackedAttention()), _adapter(), seed=seed)
    begun = {name: p.detach().clone() for name, p in start.named_parameters() if p.requires_grad}
    other = Recipe(start.unload(), rate=RATE)
    for name, parameter in other.adapter():
        parameter.data.copy_(begun[name])
    for parameter in other.model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    losses: list[float] = []
    for ids in steps:
        losses.append(other.step(torch.from_numpy(ids).long().to(device)))
        _tell(f"recipe, {dtype}", losses)
    return losses


def _adapter() -> AdapterSpec:
    return AdapterSpec(rank=16, alpha=16, dropout="0")


def _tell(who: str, losses: list[float]) -> None:
    if len(losses) % LAST_STEPS == 0:
        print(f"{who}: step {len(losses)}, loss {fmean(losses[-LAST_STEPS:]):.4f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
