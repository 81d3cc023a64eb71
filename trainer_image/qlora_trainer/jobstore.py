"""The job's store: one folder on `file://`, `pvc://claim/path` or anything that fsspec knows (`s3://`).

Called by every stage; nothing else of the trainer touches the job's folder. Its rules:

- A folder exists when its manifest does. It is written to a scratch folder, made durable (fsync), moved into place,
  and its manifest comes last; on an object store it is uploaded, and its manifest comes last. It is deleted the other
  way round.
- A manifest vouches for the size and SHA-256 of every file; what does not match is a `DamagedFolder`, never data.
- The store belongs to the highest attempt that has taken the fence. Take it first, check it before every manifest.
- A store that may not be written to is a user's error; one that does not answer is asked again a few times, then
  the attempt ends as transient; so does a full disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
from pydantic import ValidationError

from orchestrator.api.base import Model
from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    FENCE_NAME,
    MANIFEST_NAME,
    PREPARED_FOLDER,
    Fence,
    FileEntry,
)
from qlora_trainer.outcome import FencedError, StageError, Transient, UserError

PVC_ROOT_VARIABLE = "QLORA_PVC_ROOT"
DEFAULT_PVC_ROOT = "/var/lib/qlora/pvc"
"""Where claims are mounted, each in a folder of its name."""
SCRATCH_FOLDER = ".partial"
TRIES = 6
FIRST_PAUSE_SECONDS = 0.5
"""Doubles with every try: six tries span 15 seconds on top of what the client itself retries."""

M = TypeVar("M", bound=Model)
T = TypeVar("T")
log = logging.getLogger(__name__)


class DamagedFolder(Exception):
    """A file of a folder is missing or is not the one that the manifest vouches for."""


def local_path(uri: str) -> Path | None:
    """The path behind `file:///path` or `pvc://claim/path`; None for a URI of another kind."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri} names the host {parts.netloc!r}: write file:///path with three slashes")
        return Path(unquote(parts.path))
    if parts.scheme == "pvc":
        claim = Path(os.environ.get(PVC_ROOT_VARIABLE, DEFAULT_PVC_ROOT)) / parts.netloc
        if not claim.is_dir():
            raise UserError(f"{uri}: the claim {parts.netloc!r} is not mounted at {claim}")
        path = claim / unquote(parts.path).lstrip("/")
        if not path.resolve().is_relative_to(claim.resolve()):
            raise UserError(f"{uri} leaves its claim: remove the `..` from the path")
        return path
    return None


class JobStore:
    """The folder of one job."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        path = local_path(self.uri)
        self._backend: _Backend = _ObjectStore(self.uri) if path is None else _FileSystem(path)

    # --- the fence

    def take_fence(self, attempt: int) -> None:
        """Own the store; raises FencedError if a later attempt already does."""
        with self._trying("take the fence of"), self._backend.locked():
            self._refuse_if_later_than(attempt)
            self._backend.write(FENCE_NAME, Fence(attempt=attempt).model_dump_json(by_alias=True).encode())

    def check_fence(self, attempt: int) -> None:
        """Raise FencedError if a later attempt owns the store."""
        with self._trying("read the fence of"):
            found = self._refuse_if_later_than(attempt)
        if found < attempt:
            # Without locks (object stores) an earlier attempt may have written over ours between its look and write.
            self.take_fence(attempt)

    def _refuse_if_later_than(self, attempt: int) -> int:
        data = self._backend.read(FENCE_NAME)
        found = Fence.model_validate_json(data).attempt if data else 0
        if found > attempt:
            raise FencedError(f"attempt {found} owns {self.uri}; attempt {attempt} stops without writing")
        return found

    # --- folders

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """An empty local folder, on the store's own disk where it has one; gone afterwards.

        `publish_folder` moves what it finds in here, and copies what it finds elsewhere.
        """
        with self._trying("write to"):
            folder = self._backend.new_scratch_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish_folder(self, local: Path, name: str, make_manifest: Callable[[tuple[FileEntry, ...]], Model]) -> str:
        """Make the files of `local` durable as the folder `name` and return its URI.

        `make_manifest` is called when all files are in place: the moment to check the fence. Files that the store
        already has in that folder, byte for byte, are left alone; otherwise the folder is replaced.
        """
        files = tuple(describe_durably(path) for path in sorted(local.iterdir()))
        with self._trying(f"write {name} to"):
            if not self._has(name, files):
                self._backend.remove(f"{name}/{MANIFEST_NAME}")
                self._backend.remove(name)
                self._backend.place(local, [entry.name for entry in files], name)
            manifest = make_manifest(files)
            self._backend.write(f"{name}/{MANIFEST_NAME}", manifest.model_dump_json(by_alias=True, indent=1).encode())
        return self.folder_uri(name)

    def read_manifest(self, name: str, kind: type[M]) -> M | None:
        """The folder's manifest; None where there is no such folder, or where its manifest cannot be read."""
        with self._trying(f"read {name} from"):
            data = self._backend.read(f"{name}/{MANIFEST_NAME}")
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            log.warning(
                "%s/%s is not a %s and is ignored: %s", self.folder_uri(name), MANIFEST_NAME, kind.__name__, error
            )
            return None

    def fetch_folder(self, name: str, files: Iterable[FileEntry], into: Path) -> Path:
        """A local folder with the given files, each verified; raises DamagedFolder.

        A store on a file system gives its own folder, which must not be changed; others are downloaded into `into`.
        """
        files = list(files)
        with self._trying(f"read {name} from"):
            folder = self._backend.fetch(name, [entry.name for entry in files], into)
            for entry in files:
                _verify(folder / entry.name, entry, self.folder_uri(name))
        return folder

    def list_folders(self, prefix: str) -> list[str]:
        """The names of the folders directly under `prefix`, sorted; only those that have a manifest."""
        with self._trying(f"list {prefix} in"):
            return [name for name in self._backend.folders(prefix) if self._backend.exists(f"{name}/{MANIFEST_NAME}")]

    def delete_folder(self, name: str) -> None:
        """Remove a folder, manifest first, so that what is left of an interruption does not count."""
        with self._trying(f"delete {name} from"):
            self._backend.remove(f"{name}/{MANIFEST_NAME}")
            self._backend.remove(name)

    def sweep(self) -> None:
        """Remove what interrupted writes of earlier attempts left. For the fence's holder, before it writes."""
        with self._trying("sweep"):
            self._backend.remove(SCRATCH_FOLDER)
            folders = [
                ADAPTER_FOLDER,
                *self._backend.folders(CHECKPOINTS_FOLDER),
                *self._backend.folders(PREPARED_FOLDER),
            ]
            for name in folders:
                if not self._backend.exists(f"{name}/{MANIFEST_NAME}"):
                    self._backend.remove(name)

    def folder_uri(self, name: str) -> str:
        """The URI of a folder of this store."""
        return f"{self.uri}/{name}"

    def _has(self, name: str, files: tuple[FileEntry, ...]) -> bool:
        if not self._backend.exists(f"{name}/{MANIFEST_NAME}"):
            return False
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folder = self._backend.fetch(name, [entry.name for entry in files], Path(scratch))
                for entry in files:
                    _verify(folder / entry.name, entry, name)
            except DamagedFolder:
                return False
        return True

    @contextmanager
    def _trying(self, action: str) -> Iterator[None]:
        """Translate the file system's errors into the stage's."""
        try:
            yield
        except (StageError, DamagedFolder):
            raise
        except Exception as error:
            translated = self._translated(error, f"cannot {action} {self.uri}")
            if translated is None:
                raise
            raise translated from error

    def _translated(self, error: Exception, what: str) -> StageError | None:
        """The stage's error behind a file system's; None for what is none of the store's business."""
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            free = f"{self._backend.free_bytes()} bytes are free"
            return Transient(f"{what}: the disk is full ({free}); free some space or give the job a larger volume")
        if isinstance(error, PermissionError) or code in (errno.EROFS, errno.EPERM):
            return UserError(f"{what}: {error}; give the job a store that it may read and write")
        if isinstance(error, NotADirectoryError | FileExistsError):
            return UserError(f"{what}: {error}; spec.store.uri must name a folder, not a file")
        if isinstance(error, FileNotFoundError):
            return self._backend.vanished(f"{what}: {error}")
        if _lacks_credentials(error):
            return UserError(f"{what}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if _is_unavailable(error):
            return Transient(f"{what}: the store does not answer ({type(error).__name__}: {error})")
        return None


def describe_durably(path: Path) -> FileEntry:
    """Make a file durable and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name=path.name, bytes=file.tell(), sha256=sha256)


def _verify(path: Path, entry: FileEntry, where: str) -> None:
    if not path.is_file():
        raise DamagedFolder(f"{where}: {entry.name} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DamagedFolder(f"{where}: {entry.name} has {size} bytes instead of {entry.bytes}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != entry.sha256:
        raise DamagedFolder(f"{where}: {entry.name} has the SHA-256 {sha256} instead of {entry.sha256}")


def _is_unavailable(error: Exception) -> bool:
    # s3fs translates answers to OSErrors, but lets its client's own errors (no connection, no DNS) through.
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("botocore", "aiohttp", "aiobotocore")


def _lacks_credentials(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


class _Backend(Protocol):
    """What the job store needs from where it is kept. Names are relative to the job's folder."""

    def locked(self) -> Any: ...
    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...
    def remove(self, name: str) -> None: ...
    def folders(self, prefix: str) -> list[str]: ...
    def new_scratch_folder(self) -> Path: ...
    def place(self, local: Path, file_names: list[str], name: str) -> None: ...
    def fetch(self, name: str, file_names: list[str], into: Path) -> Path: ...
    def free_bytes(self) -> int | None: ...
    def vanished(self, message: str) -> StageError: ...


class _FileSystem:
    """A folder of a POSIX file system: fsync, then rename."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            with suppress(OSError):  # network file systems without locks rely on `check_fence`, as object stores do
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        folder = self.new_scratch_folder()
        temporary = folder / "file"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        target = self._root / name
        temporary.replace(target)
        sync_folder(target.parent)
        folder.rmdir()

    def exists(self, name: str) -> bool:
        return (self._root / name).exists()

    def remove(self, name: str) -> None:
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        else:
            return
        sync_folder(path.parent)

    def folders(self, prefix: str) -> list[str]:
        parent = self._root / prefix
        if not parent.is_dir():
            return []
        return sorted(f"{prefix}/{path.name}" for path in parent.iterdir() if path.is_dir())

    def new_scratch_folder(self) -> Path:
        parent = self._root / SCRATCH_FOLDER
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent))

    def place(self, local: Path, file_names: list[str], name: str) -> None:
        staged = self.new_scratch_folder()
        staged.chmod(0o755)
        own = local.resolve().is_relative_to((self._root / SCRATCH_FOLDER).resolve())
        for file_name in file_names:
            if own:
                (local / file_name).replace(staged / file_name)
            else:
                _copy_durably(local / file_name, staged / file_name)
        sync_folder(staged)
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(target)
        sync_folder(target.parent)
        sync_folder(self._root)

    def fetch(self, name: str, file_names: list[str], into: Path) -> Path:  # noqa: ARG002 - needs no copy
        return self._root / name

    def free_bytes(self) -> int | None:
        folder = next(path for path in (self._root, *self._root.parents) if path.exists())
        return shutil.disk_usage(folder).free

    def vanished(self, message: str) -> StageError:
        # Missing folders are made, so this one was there a moment ago: a volume that went, or a later attempt's sweep.
        return Transient(f"{message}; it went away while it was in use")


def _copy_durably(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ObjectStore:
    """A prefix of an object store, through fsspec: there is no rename, and an object appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        self._uri = uri

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield  # there are no locks; `check_fence` heals what a race may do

    def read(self, name: str) -> bytes | None:
        try:
            return self._retrying(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._retrying(lambda: self._fs.pipe_file(self._path(name), data))

    def exists(self, name: str) -> bool:
        return self._retrying(lambda: self._fs.isfile(self._path(name)))

    def remove(self, name: str) -> None:
        def remove() -> None:
            for path in self._fs.find(self._path(name)):
                self._fs.rm_file(path)

        self._retrying(remove)

    def folders(self, prefix: str) -> list[str]:
        root = PurePosixPath(self._path(prefix))
        paths = [PurePosixPath(path) for path in self._retrying(lambda: self._fs.find(str(root)))]
        return sorted({f"{prefix}/{path.relative_to(root).parts[0]}" for path in paths if path.parent != root})

    def new_scratch_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="qlora-"))

    def place(self, local: Path, file_names: list[str], name: str) -> None:
        for file_name in file_names:
            self._retrying(lambda n=file_name: self._fs.put_file(str(local / n), self._path(f"{name}/{n}")))

    def fetch(self, name: str, file_names: list[str], into: Path) -> Path:
        into.mkdir(parents=True, exist_ok=True)
        for file_name in file_names:
            try:
                self._retrying(lambda n=file_name: self._fs.get_file(self._path(f"{name}/{n}"), str(into / n)))
            except FileNotFoundError as error:
                raise DamagedFolder(f"{self._uri}/{name}: {file_name} is missing") from error
        return into

    def free_bytes(self) -> int | None:
        return None

    def vanished(self, message: str) -> StageError:
        return UserError(f"{message}; spec.store.uri must name a bucket that exists")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retrying(self, call: Callable[[], T]) -> T:
        """Try again while the store does not answer."""
        pause_seconds = FIRST_PAUSE_SECONDS
        for _ in range(TRIES - 1):
            try:
                return call()
            except Exception as error:
                if not _may_pass(error):
                    raise
                log.warning("%s does not answer (%s); trying again in %.1f s", self._uri, error, pause_seconds)
            time.sleep(pause_seconds)
            pause_seconds *= 2
        return call()


def _may_pass(error: Exception) -> bool:
    lasting = isinstance(error, PermissionError | FileNotFoundError | FileExistsError | NotADirectoryError)
    return _is_unavailable(error) and not lasting and not _lacks_credentials(error)
