"""The exit statuses of `qlora`, for scripts. `qlora --help` prints this table; errors find their status here."""

from __future__ import annotations

from enum import IntEnum

from orchestrator.errors import (
    JobFailed,
    NotFound,
    OrchestratorError,
    ServiceNotRunning,
    TransientError,
    WaitTimedOut,
)


class ExitStatus(IntEnum):
    """What a command says to the script that called it."""

    OK = 0
    JOB_FAILED = 1
    INVALID = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    TIMED_OUT = 5
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """The status in words."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitStatus.OK: "done; for run and wait: the job succeeded",
    ExitStatus.JOB_FAILED: "the job failed or was cancelled",
    ExitStatus.INVALID: "wrong usage, an invalid manifest, or a request that cannot be carried out",
    ExitStatus.NOT_FOUND: "there is no such object",
    ExitStatus.UNAVAILABLE: "the service is not running, or something it needs did not answer",
    ExitStatus.TIMED_OUT: "the timeout was over first",
    ExitStatus.INTERRUPTED: "interrupted with Ctrl-C; a job that was followed goes on",
}


def status_of(error: OrchestratorError) -> ExitStatus:
    """The status that stands for an error."""
    match error:
        case NotFound():
            return ExitStatus.NOT_FOUND
        case WaitTimedOut():
            return ExitStatus.TIMED_OUT
        case ServiceNotRunning() | TransientError():
            return ExitStatus.UNAVAILABLE
        case JobFailed():
            return ExitStatus.JOB_FAILED
        case _:
            return ExitStatus.INVALID
