"""Reads a finished adapter out of a job's store; nothing here writes to it.

The SDK calls it for `result()` and `adapter()`. A file counts only when its size and sha256 are those of the
folder's manifest, and a download is complete or absent: it is renamed into place when every file has been verified.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from orchestrator.api.contained_files import Contained, LinkRefused
from orchestrator.api.formats import JOURNAL_NAME, MANIFEST_NAME, CheckpointManifest, FileEntry, JournalRecord
from orchestrator.api.uris import file_path
from orchestrator.errors import InvalidObject, NotFound, PermanentError, StoreUnavailable

CHUNK_BYTES = 1 << 20
WEIGHTS_NAME = "adapter_model.safetensors"


def read_manifest(uri: str) -> CheckpointManifest:
    """The manifest of an adapter folder; raises NotFound where the folder is not complete."""
    content = b"".join(_chunks(uri, MANIFEST_NAME))
    try:
        return CheckpointManifest.model_validate_json(content)
    except ValidationError as error:
        raise InvalidObject(f"{uri}/{MANIFEST_NAME} is damaged: {error.errors()[0]['msg']}") from error


def read_journal(uri: str) -> tuple[JournalRecord, ...]:
    """The metrics of every step that the adapter went through."""
    lines = b"".join(_chunks(uri, JOURNAL_NAME)).splitlines()
    try:
        return tuple(JournalRecord.model_validate_json(line) for line in lines if line.strip())
    except ValidationError as error:
        raise InvalidObject(f"{uri}/{JOURNAL_NAME} is damaged: {error.errors()[0]['msg']}") from error


def read_file(uri: str, name: str) -> bytes:
    """A small file of a folder of the job's store; raises NotFound, StoreUnavailable."""
    return b"".join(_chunks(uri, name))


def download(uri: str, into: Path, digest: str | None) -> Path:
    """The adapter folder as the new folder `into`, every file verified, and the weights against `digest` too.

    A folder that holds exactly this adapter already is left as it is.
    """
    manifest = read_manifest(uri)
    _check_digest(uri, manifest, digest)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        if _holds(into, manifest):
            return into
        raise PermanentError(f"{into} is not an empty folder, and holds something else; name a new one")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    except OSError as error:
        raise PermanentError(f"{into} cannot be written: {error.strerror}; name another folder") from error
    try:
        for entry in manifest.files:
            _fetch(uri, entry, partial / entry.name)
        (partial / MANIFEST_NAME).write_text(manifest.model_dump_json(by_alias=True, exclude_none=True))
        partial.chmod(0o755)
        os.replace(partial, into)
    except OSError as error:
        raise PermanentError(f"{into} cannot be written: {error.strerror}; free some space or name another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return into


def _holds(folder: Path, manifest: CheckpointManifest) -> bool:
    """Whether a folder has every file of the manifest, as it is there."""
    return folder.is_dir() and all(_is(folder / entry.name, entry) for entry in manifest.files)


def _is(file: Path, entry: FileEntry) -> bool:
    if not file.is_file() or file.stat().st_size != entry.bytes:
        return False
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == entry.sha256


def _check_digest(uri: str, manifest: CheckpointManifest, digest: str | None) -> None:
    weights = next((entry for entry in manifest.files if entry.name == WEIGHTS_NAME), None)
    if weights is None:
        raise InvalidObject(f"{uri}: the manifest names no {WEIGHTS_NAME}; this is not an adapter")
    if digest is not None and digest != f"sha256:{weights.sha256}":
        raise InvalidObject(f"{uri}: holds sha256:{weights.sha256}, but the job ended with {digest}; it was replaced")


def _fetch(uri: str, entry: FileEntry, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for chunk in _chunks(uri, entry.name):
            digest.update(chunk)
            size += len(chunk)
            sink.write(chunk)
    if size != entry.bytes or digest.hexdigest() != entry.sha256:
        raise InvalidObject(
            f"{uri}/{entry.name} is damaged: {size} bytes with sha256 {digest.hexdigest()}, "
            f"where the manifest has {entry.bytes} bytes with {entry.sha256}; fetch the adapter from MLflow instead"
        )


def _chunks(uri: str, name: str) -> Iterator[bytes]:
    """A file of the store, piece by piece; errors of any backend leave as ours."""
    if uri.startswith("pvc://"):
        raise PermanentError(f"{uri} lies on a claim, which only the cluster can read; MLflow has the adapter")
    address = f"{uri.rstrip('/')}/{name}"
    try:
        with _opened(uri, name) as stream:
            while chunk := cast(bytes, stream.read(CHUNK_BYTES)):
                yield chunk
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{address} does not exist; the store was emptied, or the adapter is not complete") from error
    except LinkRefused as error:
        raise PermanentError(f"{uri}: {error}") from error
    except ImportError as error:
        raise PermanentError(f"{address}: {error}") from error
    except Exception as error:
        raise StoreUnavailable(f"{address} could not be read: {error}; check credentials and endpoint") from error


def _opened(uri: str, name: str) -> Any:
    if (folder := file_path(uri)) is not None:
        return Contained.of(folder).open(name)
    import fsspec  # pyright: ignore[reportMissingTypeStubs]  here, because importing it takes long

    return cast(Any, fsspec).open(f"{uri.rstrip('/')}/{name}", "rb")
