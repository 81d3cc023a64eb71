"""The Hugging Face recipe for QLoRA on the same shapes: what the trainer's speed is held against.

    python -m benchmarks.recipe --shape 8b --cases 512x1 2048x4 [--save recipe_8b]

transformers, PEFT and bitsandbytes as their documentation joins them: `prepare_model_for_kbit_training`, PEFT's own
adapter types, bf16 autocast, gradient checkpointing, SDPA attention, paged 8-bit AdamW. Each case is measured by the
trainer too, under the plan that it would choose where memory is no matter, in the same process on the same weights.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from statistics import median, stdev
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from benchmarks.cases import GIB, Case
from benchmarks.report import argument_parser, emit
from benchmarks.speed import Bench

MAX_GRAD_NORM = 0.3


def main() -> None:
    """Measure every case both ways."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", nargs="+", default=["512x1"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    emit(measure(arguments), save=arguments.save)


def measure(arguments: Namespace) -> dict[str, object]:
    """Tokens a second by case: the trainer's, the recipe's, and how many times as fast the trainer is."""
    settings = Namespace(
        **vars(arguments), nondeterministic=False, cap_gib=0.0, rank=16, dropout="0", warm_up=3, profile=False
    )
    bench = Bench(settings)
    trainer = {text: bench.measure(Case.parse(text), settings) for text in arguments.cases}
    base = bench.leave()
    recipe = Recipe(base)
    cases: dict[str, Any] = {}
    for text in arguments.cases:
        theirs = recipe.measure(Case.parse(text), arguments)
        ratio = round(trainer[text]["tokens_per_second"] / theirs["tokens_per_second"], 3)
        cases[text] = {"trainer": trainer[text], "recipe": theirs, "times_as_fast": ratio}
        print(json.dumps({text: cases[text]}), file=sys.stderr, flush=True)
    return {"shape": arguments.shape, "rank": 16, "cases": cases}


class Recipe:
    """A model as the documentation prepares it, and its training steps."""

    def __init__(self, base: PreTrainedModel, *, rank: int = 16, rate: float = 1e-4) -> None:
        torch.use_deterministic_algorithms(False)  # nobody else pays for it
        base.set_attn_implementation("sdpa")
        prepared = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules="all-linear")
        self.model: PeftModel = get_peft_model(prepared, settings)
        self.model.train()
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = bnb.optim.PagedAdamW8bit(self._parameters, lr=rate)
        self._vocabulary = base.config.vocab_size

    def measure(self, case: Case, arguments: Namespace) -> dict[str, Any]:
        """As `benchmarks.speed` does: the median of a repetition's steps."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            self._timed(case)
        rates = [
            case.tokens / median(self._timed(case) for _ in range(arguments.steps))
            for _ in range(arguments.repetitions)
        ]
        return {
            "tokens_per_second": round(median(rates), 1),
            "tokens_per_second_spread": round(stdev(rates), 1) if len(rates) > 1 else 0.0,
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        }

    def step(self, ids: torch.Tensor) -> float:
        """One optimizer step on ids [rows, tokens], every token but a row's first of which is a target; its loss."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def adapter(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _timed(self, case: Case) -> float:
        ids = torch.randint(5, self._vocabulary, (case.micro_batch, case.sequence), device=self.model.device)
        began = time.perf_counter()
        self.step(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
