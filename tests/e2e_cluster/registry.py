"""A registry of images to pull from: an OCI layout folder, served as the distribution specification asks.

Nodes pull from here as they would from any registry, so that pull policies, digests and missing images are the real
thing. It only reads; `images.py` writes the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.servers import Server, serving

LAYOUT_FOLDER = "images"
REFERENCE = "org.opencontainers.image.ref.name"
PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/?]+)(\?.*)?$")


class ImageHandler(BaseHTTPRequestHandler):
    """Answers HEAD and GET of manifests and blobs."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: object, layout: Path) -> None:
        self._layout = layout
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        match = PATH.match(self.path)
        found = self._find(**match.groupdict()) if match else None
        if found is None:
            self.send_response(HTTPStatus.OK if self.path == "/v2/" else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file, media_type = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.send_header("Docker-Content-Digest", f"sha256:{file.name}")
        self.end_headers()
        if with_body:
            with file.open("rb") as source:
                shutil.copyfileobj(source, self.wfile, 1 << 20)

    def _find(self, name: str, kind: str, reference: str, **_: object) -> tuple[Path, str] | None:
        """A blob's file and media type; a tag is looked up in the layout's index."""
        digest = reference
        media_type = "application/octet-stream"
        if kind == "manifests":
            index = json.loads((self._layout / "index.json").read_text())
            for entry in index["manifests"]:
                if f"{name}:{reference}" == entry.get("annotations", {}).get(REFERENCE) or reference == entry["digest"]:
                    digest, media_type = entry["digest"], entry["mediaType"]
        file = self._layout / "blobs" / digest.replace(":", "/")
        return (file, media_type) if digest.startswith("sha256:") and file.is_file() else None

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the puller says what it misses."""


@contextmanager
def serve_images(cache: Path, address: str, port: int) -> Generator[int]:
    """Serve the cache's images; gives the port (0 asks for a free one)."""
    handler = partial(ImageHandler, layout=cache / LAYOUT_FOLDER)
    with serving(Server(handler, (address, port))) as server:
        yield server.server_port
