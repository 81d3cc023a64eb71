"""Bytes of a decoder layer that transformers and PEFT compute, with autograd.

`core/sizing` is the caller, for architectures that `core/fused` does not know and for adapters with extras (DoRA).
What such a layer takes is not written down here but traced from transformers' own modules: `benchmarks.layer_trace`
runs a layer on tensors without memory, and `plain_layers.json` keeps, for each instant that can be the peak, a sum of
products of widths. An architecture that is not in there is sized like Llama's layer.

Letters: t tokens, h hidden size, i inner size, q and k widths of all query and all key heads, p q + 2 k, n query
heads, m key heads, d head size, r rank; `th: 2` is 2 bytes x t x h.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

from orchestrator.api.results import ModelFacts
from orchestrator.core.flash import Attention
from orchestrator.core.fused import LayerBytes
from orchestrator.core.linears import Linear
from orchestrator.core.timeline import allocated

BF16_BYTES = 2
TABLE_NAME = "plain_layers.json"
FEW_TARGETS = frozenset({"q_proj", "v_proj", "qkv_proj", "query_key_value"})
"""Adapters on no more than these were traced apart; on more, a layer is sized as if all its matrices had one."""
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
            "m": self.facts.num_key_value_heads,
            "d": self.facts.head_dim,
            "r": self.rank,
        }


@cache
def _tables() -> dict[str, Any]:
    return json.loads(files("orchestrator.core").joinpath(TABLE_NAME).read_text("utf-8"))


def plain_layer(layer: PlainLayer, *, recomputes: bool) -> LayerBytes:
    """A layer's bytes; one that recomputes keeps its input."""
    table = _table(layer, recomputes)
    values, workspace = layer.values(), layer.attention.whole_workspace_bytes
    return LayerBytes(
        kept=_bytes(table["kept"], values),
        first_kept=_bytes(table["first"], values),
        released=_bytes(table["released"], values),
        forward_peak=_largest(table["forward"], values, workspace),
        backward_peak=_largest(table["backward"], values, workspace),
        gradients=_gradient_bytes(layer),
    )


def final_norm(layer: PlainLayer, *, recomputes: bool) -> tuple[int, int]:
    """Bytes while the loss is computed, and at the most from there back to the last layer, beside what layers keep.

    The last layer's output, the normalized states and the gradient to them are among them.
    """
    table, values = _table(layer, recomputes), layer.values()
    return _bytes(table["loss"], values), _largest(table["norm"], values, 0)


def _table(layer: PlainLayer, recomputes: bool) -> dict[str, Any]:
    tables = _tables()
    family = tables.get(layer.facts.model_type) or tables[UNKNOWN]
    few = {linear.name for linear in layer.adapted} <= FEW_TARGETS
    adapters = ("few" if few else "all") + (" dora" if layer.dora else "")
    return family[f"{adapters}, {'recomputed' if recomputes else 'kept'}, {'dropped' if layer.drops else 'whole'}"]


def _largest(moments: list[Moment], values: Mapping[str, int], workspace: int) -> int:
    return max(_bytes(polynomial, values) + (workspace if flash else 0) for flash, polynomial in moments)


def _bytes(polynomial: Mapping[str, float], values: Mapping[str, int]) -> int:
    return round(sum(count * prod(values[letter] for letter in product) for product, count in polynomial.items()))


def _gradient_bytes(layer: PlainLayer) -> int:
    each = (
        allocated(layer.rank * linear.inputs * BF16_BYTES)
        + allocated(layer.rank * linear.outputs * BF16_BYTES)
        + (allocated(linear.outputs * BF16_BYTES) if layer.dora else 0)
        for linear in layer.adapted
    )
    return sum(each)
