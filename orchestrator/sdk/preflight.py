"""What can be known to be wrong with a job before it is stored, by looking at this machine's files.

`Client.submit` calls `check_files` for a service that runs on the same machine. Prepare checks the same and more;
this only spares the wait. Nothing is fetched: other schemes are left to prepare.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from orchestrator.adapters.job_store import model_config
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.job import ModelSource, QLoRAJob
from orchestrator.api.notification import Webhook
from orchestrator.api.trainable import refuse_files_without_tokenizer
from orchestrator.api.uris import file_path
from orchestrator.core.job.webhook_urls import refused_notifications
from orchestrator.errors import InvalidObject, NotFound, PermanentError

MODEL_FIELD, ADAPTER_FIELD = "spec.model.source", "spec.adapter.from"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SINGLE_FILE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
POINTED_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors"})
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in place of a large one."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def check_files(job: QLoRAJob, default_store_uri: str) -> None:
    """Raise InvalidObject naming the field for a model, dataset or store on this machine that cannot work."""
    check_model(job.spec.model)
    check_adapter(job.spec.adapter)
    check_dataset("spec.dataset.source", job.spec.dataset.source)
    if job.spec.dataset.eval_source is not None:
        check_dataset("spec.dataset.evalSource", job.spec.dataset.eval_source)
    _check_store(job.spec.store.uri if job.spec.store is not None else default_store_uri)


def check_webhooks(webhooks: Sequence[Webhook], allowed_hosts: str) -> None:
    """Raise InvalidObject naming the field for a webhook of a job or a queue that the service would not tell."""
    refusal = refused_notifications(webhooks, allowed_hosts)
    if refusal is not None:
        raise InvalidObject(refusal)


def check_planned_model(model: ModelSource) -> None:
    """The same for a plan, for which a folder with nothing but a config is enough."""
    folder = file_path(model.source)
    if folder is not None and folder.is_dir() and any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
        check_model(model)


def check_model(model: ModelSource) -> None:
    """Raise InvalidObject for a model folder on this machine that prepare will refuse for what its files are."""
    folder = file_path(model.source)
    if folder is None:
        return
    field = MODEL_FIELD
    if not folder.is_dir():
        raise InvalidObject(f"{field}: {folder} is not a folder; give the folder of a Hugging Face model")
    _refuse_pointers(folder)
    try:
        model_config.read_config(model)
    except (NotFound, InvalidObject) as error:
        raise InvalidObject(f"{field}: {error}") from error
    if (folder / "adapter_config.json").exists():
        raise InvalidObject(
            f"{field}: adapter_config.json lies in {folder}, which would be loaded as an adapter; give the "
            "adapter's base model, or remove that file from a whole model"
        )
    if any((folder / name).exists() for name in (SINGLE_FILE_NAME, INDEX_NAME)):
        _check_index(folder)
        try:
            refuse_files_without_tokenizer([path.name for path in folder.iterdir() if path.is_file()])
        except ValueError as error:
            raise InvalidObject(f"{field}: {folder}: {error}") from error
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise InvalidObject(
            f"{field}: {folder} holds only pickled weights, which can run code when they are loaded; "
            "convert them to safetensors (model.save_pretrained does)"
        )
    if any(folder.glob("*.gguf")):
        raise InvalidObject(
            f"{field}: {folder} holds a GGUF file, which is for inference; give the model's safetensors"
        )
    raise InvalidObject(
        f"{field}: {folder} holds neither {SINGLE_FILE_NAME} nor {INDEX_NAME}; give the folder of a complete model"
    )


def check_adapter(adapter: AdapterSpec) -> None:
    """Raise InvalidObject for an adapter folder on this machine that prepare will refuse for what its files are."""
    folder = file_path(adapter.start_uri) if adapter.start_uri is not None else None
    if folder is None:
        return
    if not folder.is_dir():
        raise InvalidObject(f"{ADAPTER_FIELD}: {folder} is not a folder; give that of an adapter that PEFT has saved")
    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise InvalidObject(
            f"{ADAPTER_FIELD}: there is no {missing[0]} in {folder}; give the folder of an adapter that PEFT has saved "
            "as safetensors"
        )


def _refuse_pointers(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise InvalidObject(
                f"{MODEL_FIELD}: {path} is a link to {path.readlink()}, which is not there; copy the files that links "
                "point at"
            )
        if path.suffix in POINTED_SUFFIXES and path.is_file():
            with path.open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    raise InvalidObject(
                        f"{MODEL_FIELD}: {path} is a Git LFS pointer, not the file itself; run `git lfs pull` where "
                        "the model was cloned"
                    )


def _check_index(folder: Path) -> None:
    """The files of an index are there, and no other set of weights is."""
    path = folder / INDEX_NAME
    if not path.exists():
        return
    try:
        names = {str(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidObject(f"{MODEL_FIELD}: {path} is damaged ({error!r}); copy it again") from error
    if not names:
        raise InvalidObject(f"{MODEL_FIELD}: {path} lists no files; copy the whole model")
    if (folder / SINGLE_FILE_NAME).exists() and names != {SINGLE_FILE_NAME}:
        raise InvalidObject(
            f"{MODEL_FIELD}: {folder} holds two sets of weights, {SINGLE_FILE_NAME} and the {len(names)} files of "
            f"{INDEX_NAME}; remove the one that is not meant"
        )
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise InvalidObject(
            f"{MODEL_FIELD}: {path} lists {len(missing)} files that are not there, the first is {missing[0]}; copy the "
            "whole model"
        )


def check_dataset(field: str, source: str) -> None:
    """Raise InvalidObject for a data file of this machine that cannot be read as one."""
    path = file_path(source)
    if path is None:
        return
    if not path.exists():
        raise InvalidObject(f"{field}: {path} does not exist")
    if not path.is_file():
        raise InvalidObject(f"{field}: {path} is not a file; give one {', '.join(DATA_SUFFIXES)} file")
    if not path.name.removesuffix(".gz").endswith(DATA_SUFFIXES):
        raise InvalidObject(
            f"{field}: {path.name} has no known ending; known are {', '.join(DATA_SUFFIXES)}, each also with .gz"
        )
    if not os.access(path, os.R_OK):
        raise InvalidObject(f"{field}: {path} may not be read; check its permissions")
    if path.stat().st_size == 0:
        raise InvalidObject(f"{field}: {path} is empty; give it at least one record")


def _check_store(uri: str) -> None:
    folder = file_path(uri)
    if folder is None:
        return
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not a folder" if not existing.is_dir() else "may not be written"
        raise PermanentError(f"spec.store.uri: {uri} cannot be used: {existing} {reason}; name another store")
