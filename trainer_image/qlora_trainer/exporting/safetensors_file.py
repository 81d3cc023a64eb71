"""Writes a safetensors file tensor by tensor; the library's own writer wants all of them in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON, padded
with spaces so that the data begins at a multiple of 8, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.exporting.merging import DTYPES, MergedTensor
from qlora_trainer.outcome import UserError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: MergedTensor) -> int:
    """What its data takes in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[MergedTensor]) -> None:
    """Write the file. UserError for a sum that is no number in 16 bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    end = 0
    # The widest first, so that each begins at a multiple of its own item's size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    for tensor in ordered:
        start, end = end, end + bytes_of(tensor)
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            for rows in tensor.rows():
                _rounded(rows, tensor).reshape(-1).view(torch.uint8).numpy().tofile(file)


def _rounded(rows: Tensor, tensor: MergedTensor) -> Tensor:
    rounded = rows.to(tensor.dtype).contiguous()
    if tensor.is_merged and not bool(torch.isfinite(rounded).all()):
        raise UserError(
            f"{tensor.name} with the adapter added is no finite number in {NAMES[tensor.dtype]}; train with a lower "
            "learning rate, or leave the format out"
        )
    return rounded
