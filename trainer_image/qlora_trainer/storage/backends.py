"""Where a job's store is kept: a POSIX file system, or anything that fsspec knows."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import fsspec  # type: ignore[import-untyped]  # it has no types

from qlora_trainer.outcome import StageError, Transient, UserError
from qlora_trainer.storage.backoff import Backoff, retry
from qlora_trainer.storage.trouble import is_away

SCRATCH_FOLDER = ".partial"
STORE_BACKOFF = Backoff(tries=6, first_pause_seconds=0.5)
"""Six tries span 15 seconds, on top of what the client itself retries."""
T = TypeVar("T")


class DamagedFolder(Exception):
    """A file of a folder is missing or is not the one that the manifest vouches for."""


class Backend(Protocol):
    """What the job store needs from where it is kept. Names are relative to the job's folder."""

    def locked(self) -> AbstractContextManager[None]: ...
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


class FileSystem:
    """A folder of a POSIX file system: fsync, then rename."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def locked(self) -> Generator[None]:
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


class ObjectStore:
    """A prefix of an object store, through fsspec: there is no rename, and an object appears whole or not at all."""

    def __init__(self, uri: str, backoff: Backoff) -> None:
        core: Any = fsspec.core  # Any: fsspec has no types
        self._fs, root = core.url_to_fs(uri, use_listings_cache=False)
        self._root = str(root)
        self._uri = uri
        self._backoff = backoff

    @contextmanager
    def locked(self) -> Generator[None]:
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
        return retry(
            call,
            self._backoff,
            what=f"{self._uri} does not answer",
            may_pass=is_away,
        )
