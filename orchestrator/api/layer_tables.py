"""The format of traced layers (`traced_layers.json`): by model type and `TableKey` what a decoder layer takes.

A table has a polynomial for what a layer keeps ("kept"), what the first one keeps ("first"), what of that is released
before the loss ("released") and what is alive at the loss ("loss"), and a list of moments for each part of a step that
can be the peak ("forward", "backward", "norm"). A polynomial is bytes for each product of widths, `{"th": 2}` for 2
bytes x tokens x hidden size; a moment is what is at work, if that takes bytes of its own, and a polynomial.

Letters: t tokens, h hidden size, i inner size (of a mixture: of what is shared), q and k widths of all query and all
key heads, p q + 2 k, n query heads, m key heads, d head size, r rank, e experts, s experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from orchestrator.api import trainer_facts
from orchestrator.api.package_data import traced_layers

Polynomial = Mapping[str, float]
Moment = tuple[str, Polynomial]
ATTENTION, EXPERTS_FORWARD, EXPERTS_BACKWARD = "attention workspace", "experts forward", "experts backward"
"""What can be at work: attention's backward pass with its workspace, and either pass of routed experts."""
QUERY_AND_VALUE = frozenset({"q_proj", "v_proj", "qkv_proj", "query_key_value"})
"""Targets of few adapters, as architectures name them. With any other target, all matrices are taken to have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableKey:
    """Which of an architecture's tables a job is sized by."""

    few: bool
    """Whether only matrices of queries and values have adapters."""
    dora: bool
    recomputes: bool
    drops: bool
    """Whether the adapters' inputs are dropped out."""

    def __str__(self) -> str:
        adapters = ("few" if self.few else "all") + (" dora" if self.dora else "")
        return f"{adapters}, {'recomputed' if self.recomputes else 'kept'}, {'dropped' if self.drops else 'whole'}"

    @classmethod
    def every(cls) -> Iterator[TableKey]:
        """All tables of an architecture, in the file's order."""
        no_and_yes = (False, True)
        for dora, few, recomputes, drops in product(no_and_yes, repeat=4):
            yield cls(few=few, dora=dora, recomputes=recomputes, drops=drops)


def few_targets(names: Iterable[str]) -> bool:
    """Whether no other matrices have adapters than those of queries and values."""
    return QUERY_AND_VALUE.issuperset(names)


def has_table(model_type: str, *, use_dora: bool, experts: bool) -> bool:
    """Whether it is known before prepare what layers of this type take: traced, or written by hand."""
    if experts:
        return False
    if model_type in trainer_facts.HANDWRITTEN_TYPES and not use_dora:
        return True
    return model_type in traced_layers()
