"""When something may be tried, and how often: the controller's waits, each with its bound.

Safe to share between threads; nothing here sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Clock = Callable[[], float]


class Backoff:
    """Which commands have to wait, and how long."""

    def __init__(self, base_seconds: float, max_seconds: float, clock: Clock = time.monotonic) -> None:
        self._base_seconds = base_seconds
        self._max_seconds = max_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[str, tuple[int, float]] = {}

    def ready(self, key: str) -> bool:
        """Whether the command may be tried now."""
        with self._lock:
            return self._clock() >= self._failures.get(key, (0, 0.0))[1]

    def failed(self, key: str) -> float:
        """Note a failure; the seconds to wait."""
        with self._lock:
            count = self._failures.get(key, (0, 0.0))[0]
            seconds = min(self._base_seconds * 2.0 ** min(count, 30), self._max_seconds)
            self._failures[key] = (count + 1, self._clock() + seconds)
            return seconds

    def succeeded(self, key: str) -> None:
        """Forget earlier failures."""
        with self._lock:
            self._failures.pop(key, None)

    def forget_all_but(self, keys: set[str]) -> None:
        """Keep only what is still asked for, and what still has to wait."""
        with self._lock:
            now = self._clock()
            kept = {key: failure for key, failure in self._failures.items() if key in keys or failure[1] > now}
            self._failures = kept


class Allowance:
    """So many a second; what was not used is saved up for `saved_seconds`."""

    def __init__(self, per_second: float, saved_seconds: float = 60.0, clock: Clock = time.monotonic) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second * saved_seconds)
        self._clock = clock
        self._lock = threading.Lock()
        self._left, self._counted_at = self._most, clock()

    def take(self) -> bool:
        """Whether one more is allowed now, which uses it up."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._counted_at) * self._per_second)
            self._counted_at = now
            if self._left < 1:
                return False
            self._left -= 1
            return True
