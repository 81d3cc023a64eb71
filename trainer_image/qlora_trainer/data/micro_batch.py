"""Which rows a step trains on, and how they become tensors.

Rules:

- The order of an epoch is a permutation that depends on the seed and the epoch alone; step `n` takes the next
  `globalBatchSize` rows of that endless sequence. So the cursor of a resumed job is its step.
- Splitting a step into micro-batches changes neither its rows nor their order.
- A micro-batch is ONE row of tokens without padding: its records follow one another, each with positions from 0, and
  `record_starts` tells attention where they begin. The last token of a record predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]  # pyarrow ships no types
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_trainer.data.encoding import IGNORED_LABEL

Numbers = NDArray[np.int32]


class PreparedRows:
    """The training or evaluation sequences that prepare wrote, in memory: 12 bytes a token."""

    def __init__(self, path: Path) -> None:
        file: Any
        with parquet.ParquetFile(path) as file:  # `read_table` and `to_numpy` import pandas
            names = {"input_ids", "labels", "position_ids", "samples"} & set(file.schema_arrow.names)
            table = file.read(columns=sorted(names))
        self._columns = [_flat(table.column(name)) for name in ("input_ids", "labels", "position_ids")]
        lengths = np.from_dlpack(table.column("input_ids").combine_chunks().value_lengths())
        self._row_starts = np.concatenate([[0], np.cumsum(lengths)])
        records_before = np.concatenate([[0], np.cumsum(self._columns[2] == 0)])
        self._record_starts = records_before[self._row_starts]
        self._samples = _flat(table.column("samples")) if "samples" in names else None

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    @property
    def record_count(self) -> int:
        """Records in all rows."""
        return int(self._record_starts[-1])

    def records(self, index: int) -> range:
        """The records of one row, numbered through all rows."""
        return range(int(self._record_starts[index]), int(self._record_starts[index + 1]))

    def samples(self, records: Iterable[int]) -> list[int]:
        """Which records of the dataset these were, counted from 0; none where older prepared data do not tell."""
        return [] if self._samples is None else [int(self._samples[number]) for number in records]

    def row(self, index: int) -> tuple[Numbers, Numbers, Numbers]:
        """Token ids, labels and positions of one row."""
        part = slice(self._row_starts[index], self._row_starts[index + 1])
        ids, labels, positions = (column[part] for column in self._columns)
        return ids, labels, positions


def _flat(column: Any) -> Numbers:
    """The values of a pyarrow column of lists, one list after the other."""
    return np.from_dlpack(column.combine_chunks().flatten()).astype(np.int32, copy=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass takes: tensors of shape [1, tokens]."""

    input_ids: Tensor
    targets: Tensor
    """The next token of the same record, or IGNORED_LABEL."""
    position_ids: Tensor
    record_starts: Tensor
    """int32 [records + 1]: where each record begins, and the number of tokens."""
    longest_record: int
    supervised: Tensor
    """int64: the positions that carry loss."""
    records: tuple[int, ...] = ()
    """Its records' numbers among those of their file, where they are known."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.input_ids.shape[1]

    def supervised_by_record(self) -> list[int]:
        """How many positions of each record carry loss; to be asked on the host."""
        return np.diff(np.searchsorted(self.supervised.numpy(), self.record_starts.numpy())).tolist()

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return MicroBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            record_starts=self.record_starts.to(device, non_blocking=True),
            longest_record=self.longest_record,
            supervised=self.supervised.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a micro-batch's kernels read beside the model, on the card."""

    host: MicroBatch
    """The same micro-batch on the host: what launches depend on."""
    batch: MicroBatch
    seed: Tensor
    """int64: of the adapters' dropout."""
    scale: Tensor
    """float32: what the summed loss is multiplied with."""

    @classmethod
    def of(cls, host: MicroBatch, seed: int, divisor: float, device: torch.device) -> StepInputs:
        """Fresh tensors on the device."""
        return cls(
            host=host,
            batch=host.to(device),
            seed=torch.full((), seed, dtype=torch.int64, device=device),
            scale=torch.full((), 1 / divisor, dtype=torch.float32, device=device),
        )

    def refill(self, host: MicroBatch, seed: int, divisor: float) -> None:
        """Another micro-batch of the same shape into the same tensors."""
        for name in ("input_ids", "targets", "position_ids", "record_starts", "supervised"):
            getattr(self.batch, name).copy_(getattr(host, name), non_blocking=True)
        self.seed.fill_(seed)
        self.scale.fill_(1 / divisor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The endless, seeded sequence of rows, cut into steps."""

    rows: int
    global_batch_size: int
    seed: int

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, which counts from 0."""
        first = step * self.global_batch_size
        places = range(first, first + self.global_batch_size)
        return [int(epoch_order(self.rows, self.seed, place // self.rows)[place % self.rows]) for place in places]

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step` steps."""
        return step * self.global_batch_size / self.rows


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of an epoch. RandomState's streams never change between NumPy versions (NEP 19)."""
    return np.random.RandomState([seed, epoch]).permutation(rows)


def micro_batches(data: PreparedRows, rows: Sequence[int], micro_batch_size: int) -> Iterator[MicroBatch]:
    """The given rows in their order, `micro_batch_size` at a time."""
    for first in range(0, len(rows), micro_batch_size):
        chosen = rows[first : first + micro_batch_size]
        records = tuple(number for index in chosen for number in data.records(index))
        yield replace(collate([data.row(index) for index in chosen]), records=records)


def supervised_tokens(data: PreparedRows, rows: Sequence[int]) -> int:
    """How many positions of these rows carry loss."""
    return sum(
        int((_targets(labels, positions) != IGNORED_LABEL).sum()) for _, labels, positions in map(data.row, rows)
    )


def collate(rows: Sequence[tuple[Numbers, Numbers, Numbers]]) -> MicroBatch:
    """One micro-batch of whole rows."""
    ids = np.concatenate([row[0] for row in rows])
    positions = np.concatenate([row[2] for row in rows])
    targets = np.concatenate([_targets(labels, own_positions) for _, labels, own_positions in rows])
    starts = np.append(np.flatnonzero(positions == 0), len(ids)).astype(np.int32)
    assert starts[0] == 0, "a prepared row must begin with a record's first token"
    return MicroBatch(
        input_ids=_tensor(ids.astype(np.int64)).unsqueeze(0),
        targets=_tensor(targets.astype(np.int64)).unsqueeze(0),
        position_ids=_tensor(positions.astype(np.int64)).unsqueeze(0),
        record_starts=_tensor(starts),
        longest_record=int(np.diff(starts).max()),
        supervised=_tensor(np.flatnonzero(targets != IGNORED_LABEL)),
    )


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]  # torch leaves the array's type open


def _targets(labels: Numbers, positions: Numbers) -> Numbers:
    """Labels moved one to the left: position i predicts token i + 1 of the same record."""
    targets = np.full_like(labels, IGNORED_LABEL)
    targets[:-1] = np.where(positions[1:] == 0, IGNORED_LABEL, labels[1:])
    return targets
