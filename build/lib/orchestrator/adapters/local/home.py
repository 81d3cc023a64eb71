"""The home folder is its owner's alone: made so, and mended where it was not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from orchestrator.errors import PermanentError

log = logging.getLogger(__name__)

OTHERS = 0o077
"""Permission bits of everybody but the owner."""


def make_private(home: Path) -> None:
    """Make the folder, readable by its owner alone, and whatever lies in it; raises PermanentError in another's home.

    What is deeper in it needs no look: nobody else gets past the folder itself.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = home.stat().st_uid
    if owner != os.getuid():
        raise PermanentError(
            f"{home} belongs to user {owner}, and this is user {os.getuid()}: set QLORA_HOME to a folder of your own"
        )
    if _close(home):
        log.warning("%s could be read by others; it is closed now", home)
    for path in home.iterdir():
        _close(path)


def private_files() -> None:
    """From here on this process, and all that it starts, makes files that nobody else can read."""
    os.umask(OTHERS)


def _close(path: Path) -> bool:
    """Take others' permissions; whether they had any."""
    if path.is_symlink():
        return False
    try:
        mode = path.stat().st_mode & 0o7777
        if mode & OTHERS:
            path.chmod(mode & ~OTHERS)
    except FileNotFoundError:  # a journal of the database, gone meanwhile
        return False
    return bool(mode & OTHERS)
