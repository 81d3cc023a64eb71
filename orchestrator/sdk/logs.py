"""What a job's stages wrote, read from where the embedded service keeps it: `<logs>/stages/<namespace>/<stage>.log`.

`JobHandle.logs` and the CLI call it. Attempts are read in order; following goes on to the next attempt by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from orchestrator.api.job import StageName

LOG_SUFFIX = ".log"
FOLLOW_POLL_SECONDS = 0.2
MAX_LINE_BYTES = 1 << 20
"""A longer line is cut into several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of one attempt's log, without its line feed."""

    stage: StageName
    attempt: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Whose log is read."""

    folder: Path
    """The logs of the job's namespace."""
    job: str
    stage: StageName | None = None
    attempt: int | None = None

    def attempts(self) -> list[tuple[int, StageName, Path]]:
        """The logs that exist and are asked for, by attempt."""
        pattern = re.compile(rf"{re.escape(self.job)}-(prepare|train|publish)-([1-9][0-9]*)")
        found: list[tuple[int, StageName, Path]] = []
        for path in self.folder.glob(f"{self.job}-*{LOG_SUFFIX}"):
            match = pattern.fullmatch(path.stem)
            if match is None:
                continue  # another job, whose name starts with this one's
            number, stage = int(match[2]), cast(StageName, match[1])
            if self.stage in (None, stage) and self.attempt in (None, number):
                found.append((number, stage, path))
        return sorted(found)


def read_lines(query: LogQuery) -> Iterator[LogLine]:
    """All lines that are there now."""
    for line in follow_lines(query, finished=lambda: True):
        if line is not None:
            yield line


def follow_lines(query: LogQuery, finished: Callable[[], bool]) -> Iterator[LogLine | None]:
    """Lines as they are written, until the job is `finished` and all is read.

    None means that nothing is new: the caller pauses for FOLLOW_POLL_SECONDS, and may stop there.
    """
    offsets: dict[Path, int] = {}
    while True:
        at_end = finished()  # asked before reading, so that the last lines are not missed
        attempts = query.attempts()
        for number, stage, path in attempts:
            closed = at_end or number < attempts[-1][0]
            for text, offset in _new_lines(path, offsets.get(path, 0), closed):
                offsets[path] = offset
                yield LogLine(stage=stage, attempt=number, text=text)
        if at_end:
            return
        yield None


def _new_lines(path: Path, offset: int, closed: bool) -> Iterator[tuple[str, int]]:
    """Lines after `offset` with the offset behind them; an unfinished last line only when nothing follows it."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return  # deleted after it was listed
    with stream:
        stream.seek(offset)
        while line := stream.readline(MAX_LINE_BYTES):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES and not closed:
                return
            offset += len(line)
            yield line.decode(errors="replace").rstrip("\r\n"), offset
