"""Bytes of flash attention over packed records: the tables of its backward pass.

Sizes are those of torch's `mha_varlen_bwd` (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp), cut into
tiles as `qlora_trainer/attention.py` does. `core/fused` and `core/plain` are the callers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from orchestrator.core.timeline import BF16_BYTES, FP32_BYTES, allocated

QUERY_TILE_TOKENS = 16384
HEADS_AT_ONCE = 8
ROWS_OF_A_RECORD = 128
"""Rows that flash attention keeps between two records' sums."""
LARGEST_HEAD, LARGEST_COMMON_HEAD = 256, 192
HEAD_MULTIPLE = 8
SCORES_BYTES = 64 << 20
SCORES_ALIVE = 4
"""Tiles of scores that are alive at once where attention is computed in plain sight."""
ROUNDED_FINELY = 128
"""Heads up to this size are rounded to a multiple of 32, larger ones to one of 64."""
SHORT_RECORD_TOKENS = 64
"""Packed rows of records shorter than this on average would take more than is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some queries of a row, and the keys that they see."""

    rows: int
    seen: int
    records: int


def alike(multiprocessors: int, tokens: int, query_heads: int) -> int:
    """The most multiprocessors that take the same bytes: cards that differ by less need not be told apart.

    Rounding up to a multiple of the heads changes no number of sums (`_tile_workspace`), where all heads are at work.
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
    squashes: bool = False
    """Whether scores are squashed, which flash attention cannot (Gemma 2)."""

    @property
    def alike(self) -> Attention:
        """One for all that differ only in their backward pass's workspace."""
        return replace(self, records=1, most_records=1, deterministic=False, multiprocessors=1)

    @property
    def fits(self) -> bool:
        """Whether flash attention takes such heads."""
        known = self.head_size == LARGEST_HEAD or self.head_size <= LARGEST_COMMON_HEAD
        return known and self.head_size % HEAD_MULTIPLE == 0

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
    def results(self) -> tuple[int, ...]:
        """The gradients to query, key and value, where they do not go straight to where they belong."""
        if self.tokens > QUERY_TILE_TOKENS:
            return ()
        return tuple(self.tokens * width * BF16_BYTES for width in (self.query_width, self.key_width, self.key_width))

    @cached_property
    def workspace(self) -> tuple[int, ...]:
        """Everything else that comes and goes while they are computed, where that is most."""
        if self.tokens <= QUERY_TILE_TOKENS:
            return self._workspace(self.tokens, self.tokens, self.query_heads, self.key_heads)
        return max((self._tiled_backward(records) for records in {self.records, self.most_records}), key=sum)

    def _tiled_backward(self, records: int) -> tuple[int, ...]:
        """A few heads, and the tile of queries that takes most, where so many equal records are in the row."""
        share = self.query_heads // self.key_heads
        keys = max(1, HEADS_AT_ONCE // share)
        queries = keys * share
        row = keys * self.head_size
        sums = (allocated(self.tokens * row * FP32_BYTES),) * 2
        most: tuple[int, ...] = ()
        before: tuple[int, ...] = ()
        for tile in _tiles(self.tokens, records):
            copies = (allocated(tile.rows * queries * self.head_size * BF16_BYTES),) * 3  # gradient, answer, of query
            logsumexp = allocated(tile.rows * queries * FP32_BYTES)
            found = (allocated(tile.seen * row * BF16_BYTES),) * 2
            workspace = self._tile_workspace(tile, queries, keys)
            most = max(most, (*before, *copies, logsumexp, *found, *workspace), key=sum)
            before = found  # the gradients of the tile before, until this one's are there
        return *sums, *most

    @cached_property
    def whole_workspace_bytes(self) -> int:
        """Beside the gradients, where the row is not cut into tiles: transformers' own backward pass."""
        if self.squashes:
            tile = min(SCORES_BYTES, 4 * self.query_heads * self.tokens**2)
            return SCORES_ALIVE * tile + 2 * allocated(self.tokens * self.key_width * FP32_BYTES)
        return sum(self._workspace(self.tokens, self.tokens, self.query_heads, self.key_heads))

    def _workspace(self, rows: int, seen: int, query_heads: int, key_heads: int) -> tuple[int, ...]:
        """Of a whole row, whose records are more or fewer."""
        tiles = (Tile(rows=rows, seen=seen, records=records) for records in {self.records, self.most_records})
        return max((self._tile_workspace(tile, query_heads, key_heads) for tile in tiles), key=sum)

    def _tile_workspace(self, tile: Tile, query_heads: int, key_heads: int) -> tuple[int, ...]:
        """The sums of query gradients, the rows' products, and a copy of keys and values for heads that share them."""
        rows = tile.rows + ROWS_OF_A_RECORD * tile.records
        splits = -(-self.multiprocessors // (tile.records * query_heads)) if self.deterministic else 1
        sums = allocated(splits * rows * query_heads * self._rounded_head * FP32_BYTES)
        products = allocated(query_heads * rows * FP32_BYTES)
        copies = (
            () if query_heads == key_heads else (allocated(tile.seen * query_heads * self.head_size * BF16_BYTES),) * 2
        )
        return sums, products, *copies

    @property
    def _rounded_head(self) -> int:
        multiple = 32 if self.head_size <= ROUNDED_FINELY else 64
        return -(-self.head_size // multiple) * multiple


@cache
def _tiles(tokens: int, records: int) -> tuple[Tile, ...]:
    """The tiles of a row of equal records, as `PackedAttention._tiled_backward` cuts it."""
    length = -(-tokens // records)
    tiles: list[Tile] = []
    for start in range(0, tokens, QUERY_TILE_TOKENS):
        stop = min(start + QUERY_TILE_TOKENS, tokens)
        first = start // length
        seen = stop - first * length
        tiles.append(Tile(rows=stop - start, seen=seen, records=-(-stop // length) - first))
    return tuple(tiles)
