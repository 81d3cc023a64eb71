"""Puts records together into training sequences: what prepare does, and a plan foresees.

Records are told by their index and their length in tokens. The same lengths and seed give the same rows, on every
machine and in every version of Python's `random.Random`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

from orchestrator.api.job import TrainingSpec

Row = list[int]
"""The records of one sequence, by index, in their order."""
FEWEST_ROWS = 112
"""A small data set is not packed into fewer rows: three epochs in batches of 16, the defaults, are then 21 steps."""


def arranged(lengths: Sequence[int], training: TrainingSpec, *, fewest_rows: int = 0) -> list[Row]:
    """Records of so many tokens, of which none is longer than a sequence, in rows as the job asks for them."""
    if not training.packing:
        return one_a_row(lengths)
    return pack(lengths, training.sequence_length, training.seed, fewest_rows=fewest_rows)


def arranged_pairs(lengths: Sequence[int], training: TrainingSpec, *, fewest_rows: int = 0) -> list[Row]:
    """The same where the first record belongs to the second, the third to the fourth and so on: they stay together."""
    together = [lengths[first] + lengths[first + 1] for first in range(0, len(lengths), 2)]
    rows = arranged(together, training, fewest_rows=fewest_rows)
    return [[record for pair in row for record in (2 * pair, 2 * pair + 1)] for row in rows]


def one_a_row(lengths: Sequence[int]) -> list[Row]:
    """Every record in a row of its own, in the order of the dataset."""
    return [[index] for index in range(len(lengths))]


def pack(lengths: Sequence[int], row_tokens: int, seed: int, *, fewest_rows: int = 0) -> list[Row]:
    """First-fit decreasing: the longest record first, each into the first row with room; then the rows shuffled.

    Needs at most 11/9 of the least number of rows, plus one (Johnson, 1973). Records must not be longer than a row.
    Where that gives fewer than `fewest_rows`, the records are spread evenly over so many, or one a row.
    """
    assert max(lengths, default=0) <= row_tokens, "a record is longer than a row"
    rows: list[Row] = []
    free = _FirstFit(len(lengths), row_tokens)
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        number = free.take(lengths[index])
        if number == len(rows):
            rows.append([])
        rows[number].append(index)
    wanted = min(fewest_rows, len(lengths))
    if len(rows) < wanted:
        rows = _spread(lengths, wanted, row_tokens) or rows
    random.Random(seed).shuffle(rows)  # noqa: S311 - an order, not a secret
    return rows


def _spread(lengths: Sequence[int], count: int, row_tokens: int) -> list[Row] | None:
    """The longest record first, each into the shortest row; None where a row would become too long."""
    rows: list[Row] = [[] for _ in range(count)]
    shortest = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, number = shortest[0]
        if tokens + lengths[index] > row_tokens:
            return None
        heapq.heapreplace(shortest, (tokens + lengths[index], number))
        rows[number].append(index)
    return rows


class _FirstFit:
    """Finds the first row with room in logarithmic time: a tree whose nodes hold the most room below them."""

    def __init__(self, rows: int, row_tokens: int) -> None:
        self._leaves = 1 << max(0, rows - 1).bit_length()
        self._most = [row_tokens] * (2 * self._leaves)

    def take(self, tokens: int) -> int:
        """Take room for so many tokens; returns the number of the row."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._most[2 * node] >= tokens else 2 * node + 1
        row = node - self._leaves
        self._most[node] -= tokens
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return row
