"""Puts data files and model folders of this machine where pods can read them: into the bucket of the job's store, below
its namespace.

An object is named by the content, so a file that is there already is not sent again; S3 shows an object only
when all of it has arrived.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from orchestrator.adapters.job_store.model_config import S3_OPTIONS
from orchestrator.errors import InvalidObject, PermanentError, StoreUnavailable

FOLDER_NAME = "uploads"
MAX_UPLOAD_BYTES = 32 << 30
"""What is larger is better brought into the bucket by tools for that."""
MODEL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors"})
"""Files of a model folder that the trainer reads."""
CHUNK_BYTES = 16 << 20
Tell = Callable[[int, int], None]
"""Is told the bytes that have been sent, and how many there are."""


def refuse_large(path: Path) -> None:
    """Raise InvalidObject for a file or model folder that is not uploaded, or cannot be read."""
    try:
        size = sum(file.stat().st_size for file in _files(path))
    except OSError as error:
        raise InvalidObject(f"{path}: cannot be read: {error.strerror}") from error
    if size > MAX_UPLOAD_BYTES:
        raise InvalidObject(
            f"{path} has {size} bytes, and no more than {MAX_UPLOAD_BYTES} are uploaded; put it into a bucket, and "
            "name that"
        )


def upload_uri(path: Path, store_uri: str, namespace: str) -> str:
    """Where a file or model folder goes; reads all of it. Raises InvalidObject for one that cannot be read."""
    try:
        digest = _digest(path)
    except OSError as error:
        raise InvalidObject(f"{path}: cannot be read: {error.strerror}") from error
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)
    return f"{store_uri.rstrip('/')}/{namespace}/{FOLDER_NAME}/{digest[:32]}-{name}"


def _files(path: Path) -> list[Path]:
    """The file, or of a folder the files of a model."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file())


def _digest(path: Path) -> str:
    digests: dict[str, str] = {}
    for file in _files(path):
        with file.open("rb") as content:
            digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest() if path.is_dir() else digests[path.name]


def upload(path: Path, uri: str, tell: Tell) -> None:
    """Send a file, or the files of a model folder, unless they are there.

    Raises StoreUnavailable, and PermanentError without the library for it.
    """
    targets = {file: f"{uri}/{file.name}" if path.is_dir() else uri for file in _files(path)}
    size, before = sum(file.stat().st_size for file in targets), 0
    try:
        import fsspec  # pyright: ignore[reportMissingTypeStubs]  here, because importing it takes long

        store: Any = cast(Any, fsspec).core.url_to_fs(uri, skip_instance_cache=True, **S3_OPTIONS)[0]
        for file, target in targets.items():
            if not (store.exists(target) and store.size(target) == file.stat().st_size):
                for sent in _send(file, store, target):
                    tell(before + sent, size)
            before += file.stat().st_size
    except ImportError as error:
        raise PermanentError(f"{uri}: {error}") from error
    except Exception as error:
        raise StoreUnavailable(f"{uri} could not be written: {error}; check credentials and endpoint") from error


def _send(file: Path, store: Any, target: str) -> Iterator[int]:
    """Sends a file; tells after each chunk how many bytes have been sent."""
    with file.open("rb") as source, store.open(target, "wb", block_size=CHUNK_BYTES) as sink:
        sent = 0
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
            sent += len(chunk)
            yield sent
