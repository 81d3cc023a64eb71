"""QLoRAJobs, QLoRAQueues and QLoRASweeps between the API server's JSON and the contract's types.

Objects are projected: what the contract does not know (managed fields, annotations of others) is left out. Ten thousand
jobs are kept in memory, and most of what they say is the same, so equal parts are shared for as long as a job has them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import TypeVar
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

from pydantic import BaseModel, ValidationError

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.watch import key_of
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import REQUEST_ANNOTATIONS, Attempt, ObjectMeta, QLoRAJob, QLoRAJobSpec, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus
from orchestrator.core.job.unreadable import read_leniently
from orchestrator.core.snapshot import UnreadableJob, UnreadableSweep
from orchestrator.errors import InvalidObject

log = logging.getLogger(__name__)

OURS = "qlora.dev/"

LABELS_KEPT = ANNOTATIONS_KEPT = 64
ANNOTATION_CHARACTERS_KEPT = 2048
"""Of ours, those that the service reads are a sentence at most; the rest is for people, and the server keeps it."""

NAME_SETS_KEPT = 4096
"""Sets of fields that are set, of which statuses that the service writes have some hundred."""

Part = TypeVar("Part", bound=BaseModel)


class Parser:
    """Parses what the API server tells; of equal parts there is one."""

    def __init__(self) -> None:
        # Weak: whoever submits and deletes large jobs must not fill the memory.
        self._parts: WeakKeyDictionary[BaseModel, ReferenceType[BaseModel]] = WeakKeyDictionary()
        self._specs: WeakValueDictionary[bytes, QLoRAJobSpec] = WeakValueDictionary()
        self._names: dict[frozenset[str], set[str]] = {}

    def job(self, item: Json) -> QLoRAJob:
        """The job in the contract's terms; raises InvalidObject for one that this version cannot read."""
        meta: Json = item["metadata"]
        try:
            job = QLoRAJob.model_validate(
                {
                    "apiVersion": item.get("apiVersion", API_VERSION),  # lists leave these two out
                    "kind": item.get("kind", "QLoRAJob"),
                    "metadata": _projected(meta),
                    "spec": self._spec(item.get("spec")),
                    "status": item.get("status", {}),
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidObject(f"job {key_of(item)}: {where}: {first['msg']}") from error
        except (TypeError, ValueError, AttributeError, RecursionError) as error:  # of no shape that any version has
            raise InvalidObject(f"job {key_of(item)}: {type(error).__name__}: {error}") from error
        compact = job.model_copy(update={"status": self._compact(job.status)})
        self._share_names(compact.metadata, compact)
        return compact

    def job_or_unreadable(self, item: Json) -> QLoRAJob | UnreadableJob:
        """The same for a cache; what cannot be read is logged, once a version."""
        try:
            return self.job(item)
        except InvalidObject as error:
            log.error("%s; nothing is started for it, but what runs can be stopped and deleted", error)
            namespace, name = key_of(item).split("/", 1)
            return read_leniently(item, namespace=namespace, name=name)

    def queue(self, item: Json) -> QLoRAQueue | None:
        """The queue, or None for one that cannot be read."""
        try:
            told = {"spec": item.get("spec", {}), "status": item.get("status", {})}
            return QLoRAQueue.model_validate({"metadata": _projected(item["metadata"]), **told})
        except ValidationError as error:
            log.error("queue %s cannot be read by this version and is left alone: %s", item["metadata"]["name"], error)
            return None
        except (TypeError, ValueError, AttributeError, RecursionError):
            log.exception("queue %s is of no shape that any version has and is left alone", key_of(item))
            return None

    def sweep(self, item: Json) -> QLoRASweep | UnreadableSweep | None:
        """The sweep, as far as this version can read it; None for one of no shape that any version has."""
        try:
            meta = _projected(item["metadata"])
            told = {"spec": item.get("spec"), "status": item.get("status", {})}
            return QLoRASweep.model_validate({"metadata": meta, **told})
        except ValidationError as error:
            log.error("sweep %s cannot be read by this version and is left alone: %s", key_of(item), error)
        except (TypeError, ValueError, AttributeError, RecursionError):
            log.exception("sweep %s is of no shape that any version has and is left alone", key_of(item))
        try:
            return UnreadableSweep(metadata=ObjectMeta.model_validate(_projected(item["metadata"])))
        except (ValidationError, TypeError, ValueError, AttributeError, RecursionError):
            return None

    def _spec(self, wire: Json | None) -> QLoRAJobSpec | Json | None:
        """A spec that was seen before is not parsed again."""
        if not isinstance(wire, dict):
            return wire
        digest = sha256(json.dumps(wire, sort_keys=True).encode()).digest()
        known = self._specs.get(digest)
        if known is None:
            known = QLoRAJobSpec.model_validate(wire)
            parts = {name: self._shared(part) for name, part in known if isinstance(part, BaseModel)}
            known = known.model_copy(update=parts)
            self._specs[digest] = known
        return known

    def _compact(self, status: QLoRAJobStatus) -> QLoRAJobStatus:
        attempts = tuple(self._compact_attempt(attempt) for attempt in status.attempts)
        changes: dict[str, object] = {"attempts": attempts, "mlflow": self._shared(status.mlflow)}
        if status.prepared is not None:
            changes["prepared"] = status.prepared.model_copy(update={"model": self._shared(status.prepared.model)})
        if status.estimate is not None:
            changes["estimate"] = self._shared(status.estimate)
        compact = status.model_copy(update=changes)
        parts = (compact.prepared, compact.progress, compact.checkpoint)
        self._share_names(*compact.conditions, *attempts, *filter(None, parts), compact)
        return compact

    def _compact_attempt(self, attempt: Attempt) -> Attempt:
        return attempt.model_copy(update={"plan": self._shared(attempt.plan)}) if attempt.plan else attempt

    def _share_names(self, *models: BaseModel) -> None:
        """Let models with the same fields set have one set of their names: half of what a job takes are such sets.

        Frozen models do not change theirs, and copies get their own.
        """
        if len(self._names) > NAME_SETS_KEPT:
            self._names.clear()
        for model in models:
            names = model.model_fields_set
            object.__setattr__(model, "__pydantic_fields_set__", self._names.setdefault(frozenset(names), names))

    def _shared(self, part: Part) -> Part:
        known = self._parts.get(part)
        found = known() if known is not None else None
        if found is None:
            self._parts[part] = ref(part)
            return part
        assert type(found) is type(part), "only models of one type are equal"
        return found


def job_wire(job: QLoRAJob) -> Json:
    """A new job as it is sent."""
    return {
        "apiVersion": API_VERSION,
        "kind": job.kind,
        "metadata": {
            **metadata_wire(job),
            **({} if job.sweep is None else {"ownerReferences": [job.sweep.to_wire()]}),
        },
        "spec": job.spec.to_wire(),
    }


def sweep_wire(sweep: QLoRASweep) -> Json:
    """A new sweep as it is sent."""
    return {
        "apiVersion": API_VERSION,
        "kind": sweep.kind,
        "metadata": metadata_wire(sweep),
        "spec": sweep.spec.to_wire(),
    }


def metadata_wire(thing: QLoRAJob | QLoRASweep) -> Json:
    """Our part of the metadata, for a write."""
    meta = thing.metadata
    return {
        "name": meta.name,
        "namespace": meta.namespace,
        "labels": dict(meta.labels),
        "annotations": ours(meta.annotations),
        "finalizers": list(meta.finalizers),
    }


def status_wire(job: QLoRAJob, status: QLoRAJobStatus) -> Json:
    """A status as it is sent: of this very job, and only if it is still at the version that was read."""
    return _status_wire(job, status) | {"metadata": _version(job.metadata) | {"namespace": job.metadata.namespace}}


def queue_status_wire(queue: QLoRAQueue, status: QLoRAQueueStatus) -> Json:
    """The same of a queue, which is in no namespace."""
    return _status_wire(queue, status) | {"metadata": _version(queue.metadata)}


def sweep_status_wire(sweep: QLoRASweep, status: QLoRASweepStatus) -> Json:
    """The same of a sweep."""
    return _status_wire(sweep, status) | {
        "metadata": _version(sweep.metadata) | {"namespace": sweep.metadata.namespace}
    }


def _status_wire(
    thing: QLoRAJob | QLoRAQueue | QLoRASweep, status: QLoRAJobStatus | QLoRAQueueStatus | QLoRASweepStatus
) -> Json:
    return {"apiVersion": API_VERSION, "kind": thing.kind, "status": status.to_wire()}


def _version(meta: ObjectMeta) -> Json:
    return {"name": meta.name, "uid": meta.uid, "resourceVersion": meta.resource_version}


def ours(annotations: Mapping[str, str]) -> dict[str, str]:
    """Our annotations; those of others may be of any size."""
    return {key: value for key, value in annotations.items() if key.startswith(OURS)}


_METADATA = ("name", "namespace", "uid", "generation", "labels", "finalizers", "resourceVersion")
_TIMES = ("creationTimestamp", "deletionTimestamp")


def _projected(meta: Json) -> Json:
    """What the server accepts can be read: of labels and annotations it takes more, and longer ones, than are kept."""
    known = {key: meta[key] for key in (*_METADATA, *_TIMES) if key in meta}
    labels: Mapping[str, str] = meta.get("labels") or {}
    ours_first = sorted(labels.items(), key=lambda label: not label[0].startswith(OURS))
    kept = {key: value[:ANNOTATION_CHARACTERS_KEPT] for key, value in ours(meta.get("annotations") or {}).items()}
    owners: list[Json] = meta.get("ownerReferences") or []
    sweeps = [owner for owner in owners if (owner["apiVersion"], owner["kind"]) == (API_VERSION, "QLoRASweep")]
    return {
        **known,
        **({"ownerReferences": sweeps[:1]} if sweeps else {}),
        "labels": dict(ours_first[:LABELS_KEPT]),
        "annotations": dict(
            sorted(kept.items(), key=lambda pair: pair[0] not in REQUEST_ANNOTATIONS)[:ANNOTATIONS_KEPT]
        ),
    }
