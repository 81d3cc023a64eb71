"""The error tree of the service.

    OrchestratorError
    |-- TransientError        the same call may succeed later: retried with backoff
    |   |-- StoreUnavailable
    |   |-- TrackingUnavailable
    |   `-- WaitTimedOut      what was waited for did not come in time
    |-- RuntimeLost           what runs the stages' holders is gone: the controller starts over, the stages go on
    `-- PermanentError        the same call gives the same answer: tell the user
        |-- InvalidObject     what was handed in breaks a rule; names the field
        |-- AlreadyExists
        |-- NotFound
        |-- Forbidden         the account may not do this
        |-- Conflict          somebody else wrote first; read again and decide anew
        |-- ServiceNotRunning
        |-- MissingExtra      libraries of an optional extra are not installed
        `-- JobFailed         the job ended without the result that was asked for

Adapters translate their library's errors into these and chain the cause. Every message says what happened,
where, and what to do.
"""


class OrchestratorError(Exception):
    """Base of all errors that the service raises on purpose."""


class TransientError(OrchestratorError):
    """The same call may succeed later."""


class StoreUnavailable(TransientError):
    """The object store did not answer."""


class TrackingUnavailable(TransientError):
    """MLflow did not answer."""


class WaitTimedOut(TransientError):
    """What was waited for did not come in time."""


class RuntimeLost(OrchestratorError):
    """What runs the stages' holders is gone; the process that used it must start over."""


class PermanentError(OrchestratorError):
    """The same call gives the same answer."""


class InvalidObject(PermanentError):
    """An object breaks a rule of the contract."""


class AlreadyExists(PermanentError):
    """An object of this name exists."""


class NotFound(PermanentError):
    """There is no such object."""


class Forbidden(PermanentError):
    """The account may not do this, or a quota does not allow it."""


class Conflict(PermanentError):
    """The object changed since it was read."""


class ServiceNotRunning(PermanentError):
    """The embedded service is not up."""


class MissingExtra(PermanentError):
    """Libraries of an optional extra are not installed."""


class JobFailed(PermanentError):
    """The job ended without the result that was asked for."""
