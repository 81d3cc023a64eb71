"""How a train stage is asked to stop, and how it keeps its word.

Three parts:

- `Stop` holds the request: from SIGTERM, or from the agent's `preempt`, which has its own deadline and may leave more
  time than a signal. While the stage starts up it interrupts whatever is going on; later it only sets a flag.
- `Watchdog` is for a main thread that is deep in a long step when the grace period runs out: it saves in its place.
- `AgentClient` talks to the agent over a unix socket (`orchestrator/api/protocol.py`). Training never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

from pydantic import ValidationError

from orchestrator.api.protocol import MAX_MESSAGE_BYTES, Checkpoint, Checkpointed, Preempt, Progress, to_trainer
from orchestrator.api.results import ProgressReport

REPORT_EVERY_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.5
INTERRUPT = signal.SIGUSR1
"""How another thread of ours interrupts the start-up."""

log = logging.getLogger(__name__)


class StopNow(BaseException):
    """Unwinds the start-up. Not an Exception, because libraries catch those while they are imported."""


class Stop:
    """Whether the stage has been asked to stop, and how long it has."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._deadline = float("inf")
        self._interrupts = True
        self._interrupted = False
        self._checkpoint_wanted = threading.Event()
        self.asked = threading.Event()

    def ask(self, seconds: float) -> None:
        """Ask to stop within so many seconds; the earliest deadline counts."""
        self._deadline = min(self._deadline, monotonic() + seconds)
        self.asked.set()

    def ask_for_checkpoint(self) -> None:
        """Ask for a checkpoint at the next step boundary."""
        self._checkpoint_wanted.set()

    def take_checkpoint_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        wanted = self._checkpoint_wanted.is_set()
        self._checkpoint_wanted.clear()
        return wanted

    def seconds_left(self) -> float:
        """Until the deadline; infinite while nobody asks."""
        return self._deadline - monotonic()

    def end_start_up(self) -> None:
        """Let a request only set the flag from here on; one that is already there still interrupts."""
        self._interrupts = False
        if self.asked.is_set():
            raise StopNow

    def explains(self, error: BaseException) -> bool:
        """Whether an error may come of the interruption: native code, interrupted, may raise one of its own."""
        return isinstance(error, StopNow) or (self._interrupted and isinstance(error, Exception))

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take SIGTERM. Only the main thread may do this."""
        # Python runs its handler when the main thread comes back to bytecode, which a backward pass may delay by many
        # seconds. The byte that C writes into the wake-up socket is there at once, and another thread reads it.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        previous_interrupt = signal.signal(INTERRUPT, self._on_interrupt)
        reader = threading.Thread(target=self._read_signals, args=(receiver,), name="signals", daemon=True)
        reader.start()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            signal.signal(INTERRUPT, previous_interrupt)
            signal.set_wakeup_fd(previous_fd)
            sender.close()
            reader.join()
            receiver.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(self._grace_seconds)
        self._on_interrupt(number, frame)

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._interrupts:
            self._interrupts = False
            self._interrupted = True
            raise StopNow

    def _read_signals(self, receiver: socket.socket) -> None:
        while numbers := receiver.recv(64):
            if signal.SIGTERM in numbers:
                self.ask(self._grace_seconds)


class Watchdog:
    """Rescues the state of the last step boundary when the main thread will not come back in time."""

    def __init__(
        self,
        stop: Stop,
        lock: threading.RLock,
        *,
        seconds_needed: Callable[[], float],
        rescue: Callable[[], None],
    ) -> None:
        """`rescue` runs with `lock`, which is held whenever the state is not that of a step boundary."""
        self._stop = stop
        self._lock = lock
        self._seconds_needed = seconds_needed
        self._rescue = rescue
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch while the body runs."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.asked.wait(POLL_SECONDS):
            if self._over.is_set():
                return
        while (spare_seconds := self._stop.seconds_left() - self._seconds_needed()) > 0:
            if self._over.wait(min(spare_seconds, POLL_SECONDS)):
                return
        with self._lock:
            if not self._over.is_set():
                self._rescue()


class AgentClient:
    """The trainer's end of the agent's socket: the latest figures go out, requests come in.

    An agent that comes new, because it was restarted, is told the latest at once, and not only at the next step.
    """

    def __init__(self, path: Path, stop: Stop) -> None:
        self._path = path
        self._stop = stop
        self._progress: Progress | None = None
        self._checkpointed: Checkpointed | None = None
        self._wake = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-client", daemon=True)

    def start(self) -> None:
        """Begin to talk, in the background."""
        self._thread.start()

    def report(self, report: ProgressReport) -> None:
        """Hand over the latest figures; what was not sent yet is replaced."""
        self._progress = Progress(report=report)

    def announce_checkpoint(self, step: int, uri: str) -> None:
        """Tell that a checkpoint is durable, at once."""
        self._checkpointed = Checkpointed(step=step, uri=uri)
        self._wake.set()

    def close(self) -> None:
        """Send what is left, if the agent takes it within moments."""
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=REPORT_EVERY_SECONDS)

    def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while not self._over.is_set():
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(LONGEST_PAUSE_SECONDS)
                    connection.connect(str(self._path))
                    pause_seconds = FIRST_PAUSE_SECONDS
                    self._talk(connection)
            except OSError as error:
                log.info("the agent at %s is away (%s); training goes on", self._path, error)
            self._over.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    def _talk(self, connection: socket.socket) -> None:
        listener = threading.Thread(target=self._listen, args=(connection,), name="agent-listener", daemon=True)
        listener.start()
        told: tuple[Checkpointed | None, Progress | None] = (None, None)
        last_words = False
        while listener.is_alive() and not last_words:
            last_words = self._over.is_set()
            self._wake.clear()
            # The checkpoint first, so that no figures of a later step overtake the checkpoint that they follow.
            latest = (self._checkpointed, self._progress)
            for message, known in zip(latest, told, strict=True):
                if message is not None and message is not known:
                    connection.sendall(message.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n")
            told = latest
            if not last_words:
                self._wake.wait(REPORT_EVERY_SECONDS)

    def _listen(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            while line := lines.readline(MAX_MESSAGE_BYTES):
                self._obey(line)

    def _obey(self, line: bytes) -> None:
        try:
            message = to_trainer.validate_json(line)
        except ValidationError as error:
            log.warning("a message of the agent makes no sense and is ignored: %s", error)
            return
        match message:
            case Checkpoint():
                self._stop.ask_for_checkpoint()
            case Preempt(deadline_seconds=seconds):
                log.info("the agent asks to stop within %.0f s", seconds)
                self._stop.ask(seconds)
                os.kill(os.getpid(), INTERRUPT)
