"""Processes by identity, and files that survive a power cut. Standard library only, because the shim uses it.

A pid alone names nobody for long: it is reused. A process is its pid, its start time and the boot it lived in.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DEAD_STATES = ("Z", "X")


class Process(NamedTuple):
    """One process, for good."""

    pid: int
    start_ticks: int
    """Clock ticks after boot at which it started (proc(5), field 22 of stat)."""
    boot_id: str

    @property
    def alive(self) -> bool:
        """Whether it still runs; one that only waits to be reaped does not."""
        stat = _read_stat(self.pid)
        return stat is not None and stat == (self.start_ticks, True) and self.of_this_boot

    @property
    def of_this_boot(self) -> bool:
        """Whether the machine has not been restarted since."""
        return self.boot_id == boot_id()

    def send(self, number: signal.Signals) -> bool:
        """Signal it, and nobody who has its pid after it; False if it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # Looked at after the handle was opened: from here on the handle cannot come to mean another process.
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    @staticmethod
    def of(pid: int) -> Process | None:
        """The running process that has this pid now."""
        stat = _read_stat(pid)
        return Process(pid, stat[0], boot_id()) if stat is not None and stat[1] else None

    @staticmethod
    def current() -> Process:
        """This process."""
        found = Process.of(os.getpid())
        assert found is not None, "a process that asks for itself runs"
        return found


def child_processes() -> Iterator[tuple[str, Process]]:
    """The running children of this process, each with the name of its program (at most 15 characters)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            head, _, tail = (entry / "stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        process = Process.of(int(entry.name)) if int(tail.split()[1]) == os.getpid() else None
        if process is not None:
            yield head.partition("(")[2], process


def boot_id() -> str:
    """What is different after every restart of the machine."""
    return BOOT_ID.read_text().strip()


def _read_stat(pid: int) -> tuple[int, bool] | None:
    """Start time in ticks, and whether the process runs."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command, in parentheses, may hold anything, parentheses included.
    fields = text.rpartition(")")[2].split()
    return int(fields[19]), fields[0] not in DEAD_STATES


def write_durably(path: Path, content: Mapping[str, object] | str) -> None:
    """Replace a file so that after a crash it holds the old content or the new one, and after this call the new one."""
    text = content if isinstance(content, str) else json.dumps(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
