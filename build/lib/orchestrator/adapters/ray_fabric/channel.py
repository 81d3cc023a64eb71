"""The controller's end of the fabric: `ports.AgentChannel`, without Ray and without waiting.

One thread keeps a connection to the head's container and keeps what the stages said last. Calls only read what
is kept, or hand an order to the socket's buffer. All of it may be lost at any time: progress is missing for a
while, and preemption is not acknowledged, so that the runtime falls back on the signal.

Whoever has a head's token can run code in it, and so can say anything here. A head that serves one namespace is
therefore believed about stages of that namespace alone, and what is kept of any head is bounded.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from orchestrator.adapters.ray_fabric.wire import Order, Word
from orchestrator.api.protocol import MAX_MESSAGE_BYTES, Checkpoint, Preempt
from orchestrator.api.results import ProgressReport

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
RETRY_BASE_SECONDS = 0.5
RETRY_MAX_SECONDS = 10.0
FRESH_SECONDS = 20.0
"""A stage of which nothing was heard for so long is missing."""
RESEND_SECONDS = 3.0
"""An order to preempt that was not acknowledged is repeated no sooner."""
HEARD_LIMIT = 10_000
"""Stages that one head may tell of at one time."""
FORGET_SECONDS = 3600.0
"""After its deadline an order to preempt is kept no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a stage said last."""

    progress: ProgressReport | None
    at: float
    """Monotonic."""


@dataclass(slots=True, kw_only=True)
class Preemption:
    """An order to preempt, and how it went."""

    deadline: float
    """Monotonic."""
    sent_at: float = float("-inf")
    told: bool = False


class FabricChannel:
    """One for a controller and a head while it leads: to connect is what starts the head. A context manager."""

    def __init__(self, path: Path, fresh_seconds: float = FRESH_SECONDS, *, namespace: str = "") -> None:
        """A head of the stages of one namespace, or of all."""
        self._path = path
        self._namespace = namespace
        self._fresh_seconds = fresh_seconds
        self._lock = threading.Lock()
        self._head: socket.socket | None = None
        self._heard: dict[str, Heard] = {}
        self._preemptions: dict[str, Preemption] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fabric channel", daemon=True)
        self._thread.start()

    def __enter__(self) -> FabricChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def progress(self) -> Mapping[str, ProgressReport]:
        """The latest figures of each stage that was heard of lately."""
        with self._lock:
            self._forget()
            return {key: heard.progress for key, heard in self._heard.items() if heard.progress is not None}

    def request_checkpoint(self, key: str) -> None:
        """Ask for a checkpoint, if the stage can be reached."""
        with self._lock:
            self._order(Order(key=key, request=Checkpoint()))

    def preempt(self, key: str, deadline_seconds: float) -> bool:
        """Ask to checkpoint and exit; whether the trainer is known to have been told. The earliest deadline counts."""
        now = time.monotonic()
        with self._lock:
            self._forget()
            known = self._preemptions.get(key)
            if known is None or now + deadline_seconds < known.deadline:
                known = self._preemptions[key] = Preemption(deadline=now + deadline_seconds)
            if not known.told and key in self._heard and now - known.sent_at >= RESEND_SECONDS:
                known.sent_at = now
                self._order(Order(key=key, request=Preempt(deadline_seconds=max(0.0, known.deadline - now))))
            return known.told

    def close(self) -> None:
        """Hang up, which ends the head."""
        self._over.set()
        with self._lock:
            self._hang_up()
        self._thread.join()

    # with the lock held

    def _forget(self) -> None:
        now = time.monotonic()
        self._heard = {key: heard for key, heard in self._heard.items() if now - heard.at <= self._fresh_seconds}
        self._preemptions = {
            key: order for key, order in self._preemptions.items() if now - order.deadline <= FORGET_SECONDS
        }

    def _order(self, order: Order) -> None:
        if self._head is None:
            return
        line = order.model_dump_json(by_alias=True).encode() + b"\n"
        try:
            sent = self._head.send(line, socket.MSG_DONTWAIT)
        except OSError as error:
            log.info("an order for stage %s was not sent: %s", order.key, error)
            sent = 0
        if sent != len(line):  # a head that lets its orders pile up is as good as gone
            self._hang_up()

    def _hang_up(self) -> None:
        if self._head is not None:
            try:
                self._head.shutdown(socket.SHUT_RDWR)  # wakes the reader, which closes
            except OSError:
                log.debug("the head was faster")
            self._head = None

    # the thread

    def _run(self) -> None:
        pause_seconds = RETRY_BASE_SECONDS
        while not self._over.is_set():
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as head:
                    head.settimeout(CONNECT_SECONDS)
                    head.connect(str(self._path))
                    head.settimeout(None)
                    if self._converse(head):
                        pause_seconds = RETRY_BASE_SECONDS
            except OSError as error:
                log.info("the fabric at %s is away (%s); only progress is missing", self._path, error)
            self._over.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RETRY_MAX_SECONDS)

    def _converse(self, head: socket.socket) -> bool:
        """Take words until the head hangs up; whether there were any."""
        with self._lock:
            self._head = head
        heard_any = False
        try:
            with head.makefile("rb") as lines:
                while not self._over.is_set() and (line := lines.readline(MAX_MESSAGE_BYTES)):
                    self._take(line)
                    heard_any = True
        finally:
            with self._lock:
                self._head = None
        return heard_any

    def _take(self, line: bytes) -> None:
        try:
            word = Word.model_validate_json(line)
        except ValidationError as error:
            log.warning("a word of the fabric makes no sense and is ignored: %s", error)
            return
        if self._namespace and not word.key.startswith(f"{self._namespace}/"):
            log.warning("the head of namespace %s spoke of stage %s, which is none of its", self._namespace, word.key)
            return
        with self._lock:
            if word.key not in self._heard and len(self._heard) >= HEARD_LIMIT:
                self._heard.pop(next(iter(self._heard)))
            self._heard[word.key] = Heard(progress=word.answer.progress, at=time.monotonic())
            order = self._preemptions.get(word.key)
            if order is not None and isinstance(word.request, Preempt) and word.answer.heard:
                order.told = True


class NamespacedChannel:
    """`ports.AgentChannel` over a head for each namespace, which share nothing. A context manager."""

    def __init__(self, path: Path, namespaces: Iterable[str]) -> None:
        """Each head listens at the path's name in a folder of the namespace's, beside it."""
        self._channels = {
            namespace: FabricChannel(path.parent / namespace / path.name, namespace=namespace)
            for namespace in namespaces
        }

    def __enter__(self) -> NamespacedChannel:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels.values():
            channel.close()

    def progress(self) -> Mapping[str, ProgressReport]:
        """The latest figures of each stage that was heard of lately."""
        return {key: report for channel in self._channels.values() for key, report in channel.progress().items()}

    def request_checkpoint(self, key: str) -> None:
        """Ask for a checkpoint, if the stage's namespace has a head."""
        if (channel := self._of(key)) is not None:
            channel.request_checkpoint(key)

    def preempt(self, key: str, deadline_seconds: float) -> bool:
        """Ask to checkpoint and exit, if the stage's namespace has a head."""
        channel = self._of(key)
        return channel is not None and channel.preempt(key, deadline_seconds)

    def _of(self, key: str) -> FabricChannel | None:
        return self._channels.get(key.partition("/")[0])
