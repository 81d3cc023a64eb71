"""An admission webhook of a test: it refuses, breaks, or takes longer than it is given."""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.errors import NotFound
from tests.servers import Server, certificate, serving

REGISTRATION = "admissionregistration.k8s.io/v1"
WEBHOOKS = path_of(REGISTRATION, "validatingwebhookconfigurations")
WORDS = "no pods on a Sunday"
ANSWER_SECONDS = 1
SLOW_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookServer:
    """Where it listens; what it does depends on the path."""

    url: str
    certificate: bytes

    def register(self, api: KubeApi, namespace: str, mood: str, labels: dict[str, str]) -> None:
        """Have the API server ask about pods of the namespace with these labels; `mood` is denies, breaks or sleeps."""
        bundle = base64.b64encode(self.certificate).decode()
        webhook: Json = {
            "name": f"{namespace}.tests.qlora.dev",
            "clientConfig": {"url": f"{self.url}/{mood}", "caBundle": bundle},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "objectSelector": {"matchLabels": labels},
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "timeoutSeconds": ANSWER_SECONDS,
            "admissionReviewVersions": ["v1"],
        }
        api.create(WEBHOOKS, {"metadata": {"name": namespace}, "webhooks": [webhook]})

    def withdraw(self, api: KubeApi, namespace: str) -> None:
        """Ask no more."""
        with suppress(NotFound):
            api.delete(f"{WEBHOOKS}/{namespace}")


@contextmanager
def webhook_server(folder: Path) -> Generator[WebhookServer]:
    """A server on a free port, until the context ends."""
    server = Server(_Handler)
    authority, pair = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield WebhookServer(url=f"https://127.0.0.1:{server.server_port}", certificate=authority)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mood = self.path.partition("?")[0]
        if mood == "/sleeps":
            time.sleep(SLOW_SECONDS)
        refusal: Json = {"uid": review["request"]["uid"], "allowed": False, "status": {"code": 403, "message": WORDS}}
        body = json.dumps({**review, "response": refusal}).encode()
        with suppress(OSError):
            self.send_response_only(500 if mood == "/breaks" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""
