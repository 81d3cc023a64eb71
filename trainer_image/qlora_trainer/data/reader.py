"""Reads a dataset's records one after the other, and knows where each of them stands.

A record is a JSON object, a CSV row or a Parquet row; what cannot be read as one comes out as a `BadRecord`, so that
all of them can be counted instead of stopping at the first. A file that cannot be read at all is a UserError; a
source that does not answer is Transient.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import weakref
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec as untyped_fsspec  # pyright: ignore[reportMissingTypeStubs]  # it ships no types

from orchestrator.api.contained_files import Contained, open_regular
from qlora_trainer.data.formats import STRICT, json_problem, named_fields, parse_json
from qlora_trainer.data.hub_files import CARD_NAME, MAX_CARD_BYTES, Wanted, files_of_split
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.shared_cache import SharedCache, hub_entry
from qlora_trainer.storage.source_errors import translated
from qlora_trainer.storage.uri import claim_path, local_path

fsspec: Any = untyped_fsspec
TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
MAX_LINE_BYTES = 64 << 20
"""Of a text file, however small it is compressed."""
MAX_CELL_CHARACTERS = 64 << 20
"""Bound on one cell of a CSV file; Python's own of 128 KiB is too small for a conversation."""
ROWS_AT_A_TIME = 1024
GZIP_MAGIC = b"\x1f\x8b"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OTHER_MAGICS = {
    b"PK\x03\x04": "a ZIP archive (as .xlsx is); unpack it, or export it as CSV",
    b"\x28\xb5\x2f\xfd": "Zstandard data; unpack it, or compress it with gzip",
    b"BZh9": "bzip2 data; unpack it, or compress it with gzip",
    b"\xfd7zXZ\0": "xz data; unpack it, or compress it with gzip",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file; write it as Parquet",
}
"""First bytes of files that are no text -> what they are, and what to do."""
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
OTHER_SEPARATORS = ";\t|"
SNIFFED_BYTES = 4096
LEAST_READ_BYTES = 1 << 16
LONGEST_WORD = 16
"""No word of JSON (`-Infinity`, an escape of two halves) is longer, so a value that was cut off fails within it."""
NO_BLANK = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record as it was read."""

    where: str
    """`line 17` of a text file, `row 17` of a table, `record 17` of a JSON array."""
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """What should be a record and is not."""

    where: str
    problem: str


class RecordFile:
    """A file of records, held open: what its digest is of is what is read, whatever becomes of its name."""

    def __init__(self, source: str, file: BinaryIO, reader: str | None = None) -> None:
        """`reader` is how it is read, where its name does not tell."""
        self.source = source
        self._name = source.rsplit("/", 1)[-1].lower()
        self._reader = reader or self._name.removesuffix(".gz").rsplit(".", 1)[-1]
        weakref.finalize(self, file.close)
        self._path = Path(f"/proc/self/fd/{file.fileno()}")

    def digest(self) -> str:
        """SHA-256 of the file as it is stored."""
        with self._path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def read(self) -> Iterator[Record | BadRecord]:
        """The records in their order."""
        _refuse_misnamed(self._path, self._name, self.source)
        try:
            if self._reader == "parquet":
                yield from _parquet(self._path, self.source)
                return
            with _opened(self._path, compressed=self._name.endswith(".gz")) as file:
                yield from _READERS[self._reader](file, self.source)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.source} is not a whole gzip file ({error}); write it again") from error


class HubDataset:
    """One split of `hf://owner/name`, at the commit that its main branch names now.

    What is read are files that the hub lists at that commit, by the readers below: a card says which of them, and
    nothing else (`hub_files`).
    """

    def __init__(self, wanted: Wanted) -> None:
        from huggingface_hub import HfApi

        self._wanted = wanted
        self._name = wanted.source.removeprefix("hf://").rstrip("/")
        info = HfApi().dataset_info(self._name)
        SharedCache.from_environment().use(hub_entry(self._name, "dataset"))
        self._commit = str(info.sha)
        self._paths = [sibling.rfilename for sibling in info.siblings or ()]

    def digest(self) -> str:
        """Digest over the commit, the configuration and the split, which name the content."""
        config = f"/{self._wanted.config}" if self._wanted.config else ""
        text = f"{self._name}@{self._commit}{config}#{self._wanted.split}"
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def read(self) -> Iterator[Record | BadRecord]:
        """The records in their order."""
        names = files_of_split(self._paths, self._card(), self._wanted)
        for name in names:
            of = f" of {name}" if len(names) > 1 else ""
            for record in self._file(name).read():
                if isinstance(record, BadRecord):
                    yield replace(record, where=record.where + of)
                else:
                    yield Record(where=record.where + of, value=_without_nulls(record.value))

    def _card(self) -> str:
        if CARD_NAME not in self._paths:
            return ""
        with self._fetched(CARD_NAME) as file:
            return file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")

    def _file(self, name: str) -> RecordFile:
        file, reader = self._fetched(name), None
        if name.lower().removesuffix(".gz").endswith(".json"):
            reader = _json_reader(file, compressed=name.lower().endswith(".gz"))
        elif name.lower().removesuffix(".gz").endswith(".ndjson"):
            reader = "jsonl"
        return RecordFile(f"{self._wanted.source}/{name}", file, reader)

    def _fetched(self, name: str) -> BinaryIO:
        """A file of the commit, in the hub's cache; its link there may lead to a blob of this data set alone."""
        import huggingface_hub

        hub: Any = huggingface_hub  # Any: its types are half unknown
        path = Path(hub.hf_hub_download(self._name, name, repo_type="dataset", revision=self._commit))
        return Contained.of(path.parent).open(path.name)


def _json_reader(file: BinaryIO, *, compressed: bool) -> str:
    """Hubs call both a JSON array and one object a line `.json`; the first character tells."""
    with os.fdopen(os.dup(file.fileno()), "rb") as raw:
        raw.seek(0)
        content: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        try:
            start = content.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        except (OSError, EOFError, zlib.error):
            start = b""  # the reader says what is wrong
        raw.seek(0)
    return "json" if start.startswith(b"[") else "jsonl"


class Records:
    """The records behind a source, and a digest that tells whether they have changed."""

    def __init__(self, source: str, *, split: str, scratch: Path, field: str, config: str | None = None) -> None:
        """A remote file is copied into `scratch`, being read twice.

        `field` is where the job names the source; `split` and `config` are those of a hub data set.
        """
        self.source = source
        self._field = field
        if config and not source.startswith("hf://"):
            raise UserError(f"{source} is a file, which has no configurations; remove spec.dataset.config")
        with translated(source, field=field):
            self._records = (
                HubDataset(Wanted(source=source, config=config, split=split, field=field))
                if source.startswith("hf://")
                else RecordFile(source, _opened_file(source, scratch))
            )

    def digest(self) -> str:
        """Digest of what the source holds."""
        with translated(self.source, field=self._field):
            return self._records.digest()

    def read(self) -> Iterator[Record | BadRecord]:
        """The records in their order."""
        with translated(self.source, field=self._field):
            yield from self._records.read()


def _opened_file(source: str, scratch: Path) -> BinaryIO:
    if not source.lower().endswith(SUFFIXES):
        folder = (path := local_path(source)) is not None and path.is_dir()
        kind = "a folder; give one file" if folder else "not of a known kind; give a file"
        raise UserError(f"{source} is {kind} that ends in {', '.join(SUFFIXES)}")
    path = local_path(source)
    if path is None:
        path = scratch / hashlib.sha256(source.encode()).hexdigest()
        file_system, remote = fsspec.core.url_to_fs(source)
        file_system.get_file(remote, str(path))
        return open_regular(path)
    try:
        return Contained.of(path.parent, claim_path(source)).open(path.name)
    except IsADirectoryError as error:
        raise UserError(f"{source} is a folder; give one of its files") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        quoted = " (in a URI, % is written %25)" if "%" in source else ""
        raise UserError(f"there is no file {source}; check its path{quoted}") from error


def _refuse_misnamed(path: Path, name: str, source: str) -> None:
    """A file that is something else than its name says is told by its first bytes."""
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    if start.startswith(LFS_POINTER):
        raise UserError(
            f"{source} is a Git LFS pointer and not the data itself; run `git lfs pull` where it comes from"
        )
    if name.endswith(".parquet"):
        return
    compressed = start.startswith(GZIP_MAGIC)
    if compressed and not name.endswith(".gz"):
        raise UserError(f"{source} holds gzip data; give it a name that ends in .gz")
    if start and name.endswith(".gz") and not compressed:
        raise UserError(f"{source} is not a whole gzip file, but something else; give it a name without .gz")
    for magic, what in OTHER_MAGICS.items():
        if start.startswith(magic):
            raise UserError(f"{source} is {what}")
    half_nul = len(start) > 1 and start.count(b"\0") * 5 >= len(start) * 2
    if not compressed and (start.startswith(WIDE_MARKS) or half_nul):
        raise UserError(f"{source} is UTF-16 (or UTF-32) and not UTF-8; save it as UTF-8")


@contextmanager
def _opened(path: Path, *, compressed: bool) -> Generator[IO[bytes]]:
    with path.open("rb") as raw:
        if not compressed:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as file:
            yield file  # pyright: ignore[reportReturnType]  # a GzipFile does all that is asked of it here


# --- text


def _decoded(
    file: IO[bytes], source: str, most_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """The lines of a UTF-8 file with their numbers; a line that is none comes as the reason."""
    for number, line in enumerate(iter(lambda: file.readline(most_bytes + 1), b""), start=1):
        if len(line) > most_bytes:
            raise UserError(
                f"{source}: line {number} is longer than {most_bytes >> 20} MiB; split its record, or check that the "
                "file is what its name says"
            )
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield number, content.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, error


def _not_utf8(number: int, error: UnicodeDecodeError) -> BadRecord:
    byte = error.object[error.start]
    return BadRecord(where=f"line {number}", problem=f"is not UTF-8 (byte 0x{byte:02x} at position {error.start + 1})")


def _json_lines(file: IO[bytes], source: str) -> Iterator[Record | BadRecord]:
    for number, line in _decoded(file, source):
        if isinstance(line, UnicodeDecodeError):
            yield _not_utf8(number, line)
        elif number == 1 and line.lstrip().startswith("["):
            raise UserError(
                f"{source} holds a list and not one object a line; a file of one JSON array is called .json"
            )
        elif line.strip():
            yield _json_line(number, line)


def _json_line(number: int, line: str) -> Record | BadRecord:
    where = f"line {number}"
    try:
        value = parse_json(line)
    except RecursionError:
        return BadRecord(where=where, problem="is nested too deeply to be read")
    except ValueError as error:
        return BadRecord(where=where, problem=f"is not valid JSON: {json_problem(error)}")
    return _as_record(where, value)


def _json_array(file: IO[bytes], source: str) -> Iterator[Record | BadRecord]:
    text = _JsonText(file, source)
    if not text.next_character():
        return
    if text.next_character() != "[":
        if text.next_character() in set('{"tfn-0123456789'):
            raise UserError(
                f"{source} must hold one JSON array of records, and nothing around it; a file of one object a line is "
                "called .jsonl"
            )
        raise text.error("Expecting value", text.position)
    text.position += 1
    number = 0
    if text.next_character() == "]":
        text.position += 1
    else:
        while True:
            number += 1
            yield _as_record(f"record {number}", text.next_value())
            after = text.next_character()
            if after not in {",", "]"}:
                raise text.error("Expecting ',' delimiter", text.position)
            text.position += 1
            if after == "]":
                break
    if text.next_character():
        raise text.error("Extra data; a file of one object a line must be called .jsonl", text.position)


class _JsonText:
    """JSON text that is read piece by piece: no more is held than the value that is being read."""

    def __init__(self, file: IO[bytes], source: str) -> None:
        self.position = 0
        """Where in what is held the next character is."""
        self._file = file
        self._source = source
        self._held = ""
        self._lines = 0
        """Line ends before what is held."""
        self._ended = False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._values = json.JSONDecoder(**STRICT)

    def next_character(self) -> str:
        """The next character that is no white space; an empty text at the end."""
        while True:
            found = NO_BLANK.search(self._held, self.position)
            if found is not None:
                self.position = found.start()
                return found[0]
            self.position = len(self._held)
            self._forget()
            if not self._read_more():
                return ""

    def next_value(self) -> Any:
        """The next value, whole."""
        self.next_character()
        self._forget()
        while True:
            try:
                value, end = self._values.raw_decode(self._held, self.position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._held) - LONGEST_WORD
                if not cut_off or not self._read_more():
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise UserError(f"{self._source} is nested too deeply to be read; flatten its records") from error
            except ValueError as error:  # a number of thousands of digits, NaN
                raise self.error(json_problem(error), self.position) from error
            else:
                if end < len(self._held) or not self._read_more():  # a number may go on
                    self.position = end
                    return value

    def error(self, what: str, position: int) -> UserError:
        """The refusal of what stands at a position of what is held."""
        line = self._lines + self._held.count("\n", 0, position) + 1
        return UserError(f"{self._source}: line {line} is not valid JSON: {what}")

    def _forget(self) -> None:
        self._lines += self._held.count("\n", 0, self.position)
        self._held = self._held[self.position :]
        self.position = 0

    def _read_more(self) -> bool:
        """As much again as is held, at least; False at the end."""
        if self._ended:
            return False
        if len(self._held) - self.position > MAX_LINE_BYTES:
            line = self._lines + self._held.count("\n", 0, self.position) + 1
            raise UserError(
                f"{self._source}: the record that begins on line {line} is longer than {MAX_LINE_BYTES >> 20} MiB; "
                "split it, or check that the file is what its name says"
            )
        piece = self._file.read(max(LEAST_READ_BYTES, len(self._held)))
        self._ended = not piece
        try:
            self._held += self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            before = self._held + error.object[: error.start].decode("utf-8", errors="replace")
            bad = _not_utf8(self._lines + before.count("\n") + 1, error)
            raise UserError(f"{self._source}: {bad.where} {bad.problem}") from error
        return True


def _as_record(where: str, value: Any) -> Record | BadRecord:
    if not isinstance(value, dict):
        return BadRecord(where=where, problem=f"is not a JSON object but {_kind(value)}")
    return Record(where=where, value=cast("dict[str, Any]", value))


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(file: IO[bytes], source: str) -> Iterator[Record | BadRecord]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    bad_lines: list[BadRecord] = []

    def text() -> Iterator[str]:
        for number, line in _decoded(file, source):
            if isinstance(line, UnicodeDecodeError):
                bad_lines.append(_not_utf8(number, line))
                yield line.object.decode("utf-8", errors="replace")
            else:
                yield line

    rows = csv.reader(text(), strict=True)
    header = _header(rows, bad_lines, source)
    if header is None:
        return
    for start, row in _numbered_rows(rows, source):
        if bad_lines:
            yield bad_lines[0]
            bad_lines.clear()
        elif len(row) != len(header):
            yield BadRecord(where=f"line {start}", problem=f"has {len(row)} fields where the header has {len(header)}")
        else:
            yield Record(where=f"line {start}", value=dict(zip(header, row, strict=True)))


def _header(rows: Any, bad_lines: Sequence[BadRecord], source: str) -> list[str] | None:
    """The names of the columns, each there once; None of an empty file."""
    try:
        header: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise UserError(f"{source}: line 1 is not valid CSV: {error}") from error
    if bad_lines:
        raise UserError(f"{source}: {bad_lines[0].where} {bad_lines[0].problem}; save the file as UTF-8")
    if header == []:
        raise UserError(f"{source}: line 1 is empty; it must name the columns")
    if header and len(header) == 1 and (other := next((mark for mark in OTHER_SEPARATORS if mark in header[0]), None)):
        raise UserError(f"{source}: its columns are separated by {other!r}; save it with commas")
    for number, name in enumerate(header or (), start=1):
        if not name.strip():
            raise UserError(f"{source}: column {number} of the header has no name; name it, or remove the column")
    _refuse_duplicate(header or (), source)
    return header


def _numbered_rows(rows: Any, source: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line that they begin on; quoted fields may span lines, and empty lines are no rows."""
    while True:
        start = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            # Where quotes do not match, nobody knows where the next row begins.
            raise UserError(f"{source}: line {start} is not valid CSV: {error}") from error
        if row is None:
            return
        if row:
            yield start, row


_READERS = {"jsonl": _json_lines, "json": _json_array, "csv": _csv}


# --- tables


def _parquet(path: Path, source: str) -> Iterator[Record | BadRecord]:
    import pyarrow as untyped_pyarrow  # pyright: ignore[reportMissingTypeStubs]  # it ships no types
    import pyarrow.parquet as untyped_parquet  # pyright: ignore[reportMissingTypeStubs]

    pyarrow: Any = untyped_pyarrow
    parquet: Any = untyped_parquet
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _refuse_duplicate(file.schema_arrow.names, source)
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
                for row in _rows(batch, number, source):
                    number += 1
                    yield Record(where=f"row {number}", value=_without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source} is not a whole Parquet file ({error}); write it again") from error


def _rows(batch: Any, before: int, source: str) -> list[dict[str, Any]]:
    """The rows of a batch as Python's values, which has none for some that Parquet can hold."""
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: a text after row {before} is not UTF-8") from error
    except Exception as error:  # pyarrow raises errors of many types, for keys there twice, dates and time zones
        raise UserError(
            f"{source}: a value after row {before} cannot be read ({error}); correct it, or remove its column"
        ) from error


def _refuse_duplicate(names: Sequence[str], source: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{source} has the column {named_fields([name])} more than once; rename or remove one")


def _without_nulls(value: Any) -> Any:
    """A table's value without the fields that it has only because another row has them."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _without_nulls(field) for name, field in fields.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in cast("list[Any]", value)]
    return value
