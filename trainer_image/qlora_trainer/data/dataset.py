"""The dataset's way from a file to training sequences: read, tokenised, held out, packed, written.

Rules:

- Nothing is skipped silently: every bad record is counted, the first few are named with their place in the file.
- A record is in one split and in one row; it never exceeds the sequence length. Positions restart with each record,
  which is how the trainer keeps records in one row apart.
- The same dataset, tokenizer and seed give the same bytes. Memory holds the tokens, not the texts.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import Path
from time import monotonic
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from orchestrator.api.base import decimal
from orchestrator.api.job import DatasetSource, TrainingSpec
from qlora_trainer.data.chat_templates import refuse_useless_template
from qlora_trainer.data.encoding import IGNORED_LABEL, EncodedRecord, Encoder
from qlora_trainer.data.formats import CHAT_FORMATS, Sample, named_fields, read_sample, unknown_fields
from qlora_trainer.data.packing import Row, one_a_row, pack
from qlora_trainer.data.reader import BadRecord, Record, Records
from qlora_trainer.data.rendering import RenderLimit, characters_of
from qlora_trainer.outcome import UserError

Numbers = NDArray[np.int32]
NAMED_PROBLEMS = 3
"""How many bad records an error message names."""
MAX_UNKNOWN_FIELDS = 64
"""No more are collected."""
MAX_PROBLEM_CHARACTERS = 400
"""Of what is wrong with one record: a template's own words may be long."""
PROGRESS_SECONDS = 10.0
BATCH_RECORDS = 64
"""Rendered ahead at a time, in the process that renders."""
BATCH_CHARACTERS = 1 << 18
"""Or fewer records, of so many characters together."""
ROWS_PER_GROUP = 256
"""Rows in a row group of the Parquet files: what a reader holds at a time."""

log = logging.getLogger(__name__)


class EncodedRecords(Sequence[EncodedRecord]):
    """Encoded records in the order of their file, in 5 bytes a token and 16 a record."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._supervised = bytearray()
        self._starts = array("q", [0])
        self._samples = array("q")

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def tokens(self) -> int:
        """Tokens in all records."""
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> EncodedRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedRecord]: ...
    def __getitem__(self, index: int | slice) -> EncodedRecord | list[EncodedRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = slice(self._starts[number], self._starts[number + 1])
        ids = np.array(self._ids[part], dtype=np.int32)
        supervised = np.frombuffer(self._supervised[part], dtype=np.bool_)
        return EncodedRecord(input_ids=ids, labels=np.where(supervised, ids, np.int32(IGNORED_LABEL)))

    def append(self, record: EncodedRecord, sample: int) -> None:
        """Add a record that comes from the sample of this index."""
        self._ids.frombytes(record.input_ids.tobytes())
        self._supervised += (record.labels != IGNORED_LABEL).tobytes()
        self._starts.append(len(self._ids))
        self._samples.append(sample)

    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return [end - start for start, end in pairwise(self._starts)]

    def samples(self) -> Sequence[int]:
        """The index of each record's sample among all that the file holds, bad ones included."""
        return self._samples

    def supervised(self) -> int:
        """Tokens that carry loss."""
        return self._supervised.count(1)

    def largest_token(self) -> int:
        """The largest token id; 0 where there are no tokens."""
        return int(np.array(self._ids, dtype=np.int32).max()) if self._ids else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The records of one split, encoded, in the order of their file.

    A sample is a record of the file; one that has to be trained in several contexts is several encoded records.
    """

    records: EncodedRecords
    truncated: int = 0
    """Samples that were cut to the sequence length."""
    dropped: int = 0
    """Samples that were left out because they are longer."""

    @property
    def samples(self) -> int:
        """Samples that something was kept of."""
        return len(set(self.records.samples()))

    @property
    def tokens(self) -> int:
        """Tokens in all records."""
        return self.records.tokens

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return self.records.supervised()

    @property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return max(self.records.lengths(), default=0)

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return self.records.largest_token()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDataset:
    """What a source gave."""

    train: Split
    evaluation: Split
    """Empty unless a fraction is held out."""
    warnings: tuple[str, ...]
    """What the chat template and the records' fields give reason to say."""


def read_dataset(records: Records, tokenizer: Any, dataset: DatasetSource, training: TrainingSpec) -> ReadDataset:
    """All of one source; raises UserError naming what is wrong with its records."""
    encoder = Encoder(tokenizer, dataset.train_on, most_tokens=training.sequence_length)
    reader = _Reader(source=records.source, dataset=dataset, sequence_length=training.sequence_length)
    encoded = reader.read(records.read(), encoder)
    train, held_out = _hold_out(encoded, decimal(dataset.eval_fraction), training.seed, records.source)
    return ReadDataset(
        train=Split(records=train, truncated=reader.truncated, dropped=reader.dropped),
        evaluation=Split(records=held_out),
        warnings=(*encoder.warnings, *reader.unknown_fields()),
    )


def read_first(
    count: int, records: Records, tokenizer: Any, dataset: DatasetSource, training: TrainingSpec
) -> ReadDataset:
    """The same of the first records alone, of which none is held out."""
    encoder = Encoder(tokenizer, dataset.train_on, most_tokens=training.sequence_length)
    reader = _Reader(source=records.source, dataset=dataset, sequence_length=training.sequence_length)
    encoded = reader.read(islice(records.read(), count), encoder)
    return ReadDataset(
        train=Split(records=encoded, truncated=reader.truncated, dropped=reader.dropped),
        evaluation=Split(records=EncodedRecords()),
        warnings=(*encoder.warnings, *reader.unknown_fields()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A record and the sample that it stands for, or else what is wrong with it."""

    where: str
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sample: Sample | None = None
    problem: str = ""


class _Reader:
    """Encodes records and keeps count of what is wrong with them."""

    def __init__(self, *, source: str, dataset: DatasetSource, sequence_length: int) -> None:
        self._source = source
        self._dataset = dataset
        self._sequence_length = sequence_length
        self._seen = 0
        self._bad: list[BadRecord] = []
        self._bad_count = 0
        self._first_too_long: tuple[str, str] | None = None
        self._too_long_count = 0
        self._unknown: set[str] = set()
        self.truncated = 0
        self.dropped = 0

    def read(self, records: Iterable[Record | BadRecord], encoder: Encoder) -> EncodedRecords:
        """Every usable record; raises UserError naming what is wrong."""
        kept = EncodedRecords()
        progress = _Progress(self._source)
        for batch in self._batches(records):
            encoder.expect(it.sample for it in batch if it.sample is not None)
            for it in batch:
                encoded = self._encoded(it, encoder)
                for fitting in () if encoded is None else self._fitting(it.where, encoded):
                    kept.append(fitting, self._seen)
                self._seen += 1
                progress.report(self._seen, kept.tokens)
        self._refuse_bad()
        self._refuse_too_long()
        if not kept:
            raise UserError(self._nothing_left())
        return kept

    def unknown_fields(self) -> Iterator[str]:
        """One sentence that names the fields that mean nothing in the format."""
        if self._unknown:
            names = named_fields(sorted(self._unknown))
            yield f"fields that the format {self._dataset.format} does not have are not trained on: {names}"

    def _batches(self, records: Iterable[Record | BadRecord]) -> Iterator[list[_Read]]:
        """Records that are rendered ahead together: not many, and few where they are long."""
        batch: list[_Read] = []
        characters = 0
        for record in records:
            batch.append(self._parsed(record))
            characters += characters_of(record.value) if isinstance(record, Record) else 0
            if len(batch) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _parsed(self, record: Record | BadRecord) -> _Read:
        if isinstance(record, BadRecord):
            return _Read(where=record.where, problem=record.problem)
        try:
            sample = read_sample(record.value, self._dataset.format)
        except ValueError as error:
            return _Read(where=record.where, problem=str(error)[:MAX_PROBLEM_CHARACTERS])
        except RecursionError:
            return _Read(where=record.where, problem="is nested too deeply")
        return _Read(where=record.where, fields=record.value, sample=sample)

    def _encoded(self, read: _Read, encoder: Encoder) -> EncodedRecord | None:
        if read.sample is None:
            return self._note(BadRecord(where=read.where, problem=read.problem))
        try:
            encoded = encoder.encode(read.sample)
        except ValueError as error:
            return self._note(BadRecord(where=read.where, problem=str(error)[:MAX_PROBLEM_CHARACTERS]))
        except RecursionError:
            return self._note(BadRecord(where=read.where, problem="is nested too deeply"))
        except RenderLimit as error:
            raise UserError(f"{self._source}: {read.where}: {error}") from error
        if encoded.supervised == 0 and encoded.complete:
            return self._note(BadRecord(where=read.where, problem="has no token to train on"))
        if len(self._unknown) <= MAX_UNKNOWN_FIELDS:
            self._unknown.update(unknown_fields(read.fields, self._dataset.format))
        return encoded

    def _note(self, bad: BadRecord) -> None:
        self._bad_count += 1
        if len(self._bad) < NAMED_PROBLEMS:
            self._bad.append(bad)

    def _fitting(self, where: str, encoded: EncodedRecord) -> list[EncodedRecord]:
        """The record's contexts as far as they fit a sequence; none if it does not go in."""
        contexts = encoded.split()
        longest = max(len(context.input_ids) for context in contexts)
        if encoded.complete and longest <= self._sequence_length:
            return contexts
        if self._dataset.too_long == "fail":
            self._too_long_count += 1
            tokens = f"{longest}" if encoded.complete else f"more than {self._sequence_length}"
            self._first_too_long = self._first_too_long or (where, tokens)
            return []
        cut = [context.cut(self._sequence_length) for context in contexts]
        taught = [context for context in cut if context.supervised]  # a prompt alone teaches nothing
        if self._dataset.too_long == "drop" or not taught:
            self.dropped += 1
            return []
        self.truncated += 1
        return taught

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
        than = "" if tokens.startswith("more") else ", more than"
        raise UserError(
            f"{self._source}: {where} has {tokens} tokens{than} spec.training.sequenceLength "
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


class _Progress:
    """Says now and then how far reading has come."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._began = self._said = monotonic()

    def report(self, records: int, tokens: int) -> None:
        """Log a line if the last one is some time ago."""
        now = monotonic()
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            speed = tokens / (now - self._began)
            log.info("%s: %d records, %d tokens, %.0f tokens a second", self._source, records, tokens, speed)


def _hold_out(
    encoded: EncodedRecords, fraction: Decimal, seed: int, source: str
) -> tuple[EncodedRecords, EncodedRecords]:
    """Records for training and for evaluation.

    Each sample's own hash decides, so samples that are added to the dataset later move none of the others.
    """
    if fraction == 0:
        return encoded, EncodedRecords()
    samples = sorted(set(encoded.samples()))
    if len(samples) < 2:
        raise UserError(
            f"{source} has a single usable record, of which evalFraction cannot hold out a share; set it to 0"
        )
    draws = np.array([_draw(seed, sample) for sample in samples], dtype=np.uint64)
    wanted = int(np.count_nonzero(draws < np.uint64(math.ceil(fraction * 2**64))))
    order: list[int] = np.argsort(draws, kind="stable").tolist()
    held_out = {samples[number] for number in order[: min(max(wanted, 1), len(samples) - 1)]}
    splits = EncodedRecords(), EncodedRecords()
    for sample, record in zip(encoded.samples(), encoded, strict=True):
        splits[sample in held_out].append(record, sample)
    return splits


def _draw(seed: int, index: int) -> int:
    """A number below 2 ** 64 that depends on the seed and the record's index alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big")


def check_chat_template(tokenizer: Any, dataset: DatasetSource, model_source: str) -> None:
    """A conversation needs a template; a base model often has none."""
    if dataset.format in CHAT_FORMATS and not tokenizer.chat_template:
        raise UserError(
            f"the dataset's format is {dataset.format}, but {model_source} has no chat template: set "
            "spec.model.chatTemplate, choose the model's instruct variant, or give the dataset as prompt-completion"
        )
    if dataset.format in CHAT_FORMATS:
        refuse_useless_template(tokenizer)


def arrange(split: Split, training: TrainingSpec, *, fewest_rows: int = 0) -> list[Row]:
    """The split's records in rows of at most the sequence length, packed no closer than `fewest_rows` allow."""
    lengths = split.records.lengths()
    if not training.packing:
        return one_a_row(lengths)
    rows = pack(lengths, training.sequence_length, training.seed, fewest_rows=fewest_rows)
    return [_in_order(row, split.records.samples()) for row in rows]


def _in_order(row: Row, samples: Sequence[int]) -> Row:
    """The row, in which the contexts of one sample follow one another as in the sample: the longest comes last."""
    by_sample: dict[int, list[int]] = {}
    for record in row:
        by_sample.setdefault(samples[record], []).append(record)
    return [record for records in by_sample.values() for record in sorted(records)]


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
