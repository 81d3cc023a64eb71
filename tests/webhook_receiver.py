"""A receiver of webhooks for tests, which believes nothing that the standardwebhooks package does not verify."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from standardwebhooks import Webhook as Judge

from tests.servers import Server, serving

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass
class Receiver:
    """What it was told, and how it answers."""

    url: str = ""
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict[str, str])
    """Of its answers."""
    hangs: threading.Event = field(default_factory=threading.Event)
    """While it is set, nothing is answered."""
    drips: bool = False
    """Whether its answer never ends, a byte at a time."""
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    """The webhook-id and the body of each request that it confirmed."""
    requests: int = 0
    refuses: str = ""
    """An event that it answers with 500."""

    def events(self, name: str = "medical") -> list[str]:
        return [body["type"] for _, body in self.told if body["data"]["name"] == name]


@contextmanager
def receiving(
    secret: str = SECRET, address: tuple[str, int] = ("127.0.0.1", 0), tls: ssl.SSLContext | None = None
) -> Generator[Receiver]:
    """A receiver at work; only what is signed with the secret is confirmed."""
    receiver, judge = Receiver(), Judge(secret)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.requests += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told = judge.verify(body, dict(self.headers.items()))
            while receiver.hangs.is_set():
                time.sleep(0.02)
            if receiver.drips:
                self.wfile.write(b"HTTP/1.1 204 ")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            status = 500 if told["type"] == receiver.refuses else receiver.status
            if 200 <= status < 300:
                receiver.told.append((self.headers["webhook-id"], told))
            self.send_response(status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = Server(Handler, address)
    if tls is not None:
        listener.socket = tls.wrap_socket(listener.socket, server_side=True)
    with serving(listener) as server:
        receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}/hook?key=in-the-url"
        yield receiver
        receiver.hangs.clear()
