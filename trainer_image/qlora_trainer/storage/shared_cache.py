"""What a machine's stages fetch once for all: base models and hub data sets, in folders that are called entries.

Rules:

- A stage holds a shared lock on each entry that it uses until it ends. What nobody holds may go, longest unused first,
  when another entry needs room below `$QLORA_MODEL_CACHE_GIB` or on the disk. Without that bound nothing is deleted:
  the hub's cache may be a person's own.
- One stage fills an entry; others that want it wait, and tell in their logs how far it is. They wait for as long as it
  grows, and `$QLORA_MODEL_CACHE_WAIT_SECONDS` more.
- Locks are flock(2)'s, which are free the moment their holder is dead. Their files are never deleted, for a lock on a
  file that has lost its name excludes nobody.
- A file has its name when all of it is there and durable; until then it has another, and the next stage goes on there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any, BinaryIO

from qlora_trainer.outcome import Transient, UserError

FOLDER_VARIABLE = "QLORA_MODEL_CACHE"
DEFAULT_FOLDER = "~/.cache/qlora/models"
LIMIT_VARIABLE, WAIT_VARIABLE = "QLORA_MODEL_CACHE_GIB", "QLORA_MODEL_CACHE_WAIT_SECONDS"
DEFAULT_WAIT_SECONDS = 600.0
LOCKS_NAME, ROOM_NAME = "locks", "room"
USE_SUFFIX, FILL_SUFFIX, RECORD_SUFFIX = ".use", ".fill", ".json"
PARTIAL_SUFFIX = ".part"
READ_BYTES = 16 * 2**20
POLL_SECONDS = 0.2
TELL_SECONDS = 30.0
GIB = 2**30
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)

log = logging.getLogger(__name__)

_held: list[int] = []
"""Descriptors of the shared locks of this process, which its end gives back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An entry as its lock's file names it."""

    lock: Path
    folder: Path
    bytes: int
    """What is there, or what is about to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCache:
    """The entries that this machine's stages share; `folder` holds their locks."""

    folder: Path
    limit_bytes: int | None = None
    wait_seconds: float = DEFAULT_WAIT_SECONDS

    @classmethod
    def from_environment(cls) -> SharedCache:
        """As the variables say; without them one for this user."""
        limit_gib = os.environ.get(LIMIT_VARIABLE)
        return cls(
            folder=Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser(),
            limit_bytes=int(float(limit_gib) * GIB) if limit_gib else None,
            wait_seconds=float(os.environ.get(WAIT_VARIABLE, DEFAULT_WAIT_SECONDS)),
        )

    def use(self, entry: Path) -> None:
        """Keep an entry from being deleted for as long as this process lives."""
        path = self._lock_path(entry, USE_SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            log.info("%s is not locked, because nothing can be written to %s", entry, self.folder)
            return
        _held.append(descriptor)
        self._acquire(descriptor, fcntl.LOCK_SH, entry, "is being deleted by another stage")
        os.utime(path)
        if not path.with_suffix(RECORD_SUFFIX).exists():
            _write_record(path, entry, 0)

    @contextmanager
    def filling(self, entry: Path, source: str) -> Generator[None]:
        """Alone with an entry, once any other stage that fills it is done, dead or hung (Transient)."""
        with _opened(self._lock_path(entry, FILL_SUFFIX)) as descriptor:
            self._acquire(descriptor, fcntl.LOCK_EX, entry, f"is being fetched from {source} by another stage")
            yield

    def make_room(self, entry: Path, needed_bytes: int, source: str) -> None:
        """See to it that so much more fits into an entry in use, and that nobody else counts on the same room.

        Raises Transient where it does not fit beside what is in use.
        """
        with _opened(self.folder / LOCKS_NAME / ROOM_NAME) as room:
            self._acquire(room, fcntl.LOCK_EX, entry, "waits for another stage that makes room")
            entry.mkdir(parents=True, exist_ok=True)
            lock = self._lock_path(entry, USE_SUFFIX)
            _write_record(lock, entry, 0)  # what a killed stage counted on is counted anew
            self._evict_for(entry, needed_bytes)
            missing_bytes, why = self._missing(needed_bytes)
            if missing_bytes > 0:
                raise Transient(
                    f"{source} needs {_gib(needed_bytes)} more in {self.folder}, {_gib(missing_bytes)} too much for "
                    f"{why}; what is there is in use; free some space, or give the model cache more"
                )
            _write_record(lock, entry, _bytes_in(entry) + needed_bytes)

    def refuse_if_too_large(self, size: int, source: str) -> None:
        """Raises UserError for what would not fit into an empty cache."""
        if self.limit_bytes is not None and size > self.limit_bytes:
            raise UserError(
                f"{source} takes {_gib(size)}, and this cluster's model cache holds {_gib(self.limit_bytes)} "
                f"({LIMIT_VARIABLE}); choose a smaller model, or ask who runs the cluster for a larger cache"
            )

    def _missing(self, needed_bytes: int) -> tuple[int, str]:
        """By how much the room is too little for so much more, and which bound says so."""
        free_bytes = shutil.disk_usage(self.folder).free
        on_disk = needed_bytes - free_bytes, f"its disk, of which {_gib(free_bytes)} are free"
        if self.limit_bytes is None:
            return on_disk
        taken = sum(each.bytes for each in self._entries())
        bound = f"{LIMIT_VARIABLE}={self.limit_bytes / GIB:g}, of which {_gib(taken)} are taken"
        return max((taken + needed_bytes - self.limit_bytes, bound), on_disk)

    def _evict_for(self, entry: Path, needed_bytes: int) -> None:
        if self.limit_bytes is None:
            return
        for other in sorted(self._entries(), key=lambda each: (each.lock.stat().st_mtime, each.lock)):
            if self._missing(needed_bytes)[0] <= 0:
                return
            if other.folder != entry:
                _delete_unless_used(other)

    def _entries(self) -> Iterator[_Entry]:
        """All entries that stages have used, and that are still there."""
        for path in sorted((self.folder / LOCKS_NAME).glob(f"*{RECORD_SUFFIX}")):
            record: dict[str, Any] = json.loads(path.read_bytes())
            folder = Path(record["folder"])
            if folder.is_dir():
                taken = max(int(record["bytes"]), _bytes_in(folder))
                yield _Entry(lock=path.with_suffix(USE_SUFFIX), folder=folder, bytes=taken)

    def _acquire(self, descriptor: int, kind: int, entry: Path, what: str) -> None:
        """Take the lock. Its holder is waited for while the entry changes its size, and so long after."""
        seen, changed, told = -1, monotonic(), -inf
        while not _try_lock(descriptor, kind):
            size = _bytes_in(entry)
            if size != seen:
                seen, changed = size, monotonic()
            if monotonic() - changed > self.wait_seconds:
                raise Transient(f"{entry} {what}, and nothing has come of it for {self.wait_seconds:.0f} s")
            if monotonic() - told > TELL_SECONDS:
                log.info("%s %s, %s so far; waiting", entry.name, what, _gib(size))
                told = monotonic()
            sleep(POLL_SECONDS)

    def _lock_path(self, entry: Path, suffix: str) -> Path:
        return self.folder / LOCKS_NAME / (hashlib.sha256(bytes(entry)).hexdigest()[:32] + suffix)


def hub_entry(repository: str, kind: str) -> Path:
    """The folder of a repository in the hub's cache; `kind` is "model" or "dataset"."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)


def fetch_file(remote: BinaryIO, target: Path, size: int, sha256: str | None) -> None:
    """Make a file of the remote one, going on where another process was killed; only its filler may call this.

    Raises Transient where what came is not what was promised; nothing of it is kept then.
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    with _opened(partial) as descriptor:
        position = os.fstat(descriptor).st_size
        if position:
            log.info("going on with %s at %s", target.name, _gib(position))
        remote.seek(position)
        while position < size and (chunk := remote.read(min(READ_BYTES, size - position))):
            # At its own place: a filler that was asked to stop may still be at this piece, with the same bytes.
            position += os.pwrite(descriptor, chunk, position)
        os.fsync(descriptor)
    found = _description(partial, with_digest=sha256 is not None)
    if found != (size, sha256):
        partial.unlink()
        raise Transient(f"{target.name} came damaged: {found} in place of {(size, sha256)}; it is fetched again")
    partial.rename(target)


def fetched_bytes(target: Path) -> int:
    """How much of a file is here, whole or in part."""
    for path in (target, target.with_name(target.name + PARTIAL_SUFFIX)):
        with suppress(FileNotFoundError):
            return path.stat().st_size
    return 0


def _description(path: Path, *, with_digest: bool) -> tuple[int, str | None]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if with_digest else None
        return os.fstat(file.fileno()).st_size, digest


def _delete_unless_used(entry: _Entry) -> None:
    with _opened(entry.lock) as descriptor:
        if _try_lock(descriptor, fcntl.LOCK_EX):
            log.info("deleting %s (%s), which is unused for longest, to make room", entry.folder, _gib(entry.bytes))
            _write_record(entry.lock, entry.folder, 0)
            shutil.rmtree(entry.folder, ignore_errors=True)  # what is left of it still counts


def _write_record(lock: Path, entry: Path, expected_bytes: int) -> None:
    """Say beside its lock where an entry is, and what it will take."""
    record = lock.with_suffix(RECORD_SUFFIX)
    temporary = record.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"folder": str(entry), "bytes": expected_bytes}))
    temporary.replace(record)


def _bytes_in(folder: Path) -> int:
    """What the files of a folder take, links aside; they come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


@contextmanager
def _opened(path: Path) -> Generator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Transient(f"the model cache's file system takes no locks ({error}); choose one that does") from error
    return True


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
