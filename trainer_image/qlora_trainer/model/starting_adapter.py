"""The adapter that a job goes on from: read in PEFT's layout, held against the base, in the trainer's type.

Everything is checked before a GPU is taken. Rules:

- Only safetensors are read. Which tensors there must be, and of what shape, PEFT says itself, of a base without memory.
- What an adapter is (`TAKEN_OVER`) comes from its adapter_config.json, and its layers from its tensors' names: a list,
  a regular expression and a range of layers come to the same. A field that would make it something else than LoRA as
  it is trained here is refused by its name.
- Its base must be the job's, as far as both have names that can be compared; a warning says where they have not.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import get_peft_model_state_dict
from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from safetensors import safe_open
from torch import Tensor

from orchestrator.api.adapter import MAX_TARGETS, TAKEN_OVER, AdapterSpec, TargetModules
from orchestrator.api.base import Digest
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.json_text import read_json
from orchestrator.api.results import StartingAdapter
from orchestrator.api.trainable import shown
from qlora_trainer.data.report import OF_START
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import ADAPTER_NAME, adaptable_layers, target_modules
from qlora_trainer.model.loading import weightless_base
from qlora_trainer.model.quantization import COMPUTE_DTYPE
from qlora_trainer.model.recorded_step import adapted
from qlora_trainer.model.source import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    Location,
    ModelDescription,
    Sought,
    TensorShape,
    known_config,
    locate,
)
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.source_errors import translated
from qlora_trainer.storage.uri import local_path

FIELD = "spec.adapter.from"
SOUGHT = Sought(what="adapter folder", field=FIELD)
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
PREFIX, A_SUFFIX = "base_model.model.", ".lora_A.weight"
"""What PEFT puts around a layer's name."""
KNOWN_FIELDS = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "target_modules",
        "target_parameters",
        "init_lora_weights",
        "base_model_name_or_path",
        "revision",
    }
)
"""What is looked at in adapter_config.json."""
SILENT_FIELDS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
    }
)
"""What says nothing that the tensors do not say, or how it was trained."""
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""
TENSOR_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAMED = 3
"""So many names stand in a message."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is on record of an adapter that a job has made."""

    source: str
    """What to call it."""
    uri: str
    """Its folder."""
    digest: Digest
    base: str
    """Its job's model.source."""
    base_revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The adapter as training begins with it."""

    start: StartingAdapter
    tensors: Mapping[str, Tensor]
    """Under PEFT's names, in the type of the trainer's adapters, on the host."""
    warnings: tuple[str, ...]


def take_adapter(spec: QLoRAJobSpec, description: ModelDescription, known: Known | None = None) -> Taken:
    """The adapter that `adapter.from` names, checked; UserError for one that the job cannot go on from.

    `known` says where it is if no address is named.
    """
    uri = spec.adapter.start_uri if known is None else known.uri
    assert uri is not None, "the job goes on from one"
    address, revision = _address(uri)
    source = address if known is None else known.source
    with translated(source, field=FIELD):
        location = locate(address, revision, SOUGHT)
        config = _read_config(location)
        tensors = location.read_header(WEIGHTS_NAME).tensors
        folder = location.fetch([WEIGHTS_NAME])
    if known is not None:
        _refuse_other_base(known, spec, description)
    warnings = () if known is not None else tuple(_held_against_base(source, config, spec, description))
    own = _own_fields(source, config)
    base = _base(description.folder, spec.model.source)
    own["target_modules"] = _targets(source, base, tensors)
    adapter = _settled(source, spec.adapter, own)
    _refuse_contradictions(source, base, spec.adapter, adapter)
    _compare(source, tensors, _expected(base, adapter))
    found = _read_tensors(source, folder / WEIGHTS_NAME)
    _tell_type(source, tensors)
    with (folder / WEIGHTS_NAME).open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if known is not None and digest != known.digest:
        raise UserError(f"{source}: {WEIGHTS_NAME} is {digest}, and {known.digest} is on record; name another adapter")
    where = f"{source}@{location.commit}" if location.commit is not None else source
    taken = {name: getattr(adapter, name) for name in TAKEN_OVER}
    log.info("training goes on from %s, %s: %s", where, digest, taken)
    return Taken(start=StartingAdapter(source=where, digest=digest, **taken), tensors=found, warnings=warnings)


def _address(asked: str) -> tuple[str, str]:
    """The source, and the revision of a hub's repository."""
    if not asked.startswith("hf://"):
        return asked, "main"
    source, _, revision = asked.partition("@")
    return source, revision or "main"


# --- its configuration


def _read_config(location: Location) -> Mapping[str, Any]:
    """The content of adapter_config.json beside safetensors."""
    files, source = location.files, location.source
    if ADAPTER_CONFIG_NAME not in files:
        what = "a model, not an adapter" if CONFIG_NAME in files else f"no {ADAPTER_CONFIG_NAME}"
        raise UserError(f"{source} holds {what}; {FIELD} must name the folder of an adapter that PEFT has saved")
    if WEIGHTS_NAME not in files:
        what = f"no {WEIGHTS_NAME}; copy the whole folder"
        if PICKLED_NAME in files:
            what = (
                f"its weights pickled ({PICKLED_NAME}), which is code that would be run on loading; save the adapter "
                "as safetensors (save_pretrained does)"
            )
        raise UserError(f"{source} holds {what}")
    size = int(files[ADAPTER_CONFIG_NAME]["size"])
    if size > MAX_CONFIG_BYTES:
        raise UserError(f"{source}: {ADAPTER_CONFIG_NAME} has {size} bytes, so it is none; copy it again")
    try:
        config: Any = read_json(location.read(ADAPTER_CONFIG_NAME))
    except ValueError as error:
        raise UserError(f"{source}: {ADAPTER_CONFIG_NAME} is not valid JSON: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{source}: {ADAPTER_CONFIG_NAME} is not a JSON object; copy it again")
    return cast("dict[str, Any]", config)


def _own_fields(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter is, but for its layers; UserError for one that cannot be trained here."""
    if config.get("peft_type") != "LORA":
        raise _refused(source, "peft_type", config.get("peft_type"), "only adapters of the type LORA are trained here")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refused(source, "task_type", config["task_type"], "only those of causal language models (CAUSAL_LM) are")
    if config.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        raise _refused(
            source,
            "init_lora_weights",
            config["init_lora_weights"],
            "it began with other weights of the base than the base's own; save it as plain LoRA "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
        )
    for name, value in config.items():
        if name not in KNOWN_FIELDS | SILENT_FIELDS and value not in (None, False, "none", "", [], {}):
            raise _refused(source, name, value, "the trainer does not know what becomes of such an adapter")
    alpha = config.get("lora_alpha")
    return {
        "rank": config.get("r"),
        "alpha": int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "experts": bool(config.get("target_parameters")),
    }


def _refused(source: str, name: str, value: object, why: str) -> UserError:
    return UserError(f"{source}: {ADAPTER_CONFIG_NAME} has {name} {shown(repr(value))}: {why}; name another adapter")


def _settled(source: str, asked: AdapterSpec, own: Mapping[str, Any]) -> AdapterSpec:
    """The adapter as it is trained; UserError for one that no spec could ask for."""
    try:
        return AdapterSpec.model_validate({"start": asked.start, "dropout": asked.dropout, **own}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = to_camel(str(first["loc"][0])) if first["loc"] else "adapter"
        raise UserError(
            f"the adapter at {source} cannot be trained as spec.adapter asks: {name}: {first['msg']}"
        ) from error


def _refuse_contradictions(source: str, base: Any, asked: AdapterSpec, adapter: AdapterSpec) -> None:
    """UserError where the spec asks for another adapter; a field that has its default asks for nothing."""
    for name in TAKEN_OVER:
        wanted, found = getattr(asked, name), getattr(adapter, name)
        if wanted in (AdapterSpec.model_fields[name].default, found):
            continue
        if name == "target_modules" and _layers(base, asked) == _layers(base, adapter):
            continue
        raise UserError(
            f"spec.adapter.{to_camel(name)} is {_words(wanted)}, but the adapter at {source} has {_words(found)}: "
            "leave it out, or name another adapter"
        )


def _words(value: object) -> str:
    return ", ".join(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else str(value)


# --- its base


def _held_against_base(
    source: str, config: Mapping[str, Any], spec: QLoRAJobSpec, description: ModelDescription
) -> Iterator[str]:
    """UserError for an adapter of another base, and a warning where nobody can tell."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    own, path = spec.model.source.removeprefix("hf://").rstrip("/"), local_path(spec.model.source)
    if not isinstance(name, str) or not name:
        yield f"{OF_START}: its config names no base, so nobody knows whether it was {own}; its tensors fit"
    elif path is None and spec.model.source.startswith("hf://") and HUB_NAME.fullmatch(name):
        if name.lower() != own.lower():
            raise UserError(
                f"{source} is an adapter for {shown(name)}, not for {own}: set spec.model.source to "
                f"hf://{shown(name)}, or, where both are the same weights, write {own} into its {ADAPTER_CONFIG_NAME}"
            )
        if isinstance(revision, str) and COMMIT.fullmatch(revision) and revision != description.revision:
            raise UserError(
                f"{source} is an adapter for {own} at {revision}, and the job's base is at {description.revision}: set "
                f"spec.model.revision to {revision}"
            )
    elif path is None or Path(name) != path:
        yield f"{OF_START}: its base was {shown(name)}, and nobody knows whether that is {own}; its tensors fit"


def _refuse_other_base(known: Known, spec: QLoRAJobSpec, description: ModelDescription) -> None:
    """UserError for a base of other content: its commit, or the digest of its config and of what its weights are."""
    if known.base_revision == description.revision:
        return
    change = f"spec.model.source to {known.base}"
    if spec.model.source == known.base and COMMIT.fullmatch(known.base_revision):
        change = f"spec.model.revision to {known.base_revision}"
    raise UserError(
        f"{known.source} is an adapter for {known.base} at {known.base_revision}, and the job's base is "
        f"{spec.model.source} at {description.revision}: set {change}"
    )


def _base(folder: Path, source: str) -> Any:
    """The base without memory."""
    PackedAttention().register()
    base, _ = weightless_base(deepcopy(known_config(folder, source)), torch.device("cpu"))
    return base


# --- its tensors


def _layers(base: Any, adapter: AdapterSpec) -> set[str]:
    wanted = target_modules(base, adapter)
    return {name for name in adaptable_layers(base) if any(f".{name}".endswith(f".{end}") for end in wanted)}


def _targets(source: str, base: Any, tensors: Mapping[str, TensorShape]) -> TargetModules:
    """The layers that have tensors, as a spec names them."""
    every = adaptable_layers(base)
    names = {name.removeprefix(PREFIX).removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX)}
    layers = sorted(names.intersection(every))
    if not layers:
        raise UserError(
            f"{source}: {WEIGHTS_NAME} holds no tensor for a linear layer of the base that can have an adapter here; "
            "name another adapter, or its own base as spec.model.source"
        )
    if len(layers) == len(every):
        return "all-linear"
    ends = {name.rpartition(".")[2] for name in layers}
    if sum(name.rpartition(".")[2] in ends for name in every) == len(layers):
        return tuple(sorted(ends))
    if len(layers) <= MAX_TARGETS:
        return tuple(layers)
    raise UserError(
        f"{source}: the adapter is on {len(layers)} layers that are some of their kind, and targetModules names at "
        f"most {MAX_TARGETS}; name another adapter"
    )


def _expected(base: Any, adapter: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that PEFT saves of such an adapter on the base; uses the base up."""
    with init_empty_weights():
        model = adapted(base, adapter)
    saved = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _compare(source: str, found: Mapping[str, TensorShape], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError for tensors that are not exactly those of such an adapter on the base."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(
            f"{source}: {WEIGHTS_NAME} lacks {len(missing)} tensors of such an adapter on this base, as "
            f"{shown(missing[0])}; copy the whole file, or name its own base as spec.model.source"
        )
    if strange := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{source}: {WEIGHTS_NAME} holds {len(strange)} tensors that no LoRA on the base's linear layers has, as "
            f"{', '.join(map(shown, strange[:NAMED]))}; name another adapter"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{source}: {shown(name)} has the shape {found[name].shape}, and on this base it would have {shape}; "
                "name its own base as spec.model.source"
            )
        if found[name].dtype not in TENSOR_TYPES:
            raise UserError(
                f"{source}: {shown(name)} is in {shown(found[name].dtype)}; adapters are read in "
                f"{', '.join(TENSOR_TYPES)}"
            )


def _read_tensors(source: str, path: Path) -> dict[str, Tensor]:
    """All tensors in the trainer's type; UserError for what is no number."""
    found: dict[str, Tensor] = {}
    file: Any
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            tensor: Tensor = file.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{source}: {shown(name)} holds what is no finite number (NaN or infinity): the adapter is broken; "
                    "name an earlier one"
                )
            found[name] = tensor.to(COMPUTE_DTYPE)
            if not bool(found[name].isfinite().all()):
                raise UserError(f"{source}: {shown(name)} holds numbers that are too large for {_type(COMPUTE_DTYPE)}")
    return found


def _tell_type(source: str, tensors: Mapping[str, TensorShape]) -> None:
    others = {_type(TENSOR_TYPES[each.dtype]) for each in tensors.values()} - {_type(COMPUTE_DTYPE)}
    if others:
        log.warning(
            "%s is in %s and is rounded to %s, the type in which adapters are trained here",
            source,
            " and ".join(sorted(others)),
            _type(COMPUTE_DTYPE),
        )


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
