"""The metrics journal: the single source of what MLflow shows, and of a run's losses.

It grows by one record after the other, and may be read from another thread meanwhile. Every checkpoint carries it up to
the checkpoint's step, so a resumed run goes on from exactly the records that led to its state. A metric has one value a
step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import time

from orchestrator.api.formats import JournalRecord, Metric, Sample
from orchestrator.api.json_text import read_json
from orchestrator.api.losses import values


class Journal:
    """An append-only list of records; safe to read from another thread while it grows."""

    def __init__(self, records: Iterable[JournalRecord] = ()) -> None:
        self._records: list[JournalRecord] = []
        self._keys_of_last_step: set[str] = set()
        for record in records:
            self.append(record)

    def append(self, record: JournalRecord) -> None:
        """Add the next record; several records of one step must hold different metrics."""
        last_step = self._records[-1].step if self._records else -1
        assert record.step >= last_step, f"step {record.step} was recorded after step {last_step}"
        if record.step > last_step:
            self._keys_of_last_step = set()
        repeated = self._keys_of_last_step & record.metrics.keys()
        assert not repeated, f"step {record.step} has already recorded {sorted(repeated)}"
        self._keys_of_last_step |= record.metrics.keys()
        self._records.append(record)

    def record(self, step: int, metrics: Mapping[str, float], samples: Iterable[Sample] = ()) -> JournalRecord:
        """Append the metrics of a step, stamped with the present time."""
        record = JournalRecord(step=step, time_ms=int(time() * 1000), metrics=dict(metrics), samples=tuple(samples))
        self.append(record)
        return record

    def records(self) -> list[JournalRecord]:
        """All records so far, oldest first."""
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def to_bytes(self) -> bytes:
        """JSON lines. Python's JSON keeps every float exactly; a record holds finite ones alone."""
        dumped = (record.model_dump(by_alias=True, exclude_defaults=True) for record in self._records)
        return b"".join(json.dumps(each).encode() + b"\n" for each in dumped)

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal:
        """The journal behind `to_bytes`; raises ValueError on a broken line."""
        try:
            return cls(JournalRecord.model_validate(read_json(line)) for line in data.splitlines())
        except AssertionError as error:
            raise ValueError(f"the journal is out of order: {error}") from error

    def save(self, path: Path) -> None:
        """Write the journal as JSON lines."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read a journal that `save` wrote."""
        return cls.from_bytes(path.read_bytes())


def latest(journal: Journal, metric: Metric) -> float | None:
    """The last value of a metric, if there is one."""
    found = values(journal.records(), metric)
    return found[-1] if found else None
