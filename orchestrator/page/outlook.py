"""When jobs are expected to start and to end, and who is next: worked out beside the requests, never in one.

Looking ahead takes seconds where a thousand jobs wait, so it is done by one thread, rests ten times as long as it took,
and looks no further than a bound. A page shows what was found last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator.core.forecast import Expectation, Forecast, forecast
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot

log = logging.getLogger(__name__)

REST = 10
"""It rests so many times as long as a look ahead takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What is expected, as of a moment."""

    time: datetime
    places: Mapping[str, int]
    """From 1, in the line for a GPU, by the job's key."""
    forecast: Forecast

    def of(self, key: str) -> Expectation | None:
        """Of one job; None where nothing is expected within the forecast."""
        return self.forecast.jobs.get(key)


class Outlook:
    """Looks ahead while somebody looks at the page."""

    def __init__(self, every_seconds: float, most_events: int) -> None:
        self._every_seconds = every_seconds
        self._most_events = most_events
        self._working = threading.Lock()
        self._rests_until = 0.0
        self._found: Ahead | None = None

    def latest(self, snapshot: Snapshot) -> Ahead | None:
        """What was found last, None before that; begins to look ahead from here if it is time."""
        if time.monotonic() >= self._rests_until and self._working.acquire(blocking=False):
            threading.Thread(target=self._look, args=(snapshot,), name="outlook", daemon=True).start()
        return self._found

    def _look(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            self._found = look_ahead(snapshot, self._most_events)
        except Exception:  # whatever it is, the page goes on without it
            log.exception("what is expected of jobs could not be worked out")
        finally:
            ended = time.monotonic()
            self._rests_until = max(began + self._every_seconds, ended + REST * (ended - began))
            self._working.release()


def look_ahead(snapshot: Snapshot, most_events: int) -> Ahead:
    """Who is next, and what comes of it."""
    places = {claim.key: number for number, claim in enumerate(schedule(snapshot).line, 1)}
    return Ahead(time=snapshot.now, places=places, forecast=forecast(snapshot, most_events=most_events))
