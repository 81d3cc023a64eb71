"""Tokens a second, MFU and peak memory of training steps on published shapes with random weights.

    python -m benchmarks.speed --shape 8b --cases 2048x4 2048x1 512x1 [--cap-gib 21.5] [--save speed_8b]

`benchmarks.cases` says how a case is written and measured. A step is what the loop makes of one micro-batch: collate,
forward, backward, gradient norm, clipping, optimizer. Rank 16 on all linear layers, paged 8-bit AdamW, no dropout. MFU
counts 4 operations a weight and token (`qlora_trainer.model.arithmetic`) against the data sheet's peak,
and `mfu_sustained` against what large products reach. `--profile` adds where another step's time went, on the card by
kernel and on the host by function.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import argument_parser, emit
from benchmarks.shapes import write_model

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["QLORA_ALLOW_RANDOM_WEIGHTS"] = "1"

import numpy as np
import torch
from peft import PeftModel
from qlora_trainer.data.micro_batch import MicroBatch, collate
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter, saved_parameters
from qlora_trainer.model.arithmetic import arithmetic
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training import runtime
from qlora_trainer.training.gradients import clip, gradient_norm
from qlora_trainer.training.optimizer import AdapterOptimizer
from qlora_trainer.training.telemetry import Card
from transformers import PreTrainedModel

from benchmarks.cases import Case, cap_memory, measured, peaks, start_afresh
from orchestrator.api.job import AdapterSpec, TrainingSpec

PROFILED_KERNELS = 24
PROFILED_NAME = 90
PROFILED_FUNCTIONS = 40


def main() -> None:
    """Measure every case on one model."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", nargs="+", default=["2048x4"])
    parser.add_argument("--cap-gib", type=float, default=0.0, help="cap on the allocator; 0 is none")
    parser.add_argument("--dropout", default="0")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--nondeterministic", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    emit(measure_all(arguments), save=arguments.save)


def measure_all(arguments: Namespace) -> dict[str, object]:
    """The results by case, and what they share."""
    began = time.perf_counter()
    bench = Bench(arguments)
    loaded = time.perf_counter() - began
    cases: dict[str, Any] = {}
    for text in arguments.cases:
        cases[text] = bench.measure(Case.parse(text), arguments)
        print(json.dumps({text: cases[text]}), file=sys.stderr, flush=True)
    return {
        "shape": arguments.shape,
        "cap_gib": arguments.cap_gib,
        "rank": arguments.rank,
        "dropout": arguments.dropout,
        "deterministic": not arguments.nondeterministic,
        "seconds_to_load": round(loaded, 1),
        "cases": cases,
        "best_tokens_per_second": max((c.get("tokens_per_second", 0.0) for c in cases.values()), default=0.0),
        "longest_tokens": max((case_tokens(t) for t, c in cases.items() if "tokens_per_second" in c), default=0),
    }


def case_tokens(text: str) -> int:
    """Tokens of one sequence of a case."""
    return Case.parse(text).sequence


class Bench:
    """A model of a published shape, and training steps on it under one plan after the other."""

    def __init__(self, arguments: Namespace) -> None:
        self._device = runtime.set_up(threads=os.cpu_count() or 1, deterministic=not arguments.nondeterministic)
        cap_memory(arguments.cap_gib)
        self._attention = PackedAttention()
        with tempfile.TemporaryDirectory() as folder:
            base = load_base(write_model(Path(folder), arguments.shape), self._device, self._attention)
        self._vocabulary = base.config.vocab_size
        adapter = AdapterSpec(rank=arguments.rank, alpha=16, dropout=arguments.dropout)
        self._peft_model = add_adapter(base, adapter, seed=0)
        self.first_adapter = self.adapter()

    def measure(self, case: Case, arguments: Namespace, kind: type[Steps] | None = None) -> dict[str, object]:
        """The figures of one case; where it runs out of memory, how much was in use. Another `kind` of steps is of
        another objective."""
        self._start_afresh()
        try:
            steps = (kind or Steps)(self._peft_model, self._attention, case, self._vocabulary)
            figures = measured(case, steps.timed, arguments)
            most = peaks()
            profile = {"profile": steps.profile()} if arguments.profile else {}
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).split(". GPU")[0], **peaks()}
        seconds = case.tokens / figures["tokens_per_second"]
        utilization = Card(self._device, 0.0).utilization(steps.operations(), seconds)
        return {
            **figures,
            **(utilization.rounded() if utilization is not None else {}),
            "loss": round(steps.loss, 4),
            **steps.told(),
            "plan": case.plan().to_wire(),
            "flash_attention": self._attention.flash is not None,
            **most,
            **profile,
        }

    def operations(self, case: Case) -> float:
        """Floating-point operations of one step of a case, which is not taken."""
        model = TrainingModel(self._peft_model, case.plan(), self._attention, 0.0)
        return arithmetic(model).operations([batch_of(next(case.rows(self._vocabulary)))])

    def adapter(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter as it is, by the names that it is saved by."""
        return {name: each.detach().cpu().clone() for name, each in saved_parameters(self._peft_model).items()}

    def begin_anew(self) -> None:
        """The adapter is what it was before the first case."""
        for name, parameter in saved_parameters(self._peft_model).items():
            parameter.data.copy_(self.first_adapter[name])

    def leave(self) -> PreTrainedModel:
        """The base without its adapter, for somebody else."""
        self._start_afresh()
        for module in self._peft_model.modules():
            module.__dict__.pop("forward", None)
        base = self._peft_model.unload()
        base.__dict__.pop("peft_config", None)
        return base

    def _start_afresh(self) -> None:
        """The embeddings too are where they were, if a case has offloaded them."""
        start_afresh(self._peft_model.parameters())
        base: Any = self._peft_model.get_base_model()
        base.get_input_embeddings().to(self._device)


class Steps:
    """Training steps of one case."""

    def __init__(self, peft_model: PeftModel, attention: PackedAttention, case: Case, vocabulary: int) -> None:
        self._model = TrainingModel(peft_model, case.plan(), attention, 0.0)
        self._optimizer = AdapterOptimizer(self._model.trainable(), TrainingSpec(optimizer="paged_adamw_8bit"))
        self._parameters = [parameter for _, parameter in self._model.trainable()]
        self._case = case
        self._rows = case.rows(vocabulary)
        self._number = 0
        self.loss = 0.0
        self._model.train()

    def timed(self) -> float:
        """Take a step; its seconds."""
        batches = self.batches()
        began = time.perf_counter()
        torch.manual_seed(self._number)
        loss = self.accumulate(batches)
        norm = gradient_norm(self._parameters)
        self.loss = loss.item()  # the loop refuses to diverge, so it reads both
        clip(self._parameters, norm.item(), 0.3)
        self._optimizer.step(1e-4)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self._number += 1
        return time.perf_counter() - began

    def batches(self) -> Sequence[MicroBatch]:
        """Those of the next step."""
        return [batch_of(next(self._rows))]

    def accumulate(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The loss, a mean over what carries it; gradients are added."""
        (batch,) = batches
        return self._model.accumulate(batch, divisor=float(self._case.tokens - self._case.micro_batch))

    def told(self) -> dict[str, object]:
        """What else there is to tell of the steps."""
        return {}

    def operations(self) -> float:
        """Floating-point operations of a step."""
        return arithmetic(self._model).operations(self.batches())

    def profile(self) -> dict[str, object]:
        """Milliseconds on the card in one step, by kernel; and of the step."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            seconds = self.timed()
        averages: list[Any] = list(profiler.key_averages())
        events = sorted(averages, key=lambda event: -event.self_device_time_total)
        return {
            "step_ms": round(1000 * seconds, 1),
            "card_ms": round(sum(event.self_device_time_total for event in events) / 1000, 1),
            "kernels": sum(event.count for event in events),
            "by_kernel_ms": {
                f"{event.key[:PROFILED_NAME]} x{event.count}": round(event.self_device_time_total / 1000, 2)
                for event in events[:PROFILED_KERNELS]
            },
            "by_function_ms": self._profile_host(),
        }

    def _profile_host(self) -> dict[str, float]:
        """Milliseconds in Python functions during a step; the profiler itself about doubles them."""
        profiler = cProfile.Profile()
        with torch.autograd.set_multithreading_enabled(False):
            profiler.enable()
            self.timed()
            profiler.disable()
        statistics: dict[Any, Any] = vars(pstats.Stats(profiler))["stats"]  # typeshed lacks it
        slowest = sorted(statistics.items(), key=lambda item: -item[1][2])[:PROFILED_FUNCTIONS]
        return {
            f"{Path(file).name}:{line} {name} x{calls}": round(1000 * own, 2)
            for (file, line, name), (_, calls, own, _, _) in slowest
        }


def batch_of(rows: np.ndarray) -> MicroBatch:
    """Rows of one record each, every token but the last of which carries loss."""
    place = np.arange(rows.shape[1], dtype=np.int32)
    return collate([(ids, ids, place) for ids in rows])


if __name__ == "__main__":
    main()
