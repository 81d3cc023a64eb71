"""AdamW from bitsandbytes over the adapter, its learning rate, and its exact way in and out of a checkpoint.

Called by the training loop. Rules:

- The learning rate is a pure function of the step, so a schedule has no state to save.
- State is restored by copying INTO buffers that the optimizer's own code has just made. bitsandbytes'
  `load_state_dict` replaces them instead, and what was paged memory comes back as ordinary VRAM.
- bitsandbytes has no paged memory on the CPU: there, paged optimizers are the plain ones, bit for bit.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import Parameter

from orchestrator.api.job import TrainingSpec

STATE_TENSORS = ("state1", "state2", "absmax1", "absmax2")
"""What bitsandbytes keeps per parameter: both moments, and per block of 8-bit moments their scale."""
PAGED_WARNING = "Paged optimizers are not supported on CPU"

OPTIMIZERS = {
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw_32bit": bnb.optim.AdamW32bit,
}

log = logging.getLogger(__name__)


def learning_rate(step: int, steps: int, training: TrainingSpec) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`: warm-up from above 0, then the schedule."""
    peak = float(training.learning_rate)
    warmup = math.ceil(float(training.warmup_ratio) * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.scheduler == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (1 - done if training.scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2)


class AdapterOptimizer:
    """AdamW over named adapter parameters, with LoRA+'s larger rate for B (Hayou et al., 2024)."""

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], training: TrainingSpec) -> None:
        self._names = {parameter: name for name, parameter in parameters}
        self._on_gpu = any(parameter.is_cuda for parameter in self._names)
        if training.optimizer.startswith("paged") and not self._on_gpu:
            log.info("%s runs without paging: there is no paged memory on the CPU", training.optimizer)
            warnings.filterwarnings("ignore", message=PAGED_WARNING)
        self._adam = OPTIMIZERS[training.optimizer](
            _groups(self._names, training),
            betas=(float(training.adam_beta1), float(training.adam_beta2)),
            eps=float(training.adam_epsilon),
        )

    def step(self, rate: float) -> None:
        """Update the adapter from its gradients at this learning rate, and drop the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["rate_ratio"]
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not finished."""
        self._adam.zero_grad(set_to_none=True)

    def export_state(self) -> dict[str, Tensor]:
        """The live state tensors as `<parameter>.<state>`; `<parameter>.step` counts its updates."""
        exported: dict[str, Tensor] = {}
        for parameter, state in self._adam.state.items():
            name = self._names[parameter]
            exported[f"{name}.step"] = torch.tensor(state["step"])
            exported |= {f"{name}.{key}": state[key] for key in STATE_TENSORS if key in state}
        return exported

    def import_state(self, exported: Mapping[str, Tensor]) -> None:
        """Bring back what `export_state` gave; raises KeyError where the tensors are of another adapter."""
        others = {name.rpartition(".")[0] for name in exported} - set(self._names.values())
        if others:
            raise KeyError(f"the saved optimizer state is of another adapter: {sorted(others)[:3]}")
        members = [
            (group, parameter, group_index, index)
            for group_index, group in enumerate(self._adam.param_groups)
            for index, parameter in enumerate(group["params"])
            if f"{self._names[parameter]}.step" in exported
        ]
        for group, parameter, group_index, index in members:
            self._adam.init_state(group, parameter, group_index, index)
        if self._on_gpu:
            torch.cuda.synchronize()  # paged buffers are zeroed on the GPU, and written from the CPU below
        for _, parameter, _, _ in members:
            name, state = self._names[parameter], self._adam.state[parameter]
            state["step"] = int(exported[f"{name}.step"])
            for key in STATE_TENSORS:
                if key in state:
                    state[key].copy_(exported[f"{name}.{key}"])

    def paged_bytes(self) -> int:
        """Bytes of state in paged memory."""
        tensors = [state[key] for state in self._adam.state.values() for key in STATE_TENSORS if key in state]
        return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def _groups(names: Mapping[Parameter, str], training: TrainingSpec) -> list[dict[str, Any]]:
    """Plain and B matrices apart. Weight decay is for matrices: DoRA's magnitudes are not pulled to zero."""
    decay = float(training.weight_decay)
    ratio = float(training.lora_plus_ratio)
    kinds: dict[tuple[float, float], list[Parameter]] = {}
    for parameter, name in names.items():
        kind = (ratio if ".lora_B." in name else 1.0, decay if parameter.dim() > 1 else 0.0)
        kinds.setdefault(kind, []).append(parameter)
    return [
        {"params": members, "lr": 0.0, "rate_ratio": own_ratio, "weight_decay": own_decay}
        for (own_ratio, own_decay), members in kinds.items()
    ]
