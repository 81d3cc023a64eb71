"""Training records that are here in Python, as the file that a job names.

A file is named by its content, so that the same records are the same file however often they are handed in. It lies in
the service's home, where its owner alone can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

from orchestrator.errors import InvalidObject

FOLDER_NAME = "datasets"
MAX_RECORDS_BYTES = 4 << 30
"""More than that belongs into a file of its own, of which no second one is made."""
Records = str | os.PathLike[str] | Iterable[Mapping[str, object]]
"""A file or URI, a list of records, or a pandas DataFrame with a column a field."""


def records_file(records: Iterable[Mapping[str, object]], home: Path) -> Path:
    """The records as a JSON lines file below `home`; raises InvalidObject for what is no record, and for none."""
    folder = home / FOLDER_NAME
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with NamedTemporaryFile(dir=folder, prefix=".partial-", delete=False) as file:
        partial = Path(file.name)
        try:
            for line in _lines(records):
                size += file.write(line)
                digest.update(line)
                if size > MAX_RECORDS_BYTES:
                    raise InvalidObject(f"the records exceed {MAX_RECORDS_BYTES >> 30} GiB; give them as a file")
            if size == 0:
                raise InvalidObject("there is no record; give at least one")
            file.flush()
            path = folder / f"{digest.hexdigest()[:32]}.jsonl"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _lines(records: Iterable[Mapping[str, object]]) -> Iterator[bytes]:
    for number, record in enumerate(_rows(records), start=1):
        if not isinstance(record, Mapping):
            raise InvalidObject(f"record {number} is no mapping of fields to values, but {type(record).__name__}")
        try:
            text = json.dumps(dict(cast("Mapping[str, object]", record)), ensure_ascii=False, allow_nan=False)
            yield f"{text}\n".encode()
        except (TypeError, ValueError) as error:
            raise InvalidObject(f"record {number} cannot be written as JSON: {error}") from error


def _rows(records: object) -> Iterable[object]:
    """The records; of a DataFrame its rows, without the fields that are missing there."""
    frame: Any = records  # Any: pandas is no dependency, and its frames are known by what they can do
    if not (hasattr(frame, "to_dict") and hasattr(frame, "notna")):
        if not isinstance(records, Iterable):
            raise InvalidObject(f"{type(records).__name__} is no file, list of records or DataFrame")
        return cast("Iterable[object]", records)
    rows: list[dict[str, object]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(field): value for field, value in row.items() if value is not None} for row in rows]
