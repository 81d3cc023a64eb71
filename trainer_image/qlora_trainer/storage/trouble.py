"""What an error of a hub, a store or a tracking server means: a hiccup, old credentials, a denial, or nothing there.

Every client has a disguise for a server that is busy: "entry not found" where the hub answered 503, a PermissionError
where a token has expired, an error of data where a download was cut. So an error is judged with all that it came of:
the nearest HTTP status or error code decides, and the types of Python's own only where there is none. Clients are told
by name, because they are imported only where they are needed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, cast


class Trouble(Enum):
    """What may be wrong with a service."""

    AWAY = "away"
    """It is down, busy or cut off: the same call works later."""
    STALE_CREDENTIALS = "stale credentials"
    """They have expired or were rotated, or a clock is wrong: a new process has new ones."""
    REFUSED = "refused"
    """It knows who asks, and says no; or nobody said who asks."""
    MISSING = "missing"
    """What was asked for is not there."""

    @property
    def passes(self) -> bool:
        """Whether the same call may work later without a change to the job."""
        return self in (Trouble.AWAY, Trouble.STALE_CREDENTIALS)


CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "botocore", "aiohttp", "aiobotocore")
BUSY_STATUSES = (408, 425, 429)
CODES = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired"), Trouble.STALE_CREDENTIALS),
    **dict.fromkeys(("InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"), Trouble.STALE_CREDENTIALS),
    **dict.fromkeys(("InvalidAccessKeyId", "InvalidClientTokenId"), Trouble.STALE_CREDENTIALS),
    **dict.fromkeys(("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError"), Trouble.AWAY),
    **dict.fromkeys(("Throttling", "ThrottlingException", "RequestLimitExceeded", "OperationAborted"), Trouble.AWAY),
}
"""Error codes of S3 and STS whose HTTP status says something else or nothing."""
REFUSING = {"NoCredentialsError", "PartialCredentialsError"}
MISSING = {"EntryNotFoundError", "DatasetNotFoundError", "FileNotFoundError", "NotADirectoryError", "IsADirectoryError"}
AWAY = {"LocalEntryNotFoundError", "IncompleteSnapshotError", "XetDownloadError", "RevisionResolutionError"}
"""The hub's client says these when it could not ask, whatever they are derived from."""
MISUSED = {"InvalidURL", "ParamValidationError"}
"""A client's complaints about what it was asked."""
NOT_SERVICE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
STALE_WORDS = re.compile(r"\bexpired\b|request time and the current time|security token.*\binvalid\b", re.IGNORECASE)


def trouble(error: BaseException) -> Trouble | None:
    """What an error means; None where it is not about a service."""
    chain = list(_chain(error))
    for judge in (_by_answer, _by_kind):
        for each in chain:
            if (found := judge(each)) is not None:
                return found
    return None


def is_away(error: BaseException) -> bool:
    """Whether asking again in a moment may do."""
    return trouble(error) is Trouble.AWAY


def is_other_version(error: BaseException) -> bool:
    """Whether a write was refused because the object is not, or no longer, of the version that the write is for."""
    chain = list(_chain(error))
    codes = {_error_code(each) for each in chain}
    return bool(codes & {"PreconditionFailed", "ConditionalRequestConflict"}) or isinstance(error, FileExistsError)


def is_not_implemented(error: BaseException) -> bool:
    """Whether a store, or its client, does not know what was asked of it."""
    codes = {_error_code(each) for each in _chain(error)}
    return "NotImplemented" in codes or isinstance(error, NotImplementedError | TypeError)


def names_in_chain(error: BaseException) -> set[str]:
    """The names of the types of an error and of all that it came of, with those that they are derived from."""
    return {name for each in _chain(error) for name in _names(each)}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came of, nearest first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _by_answer(error: BaseException) -> Trouble | None:
    """From what a server has answered, or from a connection that it did not keep."""
    if (found := CODES.get(_error_code(error))) is not None:
        return found
    status = _http_status(error)
    if status is not None:
        return _by_status(status, error)
    if isinstance(error, PermissionError) and STALE_WORDS.search(str(error)):
        return Trouble.STALE_CREDENTIALS
    names = _names(error)
    if names & REFUSING:
        return Trouble.REFUSED
    if isinstance(error, ConnectionError | TimeoutError) or (_is_clients(error) and not names & MISUSED):
        return Trouble.AWAY
    return None


def _by_status(status: int, error: BaseException) -> Trouble | None:
    if status in BUSY_STATUSES or status >= 500:
        return Trouble.AWAY
    # The hub answers strangers 401 for what they may not see, there or not; with credentials it means those.
    if status == 401 and (_had_credentials(error) or "RepositoryNotFoundError" not in _names(error)):
        return Trouble.STALE_CREDENTIALS
    if status in (401, 403):
        return Trouble.STALE_CREDENTIALS if STALE_WORDS.search(str(error)) else Trouble.REFUSED
    return Trouble.MISSING if status in (404, 410) else None


def _by_kind(error: BaseException) -> Trouble | None:
    """From the type alone."""
    names = _names(error)
    if names & AWAY:
        return Trouble.AWAY
    if names & MISSING:
        return Trouble.MISSING
    if isinstance(error, PermissionError):
        return Trouble.REFUSED
    if isinstance(error, OSError) and error.errno not in NOT_SERVICE and not isinstance(error, FileExistsError):
        return Trouble.AWAY
    return None


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _is_clients(error: BaseException) -> bool:
    return any(kind.__module__.split(".")[0] in CLIENTS for kind in type(error).__mro__)


def _error_code(error: BaseException) -> str:
    """The code in an answer of S3 or STS, as botocore keeps it."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    details: Any = cast("dict[str, Any]", response).get("Error", {})  # Any: botocore's parsed answer
    return str(details.get("Code", ""))


def _had_credentials(error: BaseException) -> bool:
    """Whether the request that was answered said who asks, as far as its client tells."""
    headers: Any = getattr(getattr(getattr(error, "response", None), "request", None), "headers", None)
    return headers is not None and "authorization" in headers


def _http_status(error: BaseException) -> int | None:
    """The status of the answer that an error is about, wherever its client keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        metadata: Any = cast("dict[str, Any]", response).get("ResponseMetadata", {})
        candidates = (metadata.get("HTTPStatusCode"),)
    else:
        asked = getattr(error, "get_http_status_code", None)  # MLflow's
        candidates = (
            getattr(response, "status_code", None),
            getattr(error, "status", None) if _is_clients(error) else None,
            getattr(error, "code", None) if "HTTPError" in _names(error) else None,
            asked() if callable(asked) else None,
        )
    return next((each for each in candidates if isinstance(each, int) and each >= 100), None)
