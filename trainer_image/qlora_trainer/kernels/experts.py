"""The routed experts of a layer: frozen NF4 weights, both passes by hand.

`qlora_trainer.experts` puts one in the place of transformers' module, whose signature it has: tokens, the experts of
each token and their weights in, the weighted sum of what those experts make of the token out. Rules:

- All experts of a layer share a parameter for gate and up and one for down, each quantized as a whole. An expert's
  blocks of weights and of scales begin where its weights do, so it is dequantized alone, and only if a token chose it.
- No dense weight and nothing of an expert's insides outlives a pass: the backward pass makes them again.
- Tokens are sorted by expert, multiplied expert by expert, and gathered back. Nothing is added to a place by two
  threads, so the same tokens give the same bits, and what is allocated does not depend on the routing.
- Tokens come in tiles, which bounds the sorted copies: there are as many rows as a token has experts.
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

from qlora_trainer.kernels import ops

TILE_TOKENS = 4096
"""Tokens that are sorted at once: with 8 of 128 experts each, 256 rows an expert."""
SCALED_TOGETHER = 64 * 256
"""Weights that share a 32-bit scale: blocks of 64, whose scales come in blocks of 256 (Dettmers et al., 2023)."""


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert's part of a parameter: packed weights, and the state that bitsandbytes dequantizes them by."""

    packed: Tensor
    state: QuantState


@dataclass(frozen=True, slots=True)
class _Routing:
    """Rows, one for each token and expert of its, sorted by expert."""

    slots: Tensor
    """[rows] The place of a row in [tokens, experts of a token]."""
    rows: Tensor
    """[tokens, experts of a token] The other way."""
    counts: list[int]
    """Rows of each expert."""

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Routing:
        """By the experts of each token [tokens, experts of a token]."""
        chosen = index.flatten()
        slots = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=experts)
        return cls(slots, torch.argsort(slots).view(index.shape), counts.tolist())

    @property
    def tokens(self) -> Tensor:
        """[rows] The token of each row."""
        return self.slots // self.rows.shape[1]

    def gathered(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows [tokens, width], in float32."""
        total = rows[self.rows[:, 0]].float()
        for column in range(1, self.rows.shape[1]):
            total += rows[self.rows[:, column]]
        return total


class NF4Experts(Module):
    """Experts with gated activations: `down(silu(gate(x)) * up(x))`."""

    source_cls = Linear
    """What transformers' loader asks of a quantized module: its weights are not transposed."""

    def __init__(self, experts: int, hidden: int, inner: int, *, gate_up: Tensor, down: Tensor) -> None:
        """`gate_up` is [experts, 2 x inner, hidden] and `down` [experts, hidden, inner]; both may be on meta."""
        super().__init__()
        self.experts, self.hidden, self.inner = experts, hidden, inner
        self.gate_up_proj, self.down_proj = nf4(gate_up), nf4(down)
        self._parts: dict[str, list[_Expert]] = {}
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
            answer[tile] = self._mix_tile(x[tile], index[tile], weights[tile])
        return answer

    def mix_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to `x` and to `weights`."""
        to_x, to_weights = torch.empty_like(x), torch.empty_like(weights)
        for tile in _tiles(len(x)):
            to_x[tile], to_weights[tile] = self._mix_tile_backward(grad[tile], x[tile], index[tile], weights[tile])
        return to_x, to_weights

    def _mix_tile(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        routing = _Routing.of(index, self.experts)
        inner = ops.swiglu(self._products(x[routing.tokens], "gate_up_proj", routing, back=False))
        rows = self._products(inner, "down_proj", routing, back=False)
        del inner
        return routing.gathered(rows.mul_(weights.flatten()[routing.slots].unsqueeze(1)))

    def _mix_tile_backward(self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        routing = _Routing.of(index, self.experts)
        gate_up = self._products(x[routing.tokens], "gate_up_proj", routing, back=False)
        to_inner = self._products(grad[routing.tokens], "down_proj", routing, back=True)
        # A row's product with its gradient is that of both one matrix earlier, where they are narrower.
        to_weights = (ops.swiglu(gate_up) * to_inner).sum(1, dtype=torch.float32)
        ops.swiglu_backward_(to_inner.mul_(weights.flatten()[routing.slots].unsqueeze(1)), gate_up)
        del to_inner
        rows = self._products(gate_up, "gate_up_proj", routing, back=True)
        del gate_up
        return routing.gathered(rows), to_weights[routing.rows]

    def _products(self, rows: Tensor, name: str, routing: _Routing, *, back: bool) -> Tensor:
        """Each row times its expert's weights: transposed on the way forward, as they are on the way back."""
        experts = self._experts(name)
        outputs, inputs = experts[0].state.shape
        answer = rows.new_empty(len(rows), inputs if back else outputs)
        start = 0
        for expert, count in zip(experts, routing.counts, strict=True):
            part = slice(start, start := start + count)
            if count:
                weight = rows.new_empty(outputs, inputs)
                ops.dequantize(expert.packed, expert.state, weight)
                ops.product(rows[part], weight if back else weight.t(), out=answer[part])
                del weight  # before the next one is there
        return answer

    def _experts(self, name: str) -> list[_Expert]:
        if name not in self._parts:
            self._parts[name] = list(_split(getattr(self, name), self.experts))
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
        to_x, to_weights = ctx.experts.mix_backward(grads[0], *ctx.saved_tensors)
        return to_x, None, to_weights, None


def _tiles(tokens: int) -> Iterator[slice]:
    return (slice(start, start + TILE_TOKENS) for start in range(0, tokens, TILE_TOKENS))


def _split(parameter: Params4bit, experts: int) -> Iterator[_Expert]:
    """The experts' parts of a parameter [experts, outputs, inputs], as views."""
    whole, packed = parameter.quant_state, parameter.data.as_subclass(Tensor).flatten()
    assert whole.blocksize * whole.state2.blocksize == SCALED_TOGETHER, "bitsandbytes' defaults"
    shares = (part.chunk(experts) for part in (packed, whole.absmax, whole.state2.absmax))
    for own, scales, outer_scales in zip(*shares, strict=True):
        outer = QuantState(
            absmax=outer_scales, blocksize=whole.state2.blocksize, code=whole.state2.code, dtype=whole.state2.dtype
        )
        state = QuantState(
            absmax=scales, shape=whole.shape[1:], code=whole.code, blocksize=whole.blocksize,
            quant_type=whole.quant_type, dtype=whole.dtype, offset=whole.offset, state2=outer,
        )  # fmt: skip
        yield _Expert(own, state)
