"""Requests to webhooks: signed, within a deadline, and to no address that only this service could reach.

Rules:

- `https://` with a certificate that this machine trusts, and public addresses alone, unless an operator allows the
  host.
- The addresses that a host's name stands for are looked at, and it is one of these that is connected to: a name that
  stands for another one a moment later changes nothing.
- No redirect is followed, no proxy of the environment is used, and nothing of an answer is read but its head.
- What is said of a failure names neither the URL, which may hold a login, nor any address: those who may see a job's
  status are not to find out with webhooks what else is in this network.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from orchestrator.adapters.webhooks.signing import keys_of, signatures
from orchestrator.api.job import QLoRAJob
from orchestrator.api.notification import (
    Notification,
    NotificationBody,
    NotifiedJob,
    NotifiedMlflow,
    Webhook,
    webhook_id,
)
from orchestrator.api.words import without_logins
from orchestrator.core.job.webhook_urls import NOT_PUBLIC, is_allowed, is_public, refused_webhook
from orchestrator.errors import PermanentError, TransientError

GONE = 410
PORTS = {"http": 80, "https": 443}


class WebhookSettings(Protocol):
    """What it needs to know."""

    @property
    def webhook_allowed_hosts(self) -> str:
        """Hosts that may be any, by http://, too."""
        ...

    @property
    def webhook_timeout_seconds(self) -> float:
        """How long one may take to answer."""
        ...

    @property
    def tracking_uri(self) -> str:
        """MLflow's, for links to its pages."""
        ...


class WebhookSecrets(Protocol):
    """Where the secrets are."""

    def read(self, namespace: str | None, name: str) -> str:
        """The secret of a webhook of a namespace's jobs, or of a queue where that is None. Raises TransientError."""
        ...


class HttpNotifier:
    """Tells webhooks things. Safe to share between threads."""

    def __init__(self, settings: WebhookSettings, secrets: WebhookSecrets) -> None:
        self._settings = settings
        self._secrets = secrets
        self._tls = ssl.create_default_context()

    def send(self, job: QLoRAJob, notification: Notification, webhook: Webhook, namespace: str | None) -> None:
        """Tell a webhook something, and return once it has answered with 2xx."""
        refusal = refused_webhook(webhook.url, self._settings.webhook_allowed_hosts)
        if refusal is not None:
            raise TransientError(f"its URL {refusal}")
        keys = keys_of(self._secrets.read(namespace, webhook.name))
        body = body_of(job, notification, self._settings.tracking_uri)
        identity, now = webhook_id(job.metadata.uid, notification.number), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "qlora-orchestrator",  # whose version an image, where nothing is installed, does not know
            "webhook-id": identity,
            "webhook-timestamp": str(now),
            "webhook-signature": signatures(keys, identity, now, body),
        }
        status = self._post(urlsplit(webhook.url), headers, body)
        if status == GONE:
            raise PermanentError("answered 410, Gone: it wants no more")
        if not 200 <= status < 300:
            raise TransientError(f"answered {status}")

    def _post(self, url: SplitResult, headers: dict[str, str], body: bytes) -> int:
        """The answer's status."""
        seconds = self._settings.webhook_timeout_seconds
        try:
            with self._connected(url, seconds) as connection:
                path = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
                connection.request("POST", path, body, {**headers, "Connection": "close"})
                with connection.getresponse() as answer:
                    return answer.status
        except ssl.SSLCertVerificationError as error:
            raise TransientError(f"its certificate is not trusted: {error.verify_message}") from error
        except TimeoutError as error:
            raise TransientError(f"did not answer within {seconds:g} s (QLORA_WEBHOOK_TIMEOUT_SECONDS)") from error
        except (OSError, HTTPException) as error:
            raise TransientError(f"cannot be reached ({type(error).__name__})") from error

    @contextmanager
    def _connected(self, url: SplitResult, seconds: float) -> Generator[HTTPConnection]:
        """A connection to the host, which ends when the time is over, whatever is under way then."""
        host, port = url.hostname or "", url.port or PORTS[url.scheme]
        over = time.monotonic() + seconds
        opened = _open(self._addresses(host, port), port, over)
        expired = threading.Event()
        timer = threading.Timer(max(0.0, over - time.monotonic()), _cut, (opened, expired))
        timer.start()
        try:
            wrapped = self._tls.wrap_socket(opened, server_hostname=host) if url.scheme == "https" else opened
            connection = HTTPConnection(host, port)
            connection.default_port = PORTS[url.scheme]  # which the header Host leaves out
            connection.sock = wrapped
            with wrapped:
                yield connection
            if expired.is_set():  # half an answer may look like a whole one
                raise TimeoutError
        except (OSError, HTTPException) as error:
            if expired.is_set():
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()
            opened.close()

    def _addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses that the host's name stands for. Raises TransientError where one of them is not public."""
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (socket.gaierror, UnicodeError) as error:
            raise TransientError("the name of its host is not known here") from error
        if not is_allowed(host, self._settings.webhook_allowed_hosts) and not all(map(is_public, found)):
            raise TransientError(f"its host {NOT_PUBLIC}")
        return found


def body_of(job: QLoRAJob, notification: Notification, tracking_uri: str) -> bytes:
    """What is told, as JSON."""
    told = NotificationBody(
        type=notification.event,
        timestamp=notification.time,
        data=NotifiedJob(
            namespace=job.metadata.namespace,
            name=job.metadata.name,
            uid=job.metadata.uid,
            queue=job.spec.queue,
            reason=notification.reason,
            message=notification.message,
            attempt=notification.attempt,
            mlflow=_mlflow(job, tracking_uri),
        ),
    )
    return told.model_dump_json(by_alias=True, exclude_none=True, ensure_ascii=True).encode()


def _mlflow(job: QLoRAJob, tracking_uri: str) -> NotifiedMlflow:
    known = job.status.mlflow
    is_server = tracking_uri.startswith(("http://", "https://"))
    run_url = f"{tracking_uri.rstrip('/')}/#/experiments/{known.experiment_id}/runs/{known.run_id}"
    model_uri = f"models:/{known.registered_model}/{known.model_version}"
    return NotifiedMlflow(
        run_id=known.run_id,
        experiment_id=known.experiment_id,
        run_url=without_logins(run_url, "") if is_server and known.run_id and known.experiment_id else None,
        registered_model=known.registered_model,
        model_version=known.model_version,
        model_uri=model_uri if known.registered_model and known.model_version else None,
    )


def _open(addresses: Sequence[str], port: int, over: float) -> socket.socket:
    """A connection to the first address that takes one before the time is over."""
    refused: OSError = TimeoutError()
    for address in addresses:
        left = over - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError as error:
            refused = error
    raise refused


def _cut(opened: socket.socket, expired: threading.Event) -> None:
    expired.set()
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
