"""The door before MLflow's page: whoever has the password of this start comes in, nobody else.

MLflow itself has no accounts and does whatever a request asks for, with its owner's rights. So it listens on a socket
in a folder that only its owner can enter, and this server, on loopback, passes on what has the password.

`sdk/door` says who that is.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path

from orchestrator.sdk.door import LOOPBACK, Door

REQUEST_SECONDS = 120.0
CHUNK_BYTES = 1 << 16
OWN_HEADERS = frozenset(
    {"authorization", "connection", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "expect", "content-length", "date", "server"}
)
"""Not passed on: they are about one connection, or for this server."""


class TrackingProxy(ThreadingHTTPServer):
    """Passes requests with the password on to the server behind a unix socket."""

    daemon_threads = True

    def __init__(self, port: int, backend: Path) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.backend = backend
        self.door = Door("qlora ui", self.server_port)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nothing to tell of."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REQUEST_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_SECONDS)
        self.sock.connect(str(self._path))


class _Handler(BaseHTTPRequestHandler):
    server: TrackingProxy  # pyright: ignore[reportIncompatibleVariableOverride]  # the one that makes these
    timeout = REQUEST_SECONDS

    def _pass_on(self) -> None:
        get = self.headers.get
        refusal = self.server.door.refusal(get("Host", ""), get("Origin"), get("Authorization", ""))
        length = get("Content-Length", "0")
        if refusal is None and (get("Transfer-Encoding") is not None or not length.isdecimal()):
            refusal = HTTPStatus.LENGTH_REQUIRED, "say how long the request is"
        if refusal is not None:
            self._refuse(*refusal)
            return
        connection = _UnixConnection(self.server.backend)
        try:
            self._exchange(connection, int(length))
        except (OSError, HTTPException) as error:
            self._refuse(HTTPStatus.BAD_GATEWAY, f"MLflow does not answer: {error}")
        finally:
            connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _pass_on  # noqa: N815 - the base's names

    def _exchange(self, connection: HTTPConnection, length: int) -> None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self._kept(self.headers.items()):
            connection.putheader(name, value)
        connection.putheader("Host", self.headers["Host"])
        connection.putheader("Content-Length", str(length))
        connection.endheaders(_parts(self.rfile, length))
        answer = connection.getresponse()
        self.send_response(answer.status, answer.reason)
        for name, value in self._kept(answer.getheaders()):
            self.send_header(name, value)
        self.send_header("Connection", "close")  # its end is the end of the answer, however long that is
        self.end_headers()
        while chunk := answer.read(CHUNK_BYTES):
            self.wfile.write(chunk)

    @staticmethod
    def _kept(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(name, value) for name, value in headers if name.lower() not in OWN_HEADERS]

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        body = f"{why}\n".encode()
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", self.server.door.challenge)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads about single requests."""


def _parts(body: BufferedIOBase, length: int) -> Iterator[bytes]:
    left = length
    while left > 0 and (part := body.read(min(left, CHUNK_BYTES))):
        left -= len(part)
        yield part
