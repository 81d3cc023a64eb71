"""The registry: the adapter as a logged model and a registered version, once.

Whatever is created carries the job's uid and the adapter's digest from the start, and is looked up by them before it is
created: a repeat finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.base import Digest
from orchestrator.api.task import StageTask
from qlora_trainer.tracking.mlflow_client import insist
from qlora_trainer.tracking.mlflow_run import JOB_UID_TAG, tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)
ADAPTER_DIGEST_TAG = "qlora.dev/adapter-digest"
LOGGED_MODEL_NAME = "adapter"
MAX_DESCRIPTION_CHARACTERS = 5000
"""What MLflow's SQL store keeps of a version's description."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """An adapter on its way into the registry."""

    task: StageTask
    run_id: str
    adapter_digest: Digest
    description: str

    @property
    def registered_model(self) -> str:
        """The name in the registry."""
        return self.task.spec.tracking.registered_model or self.task.job

    @property
    def tags(self) -> dict[str, str]:
        """What the logged model and its version are found by, and more."""
        return {**tags(self.task), ADAPTER_DIGEST_TAG: self.adapter_digest}

    @property
    def filter(self) -> str:
        """MLflow's search condition for what belongs to this job and adapter."""
        keys = (JOB_UID_TAG, ADAPTER_DIGEST_TAG)
        return " and ".join(f"tags.`{key}` = '{self.tags[key]}'" for key in keys)


def register(registration: Registration, save_model: Callable[[Path, Any], None], scratch: Path) -> str:
    """The adapter's version in the registry, made if there is none yet, with the alias on it.

    `save_model(folder, mlflow_model)` writes the model's artifact; it is called only when MLflow lacks it.
    """
    model_id = insist("log the model", lambda client: _logged_model(client, registration, save_model, scratch))
    version = insist("register the model", lambda client: _model_version(client, registration, model_id))
    alias = registration.task.spec.tracking.alias
    if alias is not None:
        name = registration.registered_model
        insist("move the alias", lambda client: client.set_registered_model_alias(name, alias, version))
    return version


def _logged_model(
    client: MlflowClient, registration: Registration, save_model: Callable[[Path, Any], None], scratch: Path
) -> str:
    """The id of the run's logged model of this adapter, complete."""
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model

    run = client.get_run(registration.run_id)
    found = _find_logged_model(client, run, registration)
    if found is not None and found.status == LoggedModelStatus.READY:
        return found.model_id
    model = found or client.create_logged_model(
        run.info.experiment_id, LOGGED_MODEL_NAME, source_run_id=run.info.run_id, tags=registration.tags
    )
    folder = scratch / model.model_id
    if not folder.exists():
        description = Model(
            artifact_path=model.artifact_location,
            run_id=run.info.run_id,
            model_id=model.model_id,
            model_uuid=model.model_id,
        )
        save_model(folder, description)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    log.info("logged the adapter as model %s", model.model_id)
    return model.model_id


def _find_logged_model(client: MlflowClient, run: Run, registration: Registration) -> Any | None:
    found = client.search_logged_models([run.info.experiment_id], registration.filter, max_results=10)
    return next((model for model in found if model.source_run_id == run.info.run_id), None)


def _model_version(client: MlflowClient, registration: Registration, model_id: str) -> str:
    """The number of this adapter's version of the registered model."""
    name = registration.registered_model
    if (found := _find_version(client, registration)) is not None:
        return str(found.version)
    _ensure_registered_model(client, name)
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=registration.run_id,
        tags=registration.tags,
        description=registration.description[:MAX_DESCRIPTION_CHARACTERS],
        model_id=model_id,
    )
    log.info("registered version %s of %s", version.version, name)
    return str(version.version)


def _find_version(client: MlflowClient, registration: Registration) -> ModelVersion | None:
    # By tags alone: a model's name may hold quotes, for which MLflow's filters have no escape.
    found = client.search_model_versions(registration.filter, max_results=100)
    return next((version for version in found if version.name == registration.registered_model), None)


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
