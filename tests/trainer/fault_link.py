"""A line to a server that fails as lines and servers do: a proxy that a test tells, request by request, what to do.

Requests and answers pass as they are, `Host` and signatures included, so that what signs them does not notice.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler
from ssl import SSLContext
from types import SimpleNamespace

import pytest
from qlora_trainer.storage import backoff

from tests.servers import Server, serving

PIECE_BYTES = 1 << 16
PATIENCE_SECONDS = 300.0
"""No client waits longer for an answer."""
HOP_HEADERS = ("connection", "transfer-encoding", "keep-alive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for."""

    method: str
    path: str
    """With its query."""
    body_bytes: int
    conditional: bool
    """Whether it is to be carried out only under a condition."""
    authorization: str = ""
    """What it says of who asks."""


class Cut(Enum):
    """A connection that ends before its time."""

    BEFORE = "nothing reaches the server"
    MIDWAY = "half of the body reaches the server"
    AFTER = "all of it is carried out, and no answer comes back"
    LATE = "all of it is carried out, and no answer comes for as long as the client waits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer in the server's stead."""

    status: int
    body: bytes
    kind: str = "application/xml"


class Stale(Enum):
    """Old news."""

    EARLIER = "what was answered to the same request the first time"


Fault = Cut | Refusal | Stale
Rule = Callable[[Request], Fault | None]


def s3_error(status: int, code: str) -> Refusal:
    """An error as an S3 server tells it."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, says the link</Message></Error>"
    return Refusal(status=status, body=text.encode())


@dataclass(slots=True)
class Link:
    """Where clients connect; `rule` may be changed at any time."""

    url: str
    rule: Rule = lambda _request: None
    faults: int = 0
    """Requests that met one."""
    seen: list[Request] = field(default_factory=list[Request])

    def lose_the_answer_to_each_write_once(self, cut: Cut) -> set[str]:
        """From now on, for each path that is written to; the paths so far, to which others come."""
        lost: set[str] = set()

        def rule(request: Request) -> Fault | None:
            what = request.path.partition("?")[0]
            if request.method == "GET" or what.endswith("search") or what in lost:
                return None
            lost.add(what)
            return cut

        self.rule = rule
        return lost


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Let the trainer's own pauses between tries take no time: how often it tries is left as it is."""

    def sleep(_seconds: float) -> None:
        time.sleep(0.01)

    patch.setattr(backoff, "time", SimpleNamespace(sleep=sleep))


@contextmanager
def fault_link(host: str, port: int, *, tls: SSLContext | None = None) -> Generator[Link]:
    """A line to the server at host and port, until the context ends; with `tls` its clients speak that."""
    server = Server(BaseHTTPRequestHandler)
    link = Link(url=f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler(host, port, link)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with serving(server):
        yield link


def _handler(host: str, port: int, link: Link) -> type[BaseHTTPRequestHandler]:
    earlier: dict[tuple[str, str], tuple[int, list[tuple[str, str]], bytes]] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            conditional = "If-Match" in self.headers or "If-None-Match" in self.headers
            request = Request(
                method=self.command,
                path=self.path,
                body_bytes=size,
                conditional=conditional,
                authorization=self.headers.get("Authorization", ""),
            )
            with lock:
                link.seen.append(request)
                fault = link.rule(request)
                link.faults += fault is not None
            if isinstance(fault, Refusal):
                self._drain(size)
                self._answer(fault.status, [("Content-Type", fault.kind)], fault.body)
            elif fault is Cut.BEFORE:
                self._hang_up()
            elif fault is Cut.MIDWAY:
                self._pass_on(self.rfile.read(size // 2), size, half=True)
                self._hang_up()
            else:
                self._pass_through(size, fault)

        do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = do_GET  # noqa: N815  names of the library

        def _pass_through(self, size: int, fault: Fault | None) -> None:
            body = self.rfile.read(size)
            key = (self.command, self.path)
            if fault is Stale.EARLIER and key in earlier:
                self._answer(*earlier[key])
                return
            answer = self._pass_on(body, size)
            assert answer is not None
            earlier.setdefault(key, answer)
            if fault is Cut.LATE:
                self._wait_for_the_clients_end()
            if isinstance(fault, Cut):
                self._hang_up()
            else:
                self._answer(*answer)

        def _pass_on(
            self, body: bytes, size: int, half: bool = False
        ) -> tuple[int, list[tuple[str, str]], bytes] | None:
            connection = http.client.HTTPConnection(host, port, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in (*HOP_HEADERS, "expect"):
                        connection.putheader(name, value)
                connection.endheaders()
                connection.send(body)
                if half:
                    return None
                answer = connection.getresponse()
                headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in (*HOP_HEADERS, "content-length")]
                self._length = answer.getheader("Content-Length")
                return answer.status, headers, answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            with suppress(OSError):
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                length = self._length if self.command == "HEAD" and self._length else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        _length: str | None = None

        def _drain(self, size: int) -> None:
            while size > 0:
                size -= len(self.rfile.read(min(size, PIECE_BYTES)))

        def _wait_for_the_clients_end(self) -> None:
            self.connection.settimeout(PATIENCE_SECONDS)
            with suppress(OSError):
                self.connection.recv(1)

        def _hang_up(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler
