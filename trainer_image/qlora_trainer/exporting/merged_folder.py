"""The merged model as a Hugging Face folder: the base's files with the adapter in them, and the job's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.exporting.merging import WIDE, WeightFile
from qlora_trainer.exporting.safetensors_file import bytes_of, write_safetensors
from qlora_trainer.exporting.sources import MakeFile, Sources
from qlora_trainer.model.source import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from qlora_trainer.storage.final_adapter import GENERATION_CONFIG_NAME, TOKENIZER_NAMES

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Where config.json says of what type the weights are, today and before transformers 5."""


def files(sources: Sources) -> Mapping[str, MakeFile]:
    """The folder's files by name, and how each is made; each of the base's files of weights becomes one."""
    names = _weight_names(len(sources.weights))
    found: dict[str, MakeFile] = {
        name: lambda sources, path, base=base: _write_weights(sources, base, path)
        for name, base in zip(names, sources.weights, strict=True)
    }
    if len(names) > 1:
        found[INDEX_NAME] = _write_index
    found[CONFIG_NAME] = _write_config
    for name in (GENERATION_CONFIG_NAME, *TOKENIZER_NAMES):
        if (sources.adapter_folder / name).is_file():
            found[name] = lambda sources, path, name=name: _copy(sources.adapter_folder / name, path)
    return found


def _weight_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_weights(sources: Sources, base: str, path: Path) -> None:
    with WeightFile(sources.base / base, sources.adapter, sources.modules) as file:
        write_safetensors(path, file.tensors())


def _write_index(sources: Sources, path: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for name, base in zip(_weight_names(len(sources.weights)), sources.weights, strict=True):
        with WeightFile(sources.base / base, sources.adapter, sources.modules) as file:
            tensors = file.tensors()
        weight_map |= {tensor.name: name for tensor in tensors}
        total += sum(bytes_of(tensor) for tensor in tensors)
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _write_config(sources: Sources, path: Path) -> None:
    """The base's own, but for the type of its weights where that was wider."""
    config: dict[str, Any] = json.loads((sources.base / CONFIG_NAME).read_bytes())
    wide = {str(dtype).removeprefix("torch.") for dtype in WIDE}
    narrowed = {name: "bfloat16" for name in DTYPE_FIELDS if config.get(name) in wide}
    path.write_text(json.dumps(config | narrowed, indent=2))


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)
