"""The adapter that a job ends with, in PEFT's layout, and how it is found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from orchestrator.api.base import Digest
from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    ANSWERS_NAME,
    JOURNAL_NAME,
    AnswerTable,
    CheckpointManifest,
    JournalRecord,
)
from orchestrator.api.task import StageTask
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from qlora_trainer.storage.uri import local_path

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OLDEST_FIELDS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
    ]
)
"""What PEFT 0.4 writes, the first that has LoRA on 4-bit layers."""

Json = dict[str, Any]  # Any: whatever JSON holds


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """The final adapter, durable."""

    uri: str
    digest: Digest
    """SHA-256 of adapter_model.safetensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAdapter:
    """The final adapter on this machine, verified."""

    folder: Path
    manifest: CheckpointManifest
    digest: Digest
    """SHA-256 of adapter_model.safetensors."""
    journal: Sequence[JournalRecord]
    answers: AnswerTable | None = None
    """To held-out prompts, where the job asked for some."""


def fetch_final_adapter(store: JobStore, into: Path) -> FinalAdapter | None:
    """The job's final adapter, as its manifest vouches for it; None where there is none. Raises DamagedFolder."""
    manifest = store.read_manifest(ADAPTER_FOLDER, CheckpointManifest)
    if manifest is None or not manifest.complete:
        return None
    folder = store.fetch_folder(ADAPTER_FOLDER, manifest.files, into)
    digests = {entry.name: entry.sha256 for entry in manifest.files}
    if missing := {ADAPTER_NAME, ADAPTER_CONFIG_NAME, JOURNAL_NAME} - digests.keys():
        raise DamagedFolder(f"{store.folder_uri(ADAPTER_FOLDER)}: the manifest names no {min(missing)}")
    sha256 = digests[ADAPTER_NAME]
    try:
        journal = Journal.load(folder / JOURNAL_NAME).records()
    except ValueError as error:
        raise DamagedFolder(f"{store.folder_uri(ADAPTER_FOLDER)}: {JOURNAL_NAME} is damaged: {error}") from error
    answers = None
    if ANSWERS_NAME in digests:
        try:
            answers = AnswerTable.model_validate_json((folder / ANSWERS_NAME).read_bytes())
        except ValueError as error:
            raise DamagedFolder(f"{store.folder_uri(ADAPTER_FOLDER)}: {ANSWERS_NAME} is damaged: {error}") from error
    return FinalAdapter(folder=folder, manifest=manifest, digest=f"sha256:{sha256}", journal=journal, answers=answers)


def adapter_config(config: PeftConfiguration, task: StageTask) -> Json:
    """The content of adapter_config.json: PEFT's own, in a fixed order, with a base model that others can find.

    Older versions of PEFT refuse fields that they do not know, so those that came later are left out where they say
    nothing.
    """
    source = task.spec.model.source
    path = local_path(source)
    base = source.removeprefix("hf://") if path is None else str(path)
    from_hub = source.startswith("hf://") and task.prepared is not None
    defaults = _defaults(config)
    own = {
        key: value
        for key, value in config.to_dict().items()
        if key != "peft_version" and (key in OLDEST_FIELDS or key not in defaults or value != defaults[key])
    }
    content = {
        **own,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": task.prepared.model.revision if from_hub and task.prepared else None,
    }
    # PEFT keeps module names in sets, whose order changes from process to process.
    return {key: sorted(cast("set[str]", value)) if isinstance(value, set) else value for key, value in content.items()}


def _defaults(config: object) -> Json:
    if not is_dataclass(config):
        return {}
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config)
    }


class PeftConfiguration(Protocol):
    """The part of PEFT's configuration classes that is used."""

    def to_dict(self) -> Json: ...
