"""Attention over a packed row: every record sees itself alone, and no mask is ever made.

`model` registers one `PackedAttention` with transformers and tells it, before each forward pass, where the records of
the row begin. transformers' own way, a boolean mask of tokens x tokens, costs 4 GiB at 65,536 tokens and forbids the
flash kernels. Here the GPU runs flash attention over all records in one launch (Dao, 2023, variable-length form), which
torch makes deterministic in deterministic mode; elsewhere each record is one causal call.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qlora_trainer.batches import MicroBatch

NAME = "qlora_packed"
"""The name under which transformers finds it."""
LARGEST_FLASH_HEAD = 128
"""Flash attention's backward pass takes larger heads on data-center cards only."""


class PackedAttention:
    """An attention function for transformers (`AttentionInterface`), for one row of records."""

    def __init__(self) -> None:
        self._starts = torch.zeros(1, dtype=torch.int32)
        self._borders: list[int] = []
        self._longest_record = 0

    def register(self) -> None:
        """Be what transformers calls under `NAME`: that is one for the whole process."""
        AttentionInterface.register(NAME, self)

    def expect(self, batch: MicroBatch, starts_on_device: Tensor) -> None:
        """Announce the row that the next forward pass (and its recomputation in backward) is about."""
        self.register()
        self._starts = starts_on_device
        self._borders = batch.record_starts.tolist()
        self._longest_record = batch.longest_record

    def __call__(
        self,
        _module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Query, key and value are [1, heads, tokens, size]; the answer is [1, tokens, heads, size]."""
        assert attention_mask is None, "packed attention knows the records' borders and takes no mask"
        assert len(query) == 1, "a micro-batch is one packed row"
        assert query.shape[2] == key.shape[2] == self._borders[-1], "this is not the row that was announced"
        window = sliding_window if sliding_window is not None and sliding_window < self._longest_record else None
        fits_flash = query.is_cuda and query.shape[-1] == value.shape[-1] <= LARGEST_FLASH_HEAD and dropout == 0
        if fits_flash:
            return self._flash(query, key, value, scaling, window), None
        records = [
            tuple(part[:, :, start:end] for part in (query, key, value)) for start, end in pairwise(self._borders)
        ]
        answers = [_one_record(*record, dropout, scaling, window) for record in records]
        return torch.cat(answers, dim=2).transpose(1, 2).contiguous(), None

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # Both window and causality say how far a token sees: `window - 1` tokens back (-1: all), none ahead.
        answer = varlen_attn(
            *(part[0].transpose(0, 1) for part in (query, key, value)),
            self._starts,
            self._starts,
            self._longest_record,
            self._longest_record,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **_grouped(varlen_attn, query.shape[1] != key.shape[1]),
        )
        assert isinstance(answer, Tensor)
        return answer.unsqueeze(0)


def _grouped(varlen_attn: Callable[..., Any], grouped: bool) -> dict[str, bool]:
    """From torch 2.12 on, heads that share keys must be announced; before, they were just taken."""
    return {"enable_gqa": grouped} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _one_record(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    mask = None
    if window is not None and window < query.shape[2]:
        place = torch.arange(query.shape[2], device=query.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
