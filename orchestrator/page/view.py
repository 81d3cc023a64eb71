"""The world as it was read last: once for everybody who looks, at most once an interval, and only while somebody does.

Who comes while another request reads is shown the world as it was before. A world that can no longer be read is shown
as it was, and says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TypeVar

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.core.scheduling.cycle import Schedule, schedule
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.errors import Forbidden, OrchestratorError
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.explanation import snapshot_of
from orchestrator.sizing.hardware import GpuClass

Found = TypeVar("Found")
REST = 4.0
"""The reader rests so many times as long as a look takes it, so that reading never fills its time."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One look at the world."""

    snapshot: Snapshot
    """What this account could read of it."""
    running: bool
    """Whether a controller is at work."""
    sees_queues: bool = True
    sees_cards: bool = True
    whole: bool = True
    """Whether these are all jobs, queues and cards, so that what is decided about them can be told."""
    trouble: str = ""
    """Why this is not the world as it is now; empty where it is."""
    _deciding: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def jobs(self) -> dict[str, QLoRAJob]:
        """By key."""
        return {job.key: job for job in self.snapshot.jobs}

    @property
    def decided(self) -> Schedule:
        """The decision of this moment, made once."""
        with self._deciding:
            return self._schedule

    @cached_property
    def _schedule(self) -> Schedule:
        return schedule(self.snapshot)


class Views:
    """Reads when asked."""

    def __init__(self, connection: Connection, policy: Policy, read_seconds: float, rest: float = REST) -> None:
        self._connection = connection
        self._policy = policy
        self._read_seconds = read_seconds
        self._rest = rest
        self._reading = threading.Lock()
        self._view: View | None = None
        self._fresh_until = 0.0
        self.reads = 0
        """How often the world was looked at."""

    def current(self) -> View:
        """The world as it was read last; raises OrchestratorError where it never could be."""
        known = self._view
        if known is not None and time.monotonic() < self._fresh_until:
            return known
        if not self._reading.acquire(blocking=known is None):
            assert known is not None, "a lock is waited for where there is nothing to show"
            return known
        try:
            if self._view is None or time.monotonic() >= self._fresh_until:
                self._view = self._look(self._view)
            return self._view
        finally:
            self._reading.release()

    def _look(self, known: View | None) -> View:
        began = time.monotonic()
        self.reads += 1
        try:
            found = read_view(self._connection, self._policy)
        except OrchestratorError as error:
            if known is None:
                raise
            found = replace(known, trouble=f"This is how it was at {known.snapshot.now:%H:%M:%S} UTC: {error}")
        ended = time.monotonic()
        self._fresh_until = ended + max(self._read_seconds, self._rest * (ended - began))
        return found


def read_view(connection: Connection, policy: Policy) -> View:
    """What the connection's account may read: everybody's jobs or its namespace's, queues and cards, if it may."""
    jobs, sees_all = _jobs(connection)
    queues: Sequence[QLoRAQueue] | None = _allowed(connection.store.list_queues)
    classes: Sequence[GpuClass] | None = _allowed(connection.gpu_classes)
    return View(
        snapshot=snapshot_of(jobs, queues or (), classes or (), policy, datetime.now(UTC)),
        running=connection.is_running(),
        sees_queues=queues is not None,
        sees_cards=classes is not None,
        whole=sees_all and queues is not None and classes is not None,
    )


def _jobs(connection: Connection) -> tuple[Sequence[QLoRAJob], bool]:
    try:
        return connection.store.list_jobs(), True
    except Forbidden:
        return connection.store.list_jobs(connection.namespace), False


def _allowed(read: Callable[[], Found]) -> Found | None:
    try:
        return read()
    except Forbidden:
        return None
