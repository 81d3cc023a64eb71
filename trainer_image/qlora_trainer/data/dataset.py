"""The dataset's way from a file to training sequences: read, tokenised, held out, packed, written.

Rules:

- Nothing is skipped silently: every bad record is counted, the first few are named with their place in the file.
- A record is in one split and in one row; it never exceeds the sequence length. Positions restart with each record,
  which is how the trainer keeps records in one row apart.
- The same dataset, tokenizer and seed give the same bytes. Memory holds the tokens, not the texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.api.base import decimal
from orchestrator.api.job import DatasetSource, TrainingSpec
from orchestrator.api.optimizer_steps import held_out
from orchestrator.api.packing import Row, arranged, arranged_pairs
from orchestrator.api.record_fields import CHAT_FORMATS
from qlora_trainer.data.chat_templates import refuse_useless_template
from qlora_trainer.data.formats import named_fields
from qlora_trainer.data.ranges import EncodedRange, EncodedRecords, Range, RangeEncoder, in_ranges
from qlora_trainer.data.reader import BadRecord, Record, Records
from qlora_trainer.outcome import UserError

Numbers = NDArray[np.int32]
EncodeRanges = Callable[[RangeEncoder, Iterator[Range]], Iterator[EncodedRange]]
"""Encodes ranges, wherever; what comes of them is in their order."""
PROGRESS_SECONDS = 10.0
ROWS_PER_GROUP = 256
"""Rows in a row group of the Parquet files: what a reader holds at a time."""

log = logging.getLogger(__name__)


def in_process(encoder: RangeEncoder, ranges: Iterator[Range]) -> Iterator[EncodedRange]:
    """Encode ranges one after the other in this process."""
    return map(encoder.encode, ranges)


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
    """What the chat template, the contents and the records' fields give reason to say."""
    chats: bool = False
    """Whether there are preferences whose answers are messages."""


def read_dataset(
    records: Records, tokenizer: Any, dataset: DatasetSource, training: TrainingSpec, encode: EncodeRanges = in_process
) -> ReadDataset:
    """All of one source; raises UserError naming what is wrong with its records."""
    found = _read(records, records.read(), tokenizer, dataset, training, encode)
    train, held_out = _hold_out(found.records, decimal(dataset.eval_fraction), training.seed, records.source)
    return ReadDataset(
        train=Split(records=train, truncated=found.truncated, dropped=found.dropped),
        evaluation=Split(records=held_out),
        warnings=_warnings(found, dataset),
        chats=found.chats,
    )


def read_first(
    count: int, records: Records, tokenizer: Any, dataset: DatasetSource, training: TrainingSpec
) -> ReadDataset:
    """The same of the first records alone, of which none is held out."""
    found = _read(records, islice(records.read(), count), tokenizer, dataset, training, in_process)
    return ReadDataset(
        train=Split(records=found.records, truncated=found.truncated, dropped=found.dropped),
        evaluation=Split(records=EncodedRecords()),
        warnings=_warnings(found, dataset),
    )


def _read(
    source: Records,
    records: Iterable[Record | BadRecord],
    tokenizer: Any,
    dataset: DatasetSource,
    training: TrainingSpec,
    encode: EncodeRanges,
) -> EncodedRange:
    """Every usable record; raises UserError naming what is wrong."""
    found = EncodedRange()
    progress = _Progress(source.source)
    encoder = RangeEncoder(
        source=source.source, tokenizer=tokenizer, dataset=dataset, sequence_length=training.sequence_length
    )
    for encoded in encode(encoder, in_ranges(records)):
        found.extend(encoded)
        progress.report(found.seen, found.records.tokens)
    progress.tell(found.seen, found.records.tokens)
    _refuse_bad(found, source.source)
    _refuse_too_long(found, source.source, training.sequence_length, pairs=dataset.format == "preference")
    if not found.records:
        raise UserError(_nothing_left(found, source.source, training.sequence_length))
    return found


def _warnings(found: EncodedRange, dataset: DatasetSource) -> tuple[str, ...]:
    """What the template and the contents give reason to say, and the fields that the format does not have, by name."""
    warnings = list(found.warnings)
    if found.special_token_said:
        warnings.append(
            f"contents of messages hold special tokens, such as {found.special_token_said}, which the model takes for "
            "the chat template's; give contents without what a template writes around them"
        )
    if found.unknown:
        names = named_fields(sorted(found.unknown))
        warnings.append(f"fields that the format {dataset.format} does not have are not trained on: {names}")
    return tuple(warnings)


def _refuse_bad(found: EncodedRange, source: str) -> None:
    if not found.bad_count:
        return
    named = "; ".join(f"{bad.where} {bad.problem}" for bad in found.bad)
    more = found.bad_count - len(found.bad)
    rest = f"; and {more} more" if more else ""
    raise UserError(
        f"{source}: {found.bad_count} of {found.seen} records cannot be used: {named}{rest}. "
        "Correct the dataset or spec.dataset.format"
    )


def _refuse_too_long(found: EncodedRange, source: str, sequence_length: int, *, pairs: bool) -> None:
    if found.first_too_long is None:
        return
    where, tokens = found.first_too_long
    than = "" if tokens.startswith("more") else ", more than"
    what = "tokens in both answers, each with its prompt" if pairs else "tokens"
    raise UserError(
        f"{source}: {where} has {tokens} {what}{than} spec.training.sequenceLength "
        f"({sequence_length}), as have {found.too_long_count} of {found.seen} records in all. Raise "
        f"spec.training.sequenceLength, or set spec.dataset.tooLong to {'' if pairs else 'truncate or to '}drop"
    )


def _nothing_left(found: EncodedRange, source: str, sequence_length: int) -> str:
    if found.seen == 0:
        return f"{source} holds no records; give a dataset with at least one"
    return (
        f"{source}: all {found.seen} records were dropped because they are longer than "
        f"spec.training.sequenceLength ({sequence_length}); raise it"
    )


class _Progress:
    """Says now and then how far reading has come, and how fast."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._began = self._said = monotonic()

    def report(self, records: int, tokens: int) -> None:
        """Log a line if the last one is some time ago."""
        if monotonic() - self._said >= PROGRESS_SECONDS:
            self.tell(records, tokens)

    def tell(self, records: int, tokens: int) -> None:
        """Log a line."""
        self._said = monotonic()
        speed = tokens / max(self._said - self._began, 1e-3)
        log.info("%s: %d records, %d tokens, %.0f tokens a second", self._source, records, tokens, speed)


def _hold_out(
    encoded: EncodedRecords, fraction: Decimal, seed: int, source: str
) -> tuple[EncodedRecords, EncodedRecords]:
    """Records for training and for evaluation."""
    if fraction == 0:
        return encoded, EncodedRecords()
    samples = sorted(set(encoded.samples()))
    if len(samples) < 2:
        raise UserError(
            f"{source} has a single usable record, of which evalFraction cannot hold out a share; set it to 0"
        )
    chosen = held_out(samples, fraction, seed)
    splits = EncodedRecords(), EncodedRecords()
    for sample, record in zip(encoded.samples(), encoded, strict=True):
        splits[sample in chosen].append(record, sample)
    return splits


def check_tokenizer(tokenizer: Any, dataset: DatasetSource, model_source: str) -> None:
    """Conversations need a template, which base models often lack; other records need a token that ends them.

    Whether preferences are conversations, only their records tell.
    """
    if dataset.format not in CHAT_FORMATS:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{model_source}: its tokenizer names no eos_token, so the model would not learn to stop; set it in "
                "tokenizer_config.json"
            )
        return
    if not tokenizer.chat_template:
        raise UserError(
            f"the dataset's format is {dataset.format}, but {model_source} has no chat template: set "
            "spec.model.chatTemplate, choose the model's instruct variant, or give the dataset as prompt-completion"
        )
    refuse_useless_template(tokenizer)


def arrange(split: Split, training: TrainingSpec, *, pairs: bool = False, fewest_rows: int = 0) -> list[Row]:
    """The split's records in rows of at most the sequence length, packed no closer than `fewest_rows` allow.

    `pairs`: each two records, what was chosen and what was rejected, are next to one another in one row.
    """
    lengths = split.records.lengths()
    if pairs:
        return arranged_pairs(lengths, training, fewest_rows=fewest_rows)
    rows = arranged(lengths, training, fewest_rows=fewest_rows)
    return [_in_order(row, split.records.samples()) for row in rows]


def _in_order(row: Row, samples: Sequence[int]) -> Row:
    """The row, in which the contexts of one sample follow one another as in the sample: the longest comes last."""
    by_sample: dict[int, list[int]] = {}
    for record in row:
        by_sample.setdefault(samples[record], []).append(record)
    return [record for records in by_sample.values() for record in sorted(records)]


def write_rows(path: Path, split: Split, rows: Sequence[Row]) -> None:
    """A Parquet file with one training sequence a row: input_ids, labels and position_ids, all of one length.

    And samples: which of the dataset's each of the row's records is of, counted from 0.
    """
    import pyarrow as untyped_pyarrow  # pyright: ignore[reportMissingTypeStubs]  # it ships no types
    import pyarrow.parquet as untyped_parquet  # pyright: ignore[reportMissingTypeStubs]

    pyarrow: Any = untyped_pyarrow
    parquet: Any = untyped_parquet
    names = ("input_ids", "labels", "position_ids", "samples")
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in names])
    # Nothing that depends on the time or the machine goes in; what pyarrow's version writes about itself does.
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False) as file:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            columns = zip(*_columns(split, rows[start : start + ROWS_PER_GROUP]), strict=True)
            file.write_table(pyarrow.table(dict(zip(names, map(list, columns), strict=True)), schema=schema))


def _columns(split: Split, rows: Sequence[Row]) -> Iterator[tuple[Numbers, ...]]:
    samples = split.records.samples()
    for row in rows:
        records = [split.records[index] for index in row]
        yield (
            np.concatenate([record.input_ids for record in records]),
            np.concatenate([record.labels for record in records]),
            np.concatenate([np.arange(len(record.input_ids), dtype=np.int32) for record in records]),
            np.array([samples[index] for index in row], dtype=np.int32),
        )
