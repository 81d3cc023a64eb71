"""The routed experts of a layer: frozen NF4 weights, both passes by hand.

`qlora_trainer.model.quantization` puts one in the place of transformers' module, whose signature it has: tokens, the
experts of each token and their weights in, the weighted sum of what those experts make of the token out. Rules:

- All experts of a layer share a parameter for gate and up and one for down, each quantized as a whole. An expert's
  blocks of weights and of scales begin where its weights do, so a few can be dequantized at a time.
- No dense weight and nothing of an expert's insides outlives a pass: the backward pass makes them again.
- Tokens are sorted by expert, multiplied by their experts' weights in one operation, and gathered back. Nothing is
  added to a place by two threads, so the same tokens give the same bits. The host never asks where tokens went, so it
  does not wait for the card, and what is allocated does not depend on the routing.
- Tokens come in tiles, which bounds what is sorted: there are as many rows as a token has experts.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True, slots=True)
class _Routing:
    """Rows, one for each token and expert of its, sorted by expert."""

    slots: Tensor
    """[rows] The place of a row in [tokens, experts of a token]."""
    rows: Tensor
    """[tokens, experts of a token] The other way."""
    tokens: Tensor
    """[rows] The token of each row."""
    borders: Tensor
    """[experts + 1] Where each expert's rows begin, and the last one's end; int32."""

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Routing:
        """By the experts of each token [tokens, experts of a token]."""
        chosen, slots = torch.sort(index.flatten(), stable=True)
        every = torch.arange(experts + 1, device=index.device)
        borders = torch.searchsorted(chosen, every, out_int32=True)
        return cls(slots, torch.argsort(slots).view(index.shape), slots // index.shape[1], borders)


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
        """Add nothing to any token."""

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' modules of experts have it."""
        if self.silent:
            return torch.zeros_like(hidden_states)
        return _Mixture.apply(hidden_states, top_k_index, top_k_weights, self)

    def mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The forward pass, without autograd."""
        answer = torch.empty_like(x)
        for tile in _tiles(len(x)):
            self._mix_tile(x[tile], index[tile], weights[tile], out=answer[tile])
        return answer

    def mix_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to `x` and to `weights`."""
        to_x, to_weights = torch.empty_like(x), torch.empty_like(weights)
        for tile in _tiles(len(x)):
            to_weights[tile] = self._mix_tile_backward(grad[tile], x[tile], index[tile], weights[tile], out=to_x[tile])
        return to_x, to_weights

    def _mix_tile(self, x: Tensor, index: Tensor, weights: Tensor, *, out: Tensor) -> None:
        routing = _Routing.of(index, self.experts)
        inner = ops.swiglu(self._products(x, "gate_up_proj", routing, of_tokens=True))
        rows = self._products(inner, "down_proj", routing)
        del inner
        ops.sum_rows(rows, routing.rows, weights, out)

    def _mix_tile_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *, out: Tensor) -> Tensor:
        routing = _Routing.of(index, self.experts)
        gate_up = self._products(x, "gate_up_proj", routing, of_tokens=True)
        to_inner = self._products(grad, "down_proj", routing, of_tokens=True, back=True)
        # A row's product with its gradient is that of both one matrix earlier, where they are narrower.
        to_weights = (ops.swiglu(gate_up) * to_inner).sum(1, dtype=torch.float32)
        ops.swiglu_backward_(to_inner.mul_(weights.flatten()[routing.slots].unsqueeze(1)), gate_up)
        del to_inner
        rows = self._products(gate_up, "gate_up_proj", routing, back=True)
        del gate_up
        ops.sum_rows(rows, routing.rows, None, out)
        return to_weights[routing.rows]

    def _products(
        self, x: Tensor, name: str, routing: _Routing, *, of_tokens: bool = False, back: bool = False
    ) -> Tensor:
        """Each row times its expert's weights; `x` has the rows, or the tokens that they are of."""
        parts = self._dense_parts(name)
        outputs, inputs = parts[0].state.shape[1:]
        answer = x.new_empty(len(routing.slots), inputs if back else outputs)
        for part in parts:
            weights = x.new_empty(part.state.shape)
            ops.dequantize(part.packed, part.state, weights)
            borders = routing.borders[part.first :]
            ops.expert_products(x, routing.tokens if of_tokens else None, weights, borders, answer, back)
            del weights  # before the next ones are there
        return answer

    def _dense_parts(self, name: str) -> list[_Part]:
        if name not in self._parts:
            self._parts[name] = list(_split(getattr(self, name)))
        return self._parts[name]


def nf4(weights: Tensor) -> Params4bit:
    """A parameter that is quantized when it is moved to a device."""
    return Params4bit(weights, quant_type="nf4", compress_statistics=True)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: NF4Experts) -> Tensor:
        ctx.save_for_backward(x, index, weights)
        ctx.experts = experts
        return experts.mix(x, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weights = ctx.experts.mix_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return to_x, None, to_weights, None


def _tiles(tokens: int) -> Iterator[slice]:
    step = trainer_facts.EXPERT_TILE_TOKENS
    return (slice(start, start + step) for start in range(0, tokens, step))


def _split(parameter: Params4bit) -> Iterator[_Part]:
    """The parts of a parameter [experts, outputs, inputs] that are dense at a time, as views."""
    whole, packed = parameter.quant_state, parameter.data.as_subclass(Tensor).flatten()
    assert whole.blocksize * whole.state2.blocksize == SCALED_TOGETHER, "bitsandbytes' defaults"
    experts, outputs, inputs = whole.shape
    each = max(1, trainer_facts.EXPERT_DENSE_BYTES // (outputs * inputs * whole.dtype.itemsize))
    shares = [part.view(experts, -1) for part in (packed, whole.absmax, whole.state2.absmax)]
    for first in range(0, experts, each):
        own, scales, outer_scales = (share[first : first + each] for share in shares)
        outer = QuantState(
            absmax=outer_scales.flatten(), blocksize=whole.state2.blocksize, code=whole.state2.code,
            dtype=whole.state2.dtype,
        )  # fmt: skip
        state = QuantState(
            absmax=scales.flatten(), shape=torch.Size((len(own), outputs, inputs)), code=whole.code,
            blocksize=whole.blocksize, quant_type=whole.quant_type, dtype=whole.dtype, offset=whole.offset,
            state2=outer,
        )  # fmt: skip
        yield _Part(first, own.flatten(), state)
