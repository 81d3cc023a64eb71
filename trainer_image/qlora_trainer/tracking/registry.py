"""The registry: the adapter as a logged model and a registered version, once.

Whatever is created carries the job's uid and the adapter's digest from the start, and is looked up by them before it is
created: a repeat finds it. A registered model is its namespace's (`api/ownership`); whose it is, is asked before every
write.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.base import Digest
from orchestrator.api.formats import Holder
from orchestrator.api.job import PublishFormat
from orchestrator.api.ownership import NAMESPACE_TAG, REGISTERED_MODEL, belongs_to, refusal, registered_model_name
from orchestrator.api.promotion import (
    COMPARED_TAG,
    GATE_TAG,
    PROMOTED_TAG,
    holder_changed,
    moved,
    stays,
    tag_value,
)
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Promotion
from orchestrator.api.task import StageTask
from qlora_trainer.outcome import UserError
from qlora_trainer.scoring.scores import Verdict
from qlora_trainer.tracking.mlflow_client import insist
from qlora_trainer.tracking.run_page import JOB_UID_TAG, tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)
ADAPTER_DIGEST_TAG = "qlora.dev/adapter-digest"
FORMAT_TAG = "qlora.dev/format"
LOGGED_MODEL_NAME = "adapter"
VERSIONS_TAG = "mlflow.modelVersions"
"""What MLflow's pages take a logged model's versions from."""
MAX_DESCRIPTION_CHARACTERS = 5000
"""What MLflow's SQL store keeps of a version's description."""
MAX_VERSIONS_LOOKED_AT = 1000


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
        return registered_model_name(self.task.spec.tracking, self.task.namespace, self.task.job)

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

    `save_model(folder, mlflow_model)` writes the model's artifact; it is called only when MLflow lacks it. Raises
    UserError for a registered model that is not the namespace's.
    """
    insist("look at the registered model", lambda client: refuse_foreign_model(client, registration.task))
    model_id = insist("log the model", lambda client: _logged_model(client, registration, save_model, scratch))
    version = insist("register the model", lambda client: _model_version(client, registration, model_id))
    name = registration.registered_model
    insist("show the version", lambda client: _name_version(client, model_id, name, version))
    alias = registration.task.spec.tracking.alias
    if alias is not None:
        insist("move the alias", lambda client: _move_alias(client, registration.task, alias, version))
    return version


def name_formats(registration: Registration, version: str, uris: Mapping[PublishFormat, str]) -> None:
    """Say in tags of the version where it lies in other formats, all of which are complete."""
    name = registration.registered_model

    def note(client: MlflowClient) -> None:
        for each, uri in uris.items():
            client.set_model_version_tag(name, version, f"{FORMAT_TAG}/{each}", tag_value(uri))

    insist("name the formats", note)


def promote(registration: Registration, version: str, verdict: Verdict, compared: Holder | None) -> Promotion:
    """Move the gated alias to the version if the gate lets it and nobody has to approve, once.

    Where the gate depends on the alias's holder, that must still be the one that the adapter was `compared` with. A
    version that does not get the alias keeps in tags what the gate found: somebody may ask for the alias later.
    """
    asked = registration.task.spec.tracking.promote
    assert asked is not None, "the job asks for it"
    name, alias = registration.registered_model, asked.alias
    known = compared.version if compared is not None else None

    def move(client: MlflowClient) -> Promotion:
        def note(tag: str, words: str) -> None:
            client.set_model_version_tag(name, version, f"{tag}/{alias}", tag_value(words))

        holder = version_of_alias(client, name, alias)
        if f"{PROMOTED_TAG}/{alias}" in client.get_model_version(name, version).tags:
            return moved(alias, version, verdict.words)
        if holder != version:
            left = _left(registration, verdict, holder, known)
            if left is not None:
                note(GATE_TAG, verdict.words)
                if known is not None:
                    note(COMPARED_TAG, known)
                return left
            _own_registered_model(client, registration.task)
            client.set_registered_model_alias(name, alias, version)
        note(PROMOTED_TAG, verdict.words)
        return moved(alias, version, verdict.words)

    return insist("move the gated alias", move)


def _left(registration: Registration, verdict: Verdict, holder: str | None, known: str | None) -> Promotion | None:
    """Why the alias is left with its holder; None where it is not."""
    asked = registration.task.spec.tracking.promote
    assert asked is not None, "the job asks for it"
    if not verdict.passed:
        return stays(asked.alias, holder, verdict.reason, verdict.words)
    changed = holder_changed(asked, holder, known)
    if changed is not None or asked.approval == "automatic":
        return changed
    words = f"it waits for approval (qlora promote {registration.task.job}): {verdict.words}"
    return stays(asked.alias, holder, Reason.AWAITING_APPROVAL, words)


def version_of_alias(client: MlflowClient, name: str, alias: str) -> str | None:
    """The number of the version that has it; None where nobody does."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model | no such alias
            return None
        raise


def refuse_foreign_model(client: MlflowClient, task: StageTask) -> Any | None:
    """The job's registered model, if there is one; raises UserError where it is not the namespace's."""
    model = find_registered_model(client, registered_model_name(task.spec.tracking, task.namespace, task.job))
    if model is not None and not belongs_here(client, model, task.namespace):
        raise UserError(refusal(REGISTERED_MODEL, model.name, model.tags, task.namespace))
    return model


def belongs_here(client: MlflowClient, model: Any, namespace: str) -> bool:
    """Whether a registered model is the namespace's: by its owner's tag, or without one by all of its versions."""
    return belongs_to(model.tags, namespace) or (NAMESPACE_TAG not in model.tags and _is_ours(client, model, namespace))


def _move_alias(client: MlflowClient, task: StageTask, alias: str, version: str) -> None:
    name = registered_model_name(task.spec.tracking, task.namespace, task.job)
    _own_registered_model(client, task)
    client.set_registered_model_alias(name, alias, version)


def _logged_model(
    client: MlflowClient, registration: Registration, save_model: Callable[[Path, Any], None], scratch: Path
) -> str:
    """The id of the run's logged model of this adapter, complete."""
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model

    run = client.get_run(registration.run_id)
    found = _find_logged_model(client, run, registration)
    if found is not None and found.status == LoggedModelStatus.READY:
        _link(client, run, found.model_id)
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
    _link(client, run, model.model_id)
    log.info("logged the adapter as model %s", model.model_id)
    return model.model_id


def _link(client: MlflowClient, run: Run, model_id: str) -> None:
    """Make the model an output of its run, which is where the run's page finds it and its versions."""
    from mlflow.entities import LoggedModelOutput

    known = run.outputs.model_outputs if run.outputs else []
    if model_id not in {output.model_id for output in known}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])


def _name_version(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Let the pages of run and logged model say as which version it is registered; a server does not by itself."""
    known: list[dict[str, Any]] = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
    own = {"name": name, "version": version}
    if own not in [{key: str(value) for key, value in each.items()} for each in known]:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*known, own])})


def _find_logged_model(client: MlflowClient, run: Run, registration: Registration) -> Any | None:
    found = client.search_logged_models([run.info.experiment_id], registration.filter, max_results=10)
    return next((model for model in found if model.source_run_id == run.info.run_id), None)


def _model_version(client: MlflowClient, registration: Registration, model_id: str) -> str:
    """The number of this adapter's version of the registered model."""
    name = registration.registered_model
    if (found := _find_version(client, registration)) is not None:
        return str(found.version)
    _own_registered_model(client, registration.task)
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


def _own_registered_model(client: Any, task: StageTask) -> None:
    """Make the registered model if there is none, with its owner's tag; raises UserError where it is another's."""
    from mlflow.exceptions import MlflowException

    name = registered_model_name(task.spec.tracking, task.namespace, task.job)
    model = refuse_foreign_model(client, task)
    if model is None:
        try:
            client.create_registered_model(name, tags={NAMESPACE_TAG: task.namespace})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            refuse_foreign_model(client, task)  # somebody else was faster
    elif NAMESPACE_TAG not in model.tags:
        client.set_registered_model_tag(name, NAMESPACE_TAG, task.namespace)
        refuse_foreign_model(client, task)  # somebody else may have been slower


def find_registered_model(client: Any, name: str) -> Any | None:  # Any: mlflow's registered models have no types
    """The registered model; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _is_ours(client: MlflowClient, model: Any, namespace: str) -> bool:
    """Whether a registered model without an owner has only versions of the namespace's jobs."""
    if "'" in model.name:  # for which MLflow's filters have no escape
        versions: list[ModelVersion] = list(model.latest_versions or ())
    else:
        versions = client.search_model_versions(f"name = '{model.name}'", max_results=MAX_VERSIONS_LOOKED_AT)
    return all(belongs_to(version.tags, namespace) for version in versions)
