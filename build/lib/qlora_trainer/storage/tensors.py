"""Named tensors on their way to a file and back: copies on the host, safetensors, never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_trainer.storage.backends import DamagedFolder

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]


def on_host(tensors: Tensors) -> dict[str, Tensor]:
    """Copies of tensors in host memory, those of one storage together.

    The adapter's matrices share one and so do the states of their updates; a copy each would be 2,000 transfers at 8B.
    """
    import torch

    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            # Pinned memory is slow to get, and torch keeps it for the next time.
            copies[storage.data_ptr()] = torch.empty_like(whole, device="cpu", pin_memory=whole.is_cuda).copy_(whole)
        copied = copies[storage.data_ptr()].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        found[name] = empty.set_(copied, tensor.storage_offset(), tensor.size(), tensor.stride())
    return found


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  # a PathLike of anything

    # Any order of keys gives the same file (the format sorts them); the metadata is what PEFT and transformers expect.
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in host memory; raises DamagedFolder where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]  # a PathLike of anything

    try:
        # Cloned, because loaded tensors are maps of a file that is deleted when newer checkpoints exist.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise DamagedFolder(f"{path} is not a safetensors file: {error}") from error
