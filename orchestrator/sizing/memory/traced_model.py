"""Bytes of the decoder layers of a model that prepare traced (`api/layer_trace`), each kind of layer by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.api import trainer_facts
from orchestrator.api.layer_trace import (
    KIND_LETTERS,
    EndInstants,
    ExpertInstants,
    InTokens,
    LayerKind,
    ModelTrace,
)
from orchestrator.sizing.memory.handwritten_layer import LayerBytes


def kinds_bytes(
    trace: ModelTrace, *, recomputes: bool, tokens: int, attention_bytes: Sequence[int]
) -> tuple[LayerBytes, ...]:
    """What layers of each kind take in a micro-batch of so many tokens; each kind's attention has its own workspace."""
    first_kind, ends = trace.layers[0], trace.recomputed if recomputes else trace.whole
    return tuple(
        _layer_bytes(kind, recomputes, ends if letter == first_kind else None, tokens, workspace)
        for letter, kind, workspace in zip(KIND_LETTERS, trace.kinds, attention_bytes, strict=False)
    )


def operations(trace: ModelTrace, recomputing: int, tokens: float) -> float | None:
    """How many operations the host starts in both passes of a micro-batch through all layers, of which the first ones
    recompute; None where a trace does not tell."""
    if not all(kind.whole.operations and kind.recomputed.operations for kind in trace.kinds):
        return None
    total = 0.0
    for letter, kind in zip(KIND_LETTERS, trace.kinds, strict=False):
        again, once = trace.layers[:recomputing].count(letter), trace.layers[recomputing:].count(letter)
        total += again * _value(kind.recomputed.operations, tokens) + once * _value(kind.whole.operations, tokens)
    return total


def end_bytes(end: EndInstants, tokens: int) -> tuple[int, int]:
    """While the loss is computed, and at the most from there back to the last layer, beside what layers keep."""
    return _bytes(end.loss, tokens), _largest(end.norm, tokens)


def shared_bytes(trace: ModelTrace, tokens: int) -> int:
    """What all layers of a pass get beside their input; 0 where a trace does not tell."""
    return _bytes(trace.whole.shared, tokens)


def left_bytes(end: EndInstants, tokens: int) -> int:
    """What a record of so many tokens leaves that has gone through the decoder, beside what layers keep."""
    return _bytes(end.left, tokens)


def outside_bytes(end: EndInstants, tokens: int) -> int:
    """At the most before the first layer, and in the backward pass from it on."""
    return _largest(end.outside, tokens)


def _layer_bytes(
    kind: LayerKind, recomputes: bool, ends: EndInstants | None, tokens: int, attention_bytes: int
) -> LayerBytes:
    layer = kind.recomputed if recomputes else kind.whole
    kept = _bytes(layer.kept, tokens)
    mixing, mixing_back = _expert_bytes(kind.experts, tokens)
    with_workspaces = max(
        _largest(layer.attention, tokens) + attention_bytes,
        _largest(layer.experts_again, tokens) + mixing,
        _largest(layer.experts_backward, tokens) + mixing_back,
    )
    backward_peak = max(_largest(layer.backward, tokens), with_workspaces)
    return LayerBytes(
        kept=kept,
        first_kept=kept if ends is None else _bytes(ends.first_kept, tokens),
        released=0 if ends is None else _bytes(ends.released, tokens),
        forward_peak=max(_largest(layer.forward, tokens), _largest(layer.experts, tokens) + mixing),
        backward_peak=backward_peak,
        # What it takes but for these is `outside_bytes`, less than elsewhere: its input needs no gradient.
        first_backward_peak=with_workspaces if ends is not None and ends.outside else backward_peak,
        gradients=kind.gradient_bytes,
    )


def _expert_bytes(experts: ExpertInstants | None, tokens: int) -> tuple[int, int]:
    """What either pass of routed experts takes by the way: they take a tile of rows at a time."""
    if experts is None:
        return 0, 0
    rows = min(tokens * experts.rows_per_token, trainer_facts.EXPERT_TILE_TOKENS)
    return _largest(experts.forward, rows), _largest(experts.backward, rows)


def _largest(instants: Iterable[InTokens], tokens: int) -> int:
    return max((_bytes(each, tokens) for each in instants), default=0)


def _bytes(polynomial: InTokens, tokens: int) -> int:
    return round(_value(polynomial, tokens))


def _value(polynomial: InTokens, tokens: float) -> float:
    return sum(coefficient * tokens**power for power, coefficient in enumerate(polynomial))
