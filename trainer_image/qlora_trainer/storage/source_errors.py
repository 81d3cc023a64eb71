"""What it means when a model or a dataset cannot be read: the sources' errors as the stage's."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from orchestrator.api.contained_files import LinkRefused
from qlora_trainer.outcome import StageError, Transient, UserError
from qlora_trainer.storage.trouble import Trouble, names_in_chain, trouble


@contextmanager
def translated(source: str, *, field: str) -> Generator[None]:
    """Raise what the source's errors mean; `field` is what names the source in the job."""
    try:
        yield
    except StageError:
        raise
    except LinkRefused as error:
        raise UserError(f"{source}: {error}") from error
    except ImportError as error:
        raise UserError(f"{source} needs a package that this trainer image lacks: {error}") from error
    except Exception as error:
        meaning = _meaning(error, source, field)
        if meaning is None:
            raise
        raise meaning from error


def _meaning(error: Exception, source: str, field: str) -> StageError | None:
    found = trouble(error)
    if found is Trouble.AWAY:
        return Transient(f"{source} does not answer ({type(error).__name__}: {error})")
    if found is Trouble.STALE_CREDENTIALS:
        message = f"{source} takes its credentials no longer ({error}); a new attempt reads them anew"
        return Transient(message, of_credentials=True)
    kinds = names_in_chain(error)
    if kinds & {"GatedRepoError", "DisabledRepoError"}:
        return UserError(
            f"{source} is gated: accept its terms on the hub, and give a token of that account through HF_TOKEN"
        )
    if "RevisionNotFoundError" in kinds:
        where = "spec.model.revision" if field == "spec.model.source" else field
        return UserError(f"{source} has no such revision; check {where}")
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return UserError(f"{source} is not on the hub, or is private; check its name, or give a token through HF_TOKEN")
    if found is Trouble.REFUSED:
        return UserError(f"{source} may not be read: {error}; give the job credentials that may")
    if found is Trouble.MISSING:
        return UserError(f"{source} cannot be read: {error}; check {field}")
    return None
