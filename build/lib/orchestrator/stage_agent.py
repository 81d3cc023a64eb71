"""The agent's end of the socket that a trainer reports to (`orchestrator/api/protocol.py`).

Whoever sits beside a trainer runs one `StageAgent`: it keeps the trainer's last words and passes requests on. It is
a convenience: a trainer whose agent is gone trains on, and files and signals do the agent's work. Ray-free.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ValidationError

from orchestrator.api.protocol import MAX_MESSAGE_BYTES, Checkpoint, Checkpointed, Preempt, Progress, from_trainer
from orchestrator.api.results import ProgressReport

log = logging.getLogger(__name__)

MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un, without the closing zero
SEND_SECONDS = 5
"""A trainer that takes longer to read a request counts as gone; SIGTERM reaches it all the same."""


class StageAgent:
    """Serves one trainer at a time; a new connection takes the place of the old one. A context manager."""

    def __init__(self, path: Path) -> None:
        assert len(bytes(path)) <= MAX_SOCKET_PATH_BYTES, f"{path} is too long for a unix socket"
        self._path = path
        self._lock = threading.Condition()
        self._trainer: socket.socket | None = None
        self._progress: ProgressReport | None = None
        self._checkpointed: Checkpointed | None = None
        self._stop_at: float | None = None
        path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(1)
        self._acceptor = threading.Thread(target=self._accept, name=f"agent {path.stem}", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> StageAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def progress(self) -> ProgressReport | None:
        """The last report."""
        return self._progress

    @property
    def checkpointed(self) -> Checkpointed | None:
        """The last checkpoint that was told to be durable."""
        return self._checkpointed

    def request_checkpoint(self) -> bool:
        """Ask for a checkpoint; whether a trainer was there to hear it."""
        return self._send(Checkpoint())

    def preempt(self, deadline_seconds: float) -> bool:
        """Ask the trainer to checkpoint and exit, and any that connects later; whether one was there to hear it."""
        self._stop_at = time.monotonic() + deadline_seconds
        return self._send(Preempt(deadline_seconds=deadline_seconds))

    def wait_for_checkpoint(self, after_step: int, timeout_seconds: float) -> Checkpointed | None:
        """The first checkpoint beyond a step that the trainer tells of in time."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._checkpointed is not None and self._checkpointed.step > after_step, timeout_seconds
            )
            found = self._checkpointed
        return found if found is not None and found.step > after_step else None

    def close(self) -> None:
        """Hang up."""
        # Shut down first: closing alone does not wake a thread that waits in accept().
        for end in (self._server, self._trainer):
            if end is not None:
                _hang_up(end)
        self._acceptor.join()
        # The path stays: by now it may be the socket of the agent that took over.

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            # For writes alone: reads wait for as long as the trainer lives.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
            with self._lock:
                before, self._trainer = self._trainer, connection
            if before is not None:
                _hang_up(before)
            if self._stop_at is not None:
                self._send(Preempt(deadline_seconds=max(0.0, self._stop_at - time.monotonic())))
            threading.Thread(target=self._listen, args=(connection,), name="agent listener", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                while line := lines.readline(MAX_MESSAGE_BYTES):
                    self._take(line)
        except OSError as error:
            log.info("the trainer at %s hung up: %s", self._path, error)
        with self._lock:
            if self._trainer is connection:
                self._trainer = None

    def _take(self, line: bytes) -> None:
        try:
            message = from_trainer.validate_json(line)
        except ValidationError as error:
            log.warning("a message of the trainer at %s makes no sense and is ignored: %s", self._path, error)
            return
        with self._lock:
            match message:
                case Progress(report=report):
                    self._progress = report
                case Checkpointed():
                    self._checkpointed = message
            self._lock.notify_all()

    def _send(self, message: BaseModel) -> bool:
        with self._lock:
            trainer = self._trainer
        if trainer is None:
            return False
        try:
            trainer.sendall(message.model_dump_json(by_alias=True).encode() + b"\n")
        except OSError as error:
            log.info("the trainer at %s did not take a request: %s", self._path, error)
            return False
        return True


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side was faster
        log.debug("the socket was closed already")
    end.close()
