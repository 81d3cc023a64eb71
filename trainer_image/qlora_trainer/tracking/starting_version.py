"""The registered version that a job goes on from: found, the namespace's, and its adapter downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.adapter import REGISTERED_PREFIX
from orchestrator.api.ownership import NAMESPACE_TAG
from orchestrator.api.task import TRACKING_URI_VARIABLE, StageTask
from qlora_trainer.outcome import UserError
from qlora_trainer.tracking.holder import BASE_TAGS, download_adapter
from qlora_trainer.tracking.mlflow_client import insist
from qlora_trainer.tracking.registry import ADAPTER_DIGEST_TAG, belongs_here, find_registered_model, version_of_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from qlora_trainer.model.starting_adapter import Known

FIELD = "spec.adapter.from"


def fetch_version(task: StageTask, into: Path) -> Known:
    """The adapter of `models:/name/version` or `models:/name@alias`. Raises UserError, Transient."""
    from qlora_trainer.model.starting_adapter import Known  # here, because torch takes seconds

    asked = task.spec.adapter.start
    assert asked is not None, "one is named"
    if not os.environ.get(TRACKING_URI_VARIABLE):
        raise UserError(f"{FIELD}: {asked} is in a registry, and {TRACKING_URI_VARIABLE} is not set; name a folder")
    version = insist("look up the version to go on from", lambda client: _version(client, asked, task.namespace))
    number, name = str(version.version), str(version.name)
    base, revision = (version.tags.get(tag) for tag in BASE_TAGS)
    digest = version.tags.get(ADAPTER_DIGEST_TAG)
    if digest is None or base is None or revision is None:
        raise UserError(
            f"{FIELD}: version {number} of {name} is none that a job has published, so nobody knows where in it an "
            "adapter is; name the adapter's folder instead"
        )
    folder = insist("fetch the adapter to go on from", lambda _: download_adapter(name, number, into))
    return Known(
        source=f"{REGISTERED_PREFIX}{name}/{number}",
        uri=folder.as_uri(),
        digest=digest,
        base=base,
        base_revision=revision,
    )


def _version(client: MlflowClient, asked: str, namespace: str) -> Any:
    """The version; UserError where there is none, or where the registered model is another namespace's."""
    from mlflow.exceptions import MlflowException

    address = asked.removeprefix(REGISTERED_PREFIX)
    name, separator, alias = address.partition("@")
    number = "" if separator else address.rpartition("/")[2]
    name = name if separator else address.rpartition("/")[0]
    model = find_registered_model(client, name)
    if model is None:
        raise UserError(f"{FIELD}: there is no registered model {name}; check the name")
    if not belongs_here(client, model, namespace):
        raise UserError(
            f"{FIELD}: the registered model {name} is not namespace {namespace}'s; let its owner name {namespace} in "
            f"its tag {NAMESPACE_TAG}, separated by a comma"
        )
    if separator:
        found = version_of_alias(client, name, alias)
        if found is None:
            raise UserError(f"{FIELD}: no version of {name} has the alias {alias}; check it, or name a version")
        number = found
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(f"{FIELD}: {name} has no version {number}; check the number") from error
        raise
