"""Who has an alias now, and that version's adapter: what a new adapter is compared with."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.base import Digest
from orchestrator.api.formats import Holder
from orchestrator.api.ownership import belongs_to, registered_model_name
from orchestrator.api.task import TRACKING_URI_VARIABLE, StageTask
from qlora_trainer.outcome import Transient
from qlora_trainer.storage.final_adapter import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from qlora_trainer.tracking.mlflow_client import insist
from qlora_trainer.tracking.registry import ADAPTER_DIGEST_TAG, version_of_alias
from qlora_trainer.tracking.run_page import tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

BASE_TAGS = ("qlora.dev/base-model", "qlora.dev/base-revision")
ADAPTER_PATH = "artifacts/adapter"
"""Where it lies in a model that publish saves."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderAdapter:
    """An alias's version, and its adapter where it can answer here."""

    holder: Holder
    digest: Digest | None = None
    folder: Path | None = None
    """PEFT's layout."""


def fetch_holder(task: StageTask, alias: str, into: Path, *, largest_bytes: int, required: bool) -> HolderAdapter:
    """The version that has the alias of the job's registered model, and its adapter, downloaded.

    An adapter for another base, of more bytes than `largest_bytes` or on experts does not answer; the holder's
    `refusal` says so. MLflow away is such a refusal too, unless the answers are `required`: then it is Transient.
    """
    if not os.environ.get(TRACKING_URI_VARIABLE):
        return _refused(alias, None, f"{TRACKING_URI_VARIABLE} is not set")
    try:
        found = insist("ask who has the alias", lambda client: _version(client, task, alias))
        if found is None:
            return HolderAdapter(holder=Holder(alias=alias))
        reason = _unfit(task, found)
        if reason is not None:
            return _refused(alias, str(found.version), reason)
        name = registered_model_name(task.spec.tracking, task.namespace, task.job)
        folder = insist("fetch the alias's adapter", lambda _: download_adapter(name, str(found.version), into))
    except Transient as error:
        if required:
            raise
        return _refused(alias, None, error.message)
    reason = _unusable(folder, found.tags[ADAPTER_DIGEST_TAG], largest_bytes)
    if reason is not None:
        return _refused(alias, str(found.version), reason)
    holder = Holder(alias=alias, version=str(found.version))
    return HolderAdapter(holder=holder, digest=found.tags[ADAPTER_DIGEST_TAG], folder=folder)


def _version(client: MlflowClient, task: StageTask, alias: str) -> Any | None:
    name = registered_model_name(task.spec.tracking, task.namespace, task.job)
    version = version_of_alias(client, name, alias)
    return None if version is None else client.get_model_version(name, version)


def _unfit(task: StageTask, version: Any) -> str | None:
    own = tags(task)
    if ADAPTER_DIGEST_TAG not in version.tags or not belongs_to(version.tags, task.namespace):
        return "no job of this namespace made it"
    if odd := next((tag for tag in BASE_TAGS if version.tags.get(tag) != own.get(tag)), None):
        return f"it is for another base: its {odd} is {version.tags.get(odd)}, not {own.get(odd)}"
    return None


def download_adapter(name: str, version: str, into: Path) -> Path:
    """The adapter of a version that publish has made, in PEFT's layout. For use inside `insist`."""
    from mlflow.artifacts import download_artifacts

    into.mkdir(parents=True, exist_ok=True)
    return Path(download_artifacts(f"models:/{name}/{version}/{ADAPTER_PATH}", dst_path=str(into)))


def _unusable(folder: Path, digest: str, largest_bytes: int) -> str | None:
    weights, config = folder / ADAPTER_NAME, folder / ADAPTER_CONFIG_NAME
    if not weights.is_file() or not config.is_file():
        return "its artifacts hold no adapter"
    if f"sha256:{sha256(weights.read_bytes()).hexdigest()}" != digest:
        return f"its {ADAPTER_NAME} is not the one that was registered"
    if json.loads(config.read_text()).get("target_parameters"):
        return "its adapter is on experts, of which two at a time are not known here"
    if weights.stat().st_size > largest_bytes:
        return f"its adapter has {weights.stat().st_size} bytes, and this job's memory has room for {largest_bytes}"
    return None


def _refused(alias: str, version: str | None, reason: str) -> HolderAdapter:
    log.warning("the holder of the alias %s does not answer: %s", alias, reason)
    return HolderAdapter(holder=Holder(alias=alias, version=version, refusal=reason))
