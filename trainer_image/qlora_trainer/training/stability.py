"""Steps whose update would do harm: their loss or gradient norm is no finite number, or the norm leaps.

What is found, and what follows from it, depends on the journal and the step's figures alone, so a resumed attempt does
the same. The figures are those that the loop reads after every step anyway: nothing is asked of the GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from orchestrator.api.formats import JournalRecord, Metric
from orchestrator.api.job import TrainingSpec
from orchestrator.api.losses import values

Response = Literal["stop", "skip", "rollback"]
NORMS_KEPT = 64
FEWEST_NORMS = 16
"""Before there are so many, no norm is a leap."""
NAMED_RECORDS = 8
"""How many records a message names."""


class Stability:
    """Watches the steps, and counts what was done about them."""

    def __init__(self, spec: TrainingSpec, records: Sequence[JournalRecord]) -> None:
        """`records` is the journal of the attempts before."""
        self._spec = spec
        self._norms = deque(values(records, Metric.GRADIENT_NORM)[-NORMS_KEPT:], maxlen=NORMS_KEPT)
        self.skips = _last(records, Metric.SKIPPED_STEPS)
        self.rollbacks = _last(records, Metric.ROLLBACKS)

    def trouble(self, loss: float, norm: float) -> tuple[Response, str] | None:
        """What to do about a step with this loss and gradient norm, and what is wrong with it; None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return self._within_bounds(self._spec.on_non_finite, f"loss {loss}, gradient norm {norm}")
        if self._spec.on_spike == "ignore" or len(self._norms) < FEWEST_NORMS:
            return None
        usual = median(self._norms)
        if norm <= usual * float(self._spec.spike_ratio):
            return None
        return self._within_bounds(self._spec.on_spike, f"loss {loss:.4g}, gradient norm {norm:.4g} after {usual:.4g}")

    def note(self, norm: float) -> None:
        """Remember a step's gradient norm, whatever was done about it."""
        if math.isfinite(norm):
            self._norms.append(norm)

    def note_response(self, response: Response) -> dict[str, float]:
        """Count what was done about a step; the metrics that tell of it."""
        if response == "skip":
            self.skips += 1
            return {Metric.SKIPPED_STEPS: self.skips}
        self.rollbacks += 1
        return {Metric.ROLLBACKS: self.rollbacks}

    def _within_bounds(self, response: Response, what: str) -> tuple[Response, str]:
        if response == "skip" and self.skips >= self._spec.max_skips:
            return "stop", f"{what}, and training.maxSkips ({self._spec.max_skips}) updates are left out already"
        if response == "rollback" and self.rollbacks >= self._spec.max_rollbacks:
            return "stop", f"{what}, and training went back training.maxRollbacks ({self._spec.max_rollbacks}) times"
        return response, what


def numbered(records: Iterable[int]) -> str:
    """Records of the dataset in words, counted from 1; nothing where they are not known."""
    found = sorted(set(records))
    if not found:
        return ""
    named = ", ".join(str(number + 1) for number in found[:NAMED_RECORDS])
    more = f" and {len(found) - NAMED_RECORDS} more" if len(found) > NAMED_RECORDS else ""
    return f"dataset record{'s' if len(found) > 1 else ''} {named}{more}"


def _last(records: Sequence[JournalRecord], metric: Metric) -> int:
    return int(max(values(records, metric), default=0))
