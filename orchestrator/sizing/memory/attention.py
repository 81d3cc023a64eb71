"""Bytes of attention over packed records: what its backward pass takes by the way.

Our own kernels (`qlora_trainer/kernels/triton_attention.py`) take next to nothing. Elsewhere sizes are those of torch's
`mha_varlen_bwd` (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp), or of flash-attn-4's
`_flash_attn_bwd` (flash_attn/cute/interface.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from orchestrator.api import trainer_facts
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES, INT32_BYTES, allocated

SOFTCAPPED_TYPES = frozenset({"gemma2"})
"""Model types whose attention softcaps its scores."""
ROWS_OF_A_RECORD = 128
"""Rows that flash attention keeps between two records' sums."""
SCORES_ALIVE = 4
"""Tiles of scores that are alive at once where attention is computed tile by tile."""
ROUNDED_FINELY = 128
"""Heads up to this size are rounded to a multiple of 32, larger ones to one of 64."""
SMALL_FLASH_HEAD, FLASH_BLOCK, FLASH_SMALL_BLOCK = 64, 128, 64
"""Rows that flash-attn-4 takes at a time on Hopper: of keys, and of queries with heads up to this size; of others."""
SHORT_RECORD_TOKENS = 64
"""Packed rows of records shorter than this on average would take more than is counted."""


def alike(multiprocessors: int, query_heads: int) -> int:
    """The most multiprocessors that take the same bytes: cards that differ by less need not be told apart.

    Rounding up to a multiple of the heads changes no number of sums (`Attention._workspace_for`).
    """
    return -(-multiprocessors // query_heads) * query_heads


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A layer's attention over one packed row."""

    tokens: int
    records: int
    """The fewest that there can be: fewer take more partial sums, more take more rows between them."""
    most_records: int
    query_heads: int
    key_heads: int
    head_size: int
    deterministic: bool
    multiprocessors: int
    """How many the card has: in deterministic mode each sums for itself."""
    softcaps: bool = False
    """Whether scores are softcapped, which flash attention cannot (Gemma 2), nor heads beyond its largest."""
    sinks: bool = False
    """Whether heads have sinks, which go through the trainer's own kernels wherever transformers computes the layer."""
    by_flash: bool = False
    """Whether flash-attn-4 computes it."""

    @cached_property
    def query_width(self) -> int:
        """Elements of all query heads of a token."""
        return self.query_heads * self.head_size

    @cached_property
    def key_width(self) -> int:
        """Elements of all key heads of a token, or of all value heads."""
        return self.key_heads * self.head_size

    @cached_property
    def logsumexp_bytes(self) -> int:
        """What is kept beside query, key, value and output."""
        return self.query_heads * self.tokens * FP32_BYTES

    @cached_property
    def workspace(self) -> tuple[int, ...]:
        """What comes and goes in a backward pass that writes its gradients where they belong."""
        if self.by_flash:
            return self._workspace_of_flash()
        if self.head_size <= trainer_facts.LARGEST_TRITON_HEAD:
            return (allocated(self.query_heads * self.tokens * FP32_BYTES),)
        widths = (self.query_width, self.key_width, self.key_width)
        return (*(allocated(self.tokens * width * BF16_BYTES) for width in widths), *self._torch_workspace())

    @cached_property
    def traced_workspace_bytes(self) -> int:
        """What comes and goes beside the gradients, where transformers computes the layer."""
        return sum(self.traced_workspace)

    @cached_property
    def traced_workspace(self) -> tuple[int, ...]:
        """The tensors of that, all of which are there at once."""
        if self.softcaps or self.head_size > trainer_facts.LARGEST_FLASH_HEAD:
            tile = min(trainer_facts.SCORES_BYTES, 4 * self.query_heads * self.tokens**2)
            return *(tile,) * SCORES_ALIVE, *(allocated(self.tokens * self.key_width * FP32_BYTES),) * 2
        return self.workspace if self.sinks else self._torch_workspace()

    def _workspace_of_flash(self) -> tuple[int, ...]:
        """The queries' sums, two numbers a row, the keys' and values' sums where heads share them, and who is next."""
        block = FLASH_SMALL_BLOCK if self.head_size > SMALL_FLASH_HEAD else FLASH_BLOCK
        records = max(1, self.tokens // trainer_facts.FLASH_RECORD_TOKENS)
        rows, key_rows = (-(-(self.tokens + (records + 1) * each - 1) // each) * each for each in (block, FLASH_BLOCK))
        sums = allocated(self.query_heads * rows * self._rounded_head * FP32_BYTES)
        number = allocated(self.query_heads * rows * FP32_BYTES)
        turns = allocated(records * self.query_heads * -(-self.tokens // block) * INT32_BYTES)
        if self.query_heads == self.key_heads:
            return sums, number, number, turns
        key_sums = allocated(self.key_heads * key_rows * self._rounded_head * FP32_BYTES)
        key_turns = allocated(2 * records * self.key_heads * -(-self.tokens // FLASH_BLOCK) * INT32_BYTES)
        return sums, number, number, key_sums, key_sums, turns, key_turns, key_turns

    def _torch_workspace(self) -> tuple[int, ...]:
        """The largest for any number of records that the row can have."""
        return max((self._workspace_for(records) for records in {self.records, self.most_records}), key=sum)

    def _workspace_for(self, records: int) -> tuple[int, ...]:
        """The sums of query gradients, the rows' products, and a copy of keys and values for heads that share them."""
        rows = self.tokens + ROWS_OF_A_RECORD * records
        splits = -(-self.multiprocessors // (records * self.query_heads)) if self.deterministic else 1
        sums = allocated(splits * rows * self.query_heads * self._rounded_head * FP32_BYTES)
        products = allocated(self.query_heads * rows * FP32_BYTES)
        copy = allocated(self.tokens * self.query_width * BF16_BYTES)
        return sums, products, *(() if self.query_heads == self.key_heads else (copy, copy))

    @property
    def _rounded_head(self) -> int:
        multiple = 32 if self.head_size <= ROUNDED_FINELY else 64
        return -(-self.head_size // multiple) * multiple
