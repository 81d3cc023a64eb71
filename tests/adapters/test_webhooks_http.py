"""Requests to webhooks, held against a receiver that verifies them with the standardwebhooks package."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from orchestrator.adapters.webhooks.http import HttpNotifier, body_of
from orchestrator.adapters.webhooks.secrets import EnvironmentSecrets
from orchestrator.adapters.webhooks.signing import keys_of, signatures
from orchestrator.api.job import MlflowStatus, QLoRAJob
from orchestrator.api.notification import Notification, NotificationBody, Webhook
from orchestrator.api.reasons import Reason
from orchestrator.errors import OrchestratorError, PermanentError, TransientError
from orchestrator.settings import Settings
from tests.builders import NOW, make_job, prepared_status
from tests.servers import certificate
from tests.webhook_receiver import SECRET, receiving

NOTIFICATION = Notification(
    number=3, event="job.failed", time=NOW, reason=Reason.USER_ERROR, message="línea 3", attempt=2, recipients=()
)


def notifier(home: Path, allowed: str = "127.0.0.1", secret: str = SECRET, seconds: float = 5.0) -> HttpNotifier:
    settings = Settings(home=home, webhook_allowed_hosts=allowed, webhook_timeout_seconds=seconds)
    return HttpNotifier(settings, EnvironmentSecrets({"QLORA_WEBHOOK_MY_CI_SECRET": secret} if secret else {}))


def send(to: HttpNotifier, url: str, job: QLoRAJob | None = None) -> None:
    to.send(job or make_job(), NOTIFICATION, Webhook(name="my-ci", url=url), "default")


def failure(to: HttpNotifier, url: str) -> OrchestratorError:
    with pytest.raises(OrchestratorError) as raised:
        send(to, url)
    assert "in-the-url" not in str(raised.value)
    assert SECRET not in str(raised.value)
    return raised.value


def test_a_request_is_what_the_standard_says(tmp_path: Path) -> None:
    with receiving() as receiver:
        send(notifier(tmp_path), receiver.url)
        send(notifier(tmp_path), receiver.url)
    (first, body), (second, again) = receiver.told
    assert first == second == "uid-job_3", "the id is the notification's, however often it is sent"
    assert body == again
    assert body["type"] == "job.failed"
    assert body["data"]["message"] == "línea 3"
    assert (body["data"]["namespace"], body["data"]["reason"]) == ("default", "UserError")
    Draft202012Validator(NotificationBody.model_json_schema(by_alias=True)).validate(body)


def test_links_to_mlflow_are_told_where_it_is_a_server() -> None:
    status = prepared_status().model_copy(
        update={
            "mlflow": MlflowStatus(run_id="r1", experiment_id="7", registered_model="team-a-medical", model_version="4")
        }
    )
    told = NotificationBody.model_validate_json(
        body_of(make_job(status=status), NOTIFICATION, "https://me:secret@mlflow.example.com/")
    ).data.mlflow
    assert told.run_url == "https://mlflow.example.com/#/experiments/7/runs/r1"
    assert told.model_uri == "models:/team-a-medical/4"
    assert b"runUrl" not in body_of(make_job(status=status), NOTIFICATION, "sqlite:///mlflow.db")


def test_the_standards_own_example_is_signed_alike() -> None:
    """From the verification example of the specification's libraries: one secret, id, time and body."""
    key = keys_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    found = signatures(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_while_receivers_change_their_secret_both_sign(tmp_path: Path) -> None:
    new = "whsec_" + "A" * 43 + "="
    both = notifier(tmp_path, secret=f"{new} {SECRET}")
    for secret in (new, SECRET):
        with receiving(secret) as receiver:
            send(both, receiver.url)
        assert len(receiver.told) == 1


@pytest.mark.parametrize(
    "secret", ["", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_!", f"{SECRET} " * 5]
)
def test_what_is_no_secret_is_said_and_not_shown(tmp_path: Path, secret: str) -> None:
    error = failure(notifier(tmp_path, secret=secret), "https://ci.example.com/")
    assert isinstance(error, TransientError)
    assert "secret" in str(error).lower()
    assert secret.split()[0] not in str(error) if secret else True


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (500, TransientError, "answered 500"),
        (429, TransientError, "answered 429"),
        (404, TransientError, "answered 404"),
        (410, PermanentError, "answered 410"),
        (302, TransientError, "answered 302"),
    ],
)
def test_what_is_not_confirmed_is_tried_again_unless_it_is_gone(
    tmp_path: Path, status: int, kind: type[Exception], words: str
) -> None:
    with receiving() as receiver, receiving() as other:
        receiver.status, receiver.headers = status, {"Location": other.url}
        error = failure(notifier(tmp_path), receiver.url)
        assert isinstance(error, kind)
        assert words in str(error)
        assert other.requests == 0, "a redirect is not followed"


def test_a_receiver_that_hangs_or_drips_is_left_in_time(tmp_path: Path) -> None:
    with receiving() as hanging, receiving() as dripping:
        hanging.hangs.set()
        dripping.drips = True
        for receiver in (hanging, dripping):
            begun = time.monotonic()
            assert "did not answer within 0.5 s" in str(failure(notifier(tmp_path, seconds=0.5), receiver.url))
            assert time.monotonic() - begun < 3


def test_one_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "cannot be reached (ConnectionRefusedError)" in str(failure(notifier(tmp_path), f"http://127.0.0.1:{port}/"))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_this_network_is_not_reached_by_any_name(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name stands for is looked at when it is connected to: here the name of this machine."""
    with receiving() as receiver:
        port = receiver.url.split(":")[2].split("/")[0]
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]"):
            error = failure(notifier(tmp_path, allowed=""), f"{scheme}://{host}:{port}/")
            assert "no public address" in str(error) or "must be https://" in str(error)
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, port, **more: real("127.0.0.1", port, **more)
        )  # the resolver of whoever owns the name says so
        error = failure(notifier(tmp_path, allowed=""), f"https://rebound.example.com:{port}/")
        assert "its host is no public address" in str(error)
        assert receiver.requests == 0


def test_a_certificate_that_is_not_trusted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pair = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    with receiving(tls=context) as receiver:
        assert "its certificate is not trusted" in str(failure(notifier(tmp_path), receiver.url))
        monkeypatch.setenv("SSL_CERT_FILE", str(pair))
        send(notifier(tmp_path), receiver.url)
        assert len(receiver.told) == 1
