"""The routed experts of a layer: frozen NF4 weights, both passes by hand.

`NF4Experts` has the signature of transformers' modules of experts: tokens, the experts of each token and their weights
in, the weighted sum of those experts' outputs out. Rules:

- All experts of a layer share a parameter for gate and up and one for down, each quantized as a whole. An expert's
  blocks of weights and of scales begin where its weights do, so a few can be dequantized at a time.
- No dense weight and nothing of an expert's insides outlives a pass: the backward pass computes them again.
- Tokens are sorted by expert, multiplied by their experts' weights in one operation, and gathered back. Nothing is
  added to a place by two threads, so the same tokens give the same bits. The host never asks where tokens went, so it
  does not wait for the card, and what is allocated does not depend on the routing.
- Tokens come in tiles, which bounds what is sorted: there are as many rows as a token has experts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn import Linear, Module

from orchestrator.api import trainer_facts
from qlora_trainer.kernels import ops

SCALED_TOGETHER = trainer_facts.NF4_BLOCK * trainer_facts.NF4_SCALE_BLOCK
"""Weights that share a 32-bit scale."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some experts' share of a parameter: packed weights, and the state that bitsandbytes dequantizes them by."""

    first: int
    packed: Tensor
    state: QuantState
    shape: torch.Size
    """[experts, outputs, inputs]"""


@dataclass(frozen=True, slots=True)
class _Routing:
    """Rows, one for each token and expert of its, sorted by expert."""

    slots: Tensor
    """[rows] The place of a row in [tokens, experts of a token]."""
    rows: Tensor
    """[tokens, experts of a token] The row of each of a token's experts."""
    tokens: Tensor
    """[rows] The token of each row."""
    offsets: Tensor
    """[experts + 1] Where each expert's rows begin, and the last one's end; int32."""

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Routing:
        """The routing of tokens whose experts are `index` [tokens, experts of a token]."""
        chosen, slots = torch.sort(index.flatten(), stable=True)
        every = torch.arange(experts + 1, device=index.device)
        offsets = torch.searchsorted(chosen, every, out_int32=True)
        return cls(slots, torch.argsort(slots).view(index.shape), slots // index.shape[1], offsets)


class NF4Experts(Module):
    """Experts with gated activations: `down(silu(gate(x)) * up(x))`."""

    source_cls = Linear
    """What transformers' loader asks of a quantized module: its weights are not transposed."""

    def __init__(self, experts: int, hidden: int, inner: int, *, gate_up: Tensor, down: Tensor) -> None:
        """`gate_up` is [experts, 2 x inner, hidden] and `down` [experts, hidden, inner]; both may be on meta."""
        super().__init__()
        self.experts, self.hidden, self.inner = experts, hidden, inner
        self.gate_up_proj, self.down_proj = nf4(gate_up), nf4(down)
        self._parts: dict[str, list[_Part]] = {}
        self.silent = False
        """Whether they add nothing to any token."""
        self.tile_tokens, self.dense_bytes = trainer_facts.EXPERT_TILE_TOKENS, trainer_facts.EXPERT_DENSE_BYTES

    @property
    def expert_weights(self) -> int:
        """The number of one expert's weights."""
        return 3 * self.hidden * self.inner

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs, as transformers' modules of experts compute it."""
        if self.silent:
            return torch.zeros_like(hidden_states)
        return _Mixture.apply(hidden_states, top_k_index, top_k_weights, self)

    def mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The forward pass, without autograd."""
        output = torch.empty_like(x)
        for tile in self._tiles(len(x)):
            self._mix_tile(x[tile], index[tile], weights[tile], out=output[tile])
        return output

    def mix_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to `x` and to `weights`."""
        x_grad, weights_grad = torch.empty_like(x), torch.empty_like(weights)
        for tile in self._tiles(len(x)):
            weights_grad[tile] = self._mix_tile_backward(
                grad[tile], x[tile], index[tile], weights[tile], out=x_grad[tile]
            )
        return x_grad, weights_grad

    def _mix_tile(self, x: Tensor, index: Tensor, weights: Tensor, *, out: Tensor) -> None:
        routing = _Routing.of(index, self.experts)
        inner = ops.swiglu(self._products(x, "gate_up_proj", routing, of_tokens=True))
        rows = self._products(inner, "down_proj", routing)
        del inner
        ops.sum_rows(rows, routing.rows, weights, out)

    def _mix_tile_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *, out: Tensor) -> Tensor:
        routing = _Routing.of(index, self.experts)
        gate_up = self._products(x, "gate_up_proj", routing, of_tokens=True)
        inner_grad = self._products(grad, "down_proj", routing, of_tokens=True, back=True)
        # A row's product with its gradient is that of both one matrix earlier, where they are narrower.
        weights_grad = (ops.swiglu(gate_up) * inner_grad).sum(1, dtype=torch.float32)
        ops.swiglu_backward_(inner_grad.mul_(weights.flatten()[routing.slots].unsqueeze(1)), gate_up)
        del inner_grad
        rows = self._products(gate_up, "gate_up_proj", routing, back=True)
        del gate_up
        ops.sum_rows(rows, routing.rows, None, out)
        return weights_grad[routing.rows]

    def _products(
        self, x: Tensor, name: str, routing: _Routing, *, of_tokens: bool = False, back: bool = False
    ) -> Tensor:
        """Each row times its expert's weights; `x` has the rows, or the tokens that they are of."""
        parts = self._dense_parts(name)
        _, outputs, inputs = parts[0].shape
        output = x.new_empty(len(routing.slots), inputs if back else outputs)
        for part in parts:
            weights = x.new_empty(part.shape)
            ops.dequantize(part.packed, part.state, weights)
            offsets = routing.offsets[part.first :]
            ops.expert_products(x, routing.tokens if of_tokens else None, weights, offsets, output, back)
            del weights  # before the next ones are there
        return output

    def _tiles(self, tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.tile_tokens) for start in range(0, tokens, self.tile_tokens))

    def _dense_parts(self, name: str) -> list[_Part]:
        if name not in self._parts:
            self._parts[name] = list(_split(getattr(self, name), self.dense_bytes))
        return self._parts[name]


@contextmanager
def silent_experts(model: Module) -> Generator[None]:
    """Leave a model's routed experts out: they look at each token alone, but round by how many have chosen them."""
    modules = [module for module in model.modules() if isinstance(module, NF4Experts)]
    for module in modules:
        module.silent = True
    try:
        yield
    finally:
        for module in modules:
            module.silent = False


def nf4(weights: Tensor) -> Params4bit:
    """A parameter that is quantized when it is moved to a device."""
    made: Any = Params4bit  # whose __new__ has no types
    return made(weights, quant_type="nf4", compress_statistics=True)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: NF4Experts) -> Tensor:
        ctx.save_for_backward(x, index, weights)
        ctx.experts = experts
        return experts.mix(x, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weights_grad = ctx.experts.mix_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return x_grad, None, weights_grad, None


def _split(parameter: Params4bit, dense_bytes: int) -> Iterator[_Part]:
    """The parts of a parameter [experts, outputs, inputs] that are dense at a time, as views."""
    whole: Any = parameter.quant_state
    packed = parameter.data.as_subclass(Tensor).flatten()
    assert whole.blocksize * whole.state2.blocksize == SCALED_TOGETHER, "bitsandbytes' defaults"
    experts, outputs, inputs = whole.shape
    each = max(1, dense_bytes // (outputs * inputs * whole.dtype.itemsize))
    shares = [part.view(experts, -1) for part in (packed, whole.absmax, whole.state2.absmax)]
    for first in range(0, experts, each):
        own, scales, outer_scales = (share[first : first + each] for share in shares)
        outer = QuantState(
            absmax=outer_scales.flatten(), blocksize=whole.state2.blocksize, code=whole.state2.code,
            dtype=whole.state2.dtype,
        )  # fmt: skip
        shape = torch.Size((len(own), outputs, inputs))
        state = QuantState(
            absmax=scales.flatten(), shape=shape, code=whole.code,
            blocksize=whole.blocksize, quant_type=whole.quant_type, dtype=whole.dtype, offset=whole.offset,
            state2=outer,
        )  # fmt: skip
        yield _Part(first, own.flatten(), state, shape)
