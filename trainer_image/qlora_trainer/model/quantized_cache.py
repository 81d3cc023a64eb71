"""The cache of quantized weights: what a model's weights became on the card, to be read back instead of made again.

An entry can be read while the libraries are still being imported (`ReadAhead`). Rules:

- It exists only where `$QLORA_MODEL_CACHE` names a folder. Elsewhere the pod's scratch space would have to hold it.
- It never fails a job: what cannot be read is made again, what cannot be written is not kept, each with a log line.
- An entry exists when its manifest does: temporary folder, fsync, rename, as in the job's store. The manifest has the
  SHA-256 of every file, checked while the file is on its way to the card.
- An entry's key covers all that decides the bits: the weights' files, the config, how and with what they are quantized.
  Fine-tuned siblings have the same names and sizes, so files also count by place, time and samples of their content.
- Entries hold every parameter and buffer, those that no checkpoint has among them (rotary frequencies), under the names
  of bitsandbytes' own format. Filling a model of the same class with them gives the same bits as loading it did.
- `$QLORA_QUANTIZED_CACHE_GIB` bounds it; what was used longest ago goes first.
- On the host it takes one shard while it writes, and a few buffers while it reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from orchestrator.api.base import Model
from orchestrator.api.formats import MANIFEST_NAME, FileEntry
from qlora_trainer.kernels.streamed_layers import NOTHING_ON_HOST, OnHost
from qlora_trainer.model.source import CONFIG_NAME
from qlora_trainer.storage.backends import sync_folder
from qlora_trainer.storage.job_store import describe_durably
from qlora_trainer.storage.shared_cache import FOLDER_VARIABLE

QUANTIZATION = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""The fields of transformers' `BitsAndBytesConfig`: NF4 with double quantization (Dettmers et al., 2023)."""
LIMIT_VARIABLE = "QLORA_QUANTIZED_CACHE_GIB"
DEFAULT_LIMIT_GIB = 400.0
CACHE_NAME = "quantized"
PARTIAL_PREFIX = ".partial-"
ABANDONED_SECONDS = 86400.0
"""A temporary folder of this age is what a killed process left; a slow disk takes an hour for 40 GB."""
FORMAT = 1
SHARD_BYTES = 512 * 2**20
"""Small enough that several threads share a model of 8B evenly; a larger tensor has a shard to itself."""
BUFFER_BYTES = 16 * 2**20
WORKERS = min(8, os.cpu_count() or 1)
"""SHA-256 does 1 to 2 GB/s on a core, a fraction of what the bus does."""
SAMPLES = 16
SAMPLE_BYTES = 4096
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that entries hold, by safetensors' names."""

STATE = re.compile(r"(?P<parameter>.+)\.(?P<part>(nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__nf4)")
"""The parts of a quantization state, under bitsandbytes' names."""

log = logging.getLogger(__name__)


class UnfitEntry(Exception):
    """The model that is to be filled is not of the kind that the tensors came from."""


class _Manifest(Model):
    files: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)


# --- keys


def entry_key(folder: Path, device: torch.device) -> str:
    """The digest that names the quantized weights of a model folder on a kind of device."""
    identity = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("bitsandbytes", "transformers")},
        "device": device.type,  # the card's kernels and the processor's differ in the last bit
        "quantization": QUANTIZATION,
        "config": hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest(),
        "weights": [_identity(path) for path in sorted(folder.glob("*.safetensors"))],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _layers(folder: Path) -> int:
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    return config.get("text_config", config)["num_hidden_layers"]


def _identity(path: Path) -> list[object]:
    """Tells a file from every other without reading it all; a hub's file resolves to its content's digest."""
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * stat.st_size // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


# --- from a model and back


def tensors_of(base: Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its quantization state, tied ones once, and every buffer."""
    for name, parameter in base.named_parameters():
        yield name, parameter.detach()
        if isinstance(parameter, bnb.nn.Params4bit):
            for part, tensor in parameter.quant_state.as_dict(packed=True).items():
                yield f"{name}.{part}", tensor
    yield from base.named_buffers()


def fill(base: Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device, its linear layers and experts replaced, the tensors of `tensors_of`."""
    values, parts = _grouped(tensors)
    for name, tensor in values.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = base.get_submodule(path)
        except AttributeError as error:
            raise UnfitEntry(f"{type(base).__name__} has no {path}") from error
        if name in parts:
            layer = owner if isinstance(owner, bnb.nn.Linear4bit) else None  # which has a state of its own
            parameters: Any = bnb.nn.Params4bit  # whose signature wants a device's name, and takes a device
            packed = parameters.from_prequantized(tensor, parts[name], device=tensor.device, module=layer)
            setattr(owner, leaf, packed)
        elif leaf in dict(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, tensor)
        elif leaf in dict(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, Parameter(tensor, requires_grad=False))
        else:
            raise UnfitEntry(f"{type(base).__name__} has no {name}")


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Parameters and buffers, and the parts of their quantization states, both by the parameter's name."""
    values: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if state := STATE.fullmatch(name):
            parts[state["parameter"]][state["part"]] = tensor
        else:
            values[name] = tensor
    return values, parts


# --- the cache


class ReadAhead:
    """A model folder's entry on its way to the device, read by threads that leave the interpreter to others."""

    def __init__(self, folder: Path, device: torch.device, *, streamed_layers: int = 0) -> None:
        self._folder = folder
        self._device = device
        self._streamed_layers = streamed_layers
        pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._found: Future[dict[str, Tensor] | None] | None = pool.submit(self._read)
        pool.shutdown(wait=False)

    def take(self) -> dict[str, Tensor] | None:
        """The entry's tensors, once, and nothing here holds them any longer; None if there is no whole entry."""
        found, self._found = self._found, None
        assert found is not None, "the entry has been taken"
        return found.result()

    def _read(self) -> dict[str, Tensor] | None:
        cache = QuantizedCache.from_environment()
        if cache is None:
            return None
        on_host = OnHost.of(self._streamed_layers, _layers(self._folder)) if self._streamed_layers else NOTHING_ON_HOST
        return cache.read(entry_key(self._folder, self._device), self._device, on_host)


@dataclass(frozen=True, slots=True)
class QuantizedCache:
    """A folder of entries, shared by the trainers that see it."""

    folder: Path
    limit_bytes: int

    @classmethod
    def from_environment(cls) -> QuantizedCache | None:
        """The cache next to the fetched models; None where there is no place for one."""
        models = os.environ.get(FOLDER_VARIABLE)
        limit_gib = float(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT_GIB))
        if not models or limit_gib <= 0:
            return None
        return cls(Path(models).expanduser() / CACHE_NAME, int(limit_gib * 2**30))

    def read(self, key: str, device: torch.device, on_host: OnHost = NOTHING_ON_HOST) -> dict[str, Tensor] | None:
        """The entry's tensors on the device, or the host; None if there is none, or none that is whole."""
        entry = self.folder / key
        try:
            manifest = _read_manifest(entry)
            with ThreadPoolExecutor(WORKERS) as pool:
                shards = list(pool.map(partial(_read_shard, entry, device, on_host), manifest.files))
        except FileNotFoundError:
            return None
        except OSError as error:  # the storage may answer the next trainer
            log.warning("the quantized weights %s cannot be read, and are not used: %s", entry, error)
            return None
        except (ValueError, KeyError) as error:
            log.warning("the quantized weights %s are damaged and are made again: %s", entry, error)
            self._remove(entry)
            return None
        with suppress(OSError):  # a read-only cache keeps no order of use
            os.utime(entry / MANIFEST_NAME)
        return {name: tensor for shard in shards for name, tensor in shard.items()}

    def write(self, key: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep an entry, unless there is one or no room for it."""
        named = dict(tensors)
        entry = self.folder / key
        odd = sorted({str(tensor.dtype) for tensor in named.values()} - {str(dtype) for dtype in DTYPES.values()})
        if odd:
            log.warning("the quantized weights are not kept: some are %s", ", ".join(odd))
            return
        try:
            if not (entry / MANIFEST_NAME).exists() and self._make_room(sum(t.nbytes for t in named.values())):
                self._write(entry, named)
        except (OSError, SafetensorError) as error:
            log.warning("the quantized weights are not kept: %s", error)

    def _write(self, entry: Path, tensors: Mapping[str, Tensor]) -> None:
        began = time.perf_counter()
        temporary = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=self.folder))
        try:
            manifest = _Manifest(files=tuple(_write_shards(temporary, tensors)))
            (temporary / MANIFEST_NAME).write_text(manifest.model_dump_json(by_alias=True))
            describe_durably(temporary / MANIFEST_NAME)
            sync_folder(temporary)
            if entry.exists():  # another trainer was faster, or an entry lost its manifest
                self._remove(entry)
            temporary.rename(entry)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        log.info("kept %.1f GiB of quantized weights in %.1f s", manifest.bytes / 2**30, time.perf_counter() - began)

    def _make_room(self, needed_bytes: int) -> bool:
        """Whether so much fits, after what was used longest ago has gone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        kept = sorted(self._entries(), key=lambda item: (item[1], item[0]))
        total = sum(size for _, _, size in kept)
        for entry, _, size in kept:
            if total + needed_bytes <= self.limit_bytes or needed_bytes > self.limit_bytes:
                break
            self._remove(entry)
            total -= size
        free_bytes = shutil.disk_usage(self.folder).free
        if total + needed_bytes <= self.limit_bytes and needed_bytes < free_bytes:
            return True
        log.warning(
            "the quantized weights are not kept: %.1f GiB do not fit into %s (%.1f GiB free, %s=%.0f)",
            needed_bytes / 2**30,
            self.folder,
            free_bytes / 2**30,
            LIMIT_VARIABLE,
            self.limit_bytes / 2**30,
        )
        return False

    def _entries(self) -> Iterator[tuple[Path, float, int]]:
        """Each entry with when it was last used and its bytes."""
        for entry in self.folder.iterdir():
            with suppress(FileNotFoundError, ValidationError):
                yield entry, (entry / MANIFEST_NAME).stat().st_mtime, _read_manifest(entry).bytes

    def _sweep(self) -> None:
        for path in self.folder.glob(f"{PARTIAL_PREFIX}*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def _remove(self, entry: Path) -> None:
        """The manifest first, so that what is left of an interruption does not count."""
        with suppress(OSError):
            (entry / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(entry, ignore_errors=True)


def _read_manifest(entry: Path) -> _Manifest:
    return _Manifest.model_validate_json((entry / MANIFEST_NAME).read_bytes())


# --- its files


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> list[FileEntry]:
    """While one shard leaves the card, threads make those before it durable."""
    with ThreadPoolExecutor(WORKERS) as pool:
        described = []
        for number, names in enumerate(_shards(tensors)):
            path = folder / f"weights-{number:05}.safetensors"
            save_file({name: tensors[name].to("cpu", copy=True).contiguous() for name in names}, path)
            described.append(pool.submit(describe_durably, path))
        return [future.result() for future in described]


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if names and filled + tensor.nbytes > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += tensor.nbytes
    yield names


def _read_shard(entry: Path, device: torch.device, on_host: OnHost, expected: FileEntry) -> dict[str, Tensor]:
    """A shard's tensors, through one small buffer; raises ValueError if the file is not the expected one."""
    path = entry / expected.name
    if not path.exists():
        raise ValueError(f"{expected.name} is missing")
    digest = hashlib.sha256()
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        if path.stat().st_size != expected.bytes:
            raise ValueError(f"{expected.name} has {path.stat().st_size} bytes instead of {expected.bytes}")
        for name, dtype, shape in _read_header(file, digest, expected.bytes):
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype], device=on_host.device(name, device))
            _read_into(tensors[name].view(-1).view(torch.uint8), file, buffer, digest)
    if digest.hexdigest() != expected.sha256:
        raise ValueError(f"{expected.name} has the SHA-256 {digest.hexdigest()} instead of {expected.sha256}")
    return tensors


def _read_header(file: BufferedReader, digest: Any, file_bytes: int) -> list[tuple[str, str, list[int]]]:
    """Names, types and shapes in the order of the data, which has no gaps; the digest takes what was read."""
    length = file.read(8)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > file_bytes:
        raise ValueError("a header longer than its file")
    header = file.read(header_bytes)
    digest.update(length + header)
    fields = {name: field for name, field in json.loads(header).items() if name != "__metadata__"}
    ordered = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, field["dtype"], field["shape"]) for name, field in ordered]


def _read_into(target: Tensor, file: BufferedReader, buffer: Tensor, digest: Any) -> None:
    """The next bytes of the file, as many as the target has; a copy from pinned memory waits until it is done."""
    for start in range(0, target.numel(), BUFFER_BYTES):
        piece = buffer[: min(BUFFER_BYTES, target.numel() - start)]
        view = memoryview(piece.numpy().data)
        if file.readinto(view) != piece.numel():
            raise ValueError("the file ends early")
        digest.update(view)
        target[start : start + piece.numel()].copy_(piece)
