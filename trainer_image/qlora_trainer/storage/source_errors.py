"""What it means when a model or a dataset cannot be read: the sources' errors as the stage's.

Clients' errors are told by name, because the clients (huggingface_hub, botocore) are imported only where a source needs
them.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager

from qlora_trainer.outcome import StageError, Transient, UserError

CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "botocore", "aiohttp", "aiobotocore")


@contextmanager
def translated(source: str, *, field: str) -> Generator[None]:
    """Raise what the source's errors mean; `field` is what names the source in the job."""
    try:
        yield
    except StageError:
        raise
    except ImportError as error:
        raise UserError(f"{source} needs a package that this trainer image lacks: {error}") from error
    except Exception as error:
        meaning = _meaning(error, source, field)
        if meaning is None:
            raise
        raise meaning from error


def _meaning(error: Exception, source: str, field: str) -> StageError | None:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds or "DisabledRepoError" in kinds:
        return UserError(
            f"{source} is gated: accept its terms on the hub, and give a token of that account through HF_TOKEN"
        )
    if "RevisionNotFoundError" in kinds:
        return UserError(f"{source} has no such revision; check spec.model.revision")
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return UserError(f"{source} is not on the hub, or is private; check its name, or give a token through HF_TOKEN")
    if kinds & {"PermissionError", "NoCredentialsError", "PartialCredentialsError"}:
        return UserError(f"{source} may not be read: {error}; give the job credentials that may")
    if kinds & {"FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "DatasetNotFoundError"}:
        return UserError(f"{source} cannot be read: {error}; check {field}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return None  # the frame says itself where there is no space left
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS:
        return Transient(f"{source} does not answer ({type(error).__name__}: {error})")
    return None
