"""Bytes of a decoder layer that transformers and PEFT compute, with autograd.

These are the layers of types without a hand-written one (`sizing/memory/handwritten_layer`), and of all types under
adapters with extras (DoRA). What such a layer takes is not written down here but traced from transformers' own modules:
`benchmarks.layer_trace` runs a layer on tensors without memory, and `api/traced_layers.json` keeps, for each instant
that can be the peak, a sum of products of widths. What attention and routed experts take by the way is
`sizing/memory/attention`'s and `sizing/memory/experts`' business. For an architecture that is not in there Llama's
table stands in, and `sizing/guess` says what that may be wrong by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from operator import mul
from typing import Any

from orchestrator.api.layer_tables import (
    ATTENTION,
    EXPERTS_BACKWARD,
    EXPERTS_FORWARD,
    Moment,
    Polynomial,
    TableKey,
    few_targets,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.package_data import traced_layers
from orchestrator.sizing.memory.attention import Attention
from orchestrator.sizing.memory.experts import Experts
from orchestrator.sizing.memory.handwritten_layer import LayerBytes
from orchestrator.sizing.memory.linear_layers import Linear
from orchestrator.sizing.memory.timeline import BF16_BYTES, allocated

NEAREST = "llama"
"""The table that stands in for that of a model type which was never traced: a guess (`sizing/guess`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedLayer:
    """One layer, and the micro-batch that goes through it."""

    tokens: int
    facts: ModelFacts
    adapted: tuple[Linear, ...]
    rank: int
    drops: bool
    dora: bool
    attention: Attention

    def values(self) -> dict[str, int]:
        """The widths by the letters of `api/layer_tables`."""
        query, key = self.attention.query_width, self.attention.key_width
        mixture = self.facts.mixture
        return {
            "t": self.tokens,
            "h": self.facts.hidden_size,
            "i": self.facts.intermediate_size if mixture is None else mixture.shared_size,
            "q": query,
            "k": key,
            "p": query + 2 * key,
            "n": self.facts.num_attention_heads,
            "m": self.facts.num_key_value_heads,
            "d": self.facts.head_dim,
            "r": self.rank,
            "e": 0 if mixture is None else mixture.experts,
            "s": 0 if mixture is None else mixture.experts_per_token,
        }

    def workspaces(self) -> dict[str, int]:
        """Bytes of whatever is at work at a moment."""
        found = {"": 0, ATTENTION: self.attention.traced_workspace_bytes}
        if self.facts.mixture is not None:
            experts = Experts(tokens=self.tokens, hidden=self.facts.hidden_size, mixture=self.facts.mixture)
            found |= {EXPERTS_FORWARD: experts.forward_bytes(), EXPERTS_BACKWARD: experts.backward_bytes()}
        return found


Coefficients = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A traced layer: each polynomial as its coefficients, for the same products in the same order."""

    products: tuple[str, ...]
    kept: Coefficients
    first: Coefficients
    released: Coefficients
    loss: Coefficients
    forward: tuple[tuple[str, Coefficients], ...]
    backward: tuple[tuple[str, Coefficients], ...]
    norm: tuple[tuple[str, Coefficients], ...]

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> _Table:
        """The table with the file's sparse polynomials."""
        single: dict[str, Polynomial] = {name: table[name] for name in ("kept", "first", "released", "loss")}
        several: dict[str, list[Moment]] = {name: table[name] for name in ("forward", "backward", "norm")}
        polynomials = (*single.values(), *(moment[1] for each in several.values() for moment in each))
        products = tuple(sorted({product for polynomial in polynomials for product in polynomial}))

        def dense(polynomial: Polynomial) -> Coefficients:
            return tuple(polynomial.get(product, 0) for product in products)

        def moments(name: str) -> tuple[tuple[str, Coefficients], ...]:
            return tuple((at_work, dense(polynomial)) for at_work, polynomial in several[name])

        return cls(
            products=products,
            kept=dense(single["kept"]),
            first=dense(single["first"]),
            released=dense(single["released"]),
            loss=dense(single["loss"]),
            forward=moments("forward"),
            backward=moments("backward"),
            norm=moments("norm"),
        )

    def amounts(self, layer: TracedLayer) -> list[int]:
        """The value of every product."""
        values = layer.values()
        return [prod(values[letter] for letter in product) for product in self.products]


def is_traced(model_type: str) -> bool:
    """Whether there is a table for layers of this type."""
    return model_type in traced_layers()


def _table(layer: TracedLayer, recomputes: bool) -> _Table:
    few = few_targets(linear.name for linear in layer.adapted)
    key = TableKey(few=few, dora=layer.dora, recomputes=recomputes, drops=layer.drops)
    return _read(layer.facts.model_type if is_traced(layer.facts.model_type) else NEAREST, key)


@cache
def _read(model_type: str, key: TableKey) -> _Table:
    """One of the package's own tables, of which there are so many: a stranger's model type is none of its keys."""
    return _Table.read(traced_layers()[model_type][str(key)])


def traced_layer_bytes(layer: TracedLayer, *, recomputes: bool) -> LayerBytes:
    """A layer's bytes; one that recomputes keeps its input."""
    table = _table(layer, recomputes)
    amounts, workspaces = table.amounts(layer), layer.workspaces()
    backward_peak = _largest(table.backward, amounts, workspaces)
    return LayerBytes(
        kept=_bytes(table.kept, amounts),
        first_kept=_bytes(table.first, amounts),
        released=_bytes(table.released, amounts),
        forward_peak=_largest(table.forward, amounts, workspaces),
        backward_peak=backward_peak,
        first_backward_peak=backward_peak,
        gradients=_gradient_bytes(layer),
    )


def final_norm(layer: TracedLayer, *, recomputes: bool) -> tuple[int, int]:
    """Bytes while the loss is computed, and at the most from there back to the last layer, beside what layers keep.

    The last layer's output, the normalized states and the gradient to them are among them.
    """
    table = _table(layer, recomputes)
    amounts = table.amounts(layer)
    return _bytes(table.loss, amounts), _largest(table.norm, amounts, {"": 0})


def _largest(moments: Iterable[tuple[str, Coefficients]], amounts: Sequence[int], workspaces: Mapping[str, int]) -> int:
    return max(_bytes(coefficients, amounts) + workspaces[at_work] for at_work, coefficients in moments)


def _bytes(coefficients: Sequence[float], amounts: Sequence[int]) -> int:
    return round(sum(map(mul, coefficients, amounts)))


def _gradient_bytes(layer: TracedLayer) -> int:
    each = (
        allocated(layer.rank * linear.inputs * BF16_BYTES)
        + allocated(layer.rank * linear.outputs * BF16_BYTES)
        + (allocated(linear.outputs * BF16_BYTES) if layer.dora else 0)
        for linear in layer.adapted
    )
    return sum(each)
