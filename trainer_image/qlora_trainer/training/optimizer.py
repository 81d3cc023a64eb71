"""AdamW from bitsandbytes over the adapter, its learning rate, and its exact way in and out of a checkpoint.

Rules:

- The learning rate is a pure function of the step, so a schedule has no state to save.
- State is restored by copying INTO buffers that the optimizer's own code has just made. bitsandbytes'
  `load_state_dict` replaces them instead, and what was paged memory comes back as ordinary VRAM.
- bitsandbytes has no paged memory on the CPU: there, paged optimizers are the plain ones, bit for bit.
- The adapter's hundreds of small matrices are moved into one piece of memory, side by side in the order that they had
  in memory, and updated as one: bitsandbytes takes longer to launch an update than most of them take. A checkpoint
  still holds the state of each, and every bit is what updating them one by one gives.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import Parameter

from orchestrator.api import trainer_facts
from orchestrator.api.job import TrainingSpec

STATE_TENSORS = ("state1", "state2", "absmax1", "absmax2")
"""What bitsandbytes keeps per parameter: both moments, and per block of 8-bit moments their scale."""
BLOCK = trainer_facts.OPTIMIZER_BLOCK
"""A piece is made of whole blocks, so none spans two matrices."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the moments of smaller parameters in 32 bits."""
PAGED_WARNING = "Paged optimizers are not supported on CPU"

_optim: Any = bnb.optim  # Any: bitsandbytes has no types
OPTIMIZERS: dict[str, Any] = {
    "paged_adamw_8bit": _optim.PagedAdamW8bit,
    "paged_adamw_32bit": _optim.PagedAdamW32bit,
    "adamw_8bit": _optim.AdamW8bit,
    "adamw_32bit": _optim.AdamW32bit,
}

NamedParameter = tuple[str, Parameter]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the adapter's parameters, and where its elements are in the piece that is updated."""

    name: str
    parameter: Parameter
    start: int

    def of(self, key: str, tensor: Tensor) -> Tensor:
        """This parameter's share of a state tensor of the piece."""
        count = self.parameter.numel()
        if key.startswith("absmax"):
            return tensor[self.start // BLOCK : (self.start + count + BLOCK - 1) // BLOCK]
        return tensor.flatten()[self.start : self.start + count].view(self.parameter.shape)


class AdapterOptimizer:
    """AdamW over named adapter parameters, with LoRA+'s larger rate for B (Hayou et al., 2024)."""

    def __init__(
        self,
        parameters: Iterable[NamedParameter],
        training: TrainingSpec,
        *,
        largest_piece: int = trainer_facts.OPTIMIZER_PIECE,
    ) -> None:
        """`largest_piece` is the number of elements that are updated at once."""
        names = {parameter: name for name, parameter in parameters}
        self._on_gpu = any(parameter.is_cuda for parameter in names)
        if training.optimizer.startswith("paged") and not self._on_gpu:
            log.info("%s runs without paging: there is no paged memory on the CPU", training.optimizer)
            warnings.filterwarnings("ignore", message=PAGED_WARNING)
        smallest = SMALLEST_8BIT if training.optimizer.endswith("8bit") else 1
        self._pieces: dict[Parameter, list[Member]] = {}
        groups = _groups(names, training)
        for group in groups:
            pieces = _in_pieces(
                [(names[parameter], parameter) for parameter in group["params"]], smallest, largest_piece
            )
            self._pieces |= pieces
            group["params"] = list(pieces)
        self._adam = OPTIMIZERS[training.optimizer](
            groups,
            betas=(float(training.adam_beta1), float(training.adam_beta2)),
            eps=float(training.adam_epsilon),
        )
        # Made now, so that a job which lacks the memory finds out in its first step.
        for group_index, group in enumerate(self._adam.param_groups):
            for index, piece in enumerate(group["params"]):
                self._adam.init_state(group, piece, group_index, index)

    def step(self, rate: float) -> None:
        """Update the adapter from its gradients at this learning rate, and drop the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["rate_ratio"]
        self._gather()
        self._update()
        self.drop_gradients()

    def _gather(self) -> None:
        """Give each piece the gradients of its members."""
        for piece, members in self._pieces.items():
            if piece is members[0].parameter:
                continue
            gradients = [m.parameter.grad.flatten() for m in members if m.parameter.grad is not None]
            assert len(gradients) in (0, len(members)), "a step changes the whole adapter or nothing"
            piece.grad = torch.cat(gradients) if gradients else None
            for member in members:
                member.parameter.grad = None

    @torch.no_grad()
    def _update(self) -> None:
        """What bitsandbytes' own `step` does, but for waiting for the GPU after every parameter."""
        for group_index, group in enumerate(self._adam.param_groups):
            for index, piece in enumerate(group["params"]):
                if piece.grad is None:
                    continue
                self._adam.prefetch_state(piece)
                self._adam.update_step(group, piece, group_index, index)
        if self._on_gpu:
            torch.cuda.synchronize()  # paged memory may be read from the CPU next

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not finished."""
        self._adam.zero_grad(set_to_none=True)
        for members in self._pieces.values():
            for member in members:
                member.parameter.grad = None

    def export_state(self) -> dict[str, Tensor]:
        """The live state tensors as `<parameter>.<state>`; `<parameter>.step` counts its updates."""
        exported: dict[str, Tensor] = {}
        for piece, state in self._adam.state.items():
            for member in self._pieces[piece]:
                exported[f"{member.name}.step"] = torch.tensor(state["step"])
                kept = {key: member.of(key, state[key]) for key in STATE_TENSORS if key in state}
                exported |= {f"{member.name}.{key}": tensor for key, tensor in kept.items()}
        return exported

    def import_state(self, exported: Mapping[str, Tensor]) -> None:
        """Bring back what `export_state` gave; raises KeyError where the tensors are of another adapter."""
        own = {member.name for members in self._pieces.values() for member in members}
        others = {name.rpartition(".")[0] for name in exported} - own
        if others:
            raise KeyError(f"the saved optimizer state is of another adapter: {sorted(others)[:3]}")
        if self._on_gpu:
            torch.cuda.synchronize()  # paged buffers are zeroed on the GPU, and written from the CPU below
        for piece, members in self._pieces.items():
            if f"{members[0].name}.step" not in exported:
                continue
            state = self._adam.state[piece]
            for member in members:
                state["step"] = int(exported[f"{member.name}.step"])
                for key in STATE_TENSORS:
                    if key in state:
                        member.of(key, state[key]).copy_(exported[f"{member.name}.{key}"])

    def paged_bytes(self) -> int:
        """Bytes of state in paged memory."""
        tensors = [state[key] for state in self._adam.state.values() for key in STATE_TENSORS if key in state]
        return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def _in_pieces(named: Sequence[NamedParameter], smallest: int, largest: int) -> dict[Parameter, list[Member]]:
    """Parameters of whole blocks, moved side by side; each of the others is its own piece."""
    joined = [(n, p) for n, p in named if p.numel() % BLOCK == 0 and smallest <= p.numel() <= largest]
    moved = {id(p) for _, p in joined}
    pieces = {p: [Member(name=n, parameter=p, start=0)] for n, p in named if id(p) not in moved}
    if not joined:
        return pieces
    joined.sort(key=lambda item: item[1].data_ptr())  # `kernels.lora_linears` wants neighbors to stay neighbors
    memory = torch.cat([parameter.data.flatten() for _, parameter in joined])
    start = 0
    for together in _portions(joined, largest):
        size = sum(parameter.numel() for _, parameter in together)
        piece = memory[start : start + size]
        pieces[Parameter(piece)] = _move_into(piece, together)
        start += size
    return pieces


def _portions(named: Sequence[NamedParameter], largest: int) -> Iterator[list[NamedParameter]]:
    """The parameters in their order, in portions of at most `largest` elements, which none of them exceeds alone."""
    portion: list[NamedParameter] = []
    size = 0
    for name, parameter in named:
        if size + parameter.numel() > largest:
            yield portion
            portion, size = [], 0
        portion.append((name, parameter))
        size += parameter.numel()
    yield portion


def _move_into(piece: Tensor, named: Sequence[NamedParameter]) -> list[Member]:
    """Make the parameters views of a piece, one after the other; it holds their values already."""
    members: list[Member] = []
    start = 0
    for name, parameter in named:
        members.append(Member(name=name, parameter=parameter, start=start))
        parameter.data = piece[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return members


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
