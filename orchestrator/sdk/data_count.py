"""How much a data file of this machine gives to train on, told before prepare has counted it.

Which samples are held out, how records become sequences and sequences steps is prepare's own code (`api/packing`,
`api/optimizer_steps`). Only the tokens of a record are guessed from its bytes, for a tokenizer takes seconds to load.
A small data set has as many sequences as records, or `FEWEST_ROWS`, however many tokens a byte is within what
tokenizers do: such a count is exact. Others are estimates, and of a large file only the beginning is read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from orchestrator.api.base import decimal
from orchestrator.api.job import DatasetSource, QLoRAJobSpec
from orchestrator.api.optimizer_steps import held_out, optimizer_steps
from orchestrator.api.packing import FEWEST_ROWS, arranged
from orchestrator.sdk import extras
from orchestrator.sizing.step_time import Work

MAX_READ_BYTES = 4 << 20
"""Of a file's text; what follows is taken to be like it."""
MAX_READ_RECORDS = 10_000
BYTES_PER_TOKEN = (8.0, 4.0, 1.0)
"""With which the fewest tokens of a text are counted, as many as are likely, and the most: no tokenizer that falls
back to bytes takes more than a token for one."""
TOKENS_PER_RECORD = (0, 16, 128)
"""What a chat template writes once, a system message of its own above all: fewest, likely, most."""
TOKENS_PER_MESSAGE = (1, 6, 16)
FIELDS: Mapping[str, Sequence[str]] = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields of each format that are trained on, or are context."""
NO_TEXT = frozenset({"role", "from", "weight", "train", "training", "loss"})
"""Fields of a message that a template does not write out."""
ANSWERING = frozenset({"assistant", "gpt", "chatgpt", "bing", "bard"})

Record = Mapping[str, Any]


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

    tokens: tuple[int, int, int]
    """Fewest, likely, most."""
    plain: bool
    """Whether it is text in one context, whose tokens cannot be out of these bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arranged:
    """Records in sequences."""

    records: int
    sequences: int
    tokens: int


def count_data(spec: QLoRAJobSpec) -> DataCount | None:
    """What the job's data file gives; None where it is not on this machine, or prepare will refuse what is read."""
    source = spec.dataset.source
    if not source.startswith("file://"):
        return None
    try:
        read = _read(Path(source.removeprefix("file://")), spec.dataset)
        sizes = [_size(record, spec.dataset) for record in read.records]
    except (OSError, EOFError, ValueError, RecursionError, csv.Error):
        return None
    return _counted(sizes, read.share, spec)


def _counted(sizes: Sequence[_Size], share: float, spec: QLoRAJobSpec) -> DataCount | None:
    whole = share == 1.0
    likely = _arranged([size.tokens[1] for size in sizes], spec, fewest_rows=FEWEST_ROWS if whole else 0)
    if likely is None:
        return None
    if not whole:
        records = round(likely.records / share)
        sequences = max(math.ceil(likely.sequences / share), min(FEWEST_ROWS, records))
        likely = _Arranged(records=records, sequences=sequences, tokens=round(likely.tokens / share))
    exact = whole and all(size.plain for size in sizes) and _is_certain(sizes, spec, likely)
    steps = optimizer_steps(spec.training, likely.sequences)
    return DataCount(records=likely.records, sequences=likely.sequences, tokens=likely.tokens, steps=steps, exact=exact)


def _is_certain(sizes: Sequence[_Size], spec: QLoRAJobSpec, likely: _Arranged) -> bool:
    """Whether the fewest and the most tokens make as many sequences."""
    if spec.training.packing and likely.sequences > FEWEST_ROWS:
        return False
    longest = max(size.tokens[2] for size in sizes)
    if spec.dataset.too_long != "fail" and longest > spec.training.sequence_length:
        return False  # who is cut or dropped is not known
    for bound in (0, 2):
        arranged_so = _arranged([size.tokens[bound] for size in sizes], spec, fewest_rows=FEWEST_ROWS)
        if arranged_so is None or arranged_so.sequences != likely.sequences:
            return False
    return True


def _arranged(lengths: Sequence[int], spec: QLoRAJobSpec, *, fewest_rows: int) -> _Arranged | None:
    """Records of so many tokens as prepare puts them together; None where nothing is left to train on."""
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
    given = [record[name] for name in FIELDS[dataset.format] if record.get(name) is not None]
    messages = [message for value in given if isinstance(value, list) for message in cast("list[Any]", value)]
    answers = sum(_answers(message) for message in messages)
    texts = list(_texts(given))
    bytes_of_text = sum(len(text.encode(errors="replace")) for text in texts)
    if not bytes_of_text:
        raise ValueError("there is nothing to train on, which prepare says better")
    fewest, likely, most = (
        math.ceil(bytes_of_text / ratio) + per_record + per_message * len(messages)
        for ratio, per_record, per_message in zip(BYTES_PER_TOKEN, TOKENS_PER_RECORD, TOKENS_PER_MESSAGE, strict=True)
    )
    nested = any(isinstance(inner, dict | list) for message in messages for inner in _inside(message))
    several = answers > 1 and dataset.train_on == "assistant"  # templates may want a context for each
    return _Size(tokens=(fewest, likely, most), plain=not nested and not several and "tools" not in record)


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
    names = [name for name in FIELDS[dataset.format] if name in file.schema_arrow.names]
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
