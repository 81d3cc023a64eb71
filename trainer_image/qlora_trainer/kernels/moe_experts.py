"""The routed experts of a layer: frozen NF4 weights, both passes by hand.

`NF4Experts` has the signature of transformers' modules of experts: tokens, the experts of each token and their weights
in, the weighted sum of those experts' outputs out. Rules:

- All experts of a layer share a parameter for gate and up and one for down, each quantized as a whole. A few experts
  whose blocks of weights and of scales begin where their weights do can be dequantized at a time.
- Experts have biases or none, gates or none, and matrices that lie either way (`ExpertLayout`). What they compute
  between their matrices is the module's own function, for which autograd is asked; SwiGLU has kernels.
- No dense weight and nothing of an expert's insides outlives a pass: the backward pass computes them again.
- Matrices may have an adapter each, A and B for every expert, in PEFT's layout (`ExpertAdapter`).
- Tokens are sorted by expert, multiplied by their experts' weights in one operation, and gathered back. Nothing is
  added to a place by two threads, so the same tokens give the same bits. The host never asks where tokens went, so it
  does not wait for the card, and what is allocated does not depend on the routing.
- Tokens come in tiles, which bounds what is sorted: there are as many rows as a token has experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from orchestrator.api import trainer_facts
from qlora_trainer.kernels import ops

SCALED_TOGETHER = trainer_facts.NF4_BLOCK * trainer_facts.NF4_SCALE_BLOCK
"""Weights that share a 32-bit scale."""
SECOND = "down_proj"
"""transformers' name of experts' second matrix."""


Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How experts' weights lie, and what is computed between their two matrices."""

    gated: bool = True
    """Whether the first matrix gives gates as well, and so is twice as wide."""
    transposed: bool = False
    """Whether matrices are [inputs, outputs] instead of [outputs, inputs]."""
    declared: bool = True
    """Whether the module itself says how they lie, to PEFT as well."""
    activation: Activation | None = None
    """[rows, width of the first matrix] -> [rows, inner size]; None for SwiGLU, gates first."""

    @property
    def first(self) -> str:
        """transformers' name of the first matrix."""
        return "gate_up_proj" if self.gated else "up_proj"


SWIGLU = ExpertLayout()


@dataclass(frozen=True, slots=True)
class Part:
    """Some experts' share of a parameter: packed weights, and the state that bitsandbytes dequantizes them by."""

    first: int
    shape: torch.Size
    """[experts, outputs, inputs], or the other way round."""
    packed: Tensor
    state: QuantState


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAdapter:
    """LoRA (Hu et al., 2021) on one matrix of every expert: PEFT's layers, whose weights lie as it saves them."""

    a: Linear
    """[rank x experts, inputs], the ranks of an expert together."""
    b: Linear
    """[outputs, rank x experts], the experts of a rank together."""
    scaling: float

    def matrices(self, experts: int) -> tuple[Tensor, Tensor]:
        """A [experts, rank, inputs] and B [experts, outputs, rank]."""
        a, b = self.a.weight.detach(), self.b.weight.detach()
        return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()

    def gradients(self, sums: AdapterSums) -> tuple[Tensor, Tensor]:
        """Those of both weights, from those of `matrices`."""
        a, b = sums
        b_grad = b.permute(1, 2, 0).reshape(self.b.weight.shape)
        return a.view(self.a.weight.shape).to(self.a.weight.dtype), b_grad.to(self.b.weight.dtype)


AdapterSums = tuple[Tensor, Tensor]
"""Gradients to an adapter's `matrices`, float32."""


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
    experts: Tensor | None
    """[rows] The expert of each row, where these have biases."""

    @classmethod
    def of(cls, index: Tensor, experts: int, *, biased: bool) -> _Routing:
        """The routing of tokens whose experts are `index` [tokens, experts of a token]."""
        chosen, slots = torch.sort(index.flatten(), stable=True)
        every = torch.arange(experts + 1, device=index.device)
        offsets = torch.searchsorted(chosen, every, out_int32=True)
        own = chosen if biased else None
        return cls(slots, torch.argsort(slots).view(index.shape), slots // index.shape[1], offsets, own)

    def of_rows(self, weights: Tensor) -> Tensor:
        """[rows, 1] The weight of each row, of those of tokens [tokens, experts of a token]."""
        return weights.flatten()[self.slots].unsqueeze(1)


NO_ADAPTERS: Mapping[str, AdapterSums] = {}


class NF4Experts(Module):
    """Experts of two matrices: `second(activation(first(x)))`."""

    source_cls = Linear
    """What transformers' loader asks of a quantized module: its weights are not transposed."""

    def __init__(self, matrices: tuple[Tensor, Tensor], layout: ExpertLayout = SWIGLU, *, biased: bool = False) -> None:
        """`matrices` are [experts, outputs, inputs], or the other way round; both may be on meta, and so are biases."""
        super().__init__()
        first, second = matrices
        self.experts, self.layout, self.biased = len(first), layout, biased
        self.hidden, self.inner = second.shape[:0:-1] if layout.transposed else second.shape[1:]
        self.is_transposed = layout.transposed  # as transformers' modules say it, for PEFT
        for name, matrix in zip(self.matrices, matrices, strict=True):
            self.register_parameter(name, nf4(matrix))
            if biased:
                outputs = matrix.shape[2 if layout.transposed else 1]
                empty = torch.empty(self.experts, outputs, dtype=matrix.dtype, device=matrix.device)
                self.register_parameter(f"{name}_bias", Parameter(empty, requires_grad=False))
        self._parts: dict[str, list[Part]] = {}
        self.adapters: dict[str, ExpertAdapter] = {}
        """By the name of the matrix that they are on."""
        self.silent = False
        """Whether they add nothing to any token."""
        self.tile_tokens, self.dense_bytes = trainer_facts.EXPERT_TILE_TOKENS, trainer_facts.EXPERT_DENSE_BYTES

    @property
    def matrices(self) -> tuple[str, str]:
        """The names of the two quantized parameters."""
        return self.layout.first, SECOND

    @property
    def expert_weights(self) -> int:
        """The number of one expert's weights."""
        return (3 if self.layout.gated else 2) * self.hidden * self.inner

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the experts' outputs, as transformers' modules of experts compute it.

        Without an index each expert has tokens of its own, as many as every other: those of the first come first.
        """
        if self.silent:
            return torch.zeros_like(hidden_states)
        if top_k_index is None or top_k_weights is None:
            own = torch.arange(len(hidden_states), device=hidden_states.device)
            top_k_index = (own // (len(hidden_states) // self.experts)).unsqueeze(1)
            top_k_weights = torch.ones_like(top_k_index, dtype=hidden_states.dtype)
        return _Mixture.apply(hidden_states, top_k_index, top_k_weights, self, *self.adapter_weights())

    def mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The forward pass, without autograd."""
        output = torch.empty_like(x)
        for tile in self._tiles(len(x)):
            self.mix_tile(x[tile], index[tile], weights[tile], out=output[tile])
        return output

    def mix_backward(
        self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, sums: Mapping[str, AdapterSums] = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor]:
        """The gradients to `x` and to `weights`; those of adapters are added to `sums`."""
        x_grad, weights_grad = torch.empty_like(x), torch.empty_like(weights)
        for tile in self._tiles(len(x)):
            weights_grad[tile] = self.mix_tile_backward(
                grad[tile], x[tile], index[tile], weights[tile], out=x_grad[tile], sums=sums
            )
        return x_grad, weights_grad

    def adapter_weights(self) -> list[Tensor]:
        """A and B of each adapter, as PEFT has them."""
        return [layer.weight for each in self.adapters.values() for layer in (each.a, each.b)]

    def adapter_sums(self) -> dict[str, AdapterSums]:
        """Zeros, to add the gradients of adapters to."""
        return {
            name: (
                torch.zeros_like(each.a.weight, dtype=torch.float32).view(self.experts, -1, each.a.in_features),
                torch.zeros_like(each.b.weight, dtype=torch.float32).view(self.experts, each.b.out_features, -1),
            )
            for name, each in self.adapters.items()
        }

    def mix_tile(self, x: Tensor, index: Tensor, weights: Tensor, *, out: Tensor) -> None:
        """`mix` of one tile, into `out`."""
        routing = self._routing(index)
        inner = self._activated(self._products(x, self.layout.first, routing, of_tokens=True))
        rows = self._products(inner, SECOND, routing)
        del inner
        ops.sum_rows(rows, routing.rows, weights, out)

    def mix_tile_backward(
        self,
        grad: Tensor,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        *,
        out: Tensor,
        sums: Mapping[str, AdapterSums] = NO_ADAPTERS,
    ) -> Tensor:
        """`mix_backward` of one tile: the gradient to `x` into `out`; that to `weights` is given."""
        routing = self._routing(index)
        first = self._products(x, self.layout.first, routing, of_tokens=True)
        inner_grad = self._products(grad, SECOND, routing, of_tokens=True, back=True)
        if SECOND in sums:
            inner = self._activated(first)
            self._add_gradients(SECOND, inner, grad, routing, sums[SECOND], rows_weights=routing.of_rows(weights))
            del inner
        # A row's product with its gradient is that of both one matrix earlier, where they are narrower.
        if self.layout.activation is None:
            weights_grad = (ops.swiglu(first) * inner_grad).sum(1, dtype=torch.float32)
            ops.swiglu_backward_(inner_grad.mul_(routing.of_rows(weights)), first)
        else:
            with torch.enable_grad():
                inner = self.layout.activation(first.requires_grad_())
            weights_grad = (inner.detach() * inner_grad).sum(1, dtype=torch.float32)
            (first,) = torch.autograd.grad(inner, first, inner_grad.mul_(routing.of_rows(weights)))
            del inner
        del inner_grad
        if self.layout.first in sums:
            self._add_gradients(self.layout.first, x, first, routing, sums[self.layout.first])
        rows = self._products(first, self.layout.first, routing, back=True)
        del first
        ops.sum_rows(rows, routing.rows, None, out)
        found = weights_grad[routing.rows]
        if self.biased:
            found += ops.affine(grad, getattr(self, f"{SECOND}_bias")).gather(1, index)
        return found

    def _routing(self, index: Tensor) -> _Routing:
        return _Routing.of(index, self.experts, biased=self.biased)

    def _activated(self, first: Tensor) -> Tensor:
        return ops.swiglu(first) if self.layout.activation is None else self.layout.activation(first)

    def _products(
        self, x: Tensor, name: str, routing: _Routing, *, of_tokens: bool = False, back: bool = False
    ) -> Tensor:
        """Each row times its expert's weights, plus its bias; `x` has the rows, or the tokens that they are of.

        `back`: the gradient to what that was computed from.
        """
        parts = self.dense_parts(name)
        as_they_lie = back != self.layout.transposed
        output = x.new_empty(len(routing.slots), parts[0].shape[2 if as_they_lie else 1])
        for part in parts:
            weights = x.new_empty(part.shape)
            ops.dequantize(part.packed, part.state, weights)
            offsets = routing.offsets[part.first :]
            ops.expert_products(x, routing.tokens if of_tokens else None, weights, offsets, output, as_they_lie)
            del weights  # before the next ones are there
        if routing.experts is not None and not back:
            output += getattr(self, f"{name}_bias")[routing.experts]
        if name in self.adapters:
            a, b = self.adapters[name].matrices(self.experts)
            low = self._low(x, b if back else a, name, routing, of_tokens=of_tokens, back=back)
            of_adapter = torch.empty_like(output)
            ops.expert_products(low, None, a if back else b, routing.offsets, of_adapter, back)
            output += of_adapter
        return output

    def _low(self, x: Tensor, matrix: Tensor, name: str, routing: _Routing, *, of_tokens: bool, back: bool) -> Tensor:
        """[rows, rank] What an adapter makes of rows before its second matrix, scaled."""
        low = x.new_empty(len(routing.slots), matrix.shape[2 if back else 1])
        ops.expert_products(x, routing.tokens if of_tokens else None, matrix, routing.offsets, low, back)
        return low.mul_(self.adapters[name].scaling)

    def _add_gradients(
        self,
        name: str,
        x: Tensor,
        grad: Tensor,
        routing: _Routing,
        sums: AdapterSums,
        rows_weights: Tensor | None = None,
    ) -> None:
        """Add a tile's gradients to an adapter's `matrices`.

        The first matrix has `x` of tokens and `grad` of rows; the second has them the other way round, and the rows'
        weights are not in `grad` yet.
        """
        of_tokens = rows_weights is None
        a, b = self.adapters[name].matrices(self.experts)
        low = self._low(x, a, name, routing, of_tokens=of_tokens, back=False)
        low_grad = self._low(grad, b, name, routing, of_tokens=not of_tokens, back=True)
        if rows_weights is not None:
            low, low_grad = (each.mul_(rows_weights) for each in (low, low_grad))
        x_source, grad_source = (routing.tokens, None) if of_tokens else (None, routing.tokens)
        ops.expert_outer_products(low_grad, None, x, x_source, routing.offsets, sums[0])
        ops.expert_outer_products(grad, grad_source, low, None, routing.offsets, sums[1])

    def _tiles(self, tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.tile_tokens) for start in range(0, tokens, self.tile_tokens))

    def dense_parts(self, name: str) -> list[Part]:
        """The parts of a matrix that are dense at a time."""
        if name not in self._parts:
            self._parts[name] = list(_split(getattr(self, name), self.dense_bytes))
        return self._parts[name]

    def dense(self, name: str) -> Tensor:
        """A whole matrix of all experts, for trials on small models."""
        found: list[Tensor] = []
        for part in self.dense_parts(name):
            found.append(torch.empty(part.shape, dtype=part.state.dtype, device=part.packed.device))
            ops.dequantize(part.packed, part.state, found[-1])
        return torch.cat(found)


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
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: NF4Experts, *adapter: Tensor) -> Tensor:
        ctx.save_for_backward(x, index, weights)
        del adapter  # the experts know it; autograd wants it named
        ctx.experts = experts
        return experts.mix(x, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        experts: NF4Experts = ctx.experts
        sums = experts.adapter_sums()
        x_grad, weights_grad = experts.mix_backward(grads[0].contiguous(), *ctx.saved_tensors, sums=sums)
        adapter = [each for name in list(sums) for each in experts.adapters[name].gradients(sums.pop(name))]
        return x_grad, None, weights_grad, None, *adapter


def shares(shape: torch.Size, itemsize: int, dense_bytes: int) -> Iterator[tuple[int, torch.Size]]:
    """The first expert and the shape of each part of a parameter [experts, outputs, inputs] that is dense at a time.

    A part begins where a 32-bit scale does.
    """
    experts, weights = shape[0], shape[1] * shape[2]
    together = SCALED_TOGETHER // gcd(weights, SCALED_TOGETHER)
    each = max(1, dense_bytes // (weights * itemsize) // together) * together
    for first in range(0, experts, each):
        yield first, torch.Size((min(each, experts - first), *shape[1:]))


def _split(parameter: Params4bit, dense_bytes: int) -> Iterator[Part]:
    """The parts of a parameter that are dense at a time, as views."""
    whole: Any = parameter.quant_state
    assert whole.blocksize * whole.state2.blocksize == SCALED_TOGETHER, "bitsandbytes' defaults"
    packed = parameter.data.as_subclass(Tensor).flatten()
    for first, shape in shares(whole.shape, whole.dtype.itemsize, dense_bytes):
        begin = first * shape[1:].numel()
        end = begin + shape.numel()
        outer = QuantState(
            absmax=whole.state2.absmax[begin // SCALED_TOGETHER : -(-end // SCALED_TOGETHER)],
            blocksize=whole.state2.blocksize, code=whole.state2.code, dtype=whole.state2.dtype,
        )  # fmt: skip
        state = QuantState(
            absmax=whole.absmax[begin // whole.blocksize : end // whole.blocksize], code=whole.code,
            shape=torch.Size((end - begin,)),  # bitsandbytes' blocks lie along the whole, but on the CPU along a row
            blocksize=whole.blocksize, quant_type=whole.quant_type, dtype=whole.dtype, offset=whole.offset,
            state2=outer,
        )  # fmt: skip
        yield Part(first, shape, packed[begin // 2 : end // 2], state)
