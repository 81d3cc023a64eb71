"""Trying again: how often, and after which pauses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Pauses that double from the first to the longest."""

    tries: int | None = None
    """The first one included; None for no end."""
    first_pause_seconds: float
    longest_pause_seconds: float = 60.0

    def pauses(self) -> Iterator[float]:
        """The seconds between one try and the next."""
        pause_seconds, left = self.first_pause_seconds, self.tries
        while left is None or left > 1:
            yield pause_seconds
            pause_seconds = min(2 * pause_seconds, self.longest_pause_seconds)
            left = None if left is None else left - 1


def retry(call: Callable[[], T], backoff: Backoff, *, what: str, may_pass: Callable[[Exception], bool]) -> T:
    """The result of `call`, tried again after errors that may pass; the last error is raised. `what` is for the log."""
    for pause_seconds in backoff.pauses():
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            log.warning("%s (%s); trying again in %.1f s", what, error, pause_seconds)
        time.sleep(pause_seconds)
    return call()
