"""Bytes of a decoder layer that transformers and PEFT compute, with autograd.

`core/sizing` is the caller, for architectures that `core/fused` does not know and for adapters with extras (DoRA).
What such a layer takes is not written down here but traced from transformers' own modules: `benchmarks.layer_trace`
runs a layer on tensors without memory, and `plain_layers.json` keeps, for each instant that can be the peak, a sum of
products of widths. An architecture that is not in there is sized like Llama's layer.

Letters: t tokens, h hidden size, i inner size, q and k widths of all query and all key heads, p q + 2 k, n query
heads, d head size, r rank; `th: 2` is 2 bytes x t x h.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from operator import mul
from typing import Any

from orchestrator.api.results import ModelFacts
from orchestrator.core.flash import Attention
from orchestrator.core.fused import LayerBytes
from orchestrator.core.linears import Linear
from orchestrator.core.timeline import allocated

BF16_BYTES = 2
TABLE_NAME = "plain_layers.json"
UNKNOWN = "llama"
"""The table for an architecture that was not traced."""

Moment = tuple[bool, Mapping[str, float]]
"""Whether flash attention's backward pass is at work, and bytes for each product of widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLayer:
    """One layer, and the micro-batch that goes through it."""

    tokens: int
    facts: ModelFacts
    adapted: tuple[Linear, ...]
    rank: int
    drops: bool
    dora: bool
    attention: Attention

    def values(self) -> dict[str, int]:
        """The widths by letter."""
        query, key = self.attention.query_width, self.attention.key_width
        return {
            "t": self.tokens,
            "h": self.facts.hidden_size,
            "i": self.facts.intermediate_size,
            "q": query,
            "k": key,
            "p": query + 2 * key,
            "n": self.facts.num_attention_heads,
            "d": self.facts.head_dim,
            "r": self.rank,
        }


@cache
def _tables() -> dict[str, Any]:
    return json.loads(files("orchestrator.core").joinpath(TABLE_NAME).read_text("utf-8"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A traced layer: each polynomial as its coefficients, for the same products in the same order."""

    products: tuple[str, ...]
    kept: tuple[float, ...]
    forward: tuple[tuple[bool, tuple[float, ...]], ...]
    backward: tuple[tuple[bool, tuple[float, ...]], ...]

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> _Table:
        """From the file's sparse polynomials."""
        forward: list[Moment] = table["forward"]
        backward: list[Moment] = table["backward"]
        kept: Mapping[str, float] = table["kept"]
        products = tuple(
            sorted({p for polynomial in (kept, *(m for _, m in (*forward, *backward))) for p in polynomial})
        )

        def dense(polynomial: Mapping[str, float]) -> tuple[float, ...]:
            return tuple(polynomial.get(product, 0) for product in products)

        return cls(
            products=products,
            kept=dense(kept),
            forward=tuple((flash, dense(polynomial)) for flash, polynomial in forward),
            backward=tuple((flash, dense(polynomial)) for flash, polynomial in backward),
        )


@cache
def _table(model_type: str, recomputes: bool, drops: bool) -> _Table:
    tables = _tables()
    family = tables.get(model_type) or tables[UNKNOWN]
    return _Table.read(family[f"{'recomputed' if recomputes else 'kept'}, {'dropped' if drops else 'whole'}"])


def plain_layer(layer: PlainLayer, *, recomputes: bool) -> LayerBytes:
    """A layer's bytes; one that recomputes keeps its input."""
    table = _table(layer.facts.model_type, recomputes, layer.drops)
    values, workspace = layer.values(), layer.attention.whole_workspace_bytes
    amounts = [prod(values[letter] for letter in product) for product in table.products]
    extra = _dora_bytes(layer)
    return LayerBytes(
        kept=_bytes(table.kept, amounts) + (0 if recomputes else extra),
        forward_peak=_largest(table.forward, amounts, workspace) + extra,
        backward_peak=_largest(table.backward, amounts, workspace) + extra,
        gradients=_gradient_bytes(layer),
    )


def _largest(moments: Iterable[tuple[bool, tuple[float, ...]]], amounts: Sequence[int], workspace: int) -> int:
    return max(_bytes(coefficients, amounts) + (workspace if flash else 0) for flash, coefficients in moments)


def _bytes(coefficients: Sequence[float], amounts: Sequence[int]) -> int:
    return round(sum(map(mul, coefficients, amounts)))


def _dora_bytes(layer: PlainLayer) -> int:
    """DoRA (Liu et al., 2024) keeps the scaled and the unscaled product, and takes the norm of W + B A."""
    if not layer.dora:
        return 0
    largest = max(linear.parameters for linear in layer.adapted)
    products = 2 * layer.tokens * sum(linear.outputs for linear in layer.adapted) * BF16_BYTES
    return products + 3 * largest * BF16_BYTES


def _gradient_bytes(layer: PlainLayer) -> int:
    each = (
        allocated(layer.rank * linear.inputs * BF16_BYTES)
        + allocated(layer.rank * linear.outputs * BF16_BYTES)
        + (allocated(linear.outputs * BF16_BYTES) if layer.dora else 0)
        for linear in layer.adapted
    )
    return sum(each)
