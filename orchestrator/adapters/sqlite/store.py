"""The object store of the embedded service: job, queue and sweep objects as JSON rows in one SQLite database.

The controller, the CLI and the SDK open it at the same time, from any process and thread. Its rules are those of a
Kubernetes API server, so that everything above it is the same there:

- every write takes the next value of one counter as its resource version, in one transaction;
- spec and status are written apart, each with the resource version that the writer has read (compare and swap);
- what a job's results depend on is immutable (`IMMUTABLE_SPEC_FIELDS`);
- deleting an object that is not at rest marks it, and the controller removes it once it is;
- deleting a sweep deletes its trials, once its own MLflow run has its end; no trial is made of a sweep that is gone;
- a row that does not parse (a newer version wrote it) is reported, fails nobody else, and can still be deleted.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic.alias_generators import to_snake

from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    IMMUTABLE_SPEC_FIELDS,
    RELEASE_FINALIZER,
    ObjectMeta,
    QLoRAJob,
    QLoRAJobStatus,
    new_uid,
)
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus
from orchestrator.core.commands import Event
from orchestrator.core.job.finalizer import FINALIZERS, finalizers_with, is_at_rest, released, without
from orchestrator.core.job.unreadable import read_leniently
from orchestrator.core.snapshot import UnreadableJob, UnreadableSweep
from orchestrator.core.sweep import finalizer as of_sweeps
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound, StoreUnavailable
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

JOB, QUEUE, SWEEP = "QLoRAJob", "QLoRAQueue", "QLoRASweep"
QUEUE_NAMESPACE = ""  # queues are cluster-wide
REPORTED_KEPT = 10_000
"""Rows that do not parse of which it is remembered that the log has told."""
Object = TypeVar("Object", QLoRAJob, QLoRAQueue, QLoRASweep)
Row = tuple[Any, ...]  # Any: sqlite3 rows are untyped

SCHEMA = """
CREATE TABLE IF NOT EXISTS counter (only INTEGER PRIMARY KEY CHECK (only = 1), value INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO counter VALUES (1, 0);
CREATE TABLE IF NOT EXISTS objects (
    kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, resource_version INTEGER NOT NULL,
    body TEXT NOT NULL, PRIMARY KEY (kind, namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, name TEXT NOT NULL, time TEXT NOT NULL, reason TEXT NOT NULL,
    message TEXT NOT NULL, warning INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS events_by_job ON events (namespace, name, id);
"""
OBJECTS = "SELECT namespace, name, body FROM objects"


class SqliteStore:
    """`ports.Store` on one database file. Safe to share between threads: each has its own connection."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.database
        self._busy_seconds = settings.store_busy_seconds
        self._poll_seconds = settings.store_poll_seconds
        self._events_limit = settings.events_limit
        self._local = threading.local()
        self._reported: dict[tuple[str, str, str], int] = {}
        self._listed: Mapping[tuple[str, str], tuple[str, QLoRAJob]] = {}
        """The jobs that were listed last, by namespace and name, and the bodies that they were parsed from: to parse a
        thousand takes most of a second, and between two looks few change."""
        with self._answers():
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection().executescript(SCHEMA)

    # jobs

    def list_jobs(self, namespace: str | None = None) -> Sequence[QLoRAJob]:
        """All jobs that parse, ordered by namespace and name."""
        known, found = self._listed, dict[tuple[str, str], tuple[str, QLoRAJob]]()
        for row in self._rows(JOB):
            key, body = (row[0], row[1]), row[2]
            before = known.get(key)
            job = before[1] if before is not None and before[0] == body else self._parse(QLoRAJob, row)
            if job is not None:
                found[key] = body, job
        self._listed = found
        return [job for _, job in found.values() if namespace in (None, job.metadata.namespace)]

    def list_unreadable(self) -> Sequence[UnreadableJob]:
        """The jobs that do not parse, as far as they can be told; the log says why they do not."""
        return [_unreadable_job(row) for row in self._rows(JOB) if self._parse(QLoRAJob, row) is None]

    def get_job(self, namespace: str, name: str) -> QLoRAJob:
        """One job; raises NotFound, or InvalidObject if its row does not parse."""
        with self._answers():
            return self._get_job(self._connection(), namespace, name)

    def create_job(self, job: QLoRAJob) -> QLoRAJob:
        """Store a new job; uid, versions, times and status are the store's to fill."""
        with self._transaction() as (connection, version):
            meta = job.metadata.model_copy(
                update={
                    "uid": new_uid(),
                    "generation": 1,
                    "resource_version": str(version),
                    "creation_timestamp": datetime.now(UTC),
                    "deletion_timestamp": None,
                }
            )
            created = _checked(job.model_copy(update={"metadata": meta, "status": QLoRAJobStatus()}))
            if _find(connection, JOB, meta.namespace, meta.name) is not None:
                raise AlreadyExists(
                    f"job {job.key} exists already; choose another name, or delete it first: qlora delete {meta.name}"
                )
            if job.sweep is not None:
                sweep = self._get_sweep(connection, meta.namespace, job.sweep.name)
                if sweep.metadata.uid != job.sweep.uid:
                    raise NotFound(f"the sweep of job {job.key} is gone, and another has its name")
            # An earlier job of this name may have left events.
            connection.execute("DELETE FROM events WHERE namespace = ? AND name = ?", (meta.namespace, meta.name))
            _put(connection, JOB, meta.namespace, created)
            return created

    def update_job(self, job: QLoRAJob) -> QLoRAJob:
        """Replace spec and metadata; removes the object if it was only kept by the finalizers that are gone now."""
        with self._transaction() as (connection, version):
            stored = self._get_current(connection, job)
            _require_mutable(stored, job)
            changed = stored.spec != job.spec
            kept = ("uid", "creation_timestamp", "deletion_timestamp", "namespace", "name")
            meta = job.metadata.model_copy(
                update={
                    **{field: getattr(stored.metadata, field) for field in kept},
                    "resource_version": str(version),
                    "generation": stored.metadata.generation + changed,
                }
            )
            updated = _checked(stored.model_copy(update={"metadata": meta, "spec": job.spec}))
            if stored.metadata.finalizers and meta.deletion_timestamp and _at_rest(updated):
                _remove(connection, JOB, updated.metadata.namespace, updated.metadata.name)
            else:
                _put(connection, JOB, meta.namespace, updated)
            return updated

    def update_status(self, job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJob:
        """Replace the status alone."""
        with self._transaction() as (connection, version):
            stored = self._get_current(connection, job)
            update = {"resource_version": str(version), "finalizers": finalizers_with(stored, status)}
            meta = stored.metadata.model_copy(update=update)
            updated = _checked(stored.model_copy(update={"metadata": meta, "status": status}))
            _put(connection, JOB, meta.namespace, updated)
            return updated

    def release(self, job: QLoRAJob) -> None:
        """Take RELEASE_FINALIZER off a job that owes nothing any more; with it goes an object that is marked."""
        with self._transaction() as (connection, version):
            stored = self._get_job(connection, job.metadata.namespace, job.metadata.name)
            if stored.metadata.uid != job.metadata.uid or RELEASE_FINALIZER not in stored.metadata.finalizers:
                return
            update = {"resource_version": str(version), "finalizers": released(stored)}
            left = stored.model_copy(update={"metadata": stored.metadata.model_copy(update=update)})
            if left.metadata.deletion_timestamp and _at_rest(left):
                _remove(connection, JOB, left.metadata.namespace, left.metadata.name)
            else:
                _put(connection, JOB, left.metadata.namespace, left)

    def release_unreadable(self, namespace: str, name: str, uid: str) -> None:
        """Remove a row that is marked and does not parse."""
        with self._transaction() as (connection, _):
            row = _find(connection, JOB, namespace, name)
            if row is not None and self._parse(QLoRAJob, row) is None and _unreadable_job(row).uid == uid:
                _remove(connection, JOB, namespace, name)

    def delete_job(self, namespace: str, name: str) -> None:
        """Remove a job at rest; mark any other as deleted, which cancels it, one that does not parse included."""
        with self._transaction() as (connection, version):
            row = _find(connection, JOB, namespace, name)
            if row is not None and self._parse(QLoRAJob, row) is None:
                _mark_unreadable(connection, row, version)
                return
            _delete(connection, self._get_job(connection, namespace, name), version)

    # queues

    def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues that parse, ordered by name."""
        parsed = (self._parse(QLoRAQueue, row) for row in self._rows(QUEUE))
        return [queue for queue in parsed if queue is not None]

    def apply_queue(self, queue: QLoRAQueue) -> QLoRAQueue:
        """Create a queue, or replace its spec."""
        with self._transaction() as (connection, version):
            row = _find(connection, QUEUE, QUEUE_NAMESPACE, queue.metadata.name)
            stored = self._parse(QLoRAQueue, row) if row is not None else None
            before = stored.metadata if stored else None
            meta = queue.metadata.model_copy(
                update={
                    "uid": before.uid if before else new_uid(),
                    "creation_timestamp": before.creation_timestamp if before else datetime.now(UTC),
                    "generation": before.generation + (stored.spec != queue.spec) if before and stored else 1,
                    "resource_version": str(version),
                }
            )
            status = stored.status if stored else QLoRAQueueStatus()
            applied = _checked(queue.model_copy(update={"metadata": meta, "status": status}))
            _put(connection, QUEUE, QUEUE_NAMESPACE, applied)
            return applied

    def update_queue_status(self, queue: QLoRAQueue, status: QLoRAQueueStatus) -> QLoRAQueue:
        """Replace the status alone."""
        name = queue.metadata.name
        with self._transaction() as (connection, version):
            row = _find(connection, QUEUE, QUEUE_NAMESPACE, name)
            stored = self._parse(QLoRAQueue, row) if row is not None else None
            if row is None:
                raise NotFound(f"there is no queue {name}")
            if stored is None or stored.metadata.resource_version != queue.metadata.resource_version:
                raise Conflict(f"queue {name} changed since it was read")
            meta = stored.metadata.model_copy(update={"resource_version": str(version)})
            updated = _checked(stored.model_copy(update={"metadata": meta, "status": status}))
            _put(connection, QUEUE, QUEUE_NAMESPACE, updated)
            return updated

    def delete_queue(self, name: str) -> None:
        """Remove a queue, one that does not parse included."""
        with self._transaction() as (connection, _):
            if _find(connection, QUEUE, QUEUE_NAMESPACE, name) is None:
                raise NotFound(f"there is no queue {name}")
            _remove(connection, QUEUE, QUEUE_NAMESPACE, name)

    # sweeps

    def list_sweeps(self, namespace: str | None = None) -> Sequence[QLoRASweep]:
        """All sweeps that parse, ordered by namespace and name."""
        rows = self._rows(SWEEP)
        parsed = (self._parse(QLoRASweep, row) for row in rows if namespace in (None, row[0]))
        return [sweep for sweep in parsed if sweep is not None]

    def create_sweep(self, sweep: QLoRASweep) -> QLoRASweep:
        """Store a new sweep; uid, versions, times and status are the store's to fill."""
        with self._transaction() as (connection, version):
            update = {"uid": new_uid(), "generation": 1, "resource_version": str(version)}
            update |= {"creation_timestamp": datetime.now(UTC), "deletion_timestamp": None}
            meta = sweep.metadata.model_copy(update=update)
            created = _checked(sweep.model_copy(update={"metadata": meta, "status": QLoRASweepStatus()}))
            if _find(connection, SWEEP, meta.namespace, meta.name) is not None:
                raise AlreadyExists(
                    f"sweep {sweep.key} exists already; choose another name, or delete it first: "
                    f"qlora sweeps delete {meta.name}"
                )
            _put(connection, SWEEP, meta.namespace, created)
            return created

    def list_unreadable_sweeps(self) -> Sequence[UnreadableSweep]:
        """The sweeps that do not parse; the log says why they do not."""
        found = (_unreadable_sweep(row) for row in self._rows(SWEEP) if self._parse(QLoRASweep, row) is None)
        return [sweep for sweep in found if sweep is not None]

    def update_sweep_status(self, sweep: QLoRASweep, status: QLoRASweepStatus) -> QLoRASweep:
        """Replace the status alone; removes the object if it was only kept by the finalizer that is gone now."""
        with self._transaction() as (connection, version):
            stored = self._get_sweep(connection, sweep.metadata.namespace, sweep.metadata.name)
            if stored.metadata.resource_version != sweep.metadata.resource_version:
                raise Conflict(f"sweep {sweep.key} changed since it was read")
            update = {"resource_version": str(version), "finalizers": of_sweeps.finalizers_with(stored, status)}
            meta = stored.metadata.model_copy(update=update)
            updated = _checked(stored.model_copy(update={"metadata": meta, "status": status}))
            if meta.deletion_timestamp is not None and not meta.finalizers:
                self._remove_sweep(connection, meta.namespace, meta.name, version)
            else:
                _put(connection, SWEEP, meta.namespace, updated)
            return updated

    def release_sweep(self, sweep: QLoRASweep | UnreadableSweep) -> None:
        """Remove a sweep that is marked, one that does not parse included; what others hold stays."""
        namespace, name = sweep.metadata.namespace, sweep.metadata.name
        with self._transaction() as (connection, version):
            row = _find(connection, SWEEP, namespace, name)
            stored = self._parse(QLoRASweep, row) if row is not None else None
            known = stored or (_unreadable_sweep(row) if row is not None else None)
            if known is None or known.metadata.uid != sweep.metadata.uid:
                raise NotFound(_no_sweep(namespace, name))
            left = of_sweeps.released(known.metadata)
            if stored is None or not left:
                self._remove_sweep(connection, namespace, name, version)
                return
            meta = stored.metadata.model_copy(update={"resource_version": str(version), "finalizers": left})
            _put(connection, SWEEP, namespace, stored.model_copy(update={"metadata": meta}))

    def cancel_sweep(self, namespace: str, name: str) -> None:
        """Ask for its end."""
        with self._transaction() as (connection, version):
            stored = self._get_sweep(connection, namespace, name)
            asked = {**stored.metadata.annotations, CANCEL_ANNOTATION: "true"}
            meta = stored.metadata.model_copy(update={"annotations": asked, "resource_version": str(version)})
            _put(connection, SWEEP, namespace, stored.model_copy(update={"metadata": meta}))

    def delete_sweep(self, namespace: str, name: str) -> None:
        """Remove a sweep, one that does not parse included, with its trials; mark one that a finalizer keeps."""
        with self._transaction() as (connection, version):
            row = _find(connection, SWEEP, namespace, name)
            if row is None:
                raise NotFound(_no_sweep(namespace, name))
            stored = self._parse(QLoRASweep, row)
            if stored is None or not stored.metadata.finalizers:
                self._remove_sweep(connection, namespace, name, version)
            elif stored.metadata.deletion_timestamp is None:
                update = {"deletion_timestamp": datetime.now(UTC), "resource_version": str(version)}
                meta = stored.metadata.model_copy(update=update)
                _put(connection, SWEEP, namespace, stored.model_copy(update={"metadata": meta}))

    def _remove_sweep(self, connection: sqlite3.Connection, namespace: str, name: str, version: int) -> None:
        """As the garbage collector of a cluster does: its trials go with it, as far as they are at rest."""
        _remove(connection, SWEEP, namespace, name)
        rows = connection.execute(OBJECTS + " WHERE kind = ? AND namespace = ?", (JOB, namespace)).fetchall()
        for row in rows:
            job = self._parse(QLoRAJob, row)
            if job is not None and job.sweep is not None and job.sweep.name == name:
                _delete(connection, job, version)

    def _get_sweep(self, connection: sqlite3.Connection, namespace: str, name: str) -> QLoRASweep:
        row = _find(connection, SWEEP, namespace, name)
        if row is None:
            raise NotFound(_no_sweep(namespace, name))
        try:
            return QLoRASweep.model_validate_json(row[2])
        except ValidationError as error:
            raise InvalidObject(_unreadable(SWEEP, row, error)) from error

    # events

    def record_event(self, job: QLoRAJob, event: Event) -> None:
        """Keep an event; a job's oldest ones make room."""
        where = (job.metadata.namespace, job.metadata.name)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._transaction() as (connection, _):
            connection.execute(
                "INSERT INTO events (namespace, name, time, reason, message, warning) VALUES (?, ?, ?, ?, ?, ?)",
                (*where, now, event.reason.value, event.message, int(event.warning)),
            )
            connection.execute(
                "DELETE FROM events WHERE namespace = ? AND name = ? AND id NOT IN"
                " (SELECT id FROM events WHERE namespace = ? AND name = ? ORDER BY id DESC LIMIT ?)",
                (*where, *where, self._events_limit),
            )

    def list_events(self, namespace: str, name: str) -> Sequence[tuple[str, Event]]:
        """A job's events with their RFC 3339 times, oldest first."""
        query = "SELECT time, reason, message, warning FROM events WHERE namespace = ? AND name = ? ORDER BY id"
        with self._answers():
            rows: list[Row] = self._connection().execute(query, (namespace, name)).fetchall()
        return [(row[0], Event(reason=Reason(row[1]), message=row[2], warning=bool(row[3]))) for row in rows]

    def wait_for_change(self, since: str, timeout_seconds: float) -> str:
        """Block until an object or event was written after `since`, or the timeout; the new cursor."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            with self._answers():
                now = str(self._connection().execute("SELECT value FROM counter").fetchone()[0])
            remaining = deadline - time.monotonic()
            if now != (since or "0") or remaining <= 0:
                return now
            time.sleep(min(self._poll_seconds, remaining))

    # machinery

    def _connection(self) -> sqlite3.Connection:
        found: _ThreadConnection | None = getattr(self._local, "found", None)
        if found is None:
            found = self._local.found = _ThreadConnection(self._path, self._busy_seconds)
        return found.connection

    @contextmanager
    def _answers(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(
                f"the object database {self._path} did not answer: {error}; check that its folder is writable, the "
                f"disk is not full, and no other program holds the file"
            ) from error

    @contextmanager
    def _transaction(self) -> Generator[tuple[sqlite3.Connection, int]]:
        """A write transaction and the resource version that its writes carry."""
        with self._answers():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                version: int = connection.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchone()[0]
                yield connection, version
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _rows(self, kind: str) -> list[Row]:
        query = f"{OBJECTS} WHERE kind = ? ORDER BY namespace, name"
        with self._answers():
            return self._connection().execute(query, (kind,)).fetchall()

    def _get_job(self, connection: sqlite3.Connection, namespace: str, name: str) -> QLoRAJob:
        row = _find(connection, JOB, namespace, name)
        if row is None:
            raise NotFound(f"there is no job {namespace}/{name}; list them with: qlora get")
        try:
            return QLoRAJob.model_validate_json(row[2])
        except ValidationError as error:
            raise InvalidObject(_unreadable(JOB, row, error)) from error

    def _get_current(self, connection: sqlite3.Connection, job: QLoRAJob) -> QLoRAJob:
        """The stored job, if the writer has read this very version."""
        stored = self._get_job(connection, job.metadata.namespace, job.metadata.name)
        if stored.metadata.resource_version != job.metadata.resource_version:
            raise Conflict(
                f"job {job.key} changed since it was read (resource version {stored.metadata.resource_version}, "
                f"not {job.metadata.resource_version or 'unset'}); read it again and repeat the change"
            )
        return stored

    def _parse(self, kind: type[Object], row: Row) -> Object | None:
        try:
            return kind.model_validate_json(row[2])
        except ValidationError as error:
            key, body = (kind.__name__, row[0], row[1]), hash(row[2])
            if self._reported.get(key) != body:
                self._reported[key] = body
                while len(self._reported) > REPORTED_KEPT:
                    self._reported.pop(next(iter(self._reported)), None)
                log.error("%s", _unreadable(kind.__name__, row, error))
            return None


class _ThreadConnection:
    """A connection that is closed when its thread, or the store, is gone."""

    def __init__(self, path: Path, busy_seconds: float) -> None:
        # autocommit: transactions are begun by hand, as IMMEDIATE, so that no reader ever upgrades to a writer
        self.connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")

    def __del__(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()


def _find(connection: sqlite3.Connection, kind: str, namespace: str, name: str) -> Row | None:
    query = f"{OBJECTS} WHERE kind = ? AND namespace = ? AND name = ?"
    return connection.execute(query, (kind, namespace, name)).fetchone()


def _put(connection: sqlite3.Connection, kind: str, namespace: str, thing: QLoRAJob | QLoRAQueue | QLoRASweep) -> None:
    meta = thing.metadata
    # With nulls: where a field has a default, null is a choice of its own (tracking.alias).
    body = thing.model_dump_json(by_alias=True)
    row = (kind, namespace, meta.name, int(meta.resource_version), body)
    connection.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", row)


def _unreadable_job(row: Row) -> UnreadableJob:
    return replace(read_leniently(_json(row), namespace=row[0], name=row[1]), held=True)


def _unreadable_sweep(row: Row) -> UnreadableSweep | None:
    """Nothing where not even its metadata parse: deleting removes it at once."""
    item = _json(row)
    meta = cast(dict[str, object], item).get("metadata") if isinstance(item, dict) else None
    try:
        return UnreadableSweep(metadata=ObjectMeta.model_validate(meta))
    except ValidationError:
        return None


def _json(row: Row) -> object:
    """The row's body as JSON types; nothing where it is not even that."""
    try:
        return json.loads(row[2])
    except (ValueError, RecursionError):
        return None


def _mark_unreadable(connection: sqlite3.Connection, row: Row, version: int) -> None:
    """Mark a row as deleted that does not parse; one that is no object goes at once."""
    item = _json(row)
    meta = cast(dict[str, object], item).get("metadata") if isinstance(item, dict) else None
    if not isinstance(meta, dict):
        _remove(connection, JOB, row[0], row[1])
        return
    known = cast(dict[str, object], meta)
    if known.get("deletionTimestamp") is None:
        known["deletionTimestamp"] = datetime.now(UTC).isoformat()
    where = (json.dumps(item), version, JOB, row[0], row[1])
    connection.execute(
        "UPDATE objects SET body = ?, resource_version = ? WHERE kind = ? AND namespace = ? AND name = ?", where
    )


def _delete(connection: sqlite3.Connection, stored: QLoRAJob, version: int) -> None:
    """Remove a job at rest; mark any other."""
    if _at_rest(stored):
        _remove(connection, JOB, stored.metadata.namespace, stored.metadata.name)
    elif stored.metadata.deletion_timestamp is None:
        update = {"deletion_timestamp": datetime.now(UTC), "resource_version": str(version)}
        meta = stored.metadata.model_copy(update=update)
        _put(connection, JOB, stored.metadata.namespace, stored.model_copy(update={"metadata": meta}))


def _no_sweep(namespace: str, name: str) -> str:
    return f"there is no sweep {namespace}/{name}; list them with: qlora sweeps"


def _remove(connection: sqlite3.Connection, kind: str, namespace: str, name: str) -> None:
    where = (namespace, name)
    connection.execute("DELETE FROM objects WHERE kind = ? AND namespace = ? AND name = ?", (kind, *where))
    if kind == JOB:
        connection.execute("DELETE FROM events WHERE namespace = ? AND name = ?", where)


def _at_rest(job: QLoRAJob) -> bool:
    """Whether nothing outside would be forgotten with the object: no stage, no open run, no other's finalizer."""
    return is_at_rest(job) and not without(job, FINALIZERS)


def _require_mutable(stored: QLoRAJob, wanted: QLoRAJob) -> None:
    for field in IMMUTABLE_SPEC_FIELDS:
        value_of = attrgetter(to_snake(field))
        if value_of(stored.spec) != value_of(wanted.spec):
            raise InvalidObject(
                f"spec.{field} of job {stored.key} cannot be changed, because the work done so far depends on it; "
                f"submit a new job instead"
            )


def _checked(thing: Object) -> Object:
    """The object as a reader will see it; whatever was built around the validators is caught before it is stored."""
    try:
        return type(thing).model_validate_json(thing.model_dump_json(by_alias=True, warnings=False))
    except ValidationError as error:
        raise InvalidObject(f"{thing.kind} {thing.metadata.name} breaks a rule: {error}") from error


def _unreadable(kind: str, row: Row, error: ValidationError) -> str:
    key = f"{row[0]}/{row[1]}".lstrip("/")
    return (
        f"the stored {kind} {key} does not parse, so nothing is started for it: {error}; "
        f"run the version of the service that wrote it, repair the row, or delete it"
    )
