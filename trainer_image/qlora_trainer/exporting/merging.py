"""The base's own weights with the adapter added to them, a few rows at a time.

    W' = W + s B A                                      LoRA (Hu et al., 2021), s = alpha / rank, or rsLoRA's
    W' = m (W + s B A) / |W + s B A|, row by row        DoRA (Liu et al., 2024)

Rules:

- W is what the checkpoint holds, in 16 bits or more, never what NF4 made of it: what training computed with is W with
  NF4's error, which the adapter does not undo.
- The sum is made in float32 and rounded once, by whoever writes it.
- Rows are independent of each other in all of this, so host memory is bounded by ROWS_BYTES and one module's A and B,
  whatever the size of a tensor; what has three dimensions goes by whole matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_trainer.model.source import INDEX_NAME, SINGLE_FILE_NAME
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.final_adapter import ADAPTER_CONFIG_NAME, ADAPTER_NAME

ROWS_BYTES = 16 << 20
"""Of rows in float32 at a time; a few copies of them are there at once."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""
WIDE = (torch.float64, torch.float32)
PREFIX = "base_model.model."
NOT_MERGED = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "lora_bias", "fan_in_fan_out")
"""Fields of adapter_config.json that would change the sum, and that no adapter of this trainer has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTensor:
    """A tensor of the merged model, under the checkpoint's name for it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What it is in 16 bits: a matrix that the checkpoint has in more is bfloat16, what is no matrix stays."""
    is_merged: bool
    """Whether the adapter is on it; its rows are then float32."""
    rows: Callable[[], Iterator[Tensor]]
    """Its values, in order, a few rows at a time, as accurate as they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the adapter adds to one weight [outputs, inputs]."""

    a: Tensor
    """[rank, inputs], float32."""
    b: Tensor
    """[outputs, rank], as it is stored."""
    scaling: float
    magnitude: Tensor | None
    """DoRA's [outputs], float32."""

    def apply(self, rows: Tensor, start: int) -> Tensor:
        """The rows [n, inputs] from `start` on, merged, in float32."""
        b = self.b[start : start + len(rows)].float()
        merged = torch.addmm(rows.float(), b, self.a, alpha=self.scaling)
        if self.magnitude is None:
            return merged
        norm = merged.square().sum(dim=1).sqrt()
        return merged * (self.magnitude[start : start + len(rows)] / norm)[:, None]


class Adapter:
    """A finished adapter in PEFT's layout, read module by module."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for what is more than LoRA on linear layers."""
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG_NAME).read_bytes())
        odd = next((name for name in NOT_MERGED if config.get(name)), None)
        if odd is not None:
            raise UserError(f"the adapter's {ADAPTER_CONFIG_NAME} has {odd}, which is not merged into a base")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        self.scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.alpha, self.rank, self.is_dora = alpha, rank, bool(config.get("use_dora"))
        self._path = folder / ADAPTER_NAME
        self._keys = frozenset(tensor_names(self._path))
        ends = ".lora_A.weight"
        self.modules = sorted(key[len(PREFIX) : -len(ends)] for key in self._keys if key.endswith(ends))

    def change(self, module: str) -> Change:
        """What is added to a module's weight."""
        a, b = self.matrices(module)
        magnitude = self._read(module, "lora_magnitude_vector").float() if self.is_dora else None
        return Change(a=a.float(), b=b, scaling=self.scaling, magnitude=magnitude)

    def matrices(self, module: str) -> tuple[Tensor, Tensor]:
        """A [rank, inputs] and B [outputs, rank] as they are stored."""
        return self._read(module, "lora_A.weight"), self._read(module, "lora_B.weight")

    def _read(self, module: str, part: str) -> Tensor:
        with opened(self._path) as file:
            return file.get_tensor(f"{PREFIX}{module}.{part}")


def opened(path: Path) -> Any:
    """A safetensors file, mapped into memory; a context."""  # Any: the library has no types
    return safe_open(path, framework="pt")


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors."""
    with opened(path) as file:
        return list(file.keys())


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that hold a model's weights, in order."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return (SINGLE_FILE_NAME,)
    content: dict[str, dict[str, str]] = json.loads(index.read_bytes())
    return tuple(sorted(set(content["weight_map"].values())))


class WeightFile:
    """One file of the base's weights, with the adapter added where it is on one of them."""

    def __init__(self, path: Path, adapter: Adapter, modules: Mapping[str, str]) -> None:
        """`modules` names the adapted modules by the checkpoint's names of their weights."""
        self._path = path
        self._adapter = adapter
        self._modules = modules
        self._open = ExitStack()

    def __enter__(self) -> WeightFile:
        self._file: Any = self._open.enter_context(opened(self._path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def tensors(self) -> list[MergedTensor]:
        """All of them, in the order of their names; their rows can be read while the file is open."""
        return [self._tensor(name) for name in sorted(self._file.keys())]

    def _tensor(self, name: str) -> MergedTensor:
        part: Any = self._file.get_slice(name)
        shape, stored = tuple(part.get_shape()), DTYPES[part.get_dtype()]
        is_wide_matrix = stored in WIDE and len(shape) > 1
        module = self._modules.get(name)
        return MergedTensor(
            name=name,
            shape=shape,
            dtype=torch.bfloat16 if is_wide_matrix else stored,
            is_merged=module is not None,
            rows=lambda: self._rows(name, shape, module),
        )

    def _rows(self, name: str, shape: tuple[int, ...], module: str | None) -> Iterator[Tensor]:
        if not shape:
            yield self._file.get_tensor(name)
            return
        change = self._adapter.change(module) if module is not None else None
        part: Any = self._file.get_slice(name)
        step = max(1, ROWS_BYTES // (4 * max(1, math.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            rows: Tensor = part[start : start + step]
            yield rows if change is None else change.apply(rows, start)
