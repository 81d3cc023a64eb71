"""The controller's clock, which says when somebody has put it.

Durations are counted from times in statuses, so a step of the clock (NTP, a machine that was suspended) would make up
hours that nobody ran. It is told from the steady clock of the same machine, which nobody can put.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

MIN_STEP_SECONDS = 10.0
"""Less between two looks is no step: clocks are slewed, and processes wait for their turn."""

log = logging.getLogger(__name__)


def _wall() -> datetime:
    return datetime.now(UTC)


class Clock:
    """The time, and what it was put by since that was last told."""

    def __init__(self, wall: Callable[[], datetime] = _wall, steady: Callable[[], float] = time.monotonic) -> None:
        """`steady` counts seconds while the machine runs."""
        self._wall = wall
        self._steady = steady
        self._last = wall(), steady()
        self.step_seconds = 0.0
        """How far it was put ahead, below zero back."""

    def now(self) -> datetime:
        """What it is; looks for a step, too."""
        wall, steady = self._wall(), self._steady()
        passed = steady - self._last[1]
        step = (wall - self._last[0]).total_seconds() - passed
        self._last = wall, steady
        if abs(step) >= MIN_STEP_SECONDS:
            log.warning(
                "the clock was put by %+.0f s, or the machine was suspended: no stage is counted as having run", step
            )
            self.step_seconds += step
        return wall

    def step_is_told(self) -> None:
        """A decision has taken the step into account."""
        self.step_seconds = 0.0
