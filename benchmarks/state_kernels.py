"""Packages' kernels for layers that carry a state against transformers' code in torch: gradients, bits, time, bytes.

    python -m benchmarks.state_kernels [--models qwen3.5-9b lfm2-1.2b granite-4-h-micro-3b] [--save state_kernels]

A few layers of published width, random weights, one row of records that go one by one. `same_bits` says whether the
same step gave the same gradients every time: as long as that is not shown, deterministic jobs are computed by torch.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from qlora_trainer.kernels import state_kernels
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import load_base

from benchmarks.architectures import config
from benchmarks.kernels import difference, loss_and_gradients, records, same, training_model, woken
from benchmarks.report import argument_parser, emit
from benchmarks.shapes import write_model
from orchestrator.api.job import AdapterSpec

MODELS = ("qwen3.5-9b", "lfm2-1.2b", "granite-4-h-micro-3b")
LAYERS, LENGTHS, REPEATS = 4, (2048, 1000, 500), 3


def main() -> None:
    """Compare, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels of packages run on a GPU, and there is none")
    emit({name: compared(name, torch.device("cuda")) for name in arguments.models}, save=arguments.save)


def compared(name: str, device: torch.device) -> dict[str, Any]:
    """One model both ways."""
    attention = PackedAttention()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), name)
        (Path(folder) / "config.json").write_text(json.dumps(config(name, LAYERS)))
        base = load_base(Path(folder), device, attention)
    plain = woken(add_adapter(base, AdapterSpec(rank=16, alpha=32, dropout="0"), seed=0))
    found: dict[str, Any] = {"versions": state_kernels.packages(base)}
    gradients: dict[str, list[torch.Tensor]] = {}
    for way, by_packages in (("torch", False), ("packages", True)):
        state_kernels.settle(base, by_packages=by_packages)
        found[way], gradients[way] = _way(plain, attention)
        found[way]["functions"] = [name for name, package in state_kernels.in_use(base).items() if package]
    largest = max(map(difference, gradients["packages"], gradients["torch"]))
    return {**found, "largest_gradient_difference": round(largest, 5)}


def _way(plain: PeftModel, attention: PackedAttention) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Figures of one way, and its gradients."""
    model = training_model(plain, attention, 0)
    batch = records(LENGTHS)
    first = loss_and_gradients(model, batch)
    torch.cuda.reset_peak_memory_stats()
    equal, began = True, time.perf_counter()
    for _ in range(REPEATS):
        equal &= same(first, loss_and_gradients(model, batch))
    torch.cuda.synchronize()
    figures = {
        "same_bits": equal,
        "seconds": round((time.perf_counter() - began) / REPEATS, 4),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "loss": round(first[0], 4),
    }
    return figures, first[1]


if __name__ == "__main__":
    main()
