"""The Hugging Face recipe for QLoRA, and how any model that others have made ready is trained and timed.

transformers, PEFT and bitsandbytes as their documentation joins them: `prepare_model_for_kbit_training`, PEFT's own
adapter types, bf16 autocast, gradient checkpointing, SDPA attention, paged 8-bit AdamW. `benchmarks.peers` measures it,
`benchmarks.loss_curve` compares its losses.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.cases import Case, measured, peaks, start_afresh

MAX_GRAD_NORM = 0.3
CHECKPOINTING = {"use_reentrant": False}


class Peer:
    """A model with an adapter, as somebody else's library has prepared it, and its training steps."""

    def __init__(self, model: Any, *, rate: float = 1e-4) -> None:
        self.model = model
        self.model.train()
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = bnb.optim.PagedAdamW8bit(self._parameters, lr=rate)

    def measure(self, text: str, settings: Namespace) -> dict[str, Any]:
        """The figures of a case: all layers recompute unless it ends in `/0`, and then none does."""
        start_afresh(self._parameters)
        self.set_recompute(not text.endswith("/0"))
        case = Case.parse(text)
        rows = case.rows(self.model.config.vocab_size)
        loss = 0.0

        def timed() -> float:
            nonlocal loss
            ids = torch.from_numpy(next(rows)).long().to(self._parameters[0].device)
            began = time.perf_counter()
            loss = self.step(ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        return {**measured(case, timed, settings), "loss": round(loss, 4), **peaks()}

    def step(self, ids: torch.Tensor) -> float:
        """One optimizer step on ids [rows, tokens], every token but a row's first of which is a target; its loss."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def set_recompute(self, wanted: bool) -> None:
        """Whether all layers recompute their activations, or none."""
        if wanted:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
        else:
            self.model.gradient_checkpointing_disable()

    def adapter(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


class Recipe(Peer):
    """A model as the documentation prepares it."""

    def __init__(self, base: PreTrainedModel, *, rank: int = 16, rate: float = 1e-4) -> None:
        torch.use_deterministic_algorithms(False)  # nobody else pays for it
        base.set_attn_implementation("sdpa")
        base.config.use_cache = False
        prepared = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=CHECKPOINTING)
        settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules="all-linear")
        super().__init__(get_peft_model(prepared, settings), rate=rate)


class Clock(TrainerCallback):
    """Seconds from the end of one step of a trainer of transformers' to the end of the next, and what it logs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.logs: list[dict[str, float]] = []
        """Of each step, the loss and whatever else."""
        self._began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended when the card has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Keep what is told of a step."""
        if logs and "loss" in logs:
            self.logs.append({**logs})
