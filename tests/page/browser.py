"""Pages as somebody from outside sees them: over a socket, read by a parser of HTML."""

from __future__ import annotations

import base64
import http.client
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser

from orchestrator.page.app import Gate, Parts, make_app
from orchestrator.page.server import listening, parts, server_of
from tests.page.gates import OpenGate
from tests.page.paper_world import PaperWorld

VOID = frozenset({"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "track", "wbr"})


@dataclass
class Element:
    """A tag with its attributes, and all text inside."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Reader(HTMLParser):
    """Collects elements; fails where tags do not match."""

    elements: list[Element] = field(default_factory=list[Element])
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.unclosed: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Element(tag, dict(attrs))
        assert len(found.attributes) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append(found)
        if tag not in VOID:
            self.unclosed.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed, f"</{tag}> without a beginning"
        assert self.unclosed[-1].tag == tag, f"</{tag}> where <{self.unclosed[-1].tag}> is open"
        self.unclosed.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        for element in self.unclosed:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        """The elements of a tag."""
        return [element for element in self.elements if element.tag == tag]


def read(html: str) -> Reader:
    """A whole page."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.unclosed, f"not closed: {[element.tag for element in reader.unclosed]}"
    return reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request is answered."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def page(self) -> Reader:
        """Read as HTML."""
        return read(self.body)


@dataclass(frozen=True, slots=True)
class Site:
    """A page that is served."""

    port: int
    parts: Parts

    def get(self, path: str = "/", method: str = "GET", password: str = "", **headers: str) -> Answer:
        """One request."""
        if password:
            headers["Authorization"] = "Basic " + base64.b64encode(f"qlora:{password}".encode()).decode()
        return ask(self.port, path, method, headers)


def ask(port: int, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: str = "") -> Answer:
    """One request to a page on a port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body or None, dict(headers or {}))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return Answer(status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, body=text)


@contextmanager
def served(world: PaperWorld, gate: Gate | None = None, made: Parts | None = None) -> Generator[Site]:
    """The page of a world, on a port of this machine, while this is open."""
    made = made or parts(gate or OpenGate(), world.connection, world.settings, None)
    with listening(0) as listener:
        server = server_of(make_app(made), world.settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Site(listener.getsockname()[1], made)
        finally:
            server.should_exit = True
            thread.join(30)
