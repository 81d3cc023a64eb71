"""How a stage ends: the errors that carry its exit code, and the termination message.

    StageError
    |-- UserError       80  the job asks for something that cannot work: say what to change
    |-- Transient       81  the surroundings failed: the same attempt may succeed later
    |                   87  ... once credentials are renewed or granted what they lack: a new attempt reads them anew
    |-- OutOfMemory     82  the plan does not fit the card
    |-- DivergedError   83  the loss is not a number any more
    |-- FencedError     84  a newer attempt owns the job's store
    |-- Preempted       85  stopped on request; for train it carries how far training came
    `-- BrokenGpu       86  the card or its driver failed: another card may do

An error's exit code is the stage's verdict. Every message says what happened, where, and what to do about it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import StageResult, TrainResult
from orchestrator.api.task import TERMINATION_LOG_VARIABLE

DEFAULT_TERMINATION_LOG = "/dev/termination-log"

log = logging.getLogger(__name__)


class StageError(Exception):
    """Base of all errors that a stage raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def reason(self) -> Reason:
        """What the exit code stands for."""
        return self.exit_code.reason


class UserError(StageError):
    """The job asks for something that cannot work; trying again ends the same way."""

    exit_code = ExitCode.USER_ERROR


class Transient(StageError):
    """The surroundings failed; trying again later may work, and what was done so far is safe."""

    def __init__(self, message: str, *, of_credentials: bool = False) -> None:
        """`of_credentials`: whoever was asked does not take them, or no longer."""
        super().__init__(message)
        self.exit_code = ExitCode.CREDENTIALS_REFUSED if of_credentials else ExitCode.TRANSIENT_ERROR


class OutOfMemory(StageError):
    """The memory plan does not fit the card."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(StageError):
    """The loss stopped being a number."""

    exit_code = ExitCode.DIVERGED


class FencedError(StageError):
    """A newer attempt owns the job's store; this one must not write any more."""

    exit_code = ExitCode.FENCED


class Preempted(StageError):
    """The stage was asked to stop, and did; `result` tells what is durable (train only)."""

    exit_code = ExitCode.PREEMPTED

    def __init__(self, result: TrainResult | None = None, message: str = "stopped on request") -> None:
        super().__init__(message)
        self.result = result


class BrokenGpu(StageError):
    """The card, or its driver, failed; the job can do nothing about it, and another card may do."""

    exit_code = ExitCode.BROKEN_GPU


def write_result(result: StageResult) -> None:
    """Write the termination message; a reader sees all of it or nothing."""
    path = Path(os.environ.get(TERMINATION_LOG_VARIABLE, DEFAULT_TERMINATION_LOG))
    data = result.to_termination_message().encode()
    try:
        _replace(path, data)
    except OSError:
        # In a pod the log is a bind-mounted file, which cannot be replaced: one write of at most 4 KiB has to do.
        try:
            path.write_bytes(data)
        except OSError as error:
            log.error("the termination message could not be written to %s (%s): %s", path, error, data.decode())


def _replace(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
