"""The dataset's way from a file to training sequences: read, tokenised, held out, packed, written.

Rules:

- Nothing is skipped silently: every bad record is counted, the first few are named with their place in the file.
- A record is in one split and in one row; it never exceeds the sequence length. Positions restart with each record,
  which is how the trainer keeps records in one row apart.
- The same dataset, tokenizer and seed give the same bytes. Memory holds the tokens, not the texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.api.base import decimal
from orchestrator.api.job import DatasetSource, TrainingSpec
from qlora_trainer.data.encoding import EncodedRecord, Encoder
from qlora_trainer.data.formats import CHAT_FORMATS, read_sample
from qlora_trainer.data.packing import Row, one_a_row, pack
from qlora_trainer.data.reader import BadRecord, Record, Records
from qlora_trainer.outcome import UserError

Numbers = NDArray[np.int32]
NAMED_PROBLEMS = 3
"""How many bad records an error message names."""
ROWS_PER_GROUP = 256
"""Rows in a row group of the Parquet files: what a reader holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The records of one split, encoded, in the order of their file."""

    records: Sequence[EncodedRecord]
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all records."""
        return sum(len(record.input_ids) for record in self.records)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(record.supervised for record in self.records)

    @property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return max((len(record.input_ids) for record in self.records), default=0)

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return max((int(record.input_ids.max()) for record in self.records), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbered:
    """An encoded record and the place that it has among all records of its file, bad ones included."""

    index: int
    record: EncodedRecord


def read_splits(
    records: Records, tokenizer: Any, dataset: DatasetSource, training: TrainingSpec
) -> tuple[Split, Split]:
    """The training and the evaluation split of one source (the latter empty unless a fraction is held out)."""
    encoder = Encoder(tokenizer, dataset.train_on)
    reader = _Reader(source=records.source, dataset=dataset, sequence_length=training.sequence_length)
    numbered = reader.read(records.read(), encoder)
    train, held_out = _hold_out(numbered, decimal(dataset.eval_fraction), training.seed, records.source)
    return (
        Split(
            records=[entry.record for entry in train],
            truncated=reader.truncated,
            dropped=reader.dropped,
        ),
        Split(records=[entry.record for entry in held_out]),
    )


class _Reader:
    """Encodes records and keeps count of what is wrong with them."""

    def __init__(self, *, source: str, dataset: DatasetSource, sequence_length: int) -> None:
        self._source = source
        self._dataset = dataset
        self._sequence_length = sequence_length
        self._seen = 0
        self._bad: list[BadRecord] = []
        self._bad_count = 0
        self._first_too_long: tuple[str, int] | None = None
        self._too_long_count = 0
        self.truncated = 0
        self.dropped = 0

    def read(self, records: Iterable[Record | BadRecord], encoder: Encoder) -> list[_Numbered]:
        """Every usable record; raises UserError naming what is wrong."""
        numbered: list[_Numbered] = []
        for index, record in enumerate(records):
            self._seen = index + 1
            encoded = self._encoded(record, encoder)
            fitting = None if encoded is None else self._fitting(record.where, encoded)
            if fitting is not None:
                numbered.append(_Numbered(index=index, record=fitting))
        self._refuse_bad()
        self._refuse_too_long()
        if not numbered:
            raise UserError(self._nothing_left())
        return numbered

    def _encoded(self, record: Record | BadRecord, encoder: Encoder) -> EncodedRecord | None:
        if isinstance(record, BadRecord):
            return self._note(record)
        try:
            encoded = encoder.encode(read_sample(record.value, self._dataset.format))
        except ValueError as error:
            return self._note(BadRecord(where=record.where, problem=str(error)))
        if encoded.supervised == 0:
            return self._note(BadRecord(where=record.where, problem="has no token to train on"))
        return encoded

    def _note(self, bad: BadRecord) -> None:
        self._bad_count += 1
        if len(self._bad) < NAMED_PROBLEMS:
            self._bad.append(bad)

    def _fitting(self, where: str, encoded: EncodedRecord) -> EncodedRecord | None:
        """The record as far as it fits a sequence; None if it does not go in."""
        tokens = len(encoded.input_ids)
        if tokens <= self._sequence_length:
            return encoded
        if self._dataset.too_long == "fail":
            self._too_long_count += 1
            self._first_too_long = self._first_too_long or (where, tokens)
            return None
        cut = encoded.cut(self._sequence_length)
        if self._dataset.too_long == "drop" or cut.supervised == 0:  # a prompt alone teaches nothing
            self.dropped += 1
            return None
        self.truncated += 1
        return cut

    def _refuse_bad(self) -> None:
        if not self._bad_count:
            return
        named = "; ".join(f"{bad.where} {bad.problem}" for bad in self._bad)
        more = self._bad_count - len(self._bad)
        rest = f"; and {more} more" if more else ""
        raise UserError(
            f"{self._source}: {self._bad_count} of {self._seen} records cannot be used: {named}{rest}. "
            "Correct the dataset or spec.dataset.format"
        )

    def _refuse_too_long(self) -> None:
        if self._first_too_long is None:
            return
        where, tokens = self._first_too_long
        raise UserError(
            f"{self._source}: {where} has {tokens} tokens, more than spec.training.sequenceLength "
            f"({self._sequence_length}), as have {self._too_long_count} of {self._seen} records in all. Raise "
            "spec.training.sequenceLength, or set spec.dataset.tooLong to truncate or to drop"
        )

    def _nothing_left(self) -> str:
        if self._seen == 0:
            return f"{self._source} holds no records; give a dataset with at least one"
        return (
            f"{self._source}: all {self._seen} records were dropped because they are longer than "
            f"spec.training.sequenceLength ({self._sequence_length}); raise it"
        )


def _hold_out(
    numbered: Sequence[_Numbered], fraction: Decimal, seed: int, source: str
) -> tuple[list[_Numbered], list[_Numbered]]:
    """Records for training and for evaluation.

    Each record's own hash decides, so records that are added to the dataset later move none of the others.
    """
    if fraction == 0:
        return list(numbered), []
    if len(numbered) < 2:
        raise UserError(
            f"{source} has a single usable record, of which evalFraction cannot hold out a share; set it to 0"
        )
    by_draw = sorted(numbered, key=lambda entry: (_draw(seed, entry.index), entry.index))
    wanted = sum(_draw(seed, entry.index) < fraction for entry in numbered)
    held_out = {entry.index for entry in by_draw[: min(max(wanted, 1), len(numbered) - 1)]}
    return (
        [entry for entry in numbered if entry.index not in held_out],
        [entry for entry in numbered if entry.index in held_out],
    )


def _draw(seed: int, index: int) -> Decimal:
    """A number in [0, 1) that depends on the seed and the record's index alone."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return Decimal(int.from_bytes(digest[:8], "big")) / Decimal(2**64)


def check_chat_template(tokenizer: Any, dataset: DatasetSource, model_source: str) -> None:
    """A conversation needs a template; a base model often has none."""
    if dataset.format in CHAT_FORMATS and not tokenizer.chat_template:
        raise UserError(
            f"the dataset's format is {dataset.format}, but {model_source} has no chat template: set "
            "spec.model.chatTemplate, choose the model's instruct variant, or give the dataset as prompt-completion"
        )


def arrange(split: Split, training: TrainingSpec) -> list[Row]:
    """The split's records in rows of at most the sequence length."""
    lengths = [len(record.input_ids) for record in split.records]
    return pack(lengths, training.sequence_length, training.seed) if training.packing else one_a_row(lengths)


def write_rows(path: Path, split: Split, rows: Sequence[Row]) -> None:
    """A Parquet file with one training sequence a row: input_ids, labels and position_ids, all of one length."""
    import pyarrow as untyped_pyarrow  # pyright: ignore[reportMissingTypeStubs]  # it ships no types
    import pyarrow.parquet as untyped_parquet  # pyright: ignore[reportMissingTypeStubs]

    pyarrow: Any = untyped_pyarrow
    parquet: Any = untyped_parquet
    names = ("input_ids", "labels", "position_ids")
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in names])
    # Nothing that depends on the time or the machine goes in; what pyarrow's version writes about itself does.
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False) as file:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            columns = zip(*_columns(split, rows[start : start + ROWS_PER_GROUP]), strict=True)
            file.write_table(pyarrow.table(dict(zip(names, map(list, columns), strict=True)), schema=schema))


def _columns(split: Split, rows: Sequence[Row]) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
    for row in rows:
        records = [split.records[index] for index in row]
        yield (
            np.concatenate([record.input_ids for record in records]),
            np.concatenate([record.labels for record in records]),
            np.concatenate([np.arange(len(record.input_ids), dtype=np.int32) for record in records]),
        )
