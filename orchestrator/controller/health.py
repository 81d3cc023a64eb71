"""Whether this replica is alive and fit for work: `/healthz` and `/readyz`; and `/metrics` on a port of its own.

Rules:

- Alive: whoever is at work (the loop, or a standby's election) has shown itself within the limit. A world that does not
  answer makes rounds fail, but a restart would not mend it, so failed rounds count as life.
- Ready: the view of the cluster is complete, and this replica stands by, or its last round came through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, start_http_server

SILENCE_LIMIT_TICKS = 60
SILENCE_LIMIT_SECONDS = 300.0
"""At least so long: a round over thousands of jobs writes thousands of times."""
REQUEST_SECONDS = 5.0


class Role(StrEnum):
    """What this replica is doing."""

    STARTING = "starting"
    STANDBY = "standby"
    LEADER = "leader"


class Health:
    """Written by the thread at work, read by the server's."""

    def __init__(self, tick_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limit_seconds = max(SILENCE_LIMIT_SECONDS, SILENCE_LIMIT_TICKS * tick_seconds)
        self._lock = threading.Lock()
        self._seen = clock()
        self._role = Role.STARTING
        self._problem = "the view of the cluster is not complete yet"

    def stands_by(self) -> None:
        """The election was looked at, and another replica leads."""
        self._show(Role.STANDBY, "")

    def round_done(self) -> None:
        """A round came through."""
        self._show(Role.LEADER, "")

    def round_failed(self, problem: str) -> None:
        """A round did not come through; the next one may."""
        self._show(Role.LEADER, problem)

    def alive(self) -> str:
        """Empty, or what is wrong."""
        with self._lock:
            silent_seconds = self._clock() - self._seen
        if silent_seconds <= self._limit_seconds:
            return ""
        return f"nothing was heard of the {self._role} for {silent_seconds:.0f} s, more than {self._limit_seconds:.0f}"

    def ready(self) -> str:
        """Empty, or what is wrong."""
        with self._lock:
            problem = self._problem
        return problem or self.alive()

    def _show(self, role: Role, problem: str) -> None:
        with self._lock:
            self._seen, self._role, self._problem = self._clock(), role, problem


@contextmanager
def served(health: Health, registry: CollectorRegistry, health_port: int, metrics_port: int) -> Generator[None]:
    """Answer on both ports, on all addresses, for as long as the context lasts."""
    with probed(health.alive, health.ready, health_port):
        metrics, thread = start_http_server(metrics_port, registry=registry)
        try:
            yield
        finally:
            metrics.shutdown()
            metrics.server_close()
            thread.join()


@contextmanager
def probed(alive: Callable[[], str], ready: Callable[[], str], port: int) -> Generator[None]:
    """Answer probes on a port, on all addresses, for as long as the context lasts; both say what is wrong, if it is."""
    server = ThreadingHTTPServer(("", port), _handler({"/healthz": alive, "/readyz": ready}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(answers: Mapping[str, Callable[[], str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers `ok`, or 503 with what is wrong."""

        timeout = REQUEST_SECONDS  # a client that says nothing holds no thread for long

        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            if answer is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            problem = answer()
            body = f"{problem or 'ok'}\n".encode()
            self.send_response(HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds; nobody reads about them."""

    return Handler
