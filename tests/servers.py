"""HTTP servers of tests: each in a thread of its own, on a free port, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

POLL_SECONDS = 0.05
"""How soon a server notices that it is to end."""


class Server(ThreadingHTTPServer):
    """Clients of tests are killed in the middle of everything; that is no error here."""

    daemon_threads = True

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler], address: tuple[str, int] = ("127.0.0.1", 0)):
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


@contextmanager
def serving(server: Server) -> Generator[Server]:
    """The server at work, until the context ends."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_SECONDS}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
