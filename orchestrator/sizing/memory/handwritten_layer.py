"""Bytes of a decoder layer that the trainer computes by hand (`qlora_trainer/kernels/layer.py`), instant by instant.

Each function walks through the method of the trainer that its docstring names and must be changed with it. Sizes are in
bytes; bf16 everywhere but where a comment says otherwise. The gradients of a layer's adapters are part of its backward
pass; those of other layers are `sizing/footprint`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from orchestrator.sizing.memory.attention import Attention
from orchestrator.sizing.memory.experts import INDEX_BYTES, Experts
from orchestrator.sizing.memory.linear_layers import Group
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES, INT32_BYTES, Timeline, Walk

TILES_WALKED = 3
"""Whole ones; what comes after them finds the places that they left."""
WALKS_KEPT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """In what a type's model differs from Llama's."""

    begins_with_norms: bool = True
    """Whether each half of a layer begins with one."""
    ends_with_norms: bool = False
    """Whether what each half adds to the residual stream is normalized."""
    normalizes_heads: bool = False
    """Whether queries and keys are."""
    heads_together: bool = False
    """Whether that is done to all heads of a token at once, instead of to each."""
    angle_tables: int = 1
    """Pairs of cosines and sines: layers with windows may turn heads at another speed than those without."""
    exact_angles: bool = False
    """Whether these stay in float32."""
    scales_embeddings: bool = False
    """Whether what is looked up is multiplied."""
    table_scales: bool = False
    """Whether the table does that itself, for which it stays on the card."""


LLAMA = Family()
_OLMO2 = Family(
    begins_with_norms=False, ends_with_norms=True, normalizes_heads=True, heads_together=True, exact_angles=True
)
_FAMILIES = {
    "granite": Family(scales_embeddings=True),
    "qwen3": Family(normalizes_heads=True),
    "qwen3_moe": Family(normalizes_heads=True),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, angle_tables=2),
    "gemma3_text": Family(
        ends_with_norms=True, normalizes_heads=True, angle_tables=2, scales_embeddings=True, table_scales=True
    ),
}


def family_of(model_type: str) -> Family:
    """What is special about a type whose layers are written by hand."""
    return _FAMILIES.get(model_type, LLAMA)


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """One layer's shape, and the micro-batch that goes through it."""

    tokens: int
    hidden: int
    inner: int
    rank: int
    drops: bool
    """Whether the adapters' inputs are dropped out."""
    mlp_tile_tokens: int
    """Tokens that the MLP takes at a time where it recomputes."""
    keeps_attention: bool = False
    """Whether a layer that recomputes keeps what attention gave."""
    family: Family
    attention: Attention
    qkv: Group
    output: Group
    gate_up: Group
    down: Group
    experts: Experts | None
    """Routed experts in the place of the MLP, whose `gate_up` and `down` are empty then."""

    def of(self, width: int, tokens: int | None = None) -> int:
        """A bf16 tensor of [tokens, width]."""
        return (self.tokens if tokens is None else tokens) * width * BF16_BYTES

    @cached_property
    def stream(self) -> int:
        """The residual stream."""
        return self.of(self.hidden)

    @property
    def span(self) -> int:
        """What attention knows of each token, twice: how far it looks."""
        return self.tokens * INT32_BYTES

    @cached_property
    def query(self) -> int:
        """All query heads."""
        return self.of(self.attention.query_width)

    @cached_property
    def key(self) -> int:
        """All key heads, or all value heads."""
        return self.of(self.attention.key_width)

    @cached_property
    def given(self) -> dict[str, int]:
        """What attention gives, by name."""
        return {"attention_output": self.query, "logsumexp": self.attention.logsumexp_bytes}

    def begun(self, tokens: int | None = None) -> int:
        """What a half begins with, where it is not the residual stream itself."""
        return self.of(self.hidden, tokens) if self.family.begins_with_norms else 0

    def ended(self, tokens: int | None = None) -> int:
        """What a half ends with, and its gradient, where it is not added to the residual stream as it is."""
        return self.of(self.hidden, tokens) if self.family.ends_with_norms else 0

    def low(self, group: Group, tokens: int | None = None) -> int:
        """The rank-r product of a group's adapters."""
        return self.of(group.adapters * self.rank, tokens)

    def per_expert(self, count: int, size: int) -> int:
        """A tensor of [tokens, count] with numbers of so many bytes."""
        return self.tokens * count * size


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What a layer takes beside what other layers keep."""

    kept: int
    """What stays from its forward to its backward pass."""
    first_kept: int
    """What the first layer keeps, whose input needs no gradient."""
    released: int
    """What of that goes before the loss: the decoder holds its embeddings to its end."""
    forward_peak: int
    """The peak with its input."""
    backward_peak: int
    """The peak with what it kept and the gradient to its output."""
    first_backward_peak: int
    """That of the first layer, as far as it is not among what the decoder does around its layers."""
    gradients: int
    """Those of its adapters, once it is done."""


def layer_bytes(layer: FusedLayer, *, offloaded: bool) -> tuple[LayerBytes, LayerBytes]:
    """A layer that keeps its input alone, on the card or in host memory, and one that keeps its activations."""
    on_card, on_host, whole = _walks(layer)
    return on_host if offloaded else on_card, whole


@lru_cache(maxsize=WALKS_KEPT)
def _walks(layer: FusedLayer) -> tuple[LayerBytes, LayerBytes, LayerBytes]:
    """A layer that keeps its input on the card, one that keeps it in host memory, one that keeps its activations."""
    forward = Timeline()
    forward.take(x=layer.stream)
    recomputed_forward(forward, layer)
    on_card = Timeline()
    on_card.take(**(layer.given if layer.keeps_attention else {}))
    given = on_card.live_bytes
    on_card.take(x=layer.stream, grad=layer.stream)
    _recomputed_to_queries(on_card, layer)
    on_host = on_card.copy()
    _from_queries(on_card, layer, fetches=False, first=False)
    _from_queries(on_host, layer, fetches=True, first=False)
    return (
        _result(layer, layer.stream + given, forward, on_card),
        _result(layer, given, forward, on_host),
        _kept_layer(layer),
    )


def _kept_layer(layer: FusedLayer) -> LayerBytes:
    forward = Timeline()
    forward.take(x=layer.stream)
    kept_forward(forward, layer)
    backward = Timeline()
    take_kept(backward, layer)
    kept = backward.live_bytes
    backward.take(grad=layer.stream)
    kept_backward(backward, layer, first=False)
    return _result(layer, kept, forward, backward)


def kept_forward(t: Walk, layer: FusedLayer) -> None:
    """The way from `x` to `out`, beside which stays what the way back needs."""
    _attend(t, layer)
    _mlp(t, layer)
    if layer.family.ends_with_norms:  # what was normalized is kept instead, and this found again
        t.drop("middle")


def kept_backward(t: Walk, layer: FusedLayer, *, first: bool) -> None:
    """The way back from `grad`, `x` and what was kept to gradients and, but for the first layer, `x_grad`."""
    if layer.family.ends_with_norms:
        t.take(middle=layer.stream)
    _mlp_backward(t, layer, recomputes=False)
    if layer.family.ends_with_norms:
        t.drop("middle")
    _attention_backward(t, layer, recomputes=False)
    _qkv_backward(t, layer, first=first)


def recomputed_forward(t: Walk, layer: FusedLayer) -> None:
    """The way from `x` to `out`, which leaves nothing else, but what attention gave where that is kept."""
    _attend(t, layer)
    _drop_attended(t, layer)
    _mlp_in_tiles(t, layer)


def recomputed_backward(t: Walk, layer: FusedLayer, *, fetches: bool, first: bool) -> None:
    """The way back from `grad` and `x`; where the input of the layer below is in host memory, it is fetched."""
    _recomputed_to_queries(t, layer)
    _from_queries(t, layer, fetches=fetches, first=first)


def _recomputed_to_queries(t: Walk, layer: FusedLayer) -> None:
    _attend(t, layer, given=layer.keeps_attention)
    _mlp_backward(t, layer, recomputes=True)
    t.drop("middle")
    _attention_backward(t, layer, recomputes=True)


def _from_queries(t: Walk, layer: FusedLayer, *, fetches: bool, first: bool) -> None:
    if fetches:  # the input of the layer below is on its way
        t.take(fetched=layer.stream)
    _qkv_backward(t, layer, first=first)


def _result(layer: FusedLayer, kept: int, forward: Timeline, backward: Timeline) -> LayerBytes:
    groups = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return LayerBytes(
        kept=kept,
        first_kept=kept,
        released=0,
        forward_peak=forward.peak_bytes,
        backward_peak=backward.peak_bytes,
        first_backward_peak=backward.peak_bytes,
        gradients=sum(group.gradient_bytes(layer.rank) for group in groups),
    )


# --- forward


def _attend(t: Walk, layer: FusedLayer, *, given: bool = False) -> None:
    """`FusedLayer._attend`; leaves `middle` and what `Attended` holds, some of which may be `given`."""
    t.take(normalized=layer.begun())
    _group_forward(t, layer, layer.qkv, "qkv", "qkv_low")
    t.drop("normalized")
    if not given:
        _rotate_heads(t, layer)
        t.take(**layer.given)
    if layer.family.ends_with_norms:
        _group_forward(t, layer, layer.output, "attention_added", "output_low")
        t.take(middle=layer.stream)
    else:
        _group_forward(t, layer, layer.output, "middle", "output_low")
    if layer.family.normalizes_heads and not given:
        t.drop("rotated_query", "rotated_key")


def _rotate_heads(t: Walk, layer: FusedLayer) -> None:
    """`FusedLayer._rotated`: normalized heads are copies, made from copies without gaps where each is a row."""
    if layer.family.heads_together:
        t.take(rotated_query=layer.query, rotated_key=layer.key)
    elif layer.family.normalizes_heads:
        t.take(copy=layer.query, rotated_query=layer.query)
        t.drop("copy")
        t.take(copy=layer.key, rotated_key=layer.key)
        t.drop("copy")


def take_kept(t: Walk, layer: FusedLayer) -> None:
    """What a layer keeps that does not recompute."""
    t.take(
        x=layer.stream,
        qkv=layer.of(layer.qkv.outputs),
        **layer.given,
        qkv_low=layer.low(layer.qkv),
        output_low=layer.low(layer.output),
        **{"attention_added" if layer.family.ends_with_norms else "middle": layer.stream},
        gate_up=layer.of(layer.gate_up.outputs),
        gate_up_low=layer.low(layer.gate_up),
        down_low=layer.low(layer.down),
        mlp_added=layer.ended(),
    )


def _drop_attended(t: Walk, layer: FusedLayer) -> None:
    t.drop("qkv", *_found_anew(layer), "qkv_low", "output_low")
    if layer.family.ends_with_norms:
        t.drop("attention_added")


def _found_anew(layer: FusedLayer) -> tuple[str, ...]:
    """What attention gives and a layer that recomputes does not keep: what is kept stays until the layer is done."""
    return () if layer.keeps_attention else tuple(layer.given)


def _mlp(t: Walk, layer: FusedLayer) -> None:
    """`FusedLayer._mlp`; leaves `out`, `gate_up` and the low products."""
    if layer.experts is not None:
        return _mixture(t, layer, layer.experts)
    t.take(normalized=layer.begun())
    _group_forward(t, layer, layer.gate_up, "gate_up", "gate_up_low")
    t.drop("normalized")
    t.take(product=layer.of(layer.inner))
    _group_forward(t, layer, layer.down, "mlp_added" if layer.family.ends_with_norms else "out", "down_low")
    t.drop("product")
    if layer.family.ends_with_norms:
        t.take(out=layer.stream)
    return None


def _mlp_in_tiles(t: Walk, layer: FusedLayer) -> None:
    """`FusedLayer._mlp_in_tiles`."""
    if layer.tokens <= layer.mlp_tile_tokens or layer.experts is not None:
        return _mlp(t, layer)
    t.take(out=layer.stream, gate_up_weight=layer.gate_up.dense_bytes, down_weight=layer.down.dense_bytes)
    before: tuple[str, ...] = ()
    for tokens, suffix, _ in _tiles(layer):
        t.take(normalized=layer.begun(tokens))
        _group_forward(t, layer, layer.gate_up, "gate_up", "gate_up_low", tokens, weight_is_there=True)
        t.drop("gate_up_low")
        product = f"product{suffix}"
        t.take(**{product: layer.of(layer.inner, tokens)})
        t.drop("normalized", "gate_up", *before)  # the one before is there until there is another
        _group_forward(t, layer, layer.down, "down", "down_low", tokens, weight_is_there=True)
        t.drop("down_low")
        t.passing(ended=layer.ended(tokens))
        t.drop("down")
        before = (product,)
    t.drop("gate_up_weight", "down_weight", *before)
    return None


class _Tile(NamedTuple):
    """Tokens that go through the MLP together."""

    tokens: int
    suffix: str = ""
    """What the names of its gradients end with."""
    down_weight_is_there: bool = False
    """Dense, for all tiles."""


def _tiles(layer: FusedLayer) -> Iterator[_Tile]:
    """The first whole ones, and the rest."""
    whole, rest = divmod(layer.tokens, layer.mlp_tile_tokens)
    sizes = [layer.mlp_tile_tokens] * min(whole, TILES_WALKED) + ([rest] if rest else [])
    for number, tokens in enumerate(sizes):
        yield _Tile(tokens, f" of tile {number}", down_weight_is_there=True)


def _group_forward(
    t: Walk,
    layer: FusedLayer,
    group: Group,
    output: str,
    low: str,
    tokens: int | None = None,
    *,
    weight_is_there: bool = False,
) -> None:
    """`LinearGroup.forward`; leaves its output and the low product under the given names."""
    if not weight_is_there:
        t.take(weight=group.dense_bytes)
    t.take(**{output: layer.of(group.outputs, tokens)})
    if not weight_is_there:
        t.drop("weight")
    _low(t, layer, group, low, tokens)


def _low(t: Walk, layer: FusedLayer, group: Group, name: str, tokens: int | None = None) -> None:
    """`LinearGroup.low`: the dropped input is made for the product alone."""
    drops = layer.drops and group.adapters > 0
    if drops:
        t.take(dropped=layer.of(group.inputs, tokens))
    t.take(**{name: layer.low(group, tokens)})
    if drops:
        t.drop("dropped")


# --- backward


def _mlp_backward(t: Walk, layer: FusedLayer, *, recomputes: bool) -> None:
    """`FusedLayer._mlp_backward`, or `MixtureLayer`'s; leaves `middle_grad` and the gradients of the MLP's adapters."""
    if layer.experts is not None:
        _mixture_backward(t, layer, layer.experts)
    elif not recomputes:
        _mlp_tile_backward(t, layer, _Tile(layer.tokens), recomputes=False)
    elif layer.tokens <= layer.mlp_tile_tokens:
        again = layer.family.ends_with_norms
        t.take(gate_up_weight=layer.gate_up.dense_bytes, down_weight=layer.down.dense_bytes if again else 0)
        _mlp_tile_backward(t, layer, _Tile(layer.tokens, down_weight_is_there=again), recomputes=True)
        t.drop("gate_up_weight", "down_weight")
    else:
        _mlp_tiles_backward(t, layer)


def _mlp_tiles_backward(t: Walk, layer: FusedLayer) -> None:
    """`FusedLayer._mlp_backward` over more than one tile; the adapters' gradients are summed in float32."""
    gradients = _mlp_gradients(layer)
    sums = {f"{name} summed": 2 * size for name, size in gradients.items()}
    t.take(gate_up_weight=layer.gate_up.dense_bytes, down_weight=layer.down.dense_bytes, middle_grad=layer.stream)
    before: list[str] = []
    for number, tile in enumerate(_tiles(layer)):
        _mlp_tile_backward(t, layer, tile, recomputes=True)
        t.drop(f"middle_grad{tile.suffix}")
        if number == 0:
            t.take(**sums)
        t.drop(*before)
        before = [f"{name}{tile.suffix}" for name in gradients]
    t.take(**gradients)
    t.drop("gate_up_weight", "down_weight", *sums, *before)


def _mlp_gradients(layer: FusedLayer) -> dict[str, int]:
    """The gradients of the MLP's adapters in the order of their sums: of each group's A, and of its Bs."""
    found: dict[str, int] = {}
    for group, name in ((layer.gate_up, "gate_up"), (layer.down, "down")):
        if group.adapters:
            *of_b, of_a = _gradients(layer, group, name).items()
            found |= dict([of_a, *of_b])
    return found


def _mlp_tile_backward(t: Walk, layer: FusedLayer, tile: _Tile, *, recomputes: bool) -> None:
    """`FusedLayer._mlp_tile_backward`; leaves `middle_grad` and gradients, with the tile's suffix to their names."""
    tokens, suffix = tile.tokens, tile.suffix
    inner, stream, ends = layer.of(layer.inner, tokens), layer.of(layer.hidden, tokens), layer.family.ends_with_norms
    t.take(normalized=layer.begun(tokens))
    if recomputes:
        _group_forward(t, layer, layer.gate_up, "gate_up", "gate_up_low", tokens, weight_is_there=True)
    if recomputes and ends:
        t.take(product=inner)
        _group_forward(t, layer, layer.down, "mlp_added", "down_low", tokens, weight_is_there=True)
        t.drop("product")
    t.take(down_grad=layer.ended(tokens))
    if recomputes and ends:
        t.drop("mlp_added")
    t.take(down_low_grad=layer.low(layer.down, tokens))
    _input_gradient(t, layer, layer.down, "product", tokens, weight_is_there=tile.down_weight_is_there)
    if recomputes and not ends:
        _low(t, layer, layer.down, "down_low", tokens)
    _adapter_gradients(t, layer, layer.down, "down", inner, suffix)
    t.drop("product", "down_grad")
    t.take(low_grad=layer.low(layer.gate_up, tokens))
    t.drop("down_low_grad")
    _adapter_gradients(t, layer, layer.gate_up, "gate_up", stream, suffix)
    t.drop("normalized")
    middle_grad = f"middle_grad{suffix}"
    begun = "normalized_grad" if layer.family.begins_with_norms else middle_grad
    _input_gradient(t, layer, layer.gate_up, begun, tokens, weight_is_there=recomputes)
    if layer.family.begins_with_norms:
        t.take(**{middle_grad: stream})
        t.drop(begun)
    t.drop("low_grad")
    if recomputes:
        t.drop("gate_up", "gate_up_low", "down_low")


def _adapter_gradients(t: Walk, layer: FusedLayer, group: Group, name: str, input_bytes: int, suffix: str = "") -> None:
    """`LinearGroup.adapter_gradients`: of each B, and then of A, for which the input is dropped out anew."""
    if not group.adapters:
        return
    *of_b, of_a = _gradients(layer, group, name, suffix).items()
    t.take(**dict(of_b))
    if layer.drops:
        t.take(dropped=input_bytes)
    t.take(**dict([of_a]))
    if layer.drops:
        t.drop("dropped")


def _gradients(layer: FusedLayer, group: Group, name: str, suffix: str = "") -> dict[str, int]:
    """Those of a group's adapters by name."""
    *of_b, of_a = group.gradients(layer.rank)
    return {
        **{f"{name}_b{n}_gradients{suffix}": size for n, size in enumerate(of_b)},
        f"{name}_a_gradients{suffix}": of_a,
    }


def _input_gradient(
    t: Walk, layer: FusedLayer, group: Group, name: str, tokens: int | None = None, *, weight_is_there: bool = False
) -> None:
    """`LinearGroup.input_gradient`; with dropout the adapters' part is made apart."""
    if not weight_is_there:
        t.take(weight=group.dense_bytes)
    t.take(**{name: layer.of(group.inputs, tokens)})
    if not weight_is_there:
        t.drop("weight")
    t.passing(apart=layer.of(group.inputs, tokens) if layer.drops and group.adapters else 0)


def _attention_backward(t: Walk, layer: FusedLayer, *, recomputes: bool) -> None:
    """`FusedLayer._attention_backward`, and the end of `Attended` where the layer had made it anew."""
    t.take(output_grad=layer.ended(), low_grad=layer.low(layer.output))
    _adapter_gradients(t, layer, layer.output, "output", layer.query)
    _input_gradient(t, layer, layer.output, "attention_output_grad")
    t.take(qkv_grad=layer.of(layer.qkv.outputs))
    _rotate_heads(t, layer)
    t.passing(**{f"attention {number}": size for number, size in enumerate(layer.attention.workspace)})
    if layer.family.normalizes_heads:
        t.drop("rotated_query", "rotated_key")
        _head_norms_backward(t, layer)
    t.drop("attention_output_grad", "low_grad", "output_grad")
    if recomputes:
        t.drop(*_found_anew(layer), "output_low", "qkv")
    if recomputes and layer.family.ends_with_norms:
        t.drop("attention_added")


# --- mixtures of experts


def _mixture(t: Walk, layer: FusedLayer, experts: Experts) -> None:
    """`MixtureLayer._mlp`; leaves `out`."""
    t.take(normalized=layer.stream)
    _route(t, layer, experts)
    t.passing(experts=experts.forward_bytes())
    t.take(out=layer.stream)
    t.drop("normalized", "chosen", "probabilities")


def _route(t: Walk, layer: FusedLayer, experts: Experts) -> None:
    """`Router.__call__`; leaves the `chosen` experts, and their `probabilities` in the router's type."""
    count, each = experts.mixture.experts, experts.mixture.experts_per_token
    t.take(logits=layer.of(count), softmax=layer.per_expert(count, FP32_BYTES))
    t.take(chosen=layer.per_expert(each, INDEX_BYTES), probabilities=layer.per_expert(each, FP32_BYTES))
    t.drop("logits", "softmax")


def _mixture_backward(t: Walk, layer: FusedLayer, experts: Experts) -> None:
    """`MixtureLayer._mlp_backward`; leaves `middle_grad`."""
    count, each = experts.mixture.experts, experts.mixture.experts_per_token
    t.take(normalized=layer.stream)
    _route(t, layer, experts)
    t.passing(experts=experts.backward_bytes())
    t.take(normalized_grad=layer.stream, probabilities_grad=layer.per_expert(each, FP32_BYTES))
    t.passing(
        softmax=layer.per_expert(count, FP32_BYTES),
        softmax_grad=layer.per_expert(count, FP32_BYTES),
        logits_grad=layer.of(count),
        router_grad=layer.stream,
    )
    t.take(middle_grad=layer.stream)
    t.drop("normalized", "normalized_grad", "chosen", "probabilities", "probabilities_grad")


def _head_norms_backward(t: Walk, layer: FusedLayer) -> None:
    """`FusedLayer._head_norms_backward`: of the queries, whose rows are there until the keys' are, and of the keys."""
    if layer.family.heads_together:
        t.take(rows=layer.query, key_rows=layer.key)
        t.drop("rows", "key_rows")
        return
    t.take(gradient_copy=layer.query, part_copy=layer.query, rows=layer.query)
    t.drop("gradient_copy", "part_copy")
    t.take(gradient_copy=layer.key, part_copy=layer.key, key_rows=layer.key)
    t.drop("gradient_copy", "part_copy", "rows", "key_rows")


def _qkv_backward(t: Walk, layer: FusedLayer, *, first: bool) -> None:
    """The rest of `FusedLayer.backward`; nobody asks for the gradient to the first layer's input."""
    t.take(low_grad=layer.low(layer.qkv), normalized=layer.begun())
    _adapter_gradients(t, layer, layer.qkv, "qkv", layer.stream)
    t.drop("normalized")
    if first:
        return
    _input_gradient(t, layer, layer.qkv, "normalized_grad" if layer.family.begins_with_norms else "x_grad")
    t.drop("qkv_grad")
    if layer.family.begins_with_norms:
        t.take(x_grad=layer.stream)
