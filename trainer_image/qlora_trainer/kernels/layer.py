"""One decoder layer of the Llama family: attention and a gated MLP, with normalizations; both passes by hand.

Each half is normalized where it begins (Llama), where it ends (OLMo 2), or both (Gemma 3): what it adds to the residual
stream is normalized then.

Rules: what is kept between the passes is decided here and nowhere else. A layer that keeps its activations keeps what
matrix products cost and recomputes what is cheap: what is normalized, sums, the MLP's product; it may keep all of that
in host memory. A layer that recomputes
keeps its input alone, on the card or in host memory, or beside it what attention gave, which costs most to compute
again where records are long. All run the same operations on the same numbers, so they give the same bits.

Only attention looks across tokens. Where a layer recomputes, its MLP runs in tiles along the sequence, so what it needs
beside a few tensors of [tokens, hidden] does not grow with the sequence.

Names: `low` is the rank-r product of an adapter, [tokens, ranks]. All activations are [tokens, width].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module, Parameter
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo3.modeling_olmo3 import Olmo3RMSNorm

from orchestrator.api import trainer_facts
from orchestrator.api.layer_ways import LayerWays
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.host_offload import ActivationStore, InputStore
from qlora_trainer.kernels.lora_linears import Dropout, LinearGroup
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels.streamed_layers import StreamedLayers

Gate = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]
"""A gated activation of `ops`, and its backward pass."""
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
SCALES = {Olmo2RMSNorm: ops.EXACT, Olmo3RMSNorm: ops.EXACT, Gemma3RMSNorm: ops.AROUND_ONE}
"""What transformers' classes do with the weight, where it is not what most do."""
TILE_SEED = 0x9E3779B1
"""Odd, so that no two tiles of up to 2^32 tokens share the low bits of a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One micro-batch's way through the decoder, as every layer sees it."""

    cos: Tensor
    sin: Tensor
    """[tokens, head size]"""
    seed: Tensor | None
    """int64: the seed of the adapters' dropout; None: nothing is dropped."""
    trains: bool
    """Whether a backward pass follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """How the layer's attention splits what query, key and value projections give."""

    queries: int
    keys: int
    """As many as there are values."""
    size: int
    scaling: float
    window: int | None
    rotates: bool
    """Whether queries and keys know their positions; some families leave that out in some layers (NoPE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A root mean square normalization's frozen weight."""

    weight: Tensor
    epsilon: float
    scale: ops.NormScale

    @classmethod
    def of(cls, module: Any) -> Norm:
        """The normalization that transformers' module computes."""
        scale = SCALES.get(type(module), ops.ROUNDED)
        epsilon = module.eps if scale is ops.AROUND_ONE else module.variance_epsilon
        return cls(weight=module.weight.data, epsilon=epsilon, scale=scale)

    @classmethod
    def found(cls, module: Any, name: str) -> Norm | None:
        """The normalization of that name, if the module has one."""
        own = getattr(module, name, None)
        return None if own is None else cls.of(own)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.epsilon, self.scale)

    def backward(self, grad: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The gradient to `x`, plus the residual stream's."""
        return ops.rms_norm_backward(grad, x, self.weight, self.epsilon, residual, self.scale)

    def by_rows(self, part: Tensor) -> Tensor:
        """Heads [tokens, heads, size] as rows of what is normalized together: each head, or all heads of a token."""
        return part.reshape(-1, len(self.weight))


@dataclass(slots=True, kw_only=True)
class Attended:
    """The first half of a layer: what its backward pass needs."""

    qkv: Tensor
    """Query, key and value [tokens, heads x size]; rotated where heads are, unless they are normalized before that."""
    output: Tensor
    logsumexp: Tensor
    qkv_low: Tensor | None
    output_low: Tensor | None
    added: Tensor | None
    """What the output projection gave, where that is normalized."""


@dataclass(slots=True, kw_only=True)
class Gated:
    """The second half of a layer: what its backward pass needs beside its input; of experts, nothing."""

    gate_up: Tensor | None
    gate_up_low: Tensor | None
    down_low: Tensor | None
    added: Tensor | None
    """What the down projection gave, where that is normalized."""


class FusedLayer:
    """One layer, callable in the place of its module's `forward`."""

    def __init__(
        self,
        module: Any,
        *,
        number: int,
        adapter_name: str,
        heads: HeadShape,
        gate: Gate,
        attention: PackedAttention,
        keeps_attention: bool,
        ways: LayerWays,
        store: InputStore | None,
        activations: ActivationStore | None,
        streamed: StreamedLayers | None,
    ) -> None:
        """`module` is transformers' layer, of a class that `takeover` lists.

        `keeps_attention`: where it recomputes, but for what attention gave. What offloaded layers keep is in
        `activations`; others see to it that it leaves and comes in time.
        """
        self._number = number
        self._heads = heads
        self._gate, self._gate_backward_ = gate
        self._attention = attention
        self._recomputes = ways.recomputes(number)
        self._keeps_attention = self._recomputes and keeps_attention
        self._offloads = ways.is_offloaded(number)
        self._turns = ways.offloaded_layers > 0 and number == ways.turn
        self._fetches = ways.fetched_at(number)
        self._store = store if self._recomputes else None
        self._kept_activations = activations
        self._streamed = streamed
        own = module.self_attn
        self._input_norm = Norm.found(module, "input_layernorm")
        self._mlp_end_norm = Norm.found(module, "post_feedforward_layernorm")
        behind = Norm.found(module, "post_attention_layernorm")  # where halves end with none, it begins the second
        ends = self._mlp_end_norm is not None
        self._attention_end_norm = behind if ends else None
        self._middle_norm = Norm.found(module, "pre_feedforward_layernorm") if ends else behind
        query_norm, key_norm = Norm.found(own, "q_norm"), Norm.found(own, "k_norm")
        self._head_norms = None if query_norm is None or key_norm is None else (query_norm, key_norm)
        self._qkv = LinearGroup(query_key_value(own), adapter_name)
        self._factor = getattr(module, "residual_multiplier", 1.0)
        """What is added to the residual stream is multiplied with it."""
        self._output = LinearGroup([own.o_proj], adapter_name, self._factor)
        self._groups = (self._qkv, self._output, *self._take_mlp(module.mlp, adapter_name))
        self._parameters: list[Parameter] = [parameter for group in self._groups for parameter in group.parameters]

    def _take_mlp(self, mlp: Any, adapter_name: str) -> tuple[LinearGroup, ...]:
        """The second half's linear layers."""
        self._gate_up = LinearGroup(gate_and_up(mlp), adapter_name)
        self._down = LinearGroup([mlp.down_proj], adapter_name, self._factor)
        return self._gate_up, self._down

    def __call__(self, hidden: Tensor, run: Run) -> Tensor:
        """[1, tokens, hidden] to the same."""
        return _LayerFunction.apply(hidden[0], self, run, *self._parameters).unsqueeze(0)

    # --- forward

    def forward(self, ctx: Any, x: Tensor, run: Run) -> Tensor:
        """The layer's output; `ctx` gets what the backward pass needs."""
        out = self._forward(ctx, x, run)
        if run.trains and self._turns and self._kept_activations is not None:
            self._kept_activations.settle()
        return out

    def _forward(self, ctx: Any, x: Tensor, run: Run) -> Tensor:
        store = self._store if run.trains else None
        if store is not None:
            store.put(self._number, x)
        middle, attended = self._attend(x, run)
        if run.trains and not self._recomputes:
            out, gated = self._mlp(middle, run)
            kept = x, middle if attended.added is None else None, *_tensors(attended), *_tensors(gated)
            if self._offloads and self._kept_activations is not None:
                self._kept_activations.put(self._number, kept)
            else:
                ctx.save_for_backward(*kept)
            return out
        given = (attended.output, attended.logsumexp) if run.trains and self._keeps_attention else ()
        del attended
        out = self._mlp_in_tiles(middle, run)
        if store is not None:
            store.wait()
            ctx.save_for_backward(*given)
        elif run.trains:
            ctx.save_for_backward(x, *given)
        return out

    def _attend(self, x: Tensor, run: Run, given: Sequence[Tensor] = ()) -> tuple[Tensor, Attended]:
        """The residual stream between attention and MLP, and what its backward pass needs.

        `given` is what attention gave before, if it was kept: its output [tokens, heads x size] and its normalizers.
        """
        qkv, qkv_low = self._qkv.forward(_normalized(self._input_norm, x), self._dropout(run, 0))
        if self._head_norms is None:
            self._rotate(self._split(qkv)[0], run)
        if given:
            output, logsumexp = given
        else:
            query, key, value = self._rotated(qkv, run)
            output, logsumexp = self._attention.forward(query, key, value, self._heads.scaling, self._heads.window)
            output = output.reshape(len(x), -1)
        found, low = self._output.forward(
            output, self._dropout(run, 1), residual=_added_to(self._attention_end_norm, x)
        )
        added = None if self._attention_end_norm is None else found
        attended = Attended(qkv=qkv, output=output, logsumexp=logsumexp, qkv_low=qkv_low, output_low=low, added=added)
        return _ended(self._attention_end_norm, found, x), attended

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Heads [tokens, heads, size]: queries and keys together, and values."""
        by_head = qkv.view(len(qkv), -1, self._heads.size)
        both = self._heads.queries + self._heads.keys
        return by_head[:, :both], by_head[:, both:]

    def _rotated(self, qkv: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as attention takes them."""
        both, value = self._split(qkv)
        query, key = both[:, : self._heads.queries], both[:, self._heads.queries :]
        if self._head_norms is None:
            return query, key, value
        pairs = zip(self._head_norms, (query, key), strict=True)
        normalized = [norm(norm.by_rows(part)).view(part.shape) for norm, part in pairs]
        for part in normalized:
            self._rotate(part, run)
        return normalized[0], normalized[1], value

    def _rotate(self, heads: Tensor, run: Run, *, back: bool = False) -> None:
        """Rotate heads by their positions, in place; some families rotate the first part of each head only."""
        if self._heads.rotates:
            rotated = heads[..., : run.cos.shape[-1]]
            ops.rotate(rotated, run.cos, run.sin, out=rotated, back=back)

    def _mlp(self, middle: Tensor, run: Run) -> tuple[Tensor, Gated]:
        norm = self._mlp_end_norm
        gate_up, gate_up_low = self._gate_up.forward(_normalized(self._middle_norm, middle), self._dropout(run, 2))
        found, down_low = self._down.forward(
            self._gate(gate_up), self._dropout(run, 3), residual=_added_to(norm, middle)
        )
        added = None if norm is None else found
        return _ended(norm, found, middle), Gated(
            gate_up=gate_up, gate_up_low=gate_up_low, down_low=down_low, added=added
        )

    def _mlp_in_tiles(self, middle: Tensor, run: Run) -> Tensor:
        tiles = list(_tiles(len(middle)))
        if len(tiles) == 1:
            return self._mlp(middle, run)[0]
        out = torch.empty_like(middle)
        gate_up_weight, down_weight = self._gate_up.weight(), self._down.weight()
        for tile in tiles:
            normalized = _normalized(self._middle_norm, middle[tile])
            gate_up = self._gate_up.forward(normalized, self._dropout(run, 2, tile), gate_up_weight)[0]
            product = self._gate(gate_up)
            del normalized, gate_up
            residual = _added_to(self._mlp_end_norm, middle[tile])
            found = self._down.forward(product, self._dropout(run, 3, tile), down_weight, residual=residual)[0]
            out[tile] = _ended(self._mlp_end_norm, found, middle[tile])
            del found
        return out

    # --- backward

    def backward(self, ctx: Any, grad: Tensor, run: Run) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients to the layer's input and to its adapters, in the order of its parameters."""
        if self._streamed is None:
            return self._backward(ctx, grad, run)
        self._streamed.take(self._number, back=True)
        found = self._backward(ctx, grad, run)
        self._streamed.leave(self._number, back=True)
        return found

    def _backward(self, ctx: Any, grad: Tensor, run: Run) -> tuple[Tensor | None, list[Tensor | None]]:
        x, middle, attended, gated = self._activations(ctx, run)
        middle_grad, of_mlp = self._mlp_backward(grad, middle, gated, run)
        del middle, gated
        qkv_grad, of_output = self._attention_backward(middle_grad, attended, run)
        qkv_low = attended.qkv_low
        del attended
        if self._store is not None and self._number > 0:
            self._store.fetch(self._number - 1)  # while this layer's last products are computed
        low_grad = self._qkv.low_gradient(qkv_grad)
        dropout = self._dropout(run, 0)
        normalized = _normalized(self._input_norm, x)
        of_qkv = self._qkv.adapter_gradients(qkv_grad, normalized, qkv_low, low_grad, dropout)
        del normalized
        gradients = self._in_order((of_qkv, of_output, *of_mlp))
        if not ctx.needs_input_grad[0]:
            return None, gradients
        normalized_grad = self._qkv.input_gradient(qkv_grad, low_grad, dropout)
        del qkv_grad
        return _begun(self._input_norm, normalized_grad, x, middle_grad), gradients

    def _activations(self, ctx: Any, run: Run) -> tuple[Tensor, Tensor, Attended, Gated | None]:
        """The input, the middle and what both halves need: as it was kept, or computed anew from the input."""
        kept: Sequence[Any] = ctx.saved_tensors
        if self._kept_activations is not None:
            kept = self._kept_activations.take(self._number) if self._offloads else kept
            if self._fetches is not None:  # while this layer computes, and those below
                self._kept_activations.fetch(self._fetches)
        if not self._recomputes:
            x, middle, *others = kept
            count = len(fields(Attended))
            attended = Attended(**_named(Attended, others[:count]))
            if attended.added is not None:
                middle = _ended(self._attention_end_norm, attended.added, x)
            return x, middle, attended, Gated(**_named(Gated, others[count:]))
        x, given = (kept[0], kept[1:]) if self._store is None else (self._store.take(self._number), kept)
        return x, *self._attend(x, run, given), None

    def _in_order(self, gradients: tuple[list[Tensor], ...]) -> list[Tensor | None]:
        """The gradients of each group's adapters, in the order of the layer's parameters."""
        by_group = zip(self._groups, gradients, strict=True)
        return [gradient for group, own in by_group for gradient in group.split(own)]

    def _mlp_backward(
        self, grad: Tensor, middle: Tensor, gated: Gated | None, run: Run
    ) -> tuple[Tensor, tuple[list[Tensor], ...]]:
        """The gradient to `middle`, and those of the adapters of each of the MLP's groups."""
        tiles = list(_tiles(len(grad))) if gated is None else [slice(0, len(grad))]
        if len(tiles) == 1:
            again, ends = gated is None, self._mlp_end_norm is not None
            twice_used = self._gate_up.weight() if again else None, self._down.weight() if again and ends else None
            middle_grad, *of_mlp = self._mlp_tile_backward(grad, middle, gated, run, tiles[0], twice_used)
            return middle_grad, tuple(of_mlp)
        weights = (self._gate_up.weight(), self._down.weight())
        middle_grad = torch.empty_like(grad)
        sums: list[list[Tensor]] = [[], []]
        for tile in tiles:
            middle_grad[tile], *found = self._mlp_tile_backward(grad[tile], middle[tile], None, run, tile, weights)
            sums = [_summed(total, part) for total, part in zip(sums, found, strict=True)]
        of_gate_up, of_down = ([total.to(grad.dtype) for total in totals] for totals in sums)
        return middle_grad, (of_gate_up, of_down)

    def _mlp_tile_backward(
        self,
        grad: Tensor,
        middle: Tensor,
        gated: Gated | None,
        run: Run,
        tile: slice,
        weights: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        below, above = self._dropout(run, 2, tile), self._dropout(run, 3, tile)
        normalized = _normalized(self._middle_norm, middle)
        if gated is None or gated.gate_up is None:
            gate_up, gate_up_low = self._gate_up.forward(normalized, below, weights[0])
        else:
            gate_up, gate_up_low = gated.gate_up, gated.gate_up_low
        down_grad, added, down_low = grad, *((None, None) if gated is None else (gated.added, gated.down_low))
        if self._mlp_end_norm is not None:
            if added is None:
                added, down_low = self._down.forward(self._gate(gate_up), above, weights[1])
            down_grad = self._mlp_end_norm.backward(grad, added)
        del added
        low_grad = self._down.low_gradient(down_grad)
        product = self._down.input_gradient(down_grad, low_grad, above, weights[1])
        self._gate_backward_(product, gate_up)  # from here on the one is the product, the other its gradient
        if down_low is None:
            down_low = self._down.low(product, above)
        of_down = self._down.adapter_gradients(down_grad, product, down_low, low_grad, above)
        del product, down_grad
        low_grad = self._gate_up.low_gradient(gate_up)
        of_gate_up = self._gate_up.adapter_gradients(gate_up, normalized, gate_up_low, low_grad, below)
        del normalized
        normalized_grad = self._gate_up.input_gradient(gate_up, low_grad, below, weights[0])
        return _begun(self._middle_norm, normalized_grad, middle, grad), of_gate_up, of_down

    def _attention_backward(self, grad: Tensor, attended: Attended, run: Run) -> tuple[Tensor, list[Tensor]]:
        """The gradient to the projections' outputs, and those of the output projection's adapter."""
        dropout, shape = self._dropout(run, 1), (len(grad), self._heads.queries, self._heads.size)
        if self._attention_end_norm is not None:
            assert attended.added is not None, "where its end is normalized, what it ends with is there"
            grad = self._attention_end_norm.backward(grad, attended.added)
        low_grad = self._output.low_gradient(grad)
        of_output = self._output.adapter_gradients(grad, attended.output, attended.output_low, low_grad, dropout)
        output_grad = self._output.input_gradient(grad, low_grad, dropout).view(shape)
        qkv_grad = torch.empty_like(attended.qkv)
        both, value_grad = self._split(qkv_grad)
        self._attention.backward(
            output_grad,
            self._rotated(attended.qkv, run),
            attended.output.view(shape),
            attended.logsumexp,
            self._heads.scaling,
            self._heads.window,
            out_grads=(both[:, : self._heads.queries], both[:, self._heads.queries :], value_grad),
        )
        self._rotate(both, run, back=True)
        if self._head_norms is not None:
            self._head_norms_backward(attended.qkv, qkv_grad)
        return qkv_grad, of_output

    def _head_norms_backward(self, qkv: Tensor, qkv_grad: Tensor) -> None:
        assert self._head_norms is not None, "only called where heads are normalized"
        queries = self._heads.queries
        both, both_grad = self._split(qkv)[0], self._split(qkv_grad)[0]
        for norm, heads in zip(self._head_norms, (slice(0, queries), slice(queries, None)), strict=True):
            part, grad = both[:, heads], both_grad[:, heads]
            rows = norm.backward(norm.by_rows(grad), norm.by_rows(part))
            grad.copy_(rows.view(part.shape))

    # --- dropout

    def _dropout(self, run: Run, group: int, tile: slice = slice(0, 0)) -> Dropout | None:
        """What is dropped in front of a group's adapters: a function of the run's seed, the layer and the place."""
        probability = self._groups[group].dropout_probability
        if run.seed is None or probability == 0.0:
            return None
        own = len(self._groups) * self._number + group
        return Dropout(probability, run.seed, own + tile.start * TILE_SEED)


class _LayerFunction(torch.autograd.Function):
    """A layer as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FusedLayer, run: Run, *_: Parameter) -> Tensor:
        ctx.layer, ctx.run = layer, run
        return layer.forward(ctx, x, run)

    # `once_differentiable` has no types, so pyright no longer sees that this is a static method.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        input_grad, gradients = ctx.layer.backward(ctx, grad_outputs[0].contiguous(), ctx.run)
        return input_grad, None, None, *gradients


class NormFunction(torch.autograd.Function):
    """The decoder's last normalization, which keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm(x)

    # `once_differentiable` has no types, so pyright no longer sees that this is a static method.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return ctx.norm.backward(grad_outputs[0].contiguous(), x), None


def query_key_value(attention: Any) -> list[Module]:
    """The projections of attention's input: some families have them in one matrix."""
    return [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [getattr(attention, name) for name in QKV]


def gate_and_up(mlp: Any) -> list[Module]:
    """The projections of the MLP's input: some families have them in one matrix."""
    return [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [getattr(mlp, name) for name in GATE_UP]


def _normalized(norm: Norm | None, x: Tensor) -> Tensor:
    """What a half begins with."""
    return x if norm is None else norm(x)


def _begun(norm: Norm | None, grad: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """The gradient to `x` of what a half begins with, plus the residual stream's; `grad` may be used up."""
    return grad.add_(residual) if norm is None else norm.backward(grad, x, residual=residual)


def _added_to(norm: Norm | None, residual: Tensor) -> Tensor | None:
    """What a half's last product is added to at once: nothing, where it is to be normalized before."""
    return residual if norm is None else None


def _ended(norm: Norm | None, found: Tensor, residual: Tensor) -> Tensor:
    """The residual stream behind a half, of what its last product gave."""
    return found if norm is None else norm(found).add_(residual)


def _tiles(tokens: int) -> Iterator[slice]:
    step = trainer_facts.MLP_TILE_TOKENS
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _summed(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    """The sum of both lists in float32, because a bfloat16 sum would forget the smaller tiles."""
    if not total:
        return [gradient.float() for gradient in part]
    return [one.add_(other) for one, other in zip(total, part, strict=True)]


def _tensors(record: Attended | Gated) -> list[Tensor | None]:
    return [getattr(record, name) for name in record.__slots__]


def _named(kind: type[Attended] | type[Gated], values: list[Tensor | None]) -> dict[str, Any]:
    return dict(zip(kind.__slots__, values, strict=True))
