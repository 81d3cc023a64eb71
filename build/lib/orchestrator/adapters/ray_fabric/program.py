"""What the fabric's two programs have in common: logs on stderr, and an end on SIGTERM."""

from __future__ import annotations

import logging
import signal
import sys
from threading import Event
from types import FrameType


def log_to_stderr() -> None:
    """Makes this process log to stderr, where the container's log is."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


def stop_on_signals() -> Event:
    """Set as soon as this process is asked to end. Only the main thread may call this."""
    stop = Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop
