"""A copy of an attempt's log in the job's store, for when its pod and its machine are gone.

The rules of a `StoredLog`:

- Whoever logs only appends to memory; one thread writes what is new to the store, every SAVE_SECONDS and at the end. A
  store that hangs, refuses or is away is told of in the log, once, and costs the stage nothing.
- It is bounded: a file of PART_BYTES, and the one before it. What is older goes. So do the logs of all but the newest
  KEPT_ATTEMPTS attempts.
- It holds what was logged, as the log's own formatter writes it, without secrets: not what native code prints.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from orchestrator.api.formats import EARLIER_LOG_NAME, LOG_NAME
from orchestrator.api.task import StageTask

SAVE_SECONDS = 30.0
PART_BYTES = 1 << 19
KEPT_ATTEMPTS = 64

log = logging.getLogger(__name__)


class StoredLog(logging.Handler):
    """The log of one attempt. Errors of the store go to the log, never to whoever logs."""

    def __init__(self, task: StageTask, formatter: logging.Formatter, *, part_bytes: int = PART_BYTES) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._task = task
        self._part_bytes = part_bytes
        self._part = bytearray()
        self._earlier = b""
        self._unsaved = set[str]()
        """Names of the files that have changed since they were saved."""
        self._is_kept = True
        self._over = threading.Event()
        self._writer = threading.Thread(target=self._save_until_the_end, name="stored-log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line to what is to be saved."""
        line = self.format(record).encode(errors="replace")[: self._part_bytes - 1] + b"\n"
        if len(self._part) + len(line) > self._part_bytes:
            self._earlier, self._part = bytes(self._part), bytearray()
            self._unsaved.add(EARLIER_LOG_NAME)
        self._part += line
        self._unsaved.add(LOG_NAME)

    def end(self, limit_seconds: float) -> None:
        """Save the last lines, unless that takes longer than the limit."""
        self._over.set()
        self._writer.join(limit_seconds)
        if self._writer.is_alive():
            log.warning("the last lines of this log are not in the job's store, which took too long to take them")

    def _save_until_the_end(self) -> None:
        while not self._over.wait(SAVE_SECONDS):
            self._try_to_save()
        self._try_to_save()

    def _try_to_save(self) -> None:
        files = self._take_unsaved()
        try:
            if files:
                self._save(files)
        except Exception as error:  # noqa: BLE001 - nothing about a copy of its log may end a stage
            self._unsaved |= files.keys()
            if self._is_kept:
                log.warning("the copy of this log in the job's store has to wait: %s", error)
            self._is_kept = False
        else:
            self._is_kept = True

    def _take_unsaved(self) -> dict[str, bytes]:
        self.acquire()
        try:
            parts = {EARLIER_LOG_NAME: self._earlier, LOG_NAME: bytes(self._part)}
            files = {name: data for name, data in parts.items() if name in self._unsaved}
            self._unsaved = set[str]()
            return files
        finally:
            self.release()

    def _save(self, files: Mapping[str, bytes]) -> None:
        # Imported here, on this thread: a store's client takes its time to come up.
        from qlora_trainer.storage.backoff import Backoff
        from qlora_trainer.storage.job_store import JobStore

        store = JobStore(self._task.store_uri, Backoff(tries=1, first_pause_seconds=0.0))
        store.keep_log(self._task.stage, self._task.attempt, files, kept_attempts=KEPT_ATTEMPTS)
