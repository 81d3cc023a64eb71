"""Where a job's store is kept: a POSIX file system, or anything that fsspec knows."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import fsspec  # type: ignore[import-untyped]  # it has no types

from orchestrator.api.contained_files import open_file, open_folder, refuse_link
from qlora_trainer.outcome import StageError, Transient, UserError
from qlora_trainer.storage.backoff import Backoff, retry
from qlora_trainer.storage.trouble import is_away, is_not_implemented, is_other_version

SCRATCH_FOLDER = ".partial"
STORE_BACKOFF = Backoff(tries=6, first_pause_seconds=0.5)
"""Six tries span 15 seconds, on top of what the client itself retries."""
UPDATE_TRIES = 16
T = TypeVar("T")
log = logging.getLogger(__name__)


class DamagedFolder(Exception):
    """A file of a folder is missing or is not the one that the manifest vouches for."""


class Backend(Protocol):
    """What the job store needs from where it is kept. Names are relative to the job's folder."""

    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, data: bytes, *, make: bool = False) -> None: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None: ...
    def exists(self, name: str) -> bool: ...
    def remove(self, name: str) -> None: ...
    def folders(self, prefix: str) -> list[str]: ...
    def new_scratch_folder(self) -> Path: ...
    def place(self, local: Path, file_names: list[str], name: str) -> None: ...
    def add(self, local: Path, file_name: str, name: str) -> None: ...
    def fetch(self, name: str, file_names: list[str], into: Path) -> Path: ...
    def free_bytes(self) -> int | None: ...
    def vanished(self, message: str) -> StageError: ...
    def denied(self, message: str) -> StageError: ...


class FileSystem:
    """A folder of a POSIX file system: fsync, then rename.

    Nothing in it is a link: what would be reached through one is neither read nor written nor deleted.
    """

    def __init__(self, root: Path, within: Path | None = None) -> None:
        """The folders above the job's own two, which operators set up, may be links that stay `within`."""
        self._root = root
        self._within = within

    @contextmanager
    def _opened(self, name: str = "", *, make: bool = False) -> Generator[int]:
        """A descriptor of a folder of the store; raises FileNotFoundError where there is none."""
        base, own = self._root.parent.parent, self._root.parts[len(self._root.parent.parent.parts) :]
        with open_folder(base, *own, *PurePosixPath(name).parts, make=make, within=self._within) as folder:
            yield folder

    @contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Generator[tuple[int, str]]:
        """A descriptor of the folder that something lies in, and its name there."""
        path = PurePosixPath(name)
        with self._opened(str(path.parent), make=make) as folder:
            yield folder, path.name

    @contextmanager
    def _locked(self) -> Generator[None]:
        with self._opened(make=True) as folder:
            with suppress(OSError):  # network file systems without locks rely on `check_fence`
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield

    def read(self, name: str) -> bytes | None:
        try:
            with self._parent(name) as (folder, leaf), open_file(folder, leaf, self._root / name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, make: bool = False) -> None:
        """Put a file into place; with `make`, its folder is made where there is none."""
        scratch = self.new_scratch_folder()
        with self._opened(self._name(scratch)) as source, self._parent(name, make=make) as (folder, leaf):
            descriptor = os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=source)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace("file", leaf, src_dir_fd=source, dst_dir_fd=folder)
            os.fsync(folder)
        self.remove(self._name(scratch))

    def create(self, name: str, data: bytes) -> bool:
        """Put a file where there is none; whether there was none."""
        with self._locked():
            if self.exists(name):
                return False
            self.write(name, data)
            return True

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a small file by what `change` makes of it, one writer at a time."""
        with self._locked():
            self.write(name, change(self.read(name)))

    def exists(self, name: str) -> bool:
        try:
            with self._parent(name) as (folder, leaf):
                refuse_link(folder, leaf, self._root / name)
                os.lstat(leaf, dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        try:
            with self._parent(name) as (folder, leaf):
                refuse_link(folder, leaf, self._root / name)
                if stat.S_ISDIR(os.lstat(leaf, dir_fd=folder).st_mode):
                    shutil.rmtree(leaf, dir_fd=folder)  # which follows no link either
                else:
                    os.unlink(leaf, dir_fd=folder)
                os.fsync(folder)
        except FileNotFoundError:
            return

    def folders(self, prefix: str) -> list[str]:
        try:
            with self._opened(prefix) as folder:
                names = sorted(os.listdir(folder))
                for name in names:
                    refuse_link(folder, name, self._root / prefix / name)
                return [f"{prefix}/{name}" for name in names if _is_folder(folder, name)]
        except FileNotFoundError:
            return []

    def new_scratch_folder(self) -> Path:
        name = f"{SCRATCH_FOLDER}/{secrets.token_hex(8)}"
        with self._opened(name, make=True):
            return self._root / name

    def place(self, local: Path, file_names: list[str], name: str) -> None:
        staged = self._name(self.new_scratch_folder())
        with self._opened(staged) as target, self._source(local) as (source, own):
            os.fchmod(target, 0o755)
            for file_name in file_names:
                refuse_link(source, file_name, local / file_name)
                if own:
                    os.replace(file_name, file_name, src_dir_fd=source, dst_dir_fd=target)
                else:
                    _copy_durably(source, target, file_name, local / file_name)
            os.fsync(target)
        with self._parent(staged) as (scratch, leaf), self._parent(name, make=True) as (parent, final):
            os.rename(leaf, final, src_dir_fd=scratch, dst_dir_fd=parent)
            os.fsync(parent)
        with self._opened() as root:
            os.fsync(root)

    def add(self, local: Path, file_name: str, name: str) -> None:
        """Put one more file of a scratch folder of this store into a folder that may be there."""
        with self._source(local) as (source, own), self._opened(name, make=True) as target:
            assert own, "it is moved, not copied"
            os.fchmod(target, 0o755)
            refuse_link(source, file_name, local / file_name)
            os.replace(file_name, file_name, src_dir_fd=source, dst_dir_fd=target)
            os.fsync(target)
        with self._opened() as root:
            os.fsync(root)

    @contextmanager
    def _source(self, local: Path) -> Generator[tuple[int, bool]]:
        """A descriptor of the folder that is to be placed, and whether it is scratch of this store."""
        if local.is_relative_to(self._root / SCRATCH_FOLDER):
            with self._opened(self._name(local)) as folder:
                yield folder, True
        else:
            with open_folder(local) as folder:
                yield folder, False

    def fetch(self, name: str, file_names: list[str], into: Path) -> Path:  # noqa: ARG002 - needs no copy
        try:
            with self._opened(name) as folder:
                for file_name in file_names:
                    refuse_link(folder, file_name, self._root / name / file_name)
        except FileNotFoundError as error:
            raise DamagedFolder(f"{self._root / name} is missing") from error
        return self._root / name

    def free_bytes(self) -> int | None:
        folder = next(path for path in (self._root, *self._root.parents) if path.exists())
        return shutil.disk_usage(folder).free

    def vanished(self, message: str) -> StageError:
        # Missing folders are made, so this one was there a moment ago: a volume that went, or a later attempt's sweep.
        return Transient(f"{message}; it went away while it was in use")

    def denied(self, message: str) -> StageError:
        return UserError(message)  # the rights of files do not come and go by themselves

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self._root))


def _is_folder(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode)
    except FileNotFoundError:
        return False


def _copy_durably(source: int, target: int, name: str, where: Path) -> None:
    with open_file(source, name, where) as file:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=target)
        with os.fdopen(descriptor, "wb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStore:
    """A prefix of an object store, through fsspec: there is no rename, and an object appears whole or not at all.

    Where two writers may meet, a write names the version that it was decided on, and the store refuses it if that is
    another one by now. S3 can do that for any version (If-Match); what other stores have in common is that an object is
    only put where there is none. Where a store cannot do either, `check_fence` repairs what a race may do.
    """

    def __init__(self, uri: str, backoff: Backoff, *, is_new: bool = False) -> None:
        """`is_new`: nothing of the job is known to be there yet, so a denial is for its user to mend."""
        core: Any = fsspec.core  # Any: fsspec has no types
        self._fs, root = core.url_to_fs(uri, use_listings_cache=False)
        self._root = str(root)
        self._uri = uri
        self._backoff = backoff
        self._is_new = is_new
        self._knows_conditions = True

    def read(self, name: str) -> bytes | None:
        try:
            return self._retrying(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, make: bool = False) -> None:  # noqa: ARG002 - there are no folders
        self._retrying(lambda: self._fs.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Put an object where there is none; whether there was none."""
        return self._write_if(name, data, version=None)

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a small object by what `change` makes of it, again if another one was there before."""
        for _ in range(UPDATE_TRIES):
            version = self._version(name)  # asked for before the content: what comes between is found out
            if self._write_if(name, change(self.read(name)), version=version):
                return
        raise Transient(f"{self._uri}/{name} was changed by others {UPDATE_TRIES} times in a row")

    def _version(self, name: str) -> str | None:
        """What tells an object from what it will be: its ETag, or nothing where that cannot be asked for."""
        info = self._info(name)
        return None if info is None else str(info.get("ETag") or "")

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the store says of an object; None where there is none."""
        path = self._path(name)
        try:
            try:
                return self._retrying(lambda: self._fs.info(path))
            except PermissionError:  # of an answer without a body, which says no more: ask for one that says why
                self._retrying(lambda: self._fs.cat_file(path, start=0, end=1))
                return self._retrying(lambda: self._fs.info(path))
        except FileNotFoundError:
            return None

    def _write_if(self, name: str, data: bytes, *, version: str | None) -> bool:
        """Write if the object is of this version, where None is none; whether it was."""
        condition = {"mode": "create"} if version is None else {"IfMatch": version} if self._is_s3 and version else {}
        if not condition or not self._knows_conditions:
            self.write(name, data)
            return True
        try:
            self._retrying(lambda: self._fs.pipe_file(self._path(name), data, **condition))
        except Exception as error:
            if is_other_version(error):
                return False
            if not is_not_implemented(error):
                raise
            log.warning("%s cannot write under a condition, so it is done without: %s", self._uri, error)
            self._knows_conditions = False
            self.write(name, data)
        return True

    @property
    def _is_s3(self) -> bool:
        return self._uri.startswith("s3://")

    def exists(self, name: str) -> bool:
        info = self._info(name)
        return info is not None and info["type"] == "file"

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

    def add(self, local: Path, file_name: str, name: str) -> None:
        self.place(local, [file_name], name)

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

    def denied(self, message: str) -> StageError:
        return UserError(message) if self._is_new else Transient(message, of_credentials=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retrying(self, call: Callable[[], T]) -> T:
        """Try again while the store does not answer."""
        return retry(
            call,
            self._backoff,
            what=f"{self._uri} does not answer",
            may_pass=lambda error: is_away(error) and not is_other_version(error) and not is_not_implemented(error),
        )
