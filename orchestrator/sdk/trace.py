"""A trace from a file, and what became of its jobs by queue and user: `qlora simulate --trace`.

A line is a job: a row of a CSV file with a header, or a JSON object. Errors name the line and the field.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import cast

from pydantic import ValidationError

from orchestrator.api.job import (
    DatasetSource,
    ModelSource,
    ObjectMeta,
    QLoRAJob,
    QLoRAJobSpec,
    QLoRAJobStatus,
    ResourcesSpec,
    TrainingSpec,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.results import PrepareResult
from orchestrator.core.scheduling.ordering import DEFAULT_QUEUE
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.trace import Arrival, Fate, Played, play
from orchestrator.errors import InvalidObject

FIELDS = ("submit", "queue", "user", "gpuClass", "vram", "seconds", "priority", "due")
MAX_JOBS = 5000
"""Of a trace: more would take minutes."""
MAX_BYTES = 2**24
MAX_SECONDS = 10 * 365 * 86_400.0
CLASSES_SEPARATOR = "/"
TAIL = 0.9
SMALL = ModelFacts(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49_152,
    tied_embeddings=True,
    revision="main",
)
"""A model that fits every card: what a job of a trace needs, the trace says."""
STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What became of the jobs of a queue, or of one user's of them."""

    queue: str
    user: str
    """Empty of all."""
    jobs: int
    mean_wait_seconds: float | None
    """Of those that got a GPU."""
    tail_wait_seconds: float | None
    """Nine of ten of them waited for no longer."""
    moves: int
    missed: int
    """Jobs that were not done when they were due."""
    waiting: int
    """Jobs that never got a GPU."""

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        return {
            "queue": self.queue,
            "user": self.user or None,
            "jobs": self.jobs,
            "meanWaitSeconds": self.mean_wait_seconds,
            "tailWaitSeconds": self.tail_wait_seconds,
            "moves": self.moves,
            "missed": self.missed,
            "neverStarted": self.waiting,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePlayed:
    """A trace on the queues and cards as they are, and with changes."""

    before: Played
    after: Played | None
    """None where nothing was changed."""

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        sides = {"before": self.before, "after": self.after}
        return {which: None if side is None else _side(side) for which, side in sides.items()}


def read_trace(path: Path, present: Snapshot) -> tuple[Arrival, ...]:
    """The jobs of a file, the first of which comes now. Raises InvalidObject, which names the line."""
    rows = list(_rows(path))
    if not rows:
        raise InvalidObject(f"{path}: holds no job")
    if len(rows) > MAX_JOBS:
        raise InvalidObject(f"{path}: holds {len(rows)} jobs; at most {MAX_JOBS} are played, so split it")
    known = {DEFAULT_QUEUE, *(queue.metadata.name for queue in present.queues)}
    read = [_Row(where=where, fields=fields, queues=known) for where, fields in rows]
    first = min(row.submit_seconds() for row in read)
    return tuple(row.arrival(number, present.now, first) for number, row in enumerate(read, start=1))


def played(present: Snapshot, changed: Snapshot | None, arrivals: Sequence[Arrival]) -> TracePlayed:
    """What becomes of them on the present queues and cards, and on changed ones."""
    return TracePlayed(before=play(present, arrivals), after=None if changed is None else play(changed, arrivals))


def groups_of(side: Played) -> list[Group]:
    """By queue, each followed by its users where there are several."""
    by_queue: defaultdict[str, defaultdict[str, list[Fate]]] = defaultdict(lambda: defaultdict(list))
    for fate in side.fates:
        by_queue[fate.arrival.job.spec.queue][fate.arrival.job.metadata.namespace].append(fate)
    found: list[Group] = []
    for queue in sorted(by_queue):
        users = by_queue[queue]
        found.append(_group(queue, "", [fate for of_user in users.values() for fate in of_user]))
        if len(users) > 1:
            found += [_group(queue, user, users[user]) for user in sorted(users)]
    return found


def _group(queue: str, user: str, fates: Sequence[Fate]) -> Group:
    waits = sorted(wait for fate in fates if (wait := fate.wait_seconds) is not None)
    return Group(
        queue=queue,
        user=user,
        jobs=len(fates),
        mean_wait_seconds=mean(waits) if waits else None,
        tail_wait_seconds=waits[math.ceil(TAIL * len(waits)) - 1] if waits else None,
        moves=sum(fate.moves for fate in fates),
        missed=sum(fate.missed for fate in fates),
        waiting=len(fates) - len(waits),
    )


def _side(side: Played) -> dict[str, object]:
    return {
        "seconds": side.seconds,
        "utilisation": dict(side.utilisation),
        "isCut": side.is_cut,
        "groups": [group.to_wire() for group in groups_of(side)],
    }


# --- the file ---------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Where each job is, and its fields as texts."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidObject(f"{path}: is larger than {MAX_BYTES >> 20} MiB; split it")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidObject(f"{path}: cannot be read: {error}") from error
    lines = text.splitlines()
    is_json = next((line.lstrip().startswith("{") for line in lines if line.strip()), False)
    yield from _json_rows(path, lines) if is_json else _csv_rows(path, lines)


def _json_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            item: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidObject(f"{where}: is not JSON: {error}") from error
        if not isinstance(item, dict):
            raise InvalidObject(f'{where}: must be an object, such as {{"submit": 0, "seconds": 600}}')
        fields = cast(dict[str, object], item)
        _refuse_unknown(where, fields)
        yield where, {name: str(value) for name, value in fields.items() if value is not None}


def _csv_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    reader = csv.DictReader(lines)
    try:
        _refuse_unknown(f"{path}: line 1", dict.fromkeys(reader.fieldnames or ()))
        for fields in reader:
            where = f"{path}: line {reader.line_num}"
            if None in fields:
                raise InvalidObject(f"{where}: has more fields than the header")
            yield where, {name: value.strip() for name, value in fields.items() if value is not None and value.strip()}
    except csv.Error as error:
        raise InvalidObject(f"{path}: line {reader.line_num}: is not CSV: {error}") from error


def _refuse_unknown(where: str, fields: Mapping[str, object]) -> None:
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise InvalidObject(f"{where}: {unknown[0]}: there is no such field; known are {', '.join(FIELDS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A job as it is written."""

    where: str
    fields: Mapping[str, str]
    queues: set[str]

    def submit_seconds(self) -> float:
        """Since some moment, the same for all."""
        return self._moment("submit")

    def arrival(self, number: int, now: datetime, first: float) -> Arrival:
        come = now + timedelta(seconds=self.submit_seconds() - first)
        due = now + timedelta(seconds=self._moment("due") - first) if "due" in self.fields else None
        queue = self.fields.get("queue", DEFAULT_QUEUE)
        if queue not in self.queues:
            raise InvalidObject(f"{self.where}: queue: there is no {queue}; there are {', '.join(sorted(self.queues))}")
        seconds = self._number("seconds")
        if not 0 < seconds <= MAX_SECONDS:
            raise InvalidObject(f"{self.where}: seconds: must be above 0 and at most {MAX_SECONDS:.0f}")
        return Arrival(job=self._job(f"trace-{number}", queue, come), come=come, train_seconds=seconds, due=due)

    def _job(self, name: str, queue: str, come: datetime) -> QLoRAJob:
        classes = tuple(filter(None, self.fields.get("gpuClass", "").split(CLASSES_SEPARATOR)))
        priority = self._number("priority") if "priority" in self.fields else 0.0
        if not priority.is_integer():
            raise InvalidObject(f"{self.where}: priority: must be a whole number")
        if not classes and "vram" not in self.fields:
            raise InvalidObject(
                f"{self.where}: gpuClass: say which it may have, such as 24Gi/48Gi, or vram, such as 40Gi"
            )
        try:
            resources = ResourcesSpec(gpu_classes=classes, vram=self.fields.get("vram", "auto"))
            return QLoRAJob(
                metadata=ObjectMeta(
                    name=name,
                    namespace=self.fields.get("user", "default"),
                    uid=f"uid-{name}",
                    resource_version="1",
                    creation_timestamp=come,
                ),
                spec=QLoRAJobSpec(
                    model=ModelSource(source="file:///trace"),
                    dataset=DatasetSource(source="file:///trace.jsonl"),
                    training=TrainingSpec(max_steps=STEPS),
                    resources=resources,
                    queue=queue,
                    priority=int(priority),
                ),
                status=_prepared(),
            )
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise InvalidObject(f"{self.where}: {_FIELD_OF.get(name, name)}: {first['msg']}") from error

    def _moment(self, name: str) -> float:
        """Seconds, or an RFC 3339 time."""
        text = self._text(name)
        try:
            return _finite(text)
        except ValueError:
            pass
        try:
            time = datetime.fromisoformat(text)
        except ValueError as error:
            raise InvalidObject(
                f"{self.where}: {name}: must be seconds or a time, such as 2026-11-30T17:00:00Z"
            ) from error
        return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()

    def _number(self, name: str) -> float:
        try:
            return _finite(self._text(name))
        except ValueError as error:
            raise InvalidObject(f"{self.where}: {name}: must be a number, not {self._text(name)!r}") from error

    def _text(self, name: str) -> str:
        if name not in self.fields:
            raise InvalidObject(f"{self.where}: {name}: is missing")
        return self.fields[name]


_FIELD_OF = {"namespace": "user", "gpu_classes": "gpuClass"}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or abs(number) > 1e11:
        raise ValueError("no moment")
    return number


def _prepared() -> QLoRAJobStatus:
    result = PrepareResult(
        digest=f"sha256:{'0' * 64}",
        uri="file:///trace",
        model=SMALL,
        train_records=STEPS,
        train_sequences=STEPS,
        train_tokens=STEPS,
        supervised_tokens=STEPS,
        eval_records=0,
        eval_sequences=0,
        steps=STEPS,
    )
    return QLoRAJobStatus(prepared=result, attempts_total=1)
