"""Embeddings of which every layer gets a part of its own (Gemma 3n, Gemma 4): larger than the layers, and on the host.

Rules:

- Their table is known by the method that transformers' classes have for it.
- It is frozen and only looked up, so it stays in host memory, and the rows of a micro-batch travel. The module itself
  looks them up there, with whatever it does to them, so the bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding

from qlora_trainer.model.text_part import decoder_of


def layer_inputs_table(base: Any) -> Embedding | None:
    """The table of a model; None where it has none."""
    find = getattr(decoder_of(base), "get_per_layer_input_embeddings", None)
    try:
        return None if find is None else find()
    except AttributeError:  # of a class that can do without
        return None


def keep_layer_inputs_on_host(base: Any, device: torch.device) -> None:
    """Move the table off the card; whoever calls it gets rows on the card."""
    table = layer_inputs_table(base)
    if table is not None:
        table.to("cpu")
        look_up_on_host(table, device)


def look_up_on_host(table: Any, device: torch.device) -> None:
    """Let a table that is on the host be called as if it were on the card."""

    def to_host(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].to("cpu"),)  # which waits for the card, but for token ids that are on the host

    def to_device(_: Any, __: Any, rows: Tensor) -> Tensor:
        return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)

    table.register_forward_pre_hook(to_host)
    table.register_forward_hook(to_device)
