"""The door before MLflow's page: what is let in, what is refused, and that what passes is passed on whole."""

from __future__ import annotations

import base64
import http.client
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from orchestrator.cli.tracking_proxy import TrackingProxy

BODY = bytes(range(256)) * 1000


class Backend(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    seen: list[tuple[str, str, dict[str, str], bytes]]


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, in chunks or with a length."""

    server: Backend
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, body))
        self.send_response(201)
        self.send_header("X-Own", "kept")
        if self.path.startswith("/chunks"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the base's names

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    server = Backend(str(tmp_path / "s"), Echo)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(backend: Backend, tmp_path: Path) -> Iterator[TrackingProxy]:
    assert backend.server_address
    proxy = TrackingProxy(0, tmp_path / "s")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def ask(proxy: TrackingProxy, method: str = "GET", path: str = "/", body: bytes = b"", **headers: str) -> tuple:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body or None, named)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def password(proxy: TrackingProxy, word: str = "") -> str:
    return "Basic " + base64.b64encode(f"qlora:{word or proxy.door.password}".encode()).decode()


def test_whoever_has_the_password_comes_in(proxy: TrackingProxy, backend: Backend) -> None:
    status, headers, body = ask(proxy, "POST", "/api?x=%20y", BODY, Authorization=password(proxy), X_Some="thing")
    assert (status, headers["X-Own"], body) == (201, "kept", BODY)
    [(method, path, seen, sent)] = backend.seen
    assert (method, path, sent, seen["x-some"]) == ("POST", "/api?x=%20y", BODY, "thing")
    assert "authorization" not in seen
    assert seen["host"] == f"127.0.0.1:{proxy.server_port}"


def test_an_answer_in_chunks_comes_whole(proxy: TrackingProxy) -> None:
    status, _, body = ask(proxy, "PUT", "/chunks", BODY, Authorization=password(proxy))
    assert (status, body) == (201, BODY)


@pytest.mark.parametrize("word", ["wrong", "pässword", "x" * 10_000])
def test_another_user_of_the_machine_without_the_password_is_refused(
    proxy: TrackingProxy, backend: Backend, word: str
) -> None:
    for headers in ({}, {"Authorization": password(proxy, word)}, {"Authorization": "Bearer x"}):
        status, answer, _ = ask(proxy, **headers)
        assert status == 401
        assert answer["WWW-Authenticate"].startswith("Basic")
    assert backend.seen == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "", "127.0.0.1:1"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(proxy: TrackingProxy, backend: Backend, host: str) -> None:
    status, _, _ = ask(proxy, Authorization=password(proxy), Host=host)
    assert status == 403
    assert backend.seen == []


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_a_page_of_another_address_cannot_use_a_browser_that_knows_the_password(
    proxy: TrackingProxy, backend: Backend, origin: str
) -> None:
    status, _, _ = ask(proxy, "POST", "/", b"{}", Authorization=password(proxy), Origin=origin)
    assert status == 403
    assert backend.seen == []


def test_its_own_pages_may_ask(proxy: TrackingProxy) -> None:
    origin = f"http://127.0.0.1:{proxy.server_port}"
    assert ask(proxy, "POST", "/", b"{}", Authorization=password(proxy), Origin=origin)[0] == 201


def test_a_server_that_is_gone_is_said(tmp_path: Path) -> None:
    proxy = TrackingProxy(0, tmp_path / "nothing")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    status, _, body = ask(proxy, Authorization=password(proxy))
    proxy.shutdown()
    proxy.server_close()
    assert status == 502
    assert b"MLflow does not answer" in body


def test_every_start_has_a_password_of_its_own_and_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    proxies = [TrackingProxy(0, tmp_path / "s") for _ in range(2)]
    assert len({proxy.door.password for proxy in proxies}) == 2
    assert {proxy.server_address[0] for proxy in proxies} == {"127.0.0.1"}
    assert proxies[0].door.password in proxies[0].door.url
    for proxy in proxies:
        proxy.server_close()
