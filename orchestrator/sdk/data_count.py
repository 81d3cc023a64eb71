"""How much a data file of this machine gives to train on, told before prepare has counted it.

Which samples are held out, how records become sequences and sequences steps is prepare's own code (`api/packing`,
`api/optimizer_steps`). Only the tokens of a record are told from its bytes: rendering and tokenising all takes seconds.

- A small data set has as many sequences as records, or `FEWEST_ROWS`, however many tokens a byte is within what
  tokenizers do: such a count is exact.
- Others are estimates. Where the model's tokenizer is on this machine it says how many bytes a token has, of a part.
- Of a large file only the beginning is read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from orchestrator.api.base import decimal
from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec
from orchestrator.api.optimizer_steps import held_out, optimizer_steps
from orchestrator.api.packing import FEWEST_ROWS, arranged
from orchestrator.api.record_fields import MASK_FIELDS, RECORD_FIELDS, SHAREGPT_ROLES, as_trl_writes_it
from orchestrator.api.uris import file_path
from orchestrator.sdk import extras
from orchestrator.sizing.step_time import Work

MAX_READ_BYTES = 4 << 20
"""Of a file's text; what follows is taken to be like it."""
MAX_READ_RECORDS = 10_000
TOKENIZER_NAME = "tokenizer.json"
MEASURED_RECORDS = 64
MEASURED_CHARACTERS = 1 << 16
"""Of the texts, from all over what is read, that the model's tokenizer is tried on."""
NO_TEXT = frozenset({"role", "from", *MASK_FIELDS})
"""Fields of a message that a template does not write out."""
ANSWERING = frozenset(role for role, means in SHAREGPT_ROLES.items() if means == "assistant")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What makes tokens of a record."""

    bytes_per_token: float
    tokens_per_record: int
    """What a chat template writes once, a system message of its own above all."""
    tokens_per_message: int


FEWEST = Rates(bytes_per_token=8.0, tokens_per_record=0, tokens_per_message=1)
LIKELY = Rates(bytes_per_token=4.0, tokens_per_record=16, tokens_per_message=6)
MOST = Rates(bytes_per_token=1.0, tokens_per_record=128, tokens_per_message=16)
"""No tokenizer that falls back to bytes makes more than a token of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCount:
    """What a data set gives to train on."""

    records: int
    """Training records, without those that are held out."""
    sequences: int
    tokens: int
    """Of all training records, as many as are likely."""
    steps: int
    exact: bool
    """Whether records, sequences and steps are what prepare will count of data that it does not refuse."""

    def work(self) -> Work:
        """The same for the times of steps."""
        return Work(
            steps=self.steps,
            sequences=self.sequences,
            sequence_tokens=self.tokens / self.sequences,
            record_tokens=self.tokens / self.records,
        )

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        counts = {"records": self.records, "sequences": self.sequences, "tokens": self.tokens, "steps": self.steps}
        return {**counts, "exact": self.exact}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """The records at the beginning of a file."""

    records: list[Record]
    share: float
    """Of the file, up to 1, which is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """What is known of one record."""

    text_bytes: int
    messages: int
    plain: bool
    """Whether it is text in one context, whose tokens cannot be out of the bounds."""

    def tokens(self, rates: Rates) -> int:
        """So many at these rates."""
        text = math.ceil(self.text_bytes / rates.bytes_per_token)
        return text + rates.tokens_per_record + rates.tokens_per_message * self.messages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arranged:
    """Records in sequences."""

    records: int
    sequences: int
    tokens: int


def count_data(spec: QLoRAJobSpec) -> DataCount | None:
    """What the job's data file gives; None where it is not on this machine, or prepare will refuse what is read."""
    source = spec.dataset.source
    path = file_path(source)
    if path is None:
        return None
    try:
        read = _read(path, spec.dataset)
        sizes = [_size(record, spec.dataset) for record in read.records]
    except (OSError, EOFError, ValueError, RecursionError, csv.Error):
        return None
    whole = read.share == 1.0
    likely = _arranged(sizes, LIKELY, spec, fewest_rows=FEWEST_ROWS)
    if whole and likely is not None and _is_certain(sizes, spec, likely):
        return _count(likely, spec, exact=True)
    rates = LIKELY
    if (measured := _bytes_per_token(read.records, spec)) is not None:
        rates = replace(LIKELY, bytes_per_token=measured)
    likely = _arranged(sizes, rates, spec, fewest_rows=FEWEST_ROWS if whole else 0)
    if likely is None:
        return None
    if not whole:
        records = round(likely.records / read.share)
        sequences = max(math.ceil(likely.sequences / read.share), min(FEWEST_ROWS, records))
        likely = _Arranged(records=records, sequences=sequences, tokens=round(likely.tokens / read.share))
    return _count(likely, spec, exact=False)


def _count(found: _Arranged, spec: QLoRAJobSpec, *, exact: bool) -> DataCount:
    steps = optimizer_steps(spec.training, found.sequences)
    return DataCount(records=found.records, sequences=found.sequences, tokens=found.tokens, steps=steps, exact=exact)


def _is_certain(sizes: Sequence[_Size], spec: QLoRAJobSpec, likely: _Arranged) -> bool:
    """Whether the fewest and the most tokens make as many sequences."""
    if not all(size.plain for size in sizes) or (spec.training.packing and likely.sequences > FEWEST_ROWS):
        return False
    longest = max(size.tokens(MOST) for size in sizes)
    if spec.dataset.too_long != "fail" and longest > spec.training.sequence_length:
        return False  # who is cut or dropped is not known
    bounds = (_arranged(sizes, rates, spec, fewest_rows=FEWEST_ROWS) for rates in (FEWEST, MOST))
    return all(bound is not None and bound.sequences == likely.sequences for bound in bounds)


def _arranged(sizes: Sequence[_Size], rates: Rates, spec: QLoRAJobSpec, *, fewest_rows: int) -> _Arranged | None:
    """The records as prepare puts them together; None where nothing is left to train on."""
    lengths = [size.tokens(rates) for size in sizes]
    most, fraction = spec.training.sequence_length, decimal(spec.dataset.eval_fraction)
    samples = [index for index, tokens in enumerate(lengths) if tokens <= most or spec.dataset.too_long != "drop"]
    if len(samples) < (2 if fraction else 1):
        return None
    without = held_out(samples, fraction, spec.training.seed) if fraction else set[int]()
    kept = [min(lengths[sample], most) for sample in samples if sample not in without]
    rows = arranged(kept, spec.training, fewest_rows=fewest_rows)
    return _Arranged(records=len(kept), sequences=len(rows), tokens=sum(kept))


# --- one record


def _size(record: Record, dataset: DatasetSource) -> _Size:
    if dataset.format == "preference":
        record = as_trl_writes_it(record)
    given = [record[name] for name in RECORD_FIELDS[dataset.format] if record.get(name) is not None]
    if dataset.format == "preference" and record.get("prompt") is not None:
        given.append(record["prompt"])  # it stands before both answers
    messages = [message for value in given if isinstance(value, list) for message in cast("list[Any]", value)]
    answers = sum(_answers(message) for message in messages)
    text_bytes = sum(len(text.encode(errors="replace")) for text in _texts(given))
    if not text_bytes:
        raise ValueError("there is nothing to train on, which prepare says better")
    nested = any(isinstance(inner, dict | list) for message in messages for inner in _inside(message))
    # Templates may want a context for each.
    several = answers > 1 and dataset.train_on == "assistant" and dataset.format != "preference"
    plain = not nested and not several and "tools" not in record
    return _Size(text_bytes=text_bytes, messages=len(messages), plain=plain)


def _answers(message: Any) -> bool:
    return isinstance(message, dict) and not ANSWERING.isdisjoint(
        str(cast("Record", message).get(name)) for name in ("role", "from")
    )


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from cast("dict[Any, Any]", value).values()
    elif isinstance(value, list):
        yield from cast("list[Any]", value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in cast("dict[Any, Any]", value).items():
            if name not in NO_TEXT:
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)


# --- the model's tokenizer


def _bytes_per_token(records: Sequence[Record], spec: QLoRAJobSpec) -> float | None:
    """How many bytes of these records' texts make a token; None where the tokenizer is not on this machine."""
    path = _tokenizer_path(spec.model)
    if path is None or not extras.is_installed("tokenizers"):
        return None
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingTypeStubs]  it has none

    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - whatever is wrong with the file, prepare says it
        return None
    names, characters, size, tokens = sorted(RECORD_FIELDS[spec.dataset.format]), 0, 0, 0
    for record in records[:: max(1, len(records) // MEASURED_RECORDS)]:
        text = "\n".join(_texts([record.get(name) for name in names]))[: MEASURED_CHARACTERS - characters]
        characters += len(text)
        size += len(text.encode(errors="replace"))
        tokens += len(tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids)
    return size / tokens if tokens else None


def _tokenizer_path(model: ModelSource) -> Path | None:
    """The tokenizer's file in the model's folder, or in the cache of what was fetched from the hub."""
    if (folder := file_path(model.source)) is not None:
        path = folder / TOKENIZER_NAME
        return path if path.is_file() else None
    if not model.source.startswith("hf://") or not extras.is_installed("huggingface_hub"):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source.removeprefix("hf://"), TOKENIZER_NAME, revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


# --- the beginning of a file


def _read(path: Path, dataset: DatasetSource) -> _Read:
    """Raises OSError, EOFError, ValueError for what is no file of records."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        return _parquet(path, dataset)
    with path.open("rb") as raw:
        content = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        start = content.read(MAX_READ_BYTES)
        at_end = not content.read(1)
        share = 1.0 if at_end else min(0.999, raw.tell() / path.stat().st_size)
    text = start.decode("utf-8-sig", "strict" if at_end else "ignore")
    rows = {".jsonl": _lines, ".json": _array, ".csv": _csv_rows}[kind](text, at_end=at_end)
    records = list(islice(rows, MAX_READ_RECORDS + 1))
    if len(records) > MAX_READ_RECORDS:
        left_out = sum(1 for _ in rows) + 1
        del records[MAX_READ_RECORDS:]
        share *= len(records) / (len(records) + left_out)
    return _Read(records=records, share=share)


def _lines(text: str, *, at_end: bool) -> Iterator[Record]:
    lines = text.split("\n")  # and nowhere else: other line separators may stand in JSON
    for line in lines if at_end else lines[:-1]:
        if line.strip():
            yield _object(json.loads(line))


def _array(text: str, *, at_end: bool) -> Iterator[Record]:
    if at_end:
        yield from map(_object, cast("list[Any]", json.loads(text)))
        return
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        while place < len(text) and text[place] in ", \t\r\n":
            place += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:  # where it was cut off
            return
        yield _object(value)


def _csv_rows(text: str, *, at_end: bool) -> Iterator[Record]:
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    yield from rows if at_end else rows[:-1]


def _parquet(path: Path, dataset: DatasetSource) -> _Read:
    if not extras.is_installed("pyarrow"):
        raise ValueError("Parquet cannot be read here")
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]  it has none

    file: Any = pyarrow.parquet.ParquetFile(path)
    names = [name for name in sorted(RECORD_FIELDS[dataset.format]) if name in file.schema_arrow.names]
    records: list[Record] = []
    size = 0
    for batch in file.iter_batches(batch_size=256, columns=names):
        records += batch.to_pylist()
        size += batch.nbytes
        if size > MAX_READ_BYTES or len(records) > MAX_READ_RECORDS:
            break
    return _Read(records=records, share=len(records) / max(1, file.metadata.num_rows))


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError("a record is no object")
    return cast("Record", value)
