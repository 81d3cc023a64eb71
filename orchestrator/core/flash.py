"""Bytes of flash attention over packed records: the tables of its backward pass.

Sizes are those of torch's `mha_varlen_bwd` (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp), cut into
tiles as `qlora_trainer/attention.py` does. `core/fused` and `core/plain` are the callers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from orchestrator.core.timeline import allocated

BF16_BYTES = 2
FP32_BYTES = 4
QUERY_TILE_TOKENS = 16384
HEADS_AT_ONCE = 8
ROWS_OF_A_RECORD = 128
"""Rows that flash attention keeps between two records' sums."""
LARGEST_HEAD = 128
HEAD_MULTIPLE = 8
SHORT_RECORD_TOKENS = 64
"""Packed rows of records shorter than this on average would take more than is counted."""


def alike(multiprocessors: int, tokens: int, query_heads: int) -> int:
    """The most multiprocessors that take the same bytes: cards that differ by less need not be told apart.

    Rounding up to a multiple of the heads changes no number of sums (`_splits`), where all heads are at work at once.
    """
    if tokens > QUERY_TILE_TOKENS:
        return multiprocessors
    return -(-multiprocessors // query_heads) * query_heads


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A layer's attention over one packed row."""

    tokens: int
    records: int
    """At the least: fewer take more partial sums, more take more rows between them."""
    most_records: int
    query_heads: int
    key_heads: int
    head_size: int
    deterministic: bool
    multiprocessors: int
    """Of the card: in deterministic mode each sums for itself."""

    @property
    def fits(self) -> bool:
        """Whether flash attention takes such heads."""
        return self.head_size <= LARGEST_HEAD and self.head_size % HEAD_MULTIPLE == 0

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
        """What is kept beside query, key, value and answer."""
        return self.query_heads * self.tokens * FP32_BYTES

    @cached_property
    def backward_result_bytes(self) -> int:
        """The gradients, where they do not go straight to where they belong."""
        if self.tokens > QUERY_TILE_TOKENS:
            return 0
        return self.tokens * (self.query_width + 2 * self.key_width) * BF16_BYTES

    @cached_property
    def backward_peak_bytes(self) -> int:
        """Gradients and everything that comes and goes while they are computed."""
        if self.tokens <= QUERY_TILE_TOKENS:
            workspace = self._workspace(self.tokens, self.tokens, self.query_heads, self.key_heads)
            return self.backward_result_bytes + workspace
        share = self.query_heads // self.key_heads
        keys = max(1, HEADS_AT_ONCE // share)
        queries = keys * share
        tile, key_bytes = QUERY_TILE_TOKENS, self.tokens * keys * self.head_size
        copies = allocated(tile * queries * self.head_size * BF16_BYTES) * 3  # gradient, answer; query's gradient
        copies += allocated(tile * queries * FP32_BYTES)
        sums = 2 * allocated(key_bytes * FP32_BYTES)
        found = 2 * allocated(key_bytes * BF16_BYTES)
        before = 2 * allocated((self.tokens - tile) * keys * self.head_size * BF16_BYTES)
        return sums + copies + found + before + self._workspace(tile, self.tokens, queries, keys)

    @cached_property
    def whole_workspace_bytes(self) -> int:
        """Beside the gradients, where the row is not cut into tiles: transformers' own backward pass."""
        return self._workspace(self.tokens, self.tokens, self.query_heads, self.key_heads)

    def _workspace(self, rows: int, seen: int, query_heads: int, key_heads: int) -> int:
        """The sums of query gradients, the rows' products, and a copy of keys and values for heads that share them."""
        width = query_heads * self._rounded_head
        sums = max(
            self._splits(records, query_heads) * (rows + ROWS_OF_A_RECORD * records)
            for records in (self.records, self.most_records)
        )
        found = allocated(sums * width * FP32_BYTES)
        found += allocated(query_heads * (rows + ROWS_OF_A_RECORD * self.most_records) * FP32_BYTES)
        if query_heads != key_heads:
            found += 2 * allocated(seen * query_heads * self.head_size * BF16_BYTES)
        return found

    def _splits(self, records: int, query_heads: int) -> int:
        return -(-self.multiprocessors // (records * query_heads)) if self.deterministic else 1

    @property
    def _rounded_head(self) -> int:
        multiple = 32 if self.head_size <= LARGEST_HEAD else 64
        return -(-self.head_size // multiple) * multiple
