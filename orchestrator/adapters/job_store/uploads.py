"""Puts a data file of this machine where pods can read it: into the bucket of the job's store, below its namespace.

An object is named by the file's content, so a file that is there already is not sent again; S3 shows an object only
when all of it has arrived.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from orchestrator.adapters.job_store.model_config import S3_OPTIONS
from orchestrator.errors import InvalidObject, PermanentError, StoreUnavailable

FOLDER_NAME = "uploads"
MAX_UPLOAD_BYTES = 32 << 30
"""What is larger is better brought into the bucket by tools for that."""
CHUNK_BYTES = 16 << 20
Tell = Callable[[int, int], None]
"""Is told the bytes that have been sent, and how many there are."""


def upload_uri(file: Path, store_uri: str, namespace: str) -> str:
    """Where a file goes; reads all of it. Raises InvalidObject for one that cannot be read, or is too large."""
    try:
        size = file.stat().st_size
        if size > MAX_UPLOAD_BYTES:
            raise InvalidObject(
                f"{file} has {size} bytes, and no more than {MAX_UPLOAD_BYTES} are uploaded; put it into a bucket, and "
                "name that"
            )
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InvalidObject(f"{file}: cannot be read: {error.strerror}") from error
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)
    return f"{store_uri.rstrip('/')}/{namespace}/{FOLDER_NAME}/{digest[:32]}-{name}"


def upload(file: Path, uri: str, tell: Tell) -> None:
    """Send a file, unless it is there; raises StoreUnavailable, and PermanentError without the library for it."""
    size = file.stat().st_size
    try:
        import fsspec  # pyright: ignore[reportMissingTypeStubs]  here, because importing it takes long

        files: Any
        files, path = cast(Any, fsspec).core.url_to_fs(uri, skip_instance_cache=True, **S3_OPTIONS)
        if files.exists(path) and files.size(path) == size:
            return
        with file.open("rb") as source, files.open(path, "wb", block_size=CHUNK_BYTES) as sink:
            sent = 0
            while chunk := source.read(CHUNK_BYTES):
                sink.write(chunk)
                sent += len(chunk)
                tell(sent, size)
    except ImportError as error:
        raise PermanentError(f"{uri}: {error}") from error
    except Exception as error:
        raise StoreUnavailable(f"{uri} could not be written: {error}; check credentials and endpoint") from error
