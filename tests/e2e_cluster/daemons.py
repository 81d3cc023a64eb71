"""Programs that run beside a test: started with a log, waited for within a bound, stopped in order.

The lab starts everything through here. Nothing needs to be swept after a crash: all of it lives in a process
namespace that dies with the first process in it (`__main__.py`).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 10.0
"""Seconds from asking a program to end until it is killed."""
POLL_SECONDS = 0.1
LOG_LINES_SHOWN = 15


class Daemon:
    """A running program and its log."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


def wait_until(what: str, holds: Callable[[], object], seconds: float, *needed: Daemon) -> None:
    """Wait for a condition; fail when it takes too long, or when a program that it needs has ended."""
    deadline = time.monotonic() + seconds
    while not holds():
        for daemon in needed:
            if not daemon.alive:
                raise AssertionError(
                    f"{daemon.name} ended with {daemon.process.returncode} before {what}:\n{daemon.tail()}"
                )
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {daemon.name}\n{daemon.tail()}" for daemon in needed)
            raise AssertionError(f"{what}: not within {seconds:.0f} s\n{tails}")
        time.sleep(POLL_SECONDS)
