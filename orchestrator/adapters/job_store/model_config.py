"""Reads a base model's config.json where it lies, without the model: what `plan` needs before prepare has run.

`file://` and `s3://` go through fsspec, `hf://` through huggingface_hub if that is installed; a claim (`pvc://`) can
only be read inside the cluster. Nothing but the config is fetched, and it is bounded.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from orchestrator.api import package_data, trainable
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.contained_files import Contained, LinkRefused
from orchestrator.api.job import ModelSource
from orchestrator.api.json_text import read_json
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.uris import file_path
from orchestrator.errors import InvalidObject, NotFound, OrchestratorError, PermanentError, StoreUnavailable

CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
WHOSE = {CONFIG_NAME: "a Hugging Face model", ADAPTER_CONFIG_NAME: "an adapter that PEFT has saved"}
"""In whose folder these files are."""
MAX_CONFIG_BYTES = 4 << 20
CONNECT_TIMEOUT_SECONDS = 5
HUB_SECONDS = 3.0
READ_TIMEOUT_SECONDS = 15


def read_facts(model: ModelSource, adapter: AdapterSpec | None = None) -> ModelFacts:
    """The shape of the model behind a source, on which the adapter can be.

    Raises NotFound, StoreUnavailable, and InvalidObject for what prepare will refuse.
    """
    return facts_in(read_config(model), model, adapter)


def facts_in(config: Mapping[str, Any], model: ModelSource, adapter: AdapterSpec | None = None) -> ModelFacts:
    """The shape that a model's config tells. Raises InvalidObject for what prepare will refuse."""
    try:
        trainable.refuse_fields(config)
        known = package_data.known_type(trainable.model_type_of(config))
        if known is None:
            raise ValueError(trainable.unknown_type(config, package_data.transformers_version()))
        facts = trainable.trainable_facts(config, model.revision, known)
        if adapter is not None and adapter.target_modules != "all-linear":
            trainable.refuse_targets(adapter.target_modules, known)
        if adapter is not None and adapter.experts and facts.mixture is None:
            raise ValueError(trainable.NO_EXPERTS)
        return facts
    except ValueError as error:
        raise InvalidObject(f"{model.source}: {error}") from error


def read_config(model: ModelSource) -> Mapping[str, Any]:
    """The parsed config.json."""
    scheme = model.source.split("://")[0]
    if scheme == "pvc":
        raise PermanentError(
            f"{model.source} lies on a claim, which only the cluster can read: submit the job, and prepare will size it"
        )
    return _parsed(model, CONFIG_NAME)


def read_adapter_config(uri: str) -> Mapping[str, Any] | None:
    """The parsed adapter_config.json of an adapter's folder; None for one on a claim, which only the cluster reads."""
    if uri.startswith("pvc://"):
        return None
    address, _, revision = uri.partition("@") if uri.startswith("hf://") else (uri, "", "")
    return _parsed(ModelSource(source=address, revision=revision or "main"), ADAPTER_CONFIG_NAME)


def _parsed(model: ModelSource, name: str) -> Mapping[str, Any]:
    content = _from_hub(model, name) if model.source.startswith("hf://") else _from_folder(model.source, name)
    try:
        config = read_json(content)
    except ValueError as error:
        raise InvalidObject(f"{model.source}: {name} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidObject(f"{model.source}: {name} is not a JSON object")
    return cast(dict[str, Any], config)


def _from_folder(source: str, name: str) -> bytes:
    try:
        with _opened(source, name) as stream:
            return cast(bytes, stream.read(MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{source}: there is no {name}; give the folder of {WHOSE[name]}") from error
    except LinkRefused as error:
        raise InvalidObject(f"{source}: {error}") from error
    except PermissionError as error:
        raise PermanentError(
            f"{source}: may not be read: {error}; check its permissions or your credentials"
        ) from error
    except ImportError as error:
        raise PermanentError(f"{source}: {error}") from error
    except Exception as error:
        raise StoreUnavailable(f"{source}: could not be read: {error}; check the endpoint and try again") from error


def _opened(source: str, name: str) -> Any:
    if (folder := file_path(source)) is not None:
        return Contained.of(folder).open(name)
    import fsspec  # pyright: ignore[reportMissingTypeStubs]  here, because importing it takes long

    options = S3_OPTIONS if source.startswith("s3://") else {}
    return cast(Any, fsspec).open(f"{source.rstrip('/')}/{name}", "rb", **options)


S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"max_attempts": 2},
    }
}


def _from_hub(model: ModelSource, name: str) -> bytes:
    try:
        from huggingface_hub import (
            hf_hub_download,  # pyright: ignore[reportUnknownVariableType]  an overload of it is untyped
        )
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise PermanentError(
            f"{model.source}: reading a hub model's config needs huggingface_hub: pip install huggingface_hub"
        ) from error
    repository = model.source.removeprefix("hf://")
    try:
        path = hf_hub_download(
            repository,
            name,
            revision=model.revision,
            etag_timeout=CONNECT_TIMEOUT_SECONDS,
            local_files_only=not _hub_listens(),
        )
        return Path(path).read_bytes()[:MAX_CONFIG_BYTES]
    except GatedRepoError as error:
        raise PermanentError(
            f"{model.source}: access is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError, too
        raise StoreUnavailable(f"{model.source}: the hub does not answer; try again later") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise _hub_not_found(model, error) from error
    except Exception as error:
        raise StoreUnavailable(f"{model.source}: the hub did not answer: {error}; try again later") from error


def _hub_listens() -> bool:
    """Whether the hub takes connections; its library would try for half a minute. Behind a proxy that is not known."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    if getproxies().get(address.scheme):
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


def _hub_not_found(model: ModelSource, error: Exception) -> OrchestratorError:
    what = type(error).__name__.removesuffix("NotFoundError").lower()
    return NotFound(f"{model.source}: no such {what} at revision {model.revision}; check its name, or set HF_TOKEN")
