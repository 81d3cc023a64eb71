"""A small model hub over HTTP: folders as repositories at one commit, some of them gated.

Speaks as much of the Hugging Face hub's protocol as reading takes: repository info, tree, path info, and files with
ranges. Used by tests through `HF_ENDPOINT`, which huggingface_hub reads when it is imported: start a process for it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers import Server, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


EXPIRED = {
    "expired-plain": (401, "", "Invalid credentials in Authorization header"),
    "expired-private": (401, "RepoNotFound", "Repository not found"),
    "expired-gated": (401, "GatedRepo", "Access to this model is restricted"),
    "expired-denied": (403, "", "Your token has expired"),
}
"""Tokens that are valid no longer, and the hub's ways to say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A folder that the hub serves."""

    folder: Path
    gated: bool = False
    token: str = ""
    """What opens it where it is gated; nothing does, where there is none."""
    kind: str = "models"
    private: bool = False
    pause_seconds: float = 0.0
    """Before each answer with a file's content."""


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Generator[tuple[str, list[str]]]:
    """The hub's address, and the list of requests that it has answered."""
    requests: list[str] = []

    class Handler(_Handler):
        known = repositories
        log = requests

    with serving(Server(Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}", requests


class _Handler(BaseHTTPRequestHandler):
    known: Mapping[str, Repository]
    log: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.log.append(f"{self.command} {'/'.join(parts)} {self.headers.get('Range', '')}".strip())
        in_api = parts[0] == "api"
        kind = parts[1] if in_api else "datasets" if parts[0] == "datasets" else "models"
        parts = parts[2:] if in_api else parts[1:] if kind == "datasets" else parts
        repository = self.known.get("/".join(parts[:2]))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in EXPIRED:
            return self._refuse(*EXPIRED[token])
        if repository is not None and repository.private and not token:
            return self._refuse(401, "RepoNotFound")
        if repository is None or repository.kind != kind:
            return self._refuse(404, "RepoNotFound")
        if in_api:
            return self._answer_api(repository, parts[2:], "/".join(parts[:2]))
        return self._answer_file(repository, parts[3], "/".join(parts[4:]))

    def _answer_api(self, repository: Repository, rest: list[str], name: str) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = {str(path.relative_to(repository.folder)): path for path in sorted(repository.folder.rglob("*"))}
        files = {name: path for name, path in files.items() if path.is_file()}
        if rest[:1] == ["tree"]:
            return self._tree(files, unquote("/".join(rest[2:])))
        if rest[:1] == ["paths-info"]:
            wanted = self._wanted_paths()
            return self._json([self._entry(name, path) for name, path in files.items() if name in wanted])
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()]
        return self._json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def _wanted_paths(self) -> list[str]:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            return json.loads(self._body)["paths"]
        return parse_qs(self._body.decode()).get("paths", [])

    def _tree(self, files: Mapping[str, Path], under: str) -> None:
        """What lies in a folder; with `recursive`, also below it."""
        prefix = f"{under}/" if under else ""
        inside = [name for name in files if name.startswith(prefix)]
        folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside if "/" in name[len(prefix) :]}
        if "recursive=True" in self.path or "recursive=true" in self.path:
            folders = {str(parent) for name in inside for parent in Path(name).parents} - {".", *Path(under).parts}
        else:
            inside = [name for name in inside if "/" not in name[len(prefix) :]]
        entries = [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        self._json([*entries, *(self._entry(name, files[name]) for name in inside)])

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)[:40]}
        is_large = path.suffix == ".safetensors"
        large = {"oid": _etag(path), "size": path.stat().st_size, "pointerSize": 134}
        return entry | ({"lfs": large} if is_large else {})

    def _answer_file(self, repository: Repository, revision: str, name: str) -> None:
        path = repository.folder / name
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if repository.gated and self.headers.get("Authorization") != f"Bearer {repository.token or None}":
            return self._refuse(403, "GatedRepo")
        data = path.read_bytes()
        time.sleep(repository.pause_seconds if self.command == "GET" else 0)
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None] if first else data
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self._send(206 if first else 200, part, headers)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
