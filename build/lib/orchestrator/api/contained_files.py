"""Files below a folder that somebody named, reached so that no link leads out of it.

Two kinds of folders, each with a rule:

- `Contained` is somebody else's: a model, a data set. Links in it are followed as long as they stay in the folder, or
  on the claim that it lies on; those of a Hugging Face cache lead from `snapshots/<commit>` to the `blobs` beside it. A
  file is opened first and looked at then: where the *open* file lies decides (`/proc/self/fd`), so a link that is
  swapped in between changes nothing.
- `open_folder` and `open_file` are for a folder of our own, in which nobody has a reason to put a link: each name is
  opened relative to the folder before it, and one that is a link is refused. What is deleted or written there is there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a pipe without a writer must not hold us
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_TRIES = 8
"""Of making and opening a folder that somebody removes at the same time."""


class LinkRefused(Exception):
    """A link leads where it must not; the message says which, where to, and what to do."""


@dataclass(frozen=True, slots=True)
class Contained:
    """A folder of somebody else's, and where the files may lie that its names lead to."""

    folder: Path
    """Without links in its own path."""
    roots: tuple[Path, ...]
    claim: bool = False

    @classmethod
    def of(cls, folder: Path, claim: Path | None = None) -> Contained:
        """The folder, which may be named by a link, unless that leaves the claim. Raises OSError, LinkRefused."""
        real = folder.resolve(strict=True)
        if claim is None:
            entries = (each.parent.parent for each in (real, *real.parents) if each.parent.name == SNAPSHOTS)
            return cls(real, (real, *(entry / BLOBS for entry in entries)))
        root = claim.resolve(strict=True)
        if not real.is_relative_to(root):
            raise LinkRefused(f"{folder} is a link that leaves its claim; copy the folder that it points at")
        return cls(real, (root,), claim=True)

    def open(self, name: str) -> BufferedReader:
        """A regular file by its name in the folder, for reading. Raises OSError, LinkRefused."""
        descriptor = os.open(self.folder / name, _READ)
        try:
            self._check(name, Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(errno.EISDIR, "not a regular file", str(self.folder / name))
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self.open(name) as file:
            return file.read()

    def files(self) -> dict[str, os.stat_result]:
        """The regular files in the folder, by name, those behind links included. Raises OSError, LinkRefused."""
        found: dict[str, os.stat_result] = {}
        for name in sorted(os.listdir(self.folder)):
            path = self.folder / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                self._check_link(name, path)
                mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                with self.open(name) as file:
                    found[name] = os.fstat(file.fileno())
        return found

    def _check_link(self, name: str, path: Path) -> None:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise LinkRefused(
                f"{name} is a link to {os.readlink(path)}, which is not there; copy the folder with the files that its "
                "links point at"
            ) from error
        self._check(name, target)

    def _check(self, name: str, where: Path) -> None:
        if not any(where.is_relative_to(root) for root in self.roots):
            what = "its claim" if self.claim else "its folder"
            raise LinkRefused(f"{name} is a link that leaves {what}; copy the file that it points at")


@contextmanager
def open_folder(base: Path, *names: str, make: bool = False, within: Path | None = None) -> Generator[int]:
    """A descriptor of the folder that the names lead to, one below the other and none of them a link.

    `base` itself may be a link, as long as it stays `within` a folder. Raises OSError, LinkRefused.
    """
    if make:
        base.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(base, _FOLDER & ~os.O_NOFOLLOW)
    try:
        if within is not None and not Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(within.resolve()):
            raise LinkRefused(f"{base} leads out of {within}; remove the link")
        where = base
        for name in names:
            where = where / name
            inner = _inner(descriptor, name, where, make)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _inner(folder: int, name: str, where: Path, make: bool) -> int:
    for _ in range(_TRIES):
        try:
            return os.open(name, _FOLDER, dir_fd=folder)
        except FileNotFoundError:
            if not make:
                raise
            try:
                os.mkdir(name, dir_fd=folder)
            except FileExistsError:
                continue
        except OSError:
            refuse_link(folder, name, where)
            raise
    raise FileNotFoundError(errno.ENOENT, "removed as often as it is made", str(where))


def open_file(folder: int, name: str, where: Path) -> BufferedReader:
    """A regular file of an open folder, for reading; `where` is its path, for messages. Raises OSError, LinkRefused."""
    try:
        descriptor = os.open(name, _READ | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError:
        refuse_link(folder, name, where)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(where))
    return os.fdopen(descriptor, "rb")


def open_regular(path: Path) -> BufferedReader:
    """A regular file in a folder that may be named by a link, for reading. Raises OSError, LinkRefused."""
    with open_folder(path.parent) as folder:
        return open_file(folder, path.name, path)


def refuse_link(folder: int, name: str, where: Path) -> None:
    """Raise LinkRefused where the name is a link."""
    try:
        mode = os.lstat(name, dir_fd=folder).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise LinkRefused(
            f"{where} is a link, and none is followed here; put the folder or file that it points at in its place"
        )
