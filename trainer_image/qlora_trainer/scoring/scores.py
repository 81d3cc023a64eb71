"""Figures and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api.reasons import Reason

CONFIDENCE = 0.95
"""Of the intervals that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure, and where it lies with some confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of all who answered."""

    adapter: Interval
    base: Interval
    holder: Interval | None
    """None where nobody had the alias, or where he did not answer."""
    over_base: Interval
    """How much better the adapter is."""
    over_holder: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate of an alias says."""

    passed: bool
    reason: Reason
    words: str
    """Every rule with its figures, in a sentence."""
