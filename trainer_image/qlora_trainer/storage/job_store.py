"""The job's store: one folder on `file://`, `pvc://claim/path` or anything that fsspec knows (`s3://`).

Nothing else of the trainer touches the job's folder. Its rules:

- A folder exists when its manifest does. It is written to a scratch folder, made durable (fsync), moved into place,
  and its manifest comes last; on an object store it is uploaded, and its manifest comes last. It is deleted the other
  way round.
- A manifest vouches for the size and SHA-256 of every file; what does not match is a `DamagedFolder`, never data.
- The store belongs to the highest attempt that has taken the fence. Take it first, check it before every manifest.
- A store that may not be written to is a user's error; one that does not answer is asked again a few times, then
  the attempt ends as transient; so it does where credentials have expired, where rights are gone that the job had, and
  where the disk is full.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from orchestrator.api.base import Digest, Model
from orchestrator.api.contained_files import LinkRefused, open_regular
from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    ADDED_FOLDER,
    ANSWERS_FOLDER,
    ATTEMPTS_NAME,
    CHECKPOINTS_FOLDER,
    FENCE_NAME,
    LOGS_FOLDER,
    MANIFEST_NAME,
    PREPARED_FOLDER,
    START_FOLDER,
    AddedFile,
    Answer,
    AttemptLog,
    Fence,
    FileEntry,
    log_folder,
)
from orchestrator.api.stage_name import StageKind
from qlora_trainer.outcome import FencedError, StageError, Transient, UserError
from qlora_trainer.storage.backends import (
    SCRATCH_FOLDER,
    STORE_BACKOFF,
    Backend,
    DamagedFolder,
    FileSystem,
    ObjectStore,
)
from qlora_trainer.storage.backoff import Backoff
from qlora_trainer.storage.trouble import Trouble, trouble
from qlora_trainer.storage.uri import claim_path, local_path

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)


class JobStore:
    """The folder of one job."""

    def __init__(self, uri: str, backoff: Backoff = STORE_BACKOFF, *, is_new: bool = False) -> None:
        """`backoff` is for object stores; a file system is not asked again.

        `is_new`: no stage of the job is known to have used it.
        """
        self.uri = uri.rstrip("/")
        path = local_path(self.uri)
        self._backend: Backend = (
            ObjectStore(self.uri, backoff, is_new=is_new) if path is None else FileSystem(path, claim_path(self.uri))
        )

    # --- the fence

    def take_fence(self, attempt: int) -> None:
        """Own the store; raises FencedError if a later attempt already does."""

        def own(data: bytes | None) -> bytes:
            self._refuse_if_later(data, attempt)
            return Fence(attempt=attempt).model_dump_json(by_alias=True).encode()

        with self._trying("take the fence of"):
            self._backend.update(FENCE_NAME, own)

    def check_fence(self, attempt: int) -> None:
        """Raise FencedError if a later attempt owns the store."""
        with self._trying("read the fence of"):
            found = self._refuse_if_later(self._backend.read(FENCE_NAME), attempt)
        if found < attempt:
            # Where nothing keeps two writers apart, an earlier one may have written over ours between look and write.
            self.take_fence(attempt)

    def _refuse_if_later(self, data: bytes | None, attempt: int) -> int:
        try:
            found = Fence.model_validate_json(data).attempt if data else 0
        except ValidationError as error:
            raise UserError(
                f"{self.uri}/{FENCE_NAME}, which says who may write there, was changed by somebody else: "
                f"{error.errors()[0]['msg']}; remove it once no other stage of the job runs"
            ) from error
        if found > attempt:
            raise FencedError(f"attempt {found} owns {self.uri}; attempt {attempt} stops without writing")
        return found

    # --- attempts

    def record_attempt(self, attempt: int, tags: Mapping[str, str]) -> None:
        """Keep what an attempt says of itself, however it ends. For the fence's holder."""
        self.check_fence(attempt)

        def with_ours(data: bytes | None) -> bytes:
            known = AttemptLog(tags={**self._attempts(data).tags, str(attempt): dict(tags)})
            return known.model_dump_json(by_alias=True).encode()

        with self._trying("record the attempt in"):
            self._backend.update(ATTEMPTS_NAME, with_ours)

    def attempt_tags(self) -> dict[str, str]:
        """What the attempts said of themselves, the last word of each tag."""
        with self._trying("read the attempts of"):
            known = self._attempts(self._backend.read(ATTEMPTS_NAME)).tags
        return {name: value for number in sorted(known, key=int) for name, value in known[number].items()}

    def _attempts(self, data: bytes | None) -> AttemptLog:
        try:
            return AttemptLog.model_validate_json(data) if data else AttemptLog()
        except ValidationError as error:
            log.warning("%s/%s does not parse and is begun anew: %s", self.uri, ATTEMPTS_NAME, error)
            return AttemptLog()

    # --- logs

    def keep_log(self, stage: StageKind, attempt: int, files: Mapping[str, bytes], *, kept_attempts: int) -> None:
        """Put files into the folder of an attempt's log, and remove the logs of all but the newest attempts.

        No fence is asked for: an attempt has a folder of its own, and an old one's last words are worth having.
        """
        with self._trying("keep a log in"):
            for name, data in files.items():
                self._backend.write(f"{log_folder(stage, attempt)}/{name}", data, make=True)
            logs = sorted(self._backend.folders(LOGS_FOLDER), key=_attempt_of_log)
            for name in logs[:-kept_attempts]:
                self._backend.remove(name)

    # --- answers

    def keep_answer(self, attempt: int, digest: str, answer: Answer) -> None:
        """Keep an answer under the digest of all that it depends on. For the fence's holder."""
        self.check_fence(attempt)
        with self._trying("keep an answer in"):
            name = f"{ANSWERS_FOLDER}/{digest}.json"
            self._backend.write(name, answer.model_dump_json(by_alias=True).encode(), make=True)

    def read_answer(self, digest: str) -> Answer | None:
        """The answer of that digest; None where there is none, or where it cannot be read."""
        with self._trying("read an answer from"):
            data = self._backend.read(f"{ANSWERS_FOLDER}/{digest}.json")
        try:
            return Answer.model_validate_json(data) if data else None
        except ValidationError as error:
            log.warning("an answer in %s does not parse and is generated anew: %s", self.uri, error)
            return None

    def forget_answers(self) -> None:
        """Remove answers that stand in a table now."""
        with self._trying("remove answers from"):
            self._backend.remove(ANSWERS_FOLDER)

    # --- folders

    @contextmanager
    def scratch_folder(self) -> Generator[Path]:
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
            is_new = not self._has(name, files)
            if is_new:
                self._backend.remove(f"{name}/{MANIFEST_NAME}")
                self._backend.remove(name)
                self._backend.place(local, [entry.name for entry in files], name)
            manifest = _manifest_bytes(make_manifest(files))
            if not (is_new and self._backend.create(f"{name}/{MANIFEST_NAME}", manifest)):
                # There is one, which may have come meanwhile: whoever may still write, writes over it.
                self._backend.write(f"{name}/{MANIFEST_NAME}", _manifest_bytes(make_manifest(files)))
        return self.folder_uri(name)

    def added_file(self, name: str, file_name: str, inputs: Digest) -> FileEntry | None:
        """A file that `add_file` put into a folder without manifest; None where there is none of these inputs."""
        with self._trying(f"read {name} from"):
            data = self._backend.read(f"{ADDED_FOLDER}/{name}/{file_name}.json")
            if data is None or not self._backend.exists(f"{name}/{file_name}"):
                return None
        try:
            known = AddedFile.model_validate_json(data)
        except ValidationError as error:
            log.warning("what is known of %s/%s does not parse, so it is made anew: %s", name, file_name, error)
            return None
        return known.entry if known.inputs == inputs else None

    def add_file(self, attempt: int, name: str, path: Path, inputs: Digest) -> FileEntry:
        """Move a file out of a `scratch_folder` into a folder that has no manifest yet. For the fence's holder.

        Whoever is killed before the last file goes on from here: a file is remembered once it is durable.
        """
        entry = describe_durably(path)
        self.check_fence(attempt)
        with self._trying(f"write {name} to"):
            self._backend.add(path.parent, path.name, name)
            known = AddedFile(inputs=inputs, entry=entry)
            self._backend.write(f"{ADDED_FOLDER}/{name}/{path.name}.json", _manifest_bytes(known), make=True)
        return entry

    def finish_folder(self, attempt: int, name: str, manifest: Model) -> None:
        """Let a folder exist whose files have been added. For the fence's holder."""
        self.check_fence(attempt)
        with self._trying(f"write {name} to"):
            self._backend.write(f"{name}/{MANIFEST_NAME}", _manifest_bytes(manifest))
            self._backend.remove(f"{ADDED_FOLDER}/{name}")

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
                START_FOLDER,
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
    def _trying(self, action: str) -> Generator[None]:
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
        if isinstance(error, LinkRefused):
            return UserError(f"{what}: {error}")
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            free = f"{self._backend.free_bytes()} bytes are free"
            return Transient(f"{what}: the disk is full ({free}); free some space or give the job a larger volume")
        if code in (errno.EROFS, errno.EPERM):
            return UserError(f"{what}: {error}; give the job a store that it may read and write")
        if isinstance(error, NotADirectoryError | FileExistsError):
            return UserError(f"{what}: {error}; spec.store.uri must name a folder, not a file")
        match trouble(error):
            case Trouble.AWAY:
                return Transient(f"{what}: the store does not answer ({type(error).__name__}: {error})")
            case Trouble.STALE_CREDENTIALS:
                message = f"{what}: it takes its credentials no longer ({error}); a new attempt reads them anew"
                return Transient(message, of_credentials=True)
            case Trouble.REFUSED:
                return self._backend.denied(
                    f"{what}: {error}; give the job a store and credentials that may read and write it"
                )
            case Trouble.MISSING:
                return self._backend.vanished(f"{what}: {error}")
            case None:
                return None


def _manifest_bytes(manifest: Model) -> bytes:
    return manifest.model_dump_json(by_alias=True, indent=1).encode()


def _attempt_of_log(folder: str) -> int:
    number = folder.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def describe_durably(path: Path) -> FileEntry:
    """Make a file durable and describe it. Raises LinkRefused."""
    with open_regular(path) as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name=path.name, bytes=file.tell(), sha256=sha256)


def copy_verified(path: Path, entry: FileEntry, target: Path) -> None:
    """Copy the file that a manifest vouches for, not what may have taken its name since. Raises DamagedFolder."""
    with open_regular(path) as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy)
    _verify(target, entry, str(path.parent))


def _verify(path: Path, entry: FileEntry, where: str) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise DamagedFolder(f"{where}: {entry.name} has {size} bytes instead of {entry.bytes}")
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedFolder(f"{where}: {entry.name} is missing") from error
    if sha256 != entry.sha256:
        raise DamagedFolder(f"{where}: {entry.name} has the SHA-256 {sha256} instead of {entry.sha256}")
