"""Hiccups are told from verdicts in the errors that real clients raise, and in what other libraries make of them."""

from __future__ import annotations

import errno
from importlib import import_module
from pathlib import Path

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError, NoCredentialsError
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
from qlora_trainer.outcome import StageError, Transient, UserError
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.source_errors import translated
from qlora_trainer.storage.trouble import Trouble, trouble
from s3fs.errors import translate_boto_error

from orchestrator.api.reasons import Reason

httpx = import_module(HfHubHTTPError.__mro__[1].__module__.split(".")[0])
"""The HTTP library of the hub's client, which has changed with its versions."""
BUSY = (408, 429, 500, 502, 503, 504)


def of_the_hub(status: int, code: str = "") -> Exception:
    """What the hub's client raises for an answer."""
    request = httpx.Request("GET", "http://hub/owner/name/resolve/main/config.json")
    response = httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is, is the client's to say
        hf_raise_for_status(response)
    return caught.value


def of_s3(code: str, status: int, message: str = "no") -> Exception:
    """What s3fs makes of an answer of S3."""
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


def chained(outer: Exception, cause: Exception, *, explicitly: bool = True) -> Exception:
    """An error that a library raised while it handled another."""
    try:
        try:
            raise cause
        except Exception as error:
            if explicitly:
                raise outer from error
            raise outer  # noqa: B904 - as libraries do
    except Exception as error:  # noqa: BLE001 - any, to give it back
        return error


def in_disguise(cause: Exception) -> list[Exception]:
    """The cause alone, and what the hub's client and datasets make of it."""
    wrapped = [
        (cls(f"could not: {cause}"), explicitly)
        for cls in (LocalEntryNotFoundError, DatasetGenerationError, FileNotFoundError)
        for explicitly in (True, False)
    ]
    return [cause, *(chained(outer, cause, explicitly=explicitly) for outer, explicitly in wrapped)]


HICCUPS = [
    *(of_the_hub(status) for status in BUSY),
    *(of_s3(str(status), status) for status in (500, 503)),
    of_s3("SlowDown", 503),
    of_s3("RequestTimeout", 400),
    of_s3("InternalError", 200),
    httpx.RemoteProtocolError("peer closed connection without sending complete message body"),
    httpx.ReadTimeout("timed out"),
    aiohttp.ClientPayloadError("Response payload is not completed"),
    aiohttp.ServerDisconnectedError(),
    EndpointConnectionError(endpoint_url="http://store"),
    IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError(),
]


@pytest.mark.parametrize("cause", HICCUPS, ids=repr)
def test_a_hiccup_is_one_in_every_disguise(cause: Exception) -> None:
    for error in in_disguise(cause):
        assert trouble(error) is Trouble.AWAY, repr(error)
        with pytest.raises(Transient, match="does not answer"), translated("hf://owner/name", field="f"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        of_s3("ExpiredToken", 400, "The provided token has expired."),
        of_s3("RequestTimeTooSkewed", 403),
        of_s3("InvalidToken", 400),
        of_s3("InvalidAccessKeyId", 403),
        PermissionError("The security token included in the request is expired"),
        PermissionError("The difference between the request time and the current time is too large."),
        of_the_hub(401, "ExpiredToken"),
        RestException({"error_code": "UNAUTHENTICATED"}),
    ],
    ids=repr,
)
def test_credentials_that_a_new_attempt_has_anew_are_no_verdict(error: Exception) -> None:
    for each in in_disguise(error):
        assert trouble(each) is Trouble.STALE_CREDENTIALS, repr(each)
        expected = pytest.raises(Transient, match="a new attempt reads them anew")
        with expected as refused, translated("s3://bucket/model", field="f"):
            raise each
        assert refused.value.reason is Reason.CREDENTIALS_REFUSED


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (of_the_hub(404, "EntryNotFound"), Trouble.MISSING),
        (of_the_hub(404, "RepoNotFound"), Trouble.MISSING),
        (of_the_hub(403, "GatedRepo"), Trouble.REFUSED),
        (of_s3("NoSuchKey", 404), Trouble.MISSING),
        (of_s3("NoSuchBucket", 404), Trouble.MISSING),
        (of_s3("AccessDenied", 403, "Access Denied"), Trouble.REFUSED),
        (of_s3("403", 403, "Forbidden"), Trouble.REFUSED),
        (NoCredentialsError(), Trouble.REFUSED),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/file"), Trouble.MISSING),
        (PermissionError(errno.EACCES, "Permission denied", "/data/file"), Trouble.REFUSED),
    ],
    ids=repr,
)
def test_an_answer_about_the_thing_itself_is_the_users(error: Exception, found: Trouble) -> None:
    assert trouble(error) is found
    with pytest.raises(UserError), translated("s3://bucket/model", field="f"):
        raise error


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MlflowException("busy", error_code=TEMPORARILY_UNAVAILABLE), Trouble.AWAY),
        (MlflowException("database is locked"), Trouble.AWAY),
        (MlflowException("no", error_code=PERMISSION_DENIED), Trouble.REFUSED),
    ],
    ids=repr,
)
def test_mlflows_errors_are_told_by_their_status(error: Exception, found: Trouble) -> None:
    assert trouble(error) is found


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), OSError(errno.ENOSPC, "No space left")], ids=repr)
def test_what_is_no_services_business_is_left_alone(error: Exception) -> None:
    assert trouble(error) is None
    with pytest.raises(type(error)), translated("file:///data", field="f"):
        raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (of_s3("ExpiredToken", 400), Transient),
        (of_s3("SlowDown", 503), Transient),
        (of_s3("AccessDenied", 403, "Access Denied"), UserError),
    ],
    ids=repr,
)
def test_the_jobs_own_store_makes_the_same_distinction(
    tmp_path: Path, error: Exception, kind: type[StageError]
) -> None:
    store = JobStore(f"{tmp_path.as_uri()}/job")

    def refuse(_files: object) -> object:
        raise error

    with store.scratch_folder() as folder, pytest.raises(kind):
        store.publish_folder(folder, "adapter", refuse)  # type: ignore[arg-type]  # never returns a manifest
