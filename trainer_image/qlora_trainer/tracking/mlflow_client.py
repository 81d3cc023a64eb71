"""MLflow's client: how it is opened, and what is done about a server that is away."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from orchestrator.api.task import TRACKING_URI_VARIABLE
from orchestrator.api.tracking_login import read_login
from qlora_trainer.outcome import StageError, Transient, UserError
from qlora_trainer.storage.backoff import Backoff, retry
from qlora_trainer.storage.trouble import Trouble, is_away, trouble

if TYPE_CHECKING:
    from mlflow import MlflowClient

PUBLISH_BACKOFF = Backoff(tries=5, first_pause_seconds=1.0)
"""15 seconds in all."""
MAX_MESSAGE_CHARACTERS = 500

T = TypeVar("T")


def open_client() -> MlflowClient:
    """A client of the job's tracking server. It fails fast and tries once: waiting and repeating are ours."""
    uri = os.environ.get(TRACKING_URI_VARIABLE)
    if not uri:
        raise UserError(f"{TRACKING_URI_VARIABLE} is not set; it must name the MLflow server that keeps the results")
    # A client that repeats a request by itself could create a second model version behind our back.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    read_login(os.environ)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def insist(action: str, call: Callable[[MlflowClient], T], backoff: Backoff = PUBLISH_BACKOFF) -> T:
    """Do something in MLflow, again and again while it is away; Transient if it stays away."""
    try:
        return retry(
            lambda: call(open_client()),
            backoff,
            what=f"MLflow is away, cannot {action}",
            may_pass=is_away,
        )
    except StageError:
        raise
    except Exception as error:
        match trouble(error):
            case Trouble.AWAY:
                raise Transient(f"MLflow is away, cannot {action}: {first_line(error)}") from error
            case Trouble.STALE_CREDENTIALS:
                raise Transient(
                    f"MLflow takes its credentials no longer, cannot {action}: {first_line(error)}; "
                    "a new attempt reads them anew",
                    of_credentials=True,
                ) from error
            case Trouble.REFUSED:
                raise Transient(
                    f"MLflow refuses to {action}: {first_line(error)}; check its credentials", of_credentials=True
                ) from error
            case _:
                raise


def first_line(error: Exception) -> str:
    """What an error says, in a line that fits a log."""
    return (str(error) or type(error).__name__).splitlines()[0][:MAX_MESSAGE_CHARACTERS]
