"""An API server that misbehaves: a proxy before the real one, which loses, repeats, delays, refuses and lies.

Tests give a controller the proxy's address. Every decision about a fault comes from one seeded generator. The proxy
also counts the writes that pass, so that a test can end the writer just before or just after any one of them.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

import urllib3

from tests.servers import Server, serving

WATCH_PIECE_BYTES = 1 << 16
KEPT_HEADERS = ("authorization", "content-type", "accept", "user-agent")
STATUS = {
    409: ("Conflict", "the proxy made this conflict up"),
    429: ("TooManyRequests", "the proxy is in the mood to throttle"),
    500: ("InternalError", "the proxy broke"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Shares of what passes, between 0 and 1."""

    drop_events: float = 0.0
    repeat_events: float = 0.0
    delay_events: float = 0.0
    delay_seconds: float = 0.5
    end_watches: float = 0.0
    """How often the watch that told an event ends after it."""
    stale_reads: float = 0.0
    """A read is answered with an earlier answer to the same request."""
    errors: float = 0.0
    """A request is refused with one of STATUS, and is not carried out."""
    lost_answers: float = 0.0
    """A write is carried out, and answered with an error."""


@dataclass(slots=True)
class Proxy:
    """The faults may be changed at any time, such as to none."""

    url: str
    faults: Faults
    reads: int = 0
    """Without watches."""
    writes: int = 0
    on_write: Callable[[int, str], None] = lambda _number, _moment: None
    """Told `before` and `after` each write, which is passed on and answered in between. A lease's do not count, nor do
    dry runs, which store nothing."""


@contextmanager
def fault_proxy(upstream: str, faults: Faults | None = None, seed: int = 0) -> Generator[Proxy]:
    """A proxy on a free port, until the context ends."""
    server = Server(BaseHTTPRequestHandler)
    proxy = Proxy(url=f"http://127.0.0.1:{server.server_port}", faults=faults or Faults())
    server.RequestHandlerClass = _handler(upstream, proxy, random.Random(seed))
    with serving(server):
        yield proxy


def _handler(upstream: str, proxy: Proxy, chance: random.Random) -> type[BaseHTTPRequestHandler]:
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    pool = urllib3.PoolManager(maxsize=64, cert_reqs="CERT_NONE")
    earlier: dict[str, tuple[int, bytes]] = {}
    lock = threading.Lock()

    def happens(share: float) -> bool:
        with lock:
            return share > 0 and chance.random() < share

    class Handler(BaseHTTPRequestHandler):
        """Passes requests on, mostly."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if "watch=true" in self.path:
                self._watch()
            else:
                self._read()

        def do_POST(self) -> None:
            self._write()

        do_PUT = do_PATCH = do_DELETE = do_POST  # noqa: N815  names of the library

        def _read(self) -> None:
            with lock:
                proxy.reads += 1
            if happens(proxy.faults.errors):
                self._refuse()
                return
            if self.path in earlier and happens(proxy.faults.stale_reads):
                self._answer(*earlier[self.path])
                return
            answer = self._pass_on(None)
            earlier[self.path] = (answer.status, answer.data)
            self._answer(answer.status, answer.data)

        def _write(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if happens(proxy.faults.errors):
                self._refuse()
                return
            counts = "/leases" not in self.path and "dryRun=" not in self.path
            with lock:
                proxy.writes += counts
                number = proxy.writes
            if counts:
                proxy.on_write(number, "before")
            answer = self._pass_on(body)
            status, data = answer.status, answer.data
            if counts:
                proxy.on_write(number, "after")
            if happens(proxy.faults.lost_answers):
                self._refuse()
            else:
                self._answer(status, data)

        def _watch(self) -> None:
            answer = self._pass_on(None, stream=True)
            if answer.status != 200:
                self._answer(answer.status, answer.data)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            rest = b""
            try:
                for piece in answer.stream(WATCH_PIECE_BYTES):
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        self._tell(line + b"\n")
                        if happens(proxy.faults.end_watches):
                            return
                self._chunk(b"")
            except OSError:  # whoever watched has gone
                return
            finally:
                answer.close()
                self.close_connection = True

        def _tell(self, line: bytes) -> None:
            is_bookmark = b'"BOOKMARK"' in line[:40]
            if not is_bookmark and happens(proxy.faults.drop_events):
                return
            if happens(proxy.faults.delay_events):
                time.sleep(proxy.faults.delay_seconds)
            self._chunk(line)
            if happens(proxy.faults.repeat_events):
                self._chunk(line)

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _refuse(self) -> None:
            with lock:
                code = chance.choice(list(STATUS))
            reason, message = STATUS[code]
            body = {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": message}
            self._answer(code, json.dumps(body).encode())

        def _answer(self, status: int, data: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # killed meanwhile
                self.close_connection = True

        def _pass_on(self, body: bytes | None, stream: bool = False) -> urllib3.BaseHTTPResponse:
            headers = {name: value for name, value in self.headers.items() if name.lower() in KEPT_HEADERS}
            return pool.request(
                self.command,
                upstream + self.path,
                body=body,
                headers=headers,
                preload_content=not stream,
                timeout=urllib3.Timeout(connect=5, read=None),
                retries=False,
            )

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler
