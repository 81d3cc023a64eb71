"""Encodes a dataset a range at a time: some consecutive records in, their tokens and what is to be said of them out.

Ranges are cut by the records alone, and each is encoded as if it were the only one. So whoever encodes them, in
whatever order and however often, the dataset's tokens, counts and messages are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, overload

import numpy as np

from orchestrator.api.job import DatasetSource
from qlora_trainer.data.chat_templates import refuse_chats_without_template
from qlora_trainer.data.encoding import IGNORED_LABEL, EncodedRecord, Encoder
from qlora_trainer.data.formats import Conversation, Preference, Sample, read_sample, unknown_fields
from qlora_trainer.data.reader import BadRecord, Record
from qlora_trainer.data.rendering import RenderLimit, characters_of
from qlora_trainer.outcome import UserError

RANGE_RECORDS = 2048
"""Records of a range."""
RANGE_CHARACTERS = 1 << 20
"""Or fewer records, of so many characters together: a second or two of work."""
BATCH_RECORDS = 64
"""Rendered ahead at a time, in the process that renders."""
BATCH_CHARACTERS = 1 << 18
"""Or fewer records, of so many characters together."""
NAMED_PROBLEMS = 3
"""How many bad records an error message names."""
MAX_PROBLEM_CHARACTERS = 400
"""Of what is wrong with one record: a template's own words may be long."""
MAX_UNKNOWN_FIELDS = 64
"""No more are collected."""

Range = Sequence[Record | BadRecord]


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

    def extend(self, records: EncodedRecords, first_sample: int) -> None:
        """Add records whose samples are counted from this one."""
        base = len(self._ids)
        self._ids += records._ids
        self._supervised += records._supervised
        self._starts.extend(base + end for end in records._starts[1:])
        self._samples.extend(first_sample + sample for sample in records._samples)

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


@dataclass(slots=True, kw_only=True)
class EncodedRange:
    """What came of a range, or of several one after the other."""

    records: EncodedRecords = field(default_factory=EncodedRecords)
    seen: int = 0
    """Samples that it holds, good and bad."""
    bad: list[BadRecord] = field(default_factory=list[BadRecord])
    """The first of those that cannot be used."""
    bad_count: int = 0
    first_too_long: tuple[str, str] | None = None
    """Where the first record is that is longer than a sequence, where that is an error, and how long it is."""
    too_long_count: int = 0
    truncated: int = 0
    dropped: int = 0
    unknown: set[str] = field(default_factory=set[str])
    """Fields that mean nothing in the format."""
    warnings: list[str] = field(default_factory=list[str])
    """What there is to know about the chat template."""
    chats: bool = False
    """Whether there are preferences whose answers are messages."""
    special_token_said: str | None = None
    """The first of the chat template's tokens that a message's content holds."""

    def note(self, bad: BadRecord) -> None:
        """Count a record that cannot be used."""
        self.bad_count += 1
        if len(self.bad) < NAMED_PROBLEMS:
            self.bad.append(bad)

    def note_unknown(self, names: Iterable[str]) -> None:
        """Collect names of fields, up to a bound."""
        if len(self.unknown) <= MAX_UNKNOWN_FIELDS:
            self.unknown.update(names)

    def extend(self, following: EncodedRange) -> None:
        """Add what came of the range after this one."""
        self.records.extend(following.records, self.seen)
        self.seen += following.seen
        self.bad = [*self.bad, *following.bad][:NAMED_PROBLEMS]
        self.bad_count += following.bad_count
        self.first_too_long = self.first_too_long or following.first_too_long
        self.too_long_count += following.too_long_count
        self.truncated += following.truncated
        self.dropped += following.dropped
        self.note_unknown(following.unknown)
        self.warnings += [warning for warning in following.warnings if warning not in self.warnings]
        self.chats = self.chats or following.chats
        self.special_token_said = self.special_token_said or following.special_token_said


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeEncoder:
    """All that decides how records are encoded; it may be sent to another process."""

    source: str
    tokenizer: Any
    dataset: DatasetSource
    sequence_length: int

    def encode(self, records: Range) -> EncodedRange:
        """What comes of a range; raises UserError for what ends prepare at once."""
        return _RangeInHand(self).encode(records)


def in_ranges(records: Iterable[Record | BadRecord]) -> Iterator[Range]:
    """Consecutive records, some at a time."""
    return _cut(records, RANGE_RECORDS, RANGE_CHARACTERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A record and the sample that it stands for, or else what is wrong with it."""

    where: str
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sample: Sample | None = None
    problem: str = ""


class _RangeInHand:
    """Encodes one range."""

    def __init__(self, how: RangeEncoder) -> None:
        self._how = how
        self._pairs = how.dataset.format == "preference"
        train_on = "completion" if self._pairs else how.dataset.train_on
        self._encoder = Encoder(how.tokenizer, train_on, most_tokens=how.sequence_length)
        self._found = EncodedRange()

    def encode(self, records: Range) -> EncodedRange:
        found = self._found
        for batch in _cut(records, BATCH_RECORDS, BATCH_CHARACTERS):
            read = [self._parsed(record) for record in batch]
            self._encoder.expect(it.sample for it in read if it.sample is not None)
            for it in read:
                encoded = self._encoded(it)
                for fitting in () if encoded is None else self._fitting(it.where, encoded):
                    found.records.append(fitting, found.seen)
                found.seen += 1
        found.warnings = self._encoder.warnings
        found.special_token_said = self._encoder.special_token_said
        return found

    def _parsed(self, record: Record | BadRecord) -> _Read:
        if isinstance(record, BadRecord):
            return _Read(where=record.where, problem=record.problem)
        try:
            sample = read_sample(record.value, self._how.dataset.format)
        except ValueError as error:
            return _Read(where=record.where, problem=str(error)[:MAX_PROBLEM_CHARACTERS])
        except RecursionError:
            return _Read(where=record.where, problem="is nested too deeply")
        if isinstance(sample, Preference) and isinstance(sample.chosen, Conversation) and not self._found.chats:
            refuse_chats_without_template(self._how.tokenizer)  # of texts none is asked for
            self._found.chats = True
        return _Read(where=record.where, fields=record.value, sample=sample)

    def _encoded(self, read: _Read) -> EncodedRecord | None:
        if read.sample is None:
            return self._found.note(BadRecord(where=read.where, problem=read.problem))
        try:
            encoded = self._encoder.encode(read.sample)
        except ValueError as error:
            return self._found.note(BadRecord(where=read.where, problem=str(error)[:MAX_PROBLEM_CHARACTERS]))
        except RecursionError:
            return self._found.note(BadRecord(where=read.where, problem="is nested too deeply"))
        except RenderLimit as error:
            raise UserError(f"{self._how.source}: {read.where}: {error}") from error
        if encoded.supervised == 0 and encoded.complete:
            return self._found.note(BadRecord(where=read.where, problem="has no token to train on"))
        self._found.note_unknown(unknown_fields(read.fields, self._how.dataset.format))
        return encoded

    def _fitting(self, where: str, encoded: EncodedRecord) -> list[EncodedRecord]:
        """The record's contexts as far as they fit a sequence; none if it does not go in."""
        most, too_long = self._how.sequence_length, self._how.dataset.too_long
        contexts = encoded.split()
        lengths = [len(context.input_ids) for context in contexts]
        longest = sum(lengths) if self._pairs else max(lengths)  # both answers of a preference share a sequence
        if encoded.complete and longest <= most:
            return contexts
        if too_long == "fail":
            self._found.too_long_count += 1
            tokens = f"{longest}" if encoded.complete else f"more than {most}"
            self._found.first_too_long = self._found.first_too_long or (where, tokens)
            return []
        cut = [context.cut(most) for context in contexts]
        taught = [context for context in cut if context.supervised]  # a prompt alone teaches nothing
        if too_long == "drop" or not taught:
            self._found.dropped += 1
            return []
        self._found.truncated += 1
        return taught


def _cut(records: Iterable[Record | BadRecord], most_records: int, most_characters: int) -> Iterator[Range]:
    part: list[Record | BadRecord] = []
    characters = 0
    for record in records:
        part.append(record)
        characters += characters_of(record.value) if isinstance(record, Record) else 0
        if len(part) >= most_records or characters >= most_characters:
            yield part
            part, characters = [], 0
    if part:
        yield part
