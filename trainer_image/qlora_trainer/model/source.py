"""Where the base model comes from, and whether this trainer can tune it.

`describe_model` reads the config, the tokenizer files and the headers of the weights, but never the weights;
`load_tokenizer` and `check_architecture` then say no before a GPU is taken. `resolve_model` gives the whole
model. Rules:

- Only safetensors are read, and no code that comes with a model is run.
- `file://` and `pvc://` models are used where they lie. `s3://` models are copied to `$QLORA_MODEL_CACHE`, each version
  of the bucket's content into a folder of its own. `hf://` models live in the hub's cache.
- What is wrong with a model is a UserError that names the file or field; a source that does not answer is Transient.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec

from orchestrator.api.job import AdapterSpec
from orchestrator.api.model_facts import ModelFacts
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.source_errors import translated
from qlora_trainer.storage.uri import local_path

MODEL_CACHE_VARIABLE = "QLORA_MODEL_CACHE"
DEFAULT_MODEL_CACHE = "~/.cache/qlora/models"
RANDOM_WEIGHTS_NAME = "random_weights.json"
RANDOM_WEIGHTS_VARIABLE = "QLORA_ALLOW_RANDOM_WEIGHTS"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
TEMPLATE_PATTERNS = ("chat_template*",)
DESCRIPTION_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Everything of a model that is small: config, index, tokenizer, templates."""
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on a safetensors header."""
UNUSABLE_DTYPES = ("F8", "F6", "F4")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One tensor of a safetensors file, from its header."""

    dtype: str
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model without its weights."""

    folder: Path
    """Holds config and tokenizer; for `file://` and `pvc://` the model itself."""
    revision: str
    """The commit of a hub model, or the digest of a folder's config and tensor index."""
    parameters: int | None
    """How many numbers the weights' files hold; None where random weights stand in for them."""


def resolve_model(source: str, revision: str) -> Path:
    """A local folder with the whole model, weights included."""
    with translated(source, field="spec.model.source"):
        location = _locate(source, revision)
        return location.fetch([*location.description_names(), *_weight_names(location)])


def describe_model(source: str, revision: str) -> ModelDescription:
    """A local folder with config and tokenizer, and what the weights' headers say; all of it checked."""
    with translated(source, field="spec.model.source"):
        location = _locate(source, revision)
        headers = {name: location.read_header(name) for name in _weight_names(location)}
        _check_index(location, headers)
        tensors = [shape for header in headers.values() for shape in header.tensors.values()]
        _refuse_unusable_dtypes(source, tensors)
        return ModelDescription(
            folder=location.fetch(location.description_names()),
            revision=location.commit or _content_digest(location, headers),
            parameters=sum(shape.elements for shape in tensors) if headers else None,
        )


def tokenizer_digest(folder: Path) -> str:
    """Digest over everything that decides how this model's tokenizer turns text into tokens, templates aside."""
    digest = hashlib.sha256()
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    digest.update(str(config.get("model_type")).encode())  # decides the class of some tokenizers
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, TOKENIZER_PATTERNS):
            digest.update(f"\n{path.name}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def load_tokenizer(folder: Path, source: str, chat_template: str | None) -> Any:
    """The model's tokenizer as transformers makes it for inference, with the job's chat template if it has one."""
    if not any(_matches(path.name, TOKENIZER_PATTERNS) for path in folder.iterdir()):
        raise UserError(f"{source} has no tokenizer: add the model's tokenizer.json and tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the files provoke, they are the user's to mend
        raise UserError(f"the tokenizer of {source} cannot be loaded: {type(error).__name__}: {error}") from error
    template = chat_template or tokenizer.chat_template
    if isinstance(template, dict):  # some models ship several by name
        template = template.get("default")
    tokenizer.chat_template = template
    return tokenizer


def read_facts(description: ModelDescription, source: str) -> ModelFacts:
    """The model's shape, as its transformers class reads the config (which may leave defaults out)."""
    config = _read_config(description.folder, source)
    _refuse_quantized(source, config)
    resolved = _known_config(description.folder, source, config)
    try:
        return ModelFacts.from_config(resolved.to_dict(), description.revision)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: {CONFIG_NAME} does not describe a model that can be trained: {reason}") from error


def context_length(description: ModelDescription, source: str) -> int | None:
    """The largest number of positions that the model was made for, where its config tells."""
    config = _known_config(description.folder, source, _read_config(description.folder, source))
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_architecture(description: ModelDescription, source: str, adapter: AdapterSpec) -> None:
    """Build the model without memory and refuse what training could not do."""
    config = _known_config(description.folder, source, _read_config(description.folder, source))
    _refuse_not_causal(source, config)
    model = _weightless_model(source, config)
    _refuse_unquantizable(source, model)
    _refuse_missing_targets(source, model, adapter)
    _refuse_missing_weights(source, model, description.parameters)


# --- where it lies


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """A safetensors file's header."""

    raw: bytes
    tensors: Mapping[str, TensorShape]


class _Location:
    """A folder of files behind fsspec: the same few questions for every kind of source."""

    def __init__(self, source: str, file_system: Any, root: str, commit: str | None = None) -> None:
        self.source = source
        self.commit = commit
        self._file_system = file_system
        self._root = root.rstrip("/")
        self.files = self._list()

    def _list(self) -> dict[str, Mapping[str, Any]]:
        try:
            entries = self._file_system.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"there is no model folder at {self.source}; check spec.model.source") from error
        return {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}

    def description_names(self) -> list[str]:
        if CONFIG_NAME not in self.files:
            raise UserError(f"{self.source} holds no {CONFIG_NAME}; give the folder of a Hugging Face model")
        return [name for name in sorted(self.files) if _matches(name, DESCRIPTION_PATTERNS)]

    def read(self, name: str) -> bytes:
        return self._file_system.cat_file(f"{self._root}/{name}")

    def read_header(self, name: str) -> _Header:
        """The header of a safetensors file, which must also be as long as its header says."""
        size = int(self.files[name]["size"])
        with self._file_system.open(f"{self._root}/{name}", "rb", block_size=1 << 20) as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if size >= 8 and length <= min(MAX_HEADER_BYTES, size - 8) else b""
        try:
            return _Header(raw=raw, tensors=_parse_header(raw, size))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.source}: {name} is damaged or not a safetensors file ({error}); copy it again"
            ) from error

    def fetch(self, names: Iterable[str]) -> Path:
        """A local folder that holds these files."""
        raise NotImplementedError


class _Folder(_Location):
    """`file://` and `pvc://`."""

    def __init__(self, source: str, path: Path) -> None:
        super().__init__(source, fsspec.filesystem("file"), str(path))
        self._path = path

    def fetch(self, names: Iterable[str]) -> Path:  # noqa: ARG002 - they are all there
        return self._path


class _Bucket(_Location):
    """`s3://` and whatever else fsspec can list."""

    def __init__(self, source: str) -> None:
        file_system, root = fsspec.core.url_to_fs(source, use_listings_cache=False)
        super().__init__(source, file_system, root)

    def fetch(self, names: Iterable[str]) -> Path:
        names = sorted(names)
        cache = Path(os.environ.get(MODEL_CACHE_VARIABLE, DEFAULT_MODEL_CACHE)).expanduser()
        target = cache / self._version(names)
        if not target.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            self._download(names, target)
        return target

    def _version(self, names: list[str]) -> str:
        """A name for what the bucket holds now: where, which files, how long, which versions."""
        stated = [(name, self.files[name]["size"], str(self.files[name].get("ETag", ""))) for name in names]
        return hashlib.sha256(json.dumps([self.source, stated]).encode()).hexdigest()[:32]

    def _download(self, names: list[str], target: Path) -> None:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
        try:
            for name in names:
                log.info("fetching %s/%s", self.source, name)
                self._file_system.get_file(f"{self._root}/{name}", str(temporary / name))
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another stage was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class _HubModel(_Location):
    """`hf://owner/name` at one commit."""

    def __init__(self, source: str, revision: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        self._repository = source.removeprefix("hf://").rstrip("/")
        commit = HfApi().model_info(self._repository, revision=revision).sha
        super().__init__(
            source, HfFileSystem(use_listings_cache=False), f"{self._repository}@{commit}", commit=str(commit)
        )

    def fetch(self, names: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self._repository, revision=self.commit, allow_patterns=sorted(names), ignore_patterns=["*/*"]
        )
        return Path(folder)


def _locate(source: str, revision: str) -> _Location:
    if source.startswith("hf://"):
        return _HubModel(source, revision)
    path = local_path(source)
    return _Bucket(source) if path is None else _Folder(source, path)


# --- its files


def _weight_names(location: _Location) -> list[str]:
    """The files that hold the weights, all of them there."""
    files = location.files
    if INDEX_NAME in files:
        names = sorted(set(_weight_map(location).values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise UserError(
                f"{location.source}: {INDEX_NAME} lists {len(missing)} files that are not there, the first is "
                f"{missing[0]}; copy the whole model"
            )
        return names
    if SINGLE_FILE_NAME in files:
        return [SINGLE_FILE_NAME]
    if RANDOM_WEIGHTS_NAME in files and os.environ.get(RANDOM_WEIGHTS_VARIABLE) == "1":
        return []
    raise UserError(f"{location.source} {_what_instead_of_weights(files)}")


def _what_instead_of_weights(files: Iterable[str]) -> str:
    pickled = sorted(name for name in files if _matches(name, PICKLE_PATTERNS))
    if pickled:
        return (
            f"holds its weights pickled ({pickled[0]}), which is code that would be run on loading; "
            "convert the model to safetensors (save_pretrained does)"
        )
    if any(name.endswith(".gguf") for name in files):
        return "holds a GGUF file, which is for inference; give the model's safetensors"
    return f"holds neither {SINGLE_FILE_NAME} nor {INDEX_NAME}; give the folder of a Hugging Face model"


def _weight_map(location: _Location) -> Mapping[str, str]:
    try:
        weight_map = json.loads(location.read(INDEX_NAME))["weight_map"]
        return {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location.source}: {INDEX_NAME} is damaged ({error!r}); copy it again") from error


def _check_index(location: _Location, headers: Mapping[str, _Header]) -> None:
    if INDEX_NAME not in location.files:
        return
    absent = [tensor for tensor, name in _weight_map(location).items() if tensor not in headers[name].tensors]
    if absent:
        raise UserError(
            f"{location.source}: {INDEX_NAME} lists {len(absent)} tensors that its files do not hold, the first is "
            f"{absent[0]}; copy the whole model"
        )


def _parse_header(raw: bytes, file_bytes: int) -> dict[str, TensorShape]:
    """See https://github.com/huggingface/safetensors: 8 bytes of length, that much JSON, then the data."""
    if not raw:
        raise ValueError(f"no header in {file_bytes} bytes")
    fields = json.loads(raw)
    tensors = {name: field for name, field in fields.items() if name != "__metadata__"}
    end = 8 + len(raw) + max((field["data_offsets"][1] for field in tensors.values()), default=0)
    if end != file_bytes:
        raise ValueError(f"{file_bytes} bytes long instead of {end}")
    return {
        name: TensorShape(dtype=field["dtype"], elements=_product(field["shape"])) for name, field in tensors.items()
    }


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _content_digest(location: _Location, headers: Mapping[str, _Header]) -> str:
    digest = hashlib.sha256(location.read(CONFIG_NAME) if CONFIG_NAME in location.files else b"")
    for name, header in headers.items():
        digest.update(f"\n{name}\n".encode() + hashlib.sha256(header.raw).digest())
    return f"sha256:{digest.hexdigest()}"


def _refuse_unusable_dtypes(source: str, tensors: Iterable[TensorShape]) -> None:
    unusable = sorted({shape.dtype for shape in tensors if shape.dtype.startswith(UNUSABLE_DTYPES)})
    if unusable:
        raise UserError(f"{source} holds weights in {', '.join(unusable)}; give the model's 16-bit weights")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# --- its architecture


def _read_config(folder: Path, source: str) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except ValueError as error:
        raise UserError(f"{source}: {CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{source}: {CONFIG_NAME} names no model_type; give the folder of a Hugging Face model")
    return config


def _refuse_quantized(source: str, config: Mapping[str, Any]) -> None:
    text = config.get("text_config") or {}
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method")
        raise UserError(
            f"{source} is already quantized ({method}); give the model's 16-bit weights, training quantizes them to NF4"
        )


def _known_config(folder: Path, source: str, config: Mapping[str, Any]) -> Any:
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise UserError(
                f"{source} needs the code in its own repository (auto_map), which is never run; choose another"
            )
        raise UserError(
            f"{source}: transformers {transformers.__version__} does not know the model type {config['model_type']!r}; "
            "choose another model or a newer trainer image"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the config provokes, it is the user's to mend
        raise UserError(f"{source}: {CONFIG_NAME} is not valid: {type(error).__name__}: {error}") from error


def _refuse_not_causal(source: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    classes = (causal,) if isinstance(causal, str) else tuple(causal)
    architecture = config.architectures[0]
    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if architecture not in classes or bidirectional or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{source} is a {architecture}, not a causal language model; choose a model that generates text from left "
            "to right"
        )


def _weightless_model(source: str, config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
    except Exception as error:  # a config that the class cannot be built from, in any of its ways
        raise UserError(f"{source}: {config.architectures[0]} cannot be built from its config: {error}") from error


def _refuse_unquantizable(source: str, model: Any) -> None:
    from qlora_trainer.model import quantization

    if reason := quantization.refusal(model):
        raise UserError(f"{source}: {type(model).__name__} cannot be trained here: {reason}; choose another model")
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 3 and not quantization.holds(model, name):
            raise UserError(
                f"{source}: {type(model).__name__} keeps weights in {parameter.dim()}-dimensional parameters ({name}), "
                "which cannot be quantized to NF4 and would stay in 16 bits; choose a model of linear layers"
            )


def _refuse_missing_targets(source: str, model: Any, adapter: AdapterSpec) -> None:
    if adapter.target_modules == "all-linear":
        return
    names = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    for target in adapter.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"spec.adapter.targetModules: {source} has no linear layer {target!r}; choose of {known}, or all-linear"
            )


def _refuse_missing_weights(source: str, model: Any, found: int | None) -> None:
    """transformers would fill what is missing with random numbers and a warning."""
    needed = sum(parameter.numel() for parameter in model.parameters())
    if found is not None and found < needed:
        raise UserError(
            f"{source} holds {found} parameters where {type(model).__name__} has {needed}: some of its weights are "
            "missing; copy the whole model"
        )
