"""Where the base model comes from: its files, what they say of it, and those that cannot be used.

`describe_model` reads the config, the tokenizer files and the headers of the weights, but never the weights;
`resolve_model` gives the whole model. Rules:

- Only safetensors are read, and no code that comes with a model is run.
- The weights of `file://` and `pvc://` models are used where they lie, and no link leads out of there. `s3://` models
  are copied to `$QLORA_MODEL_CACHE`, each version of the bucket's content into a folder of its own. `hf://` models live
  in the hub's cache. What is fetched is fetched once for all stages of a machine, see `shared_cache`.
- Both read the same files of weights: one file, or the shards of an index; a folder with both is refused.
- What is wrong with a model is a UserError that names the file or field; a source that does not answer is Transient.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, cast

import fsspec

from orchestrator.api.base import MAX_COUNT
from orchestrator.api.contained_files import BLOBS, Contained
from orchestrator.api.json_text import read_json
from orchestrator.api.model_facts import OVERRIDES, TEXT_CONFIG, ModelFacts
from orchestrator.api.trainable import (
    KnownType,
    is_mxfp4,
    refuse_fields,
    refuse_files_without_tokenizer,
    shown,
    trainable_facts,
    unknown_type,
)
from orchestrator.api.words import on_one_line
from qlora_trainer.outcome import Transient, UserError
from qlora_trainer.storage.shared_cache import SharedCache, fetch_file, fetched_bytes, hub_entry
from qlora_trainer.storage.source_errors import translated
from qlora_trainer.storage.uri import claim_path, local_path

FETCHERS = 8
"""Files of a model that are fetched at one time; each takes a piece of host memory (`shared_cache.READ_BYTES`)."""
RANDOM_WEIGHTS_NAME = "random_weights.json"
RANDOM_WEIGHTS_VARIABLE = "QLORA_ALLOW_RANDOM_WEIGHTS"
CONFIG_NAME = "config.json"
PROCESSOR_TEMPLATE_NAME = "chat_template.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
DESCRIPTION_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Everything of a model that is small: config, index, tokenizer, templates."""
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on a safetensors header."""
LIBRARY_CHARACTERS = 400
"""Of a library's own words in a message."""
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of an element, by what safetensors calls its type."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
BESIDE_TEXT = re.compile(
    r"(^|\.)((vision|visual|audio|speech)(_tower|_model|_encoder|_embed_tokens)?|multi_modal_projector|embed_(vision|audio))\."
)
"""Names of weights of the other parts of a model that holds a text model: a file of nothing else is not fetched."""
PARTS = (TEXT_CONFIG, "vision_config", "audio_config")
"""One of them is in the config of a model that holds a text model beside others."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in place of a large one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One tensor of a safetensors file, from its header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model without its weights."""

    folder: Path
    """Holds config and tokenizer."""
    revision: str
    """The commit of a hub model, or the digest of a folder's config and tensor index."""
    tensors: Mapping[str, TensorShape] | None
    """What the weights' files hold, by name; None where random weights stand in for them."""


def resolve_model(source: str, revision: str) -> Path:
    """A local folder with the whole model, weights included."""
    with translated(source, field=MODEL.field):
        location = locate(source, revision)
        names = _weight_names(location)
        folder = location.fetch([*location.description_names(), *names])
        if INDEX_NAME in location.files:
            _write_index(folder, _weight_map(location), names)
        return folder


def describe_model(source: str, revision: str) -> ModelDescription:
    """A local folder with config and tokenizer, and what the weights' headers say; all of it checked."""
    with translated(source, field=MODEL.field):
        location = locate(source, revision)
        weights = _weight_names(location)
        location.check_size(weights)
        headers = {name: location.read_header(name) for name in weights}
        _check_index(location, headers)
        folder = location.fetch(location.description_names())
        _refuse_pointers(source, folder)
        return ModelDescription(
            folder=folder,
            revision=location.commit or _content_digest(location, headers),
            tensors=_all_tensors(source, headers) if headers else None,
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
    with _refusals(source):
        refuse_files_without_tokenizer([path.name for path in folder.iterdir()])
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _try_tokenizer(tokenizer)
    except Exception as error:  # whatever the files provoke, they are the user's to mend
        raise UserError(f"the tokenizer of {source} cannot be used: {library_words(error)}") from error
    template = chat_template or tokenizer.chat_template or _template_of_processor(folder)
    if isinstance(template, dict):  # some models ship several by name
        template = template.get("default")
    tokenizer.chat_template = template
    return tokenizer


def _template_of_processor(folder: Path) -> Any:
    """Where older models of images and text have their chats' template."""
    path = folder / PROCESSOR_TEMPLATE_NAME
    content: Any = read_json(path.read_bytes()) if path.is_file() else {}
    return content.get("chat_template")


def _try_tokenizer(tokenizer: Any) -> None:
    """Encode, decode and save: some of what is wrong with a tokenizer's files shows only then."""
    tokenizer.decode(tokenizer("a").input_ids)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as scratch:
        tokenizer.save_pretrained(scratch)


def read_facts(description: ModelDescription, source: str) -> ModelFacts:
    """The model's shape, as its transformers class reads the config (which may leave defaults out)."""
    resolved = known_config(description.folder, source)
    with _refusals(source):
        return trainable_facts(resolved.to_dict(), description.revision, _known_type(resolved.model_type))


# --- where it lies


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """A safetensors file's header."""

    raw: bytes
    tensors: Mapping[str, TensorShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What a source is asked for, in words for messages."""

    what: str
    field: str
    """The field of the job that names the source."""


MODEL = Sought(what="model folder", field="spec.model.source")


class Location:
    """A folder of files behind fsspec: the same few questions for every kind of source."""

    def __init__(
        self, source: str, file_system: Any, root: str, *, sought: Sought = MODEL, commit: str | None = None
    ) -> None:
        self.source = source
        self.sought = sought
        self.commit = commit
        self._file_system = file_system
        self._root = root.rstrip("/")
        self.files = self._list()

    def _list(self) -> dict[str, Mapping[str, Any]]:
        try:
            entries = self._file_system.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._absent() from error
        return {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}

    def _absent(self) -> UserError:
        return UserError(f"there is no {self.sought.what} at {self.source}; check {self.sought.field}")

    def refuse_adapter(self) -> None:
        """An adapter is not a model, although it lies in a folder like one."""
        if ADAPTER_CONFIG_NAME in self.files and CONFIG_NAME not in self.files:
            base = _named_base(self.read(ADAPTER_CONFIG_NAME))
            raise UserError(
                f"{self.source} holds an adapter ({ADAPTER_CONFIG_NAME}), not a model; give {base} as "
                "spec.model.source, or the model that the adapter was merged into"
            )

    def description_names(self) -> list[str]:
        if CONFIG_NAME not in self.files:
            raise UserError(f"{self.source} holds no {CONFIG_NAME}; give the folder of a Hugging Face model")
        names = [name for name in sorted(self.files) if _matches(name, DESCRIPTION_PATTERNS)]
        return [name for name in names if name != ADAPTER_CONFIG_NAME]  # transformers would load that adapter

    def read(self, name: str) -> bytes:
        return self._file_system.cat_file(f"{self._root}/{name}")

    def _open(self, name: str) -> Any:
        return self._file_system.open(f"{self._root}/{name}", "rb", block_size=1 << 20)

    def read_header(self, name: str) -> _Header:
        """The header of a safetensors file, which must also be as long as its header says."""
        size = int(self.files[name]["size"])
        with self._open(name) as file:
            start = file.read(8)
            if start == POINTER[:8]:
                raise _pointer_refusal(self.source, name)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if size >= 8 and length <= min(MAX_HEADER_BYTES, size - 8) else b""
        try:
            return _Header(raw=raw, tensors=_parse_header(raw, size))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.source}: {name} is damaged or not a safetensors file ({error}); copy it again"
            ) from error

    def check_size(self, names: Iterable[str]) -> None:
        """Raises UserError for files that could not be fetched, whatever else has gone."""

    def fetch(self, names: Iterable[str]) -> Path:
        """A local folder with these files, which nobody else changes."""
        raise NotImplementedError


class _Folder(Location):
    """`file://` and `pvc://`, of which nothing is read that a link leads out of them to."""

    def __init__(self, source: str, path: Path, claim: Path | None, sought: Sought) -> None:
        self.source, self.sought = source, sought
        try:
            self._contained = Contained.of(path, claim)
            self._listed = self._contained.files()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._absent() from error
        super().__init__(source, None, str(path), sought=sought)

    def _list(self) -> dict[str, Mapping[str, Any]]:
        return {name: {"size": status.st_size} for name, status in self._listed.items()}

    def read(self, name: str) -> bytes:
        return self._contained.read(name)

    def _open(self, name: str) -> Any:
        return self._contained.open(name)

    def refuse_adapter(self) -> None:
        super().refuse_adapter()
        if ADAPTER_CONFIG_NAME in self.files:
            raise UserError(
                f"{self.source}: {ADAPTER_CONFIG_NAME} lies beside the model's config.json, so the folder would be "
                "loaded as an adapter; remove that file, or merge the adapter into the model first"
            )

    def fetch(self, names: Iterable[str]) -> Path:
        return _own_folder(self._contained, names)


def _own_folder(contained: Contained, names: Iterable[str]) -> Path:
    """A folder of this process: copies of what is small and may be published, and names for the weights.

    The libraries open files by their names, so what they find must not change its meaning after it was looked at.
    """
    own = Path(tempfile.mkdtemp(prefix="qlora-model-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for name in names:
        with contained.open(name) as file:
            if _matches(name, DESCRIPTION_PATTERNS) and name != INDEX_NAME:
                with (own / name).open("xb") as copy:
                    shutil.copyfileobj(file, copy)
            else:
                (own / name).symlink_to(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    return own


class _Remote(Location):
    """What is fetched into the cache that the stages of a machine share (`shared_cache`)."""

    def check_size(self, names: Iterable[str]) -> None:
        SharedCache.from_environment().refuse_if_too_large(self._bytes(names), self.source)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(int(self.files[name]["size"]) for name in names)

    def _fill(self, entry: Path, targets: Mapping[str, Path]) -> None:
        """Bring these files to their places in an entry of the cache, unless they are there."""
        cache = SharedCache.from_environment()
        cache.use(entry)
        if not self._missing(targets):
            return
        with cache.filling(entry, self.source):
            missing = self._missing(targets)  # another stage may have fetched them meanwhile
            if not missing:
                return
            here = sum(fetched_bytes(targets[name]) for name in missing)
            cache.make_room(entry, max(0, self._bytes(missing) - here), self.source)
            log.info("fetching %d files of %s, %.1f GiB", len(missing), self.source, self._bytes(missing) / 2**30)
            pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
            try:
                list(pool.map(self._fetch_file, missing, [targets[name] for name in missing]))
            finally:  # who is asked to stop does not wait for files of many gigabytes
                pool.shutdown(wait=False, cancel_futures=True)

    def _missing(self, targets: Mapping[str, Path]) -> list[str]:
        sizes = {name: path.stat().st_size if path.is_file() else None for name, path in targets.items()}
        return sorted(name for name, size in sizes.items() if size != self.files[name]["size"])

    def _fetch_file(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._file_system.open(f"{self._root}/{name}", "rb", cache_type="none") as remote:
            fetch_file(remote, target, int(self.files[name]["size"]), self._sha256(name))

    def _sha256(self, name: str) -> str | None:
        """The digest of a file's content, where the source states one: the hub does of large files."""
        large = self.files[name].get("lfs")
        return str(large["sha256"]) if large else None


class _Bucket(_Remote):
    """`s3://` and whatever else fsspec can list."""

    def __init__(self, source: str, sought: Sought) -> None:
        file_system, root = fsspec.core.url_to_fs(source, use_listings_cache=False)
        super().__init__(source, file_system, root, sought=sought)

    def fetch(self, names: Iterable[str]) -> Path:
        names = sorted(names)
        entry = SharedCache.from_environment().folder / self._version(names)
        self._fill(entry, {name: entry / name for name in names})
        return _own_folder(Contained.of(entry), names)

    def _version(self, names: list[str]) -> str:
        """A name for what the bucket holds now: where, which files, how long, which versions."""
        stated = [(name, self.files[name]["size"], self._tag(self.files[name])) for name in names]
        return hashlib.sha256(json.dumps([self.source, stated]).encode()).hexdigest()[:32]

    def _tag(self, entry: Mapping[str, Any]) -> str:
        return str(entry.get("ETag", ""))

    def _fetch_file(self, name: str, target: Path) -> None:
        super()._fetch_file(name, target)
        now = self._file_system.info(f"{self._root}/{name}")
        if (now["size"], self._tag(now)) != (self.files[name]["size"], self._tag(self.files[name])):
            target.unlink()
            raise Transient(f"{self.source}/{name} changed while it was fetched; it is fetched again")


class _HubModel(_Remote):
    """`hf://owner/name` at one commit."""

    def __init__(self, source: str, revision: str, sought: Sought) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        self._repository = source.removeprefix("hf://").rstrip("/")
        commit = HfApi().model_info(self._repository, revision=revision).sha
        files = HfFileSystem(use_listings_cache=False)
        super().__init__(source, files, f"{self._repository}@{commit}", sought=sought, commit=str(commit))

    def fetch(self, names: Iterable[str]) -> Path:
        """Large files come as blobs of the hub's cache, which its client links; it fetches the small ones."""
        from huggingface_hub import snapshot_download

        names = sorted(names)
        entry = hub_entry(self._repository, "model")
        blobs = {name: entry / BLOBS / digest for name in names if (digest := self._sha256(name)) is not None}
        self._fill(entry, blobs)
        folder = snapshot_download(
            self._repository, revision=self.commit, allow_patterns=names, ignore_patterns=["*/*"]
        )
        return _own_folder(Contained.of(Path(folder)), names)


def locate(source: str, revision: str, sought: Sought = MODEL) -> Location:
    """The folder behind a source; `revision` is of a hub's repository. For use inside `translated`."""
    if source.startswith("hf://"):
        return _HubModel(source, revision, sought)
    path = local_path(source)
    return _Bucket(source, sought) if path is None else _Folder(source, path, claim_path(source), sought)


# --- its files


def _weight_names(location: Location) -> list[str]:
    """The files that hold the weights that are trained, all of them there."""
    files = location.files
    location.refuse_adapter()
    if INDEX_NAME in files:
        weight_map = _weight_map(location)
        if _holds_more_than_text(location):
            weight_map = {tensor: name for tensor, name in weight_map.items() if not BESIDE_TEXT.search(tensor)}
        names = sorted(set(weight_map.values()))
        if not names:
            raise UserError(f"{location.source}: {INDEX_NAME} lists no files; copy the whole model")
        if SINGLE_FILE_NAME in files and names != [SINGLE_FILE_NAME]:
            raise UserError(
                f"{location.source} holds two sets of weights, {SINGLE_FILE_NAME} and the {len(names)} files of "
                f"{INDEX_NAME}; remove the one that is not meant"
            )
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


def _holds_more_than_text(location: Location) -> bool:
    """As config.json has it, before transformers is imported."""
    if CONFIG_NAME not in location.files:
        return False
    try:
        config: Any = read_json(location.read(CONFIG_NAME))
    except ValueError:  # which is told where the config is read
        return False
    return isinstance(config, dict) and any(isinstance(config.get(name), dict) for name in PARTS)


def _write_index(folder: Path, weight_map: Mapping[str, str], names: Collection[str]) -> None:
    """An index of the files that were fetched, in the place of the whole one."""
    fetched = {tensor: name for tensor, name in weight_map.items() if name in names}
    if len(fetched) < len(weight_map):
        (folder / INDEX_NAME).unlink()
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": fetched}))


def _weight_map(location: Location) -> Mapping[str, str]:
    try:
        index: Any = read_json(location.read(INDEX_NAME))
        weight_map = index["weight_map"]
        return {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location.source}: {INDEX_NAME} is damaged ({error!r}); copy it again") from error


def _check_index(location: Location, headers: Mapping[str, _Header]) -> None:
    if INDEX_NAME not in location.files:
        return
    listed = {tensor: name for tensor, name in _weight_map(location).items() if name in headers}
    absent = [tensor for tensor, name in listed.items() if tensor not in headers[name].tensors]
    if absent:
        raise UserError(
            f"{location.source}: {INDEX_NAME} lists {len(absent)} tensors that its files do not hold, the first is "
            f"{absent[0]}; copy the whole model"
        )


def _all_tensors(source: str, headers: Mapping[str, _Header]) -> dict[str, TensorShape]:
    """The tensors of all files, each of them in one."""
    places: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in places:
                raise UserError(f"{source}: {places[name]} and {file} both hold {name}; copy the whole model anew")
            places[name] = file
    return {name: shape for header in headers.values() for name, shape in header.tensors.items()}


def _refuse_pointers(source: str, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, DESCRIPTION_PATTERNS):
            with path.open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    raise _pointer_refusal(source, path.name)


def _pointer_refusal(source: str, name: str) -> UserError:
    return UserError(
        f"{source}: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` where the model was cloned"
    )


def _named_base(adapter_config: bytes) -> str:
    try:
        config: Any = read_json(adapter_config)
        name = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        name = None
    return f"its base model, {shown(name)}," if isinstance(name, str) and name else "its base model"


def _parse_header(raw: bytes, file_bytes: int) -> dict[str, TensorShape]:
    """See https://github.com/huggingface/safetensors: 8 bytes of length, that much JSON, then the data."""
    if not raw:
        raise ValueError(f"no header in {file_bytes} bytes")
    fields = read_json(raw)
    if not isinstance(fields, dict):
        raise ValueError("a header that is no object")
    tensors = {name: _parse_tensor(name, field) for name, field in fields.items() if name != "__metadata__"}
    end = 8 + len(raw) + max((end for _, end in tensors.values()), default=0)
    if end != file_bytes:
        raise ValueError(f"{file_bytes} bytes long instead of {end}")
    return {name: shape for name, (shape, _) in tensors.items()}


def _parse_tensor(name: str, field: Any) -> tuple[TensorShape, int]:
    """A header's entry, and where its data ends; raises ValueError where it is none that a reader can follow."""
    known = isinstance(field, dict) and {"dtype", "shape", "data_offsets"} <= field.keys()
    if not known or not isinstance(field["dtype"], str):
        raise ValueError(f"the entry of {shown(name)} has no dtype, shape and data_offsets")
    shape, offsets = field["shape"], field["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"shape or data_offsets of {shown(name)} are no sizes")
    size = ITEM_BYTES.get(field["dtype"])
    if size is not None and prod(shape) * size != offsets[1] - offsets[0]:
        raise ValueError(f"{shown(name)} has {offsets[1] - offsets[0]} bytes, which is not what its shape takes")
    return TensorShape(dtype=field["dtype"], shape=tuple(shape)), offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_COUNT for value in values)


def library_words(error: BaseException) -> str:
    """What a library says is wrong with a file, short enough for a message: it may quote the whole file."""
    words = on_one_line(f"{type(error).__name__}: {error}")
    return words if len(words) <= LIBRARY_CHARACTERS else f"{words[:LIBRARY_CHARACTERS]} ..."


def _content_digest(location: Location, headers: Mapping[str, _Header]) -> str:
    digest = hashlib.sha256(location.read(CONFIG_NAME) if CONFIG_NAME in location.files else b"")
    for name, header in headers.items():
        digest.update(f"\n{name}\n".encode() + hashlib.sha256(header.raw).digest())
    return f"sha256:{digest.hexdigest()}"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# --- its architecture


def _read_config(folder: Path, source: str) -> Mapping[str, Any]:
    """The content of config.json; UserError for what its fields alone rule out."""
    try:
        config: Any = read_json((folder / CONFIG_NAME).read_bytes())
    except ValueError as error:
        raise UserError(f"{source}: {CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{source}: {CONFIG_NAME} is not a JSON object; give the folder of a Hugging Face model")
    with _refusals(source):
        refuse_fields(cast(Mapping[str, Any], config))
    return cast(Mapping[str, Any], config)


@contextmanager
def _refusals(source: str) -> Generator[None]:
    """What is raised as a ValueError about a model is the user's to know."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def config_of_weights_as_read(folder: Path) -> Any:
    """transformers' config of a model folder, without what it says of MXFP4: such weights are quantized anew."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if is_mxfp4(config.to_dict()):
        del config.quantization_config
    return config


def known_config(folder: Path, source: str) -> Any:
    """The config as transformers' own class for the model type reads it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = _read_config(folder, source)
    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        raise UserError(f"{source}: {unknown_type(config, transformers.__version__)}")
    try:
        return config_of_weights_as_read(folder)
    except Exception as error:  # whatever the config provokes, it is the user's to mend
        raise UserError(f"{source}: {CONFIG_NAME} is not valid: {library_words(error)}") from error


def holds_text_model(model_type: str) -> bool:
    """Whether models of this type are of images and text, and hold a text model, which alone is trained."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return False
    parts: Any = CONFIG_MAPPING[model_type].sub_configs
    return TEXT_CONFIG in parts


def _known_type(model_type: str) -> KnownType:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    wraps = holds_text_model(model_type)
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if wraps else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = names.get(model_type, ())
    return KnownType(
        classes=(found,) if isinstance(found, str) else tuple(found),
        wraps=wraps,
        sees_both_sides=model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        assumes=_own_overrides(CONFIG_MAPPING[model_type]),
    )


def _own_overrides(config_class: Any) -> dict[str, object]:
    """`KnownType.assumes`, of which prepare must know which types make layers with sizes of their own."""
    try:
        config: Any = config_class()
    except Exception:  # noqa: BLE001 - some have no defaults, and then nothing is assumed
        return {}
    own: dict[str, object] = {OVERRIDES: True} if config.get_text_config().to_dict().get(OVERRIDES) else {}
    return {TEXT_CONFIG: own} if own and config.get_text_config() is not config else own
