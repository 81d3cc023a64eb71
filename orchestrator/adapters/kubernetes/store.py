"""QLoRAJobs, QLoRAQueues and QLoRASweeps in a Kubernetes API server: `ports.Store` over the CRDs.

Rules:

- Status is written by PUT to its own subresource, spec and metadata by merge patch, both with the resource version that
  was read: neither touches the other, and a stale write is refused. After a refusal the object is read anew, so that a
  view that missed something is put right by the write that it misled.
- RELEASE_FINALIZER keeps a job that holds a GPU, or whose MLflow run waits for its last status (`core/job/finalizer`),
  so deleting it waits for the controller. It is on before the status says so. Prepare and publish stages need no such
  care, because the garbage collector ends their pods with the job.
- `start` turns on caches; before it every read asks the server, which is what a short-lived client wants.
- The same finalizer keeps a sweep whose MLflow run waits for its end (`core/sweep/finalizer`). When its object has
  gone, the garbage collector deletes its trials.
- An object that does not parse (a newer version wrote it) is reported, fails nobody else, and can still be stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from operator import attrgetter

from pydantic.alias_generators import to_snake

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.events import Recorder
from orchestrator.adapters.kubernetes.objects import (
    Parser,
    job_wire,
    metadata_wire,
    queue_status_wire,
    status_wire,
    sweep_status_wire,
    sweep_wire,
)
from orchestrator.adapters.kubernetes.watch import EVERYWHERE, Cache, Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    IMMUTABLE_SPEC_FIELDS,
    RELEASE_FINALIZER,
    QLoRAJob,
    QLoRAJobSpec,
    QLoRAJobStatus,
)
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus
from orchestrator.core.commands import Event
from orchestrator.core.job.finalizer import FINALIZERS, finalizers_with, is_at_rest, without
from orchestrator.core.snapshot import UnreadableJob, UnreadableSweep
from orchestrator.core.sweep import finalizer as of_sweeps
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound

log = logging.getLogger(__name__)

JOBS, QUEUES, SWEEPS = "qlorajobs", "qloraqueues", "qlorasweeps"
RELEASE_TRIES = 3
"""Attempts to take it off a finished job while others write to the job."""


class KubernetesStore:
    """`ports.Store` on one API server; all namespaces, or some."""

    def __init__(
        self,
        api: KubeApi,
        *,
        namespaces: Sequence[str] = EVERYWHERE,
        watched: Sequence[str] | None = None,
        reporter: str = "client",
        changes: Changes | None = None,
    ) -> None:
        """`watched` are the namespaces whose changes are waited for, where that is not all that is read."""
        self._api = api
        self._namespaces = namespaces
        self._watched = namespaces if watched is None else watched
        self._changes = changes or Changes()
        self._parser = Parser()
        self._recorder = Recorder(api, reporter)
        self._jobs: Cache[QLoRAJob | UnreadableJob] = Cache(
            api, API_VERSION, JOBS, self._parser.job_or_unreadable, self._changes, namespaces=self._watched
        )
        self._queues: Cache[QLoRAQueue] = Cache(api, API_VERSION, QUEUES, self._parser.queue, self._changes)
        self._sweeps: Cache[QLoRASweep | UnreadableSweep] = Cache(
            api, API_VERSION, SWEEPS, self._parser.sweep, self._changes, namespaces=self._watched
        )

    def start(self) -> None:
        """Read from caches from now on, which watches keep up to date, and send events without waiting for them."""
        self._queues.start()
        self._sweeps.start()
        self._jobs.start()
        self._recorder.start()

    def refresh(self) -> None:
        """See everything that anybody wrote before this call, and finish what a controller left that was killed."""
        self._queues.refresh()
        self._sweeps.refresh()
        self._jobs.refresh()
        for job in self.list_jobs():
            gone = set(job.metadata.finalizers).difference(finalizers_with(job, job.status))
            if gone:
                self._release_left(job, gone)

    def _release_left(self, job: QLoRAJob, gone: Set[str]) -> None:
        """Whoever takes over must not fail for one object that the server takes no write of."""
        try:
            self._release_finished(job, gone)
        except InvalidObject as error:
            log.warning("the finalizer stays on job %s, of which the server takes no write: %s", job.key, error)

    def close(self) -> None:
        """Send what is left to tell, and watch no more."""
        self._recorder.close()
        self._jobs.close()
        self._sweeps.close()
        self._queues.close()

    # jobs

    def list_jobs(self, namespace: str | None = None) -> Sequence[QLoRAJob]:
        """All jobs that parse, ordered by namespace and name."""
        found = (job for job in self._all_jobs(namespace) if isinstance(job, QLoRAJob))
        return sorted((job for job in found if namespace in (None, job.metadata.namespace)), key=_place)

    def list_unreadable(self) -> Sequence[UnreadableJob]:
        """The jobs that do not parse, as far as they can be told; the log says why they do not."""
        found = (job for job in self._all_jobs() if isinstance(job, UnreadableJob))
        return sorted(found, key=lambda job: job.key)

    def get_job(self, namespace: str, name: str) -> QLoRAJob:
        """One job; raises NotFound, or InvalidObject if it does not parse."""
        if self._jobs.started:
            known = self._jobs.find(f"{namespace}/{name}")
            if isinstance(known, QLoRAJob):
                return known
        return self.read_job(namespace, name)

    def read_job(self, namespace: str, name: str) -> QLoRAJob:
        """One job as the server has it now, whatever the view says, which is put right."""
        try:
            item = self._api.get(path_of(API_VERSION, JOBS, namespace, name))
        except NotFound as error:
            self._jobs.drop(f"{namespace}/{name}")
            raise NotFound(f"there is no job {namespace}/{name}") from error
        job = self._parser.job_or_unreadable(item)
        self._jobs.correct(item, job)
        return job if isinstance(job, QLoRAJob) else self._parser.job(item)  # which says why it cannot

    def create_job(self, job: QLoRAJob) -> QLoRAJob:
        """Store a new job; raises AlreadyExists, InvalidObject."""
        try:
            return self._took(self._api.create(path_of(API_VERSION, JOBS, job.metadata.namespace), job_wire(job)))
        except AlreadyExists as error:
            raise AlreadyExists(
                f"job {job.key} exists already; choose another name, or delete it first: qlora delete "
                f"{job.metadata.name}"
            ) from error

    def update_job(self, job: QLoRAJob) -> QLoRAJob:
        """Replace spec and our part of the metadata, never the status."""
        stored = self.read_job(job.metadata.namespace, job.metadata.name)
        if stored.metadata.resource_version != job.metadata.resource_version:
            raise Conflict(f"job {job.key} changed since it was read; read it again and repeat the change")
        _require_mutable(stored, job)
        meta = metadata_wire(job)
        # Only what differs: what is kept of the others here may be cut.
        meta["annotations"] = _changes(stored.metadata.annotations, meta["annotations"])
        meta["labels"] = _changes(stored.metadata.labels, meta["labels"])
        meta["resourceVersion"] = job.metadata.resource_version
        # With nulls, which take a field away; the immutable ones are not sent at all.
        immutable = set(QLoRAJobSpec.model_fields) & set(IMMUTABLE_SPEC_FIELDS)
        spec = job.spec.model_dump(mode="json", by_alias=True, exclude=immutable)
        try:
            return self._took(self._api.patch(self._path(job), {"metadata": meta, "spec": spec}))
        except Conflict as error:
            raise Conflict(f"job {job.key} changed since it was read; read it again and repeat the change") from error

    def update_status(self, job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJob:
        """Replace the status alone."""
        held, wanted = job.metadata.finalizers, finalizers_with(job, status)
        new, gone = set(wanted).difference(held), set(held).difference(wanted)
        if new and job.metadata.deletion_timestamp is None:
            job = self._set_finalizers(job, (*held, *(finalizer for finalizer in wanted if finalizer in new)))
        try:
            written = self._took(self._api.replace(f"{self._path(job)}/status", status_wire(job, status)))
        except (NotFound, Conflict) as error:
            raise self._put_right(job, error) from error
        return self._release_finished(written, gone) if gone else written

    def release(self, job: QLoRAJob) -> None:
        """Take RELEASE_FINALIZER off a job that owes nothing any more."""
        current = self.get_job(job.metadata.namespace, job.metadata.name)
        if current.metadata.uid == job.metadata.uid and RELEASE_FINALIZER in current.metadata.finalizers:
            self._release_finished(current, {RELEASE_FINALIZER})

    def release_unreadable(self, namespace: str, name: str, uid: str) -> None:
        """Take our finalizer off a job that does not parse."""
        path = path_of(API_VERSION, JOBS, namespace, name)
        try:
            meta: Json = self._api.get(path)["metadata"]
            listed: list[str] = meta.get("finalizers") or []
            left = [finalizer for finalizer in listed if finalizer not in FINALIZERS]
            version = {"uid": uid, "resourceVersion": meta["resourceVersion"]}
            self._api.patch(path, {"metadata": {"finalizers": left, **version}})
        except NotFound:
            self._jobs.drop(f"{namespace}/{name}")

    def delete_job(self, namespace: str, name: str) -> None:
        """Remove the object; one that is busy is marked, and removed by the call that finds it at rest.

        One that does not parse is marked: the controller lets it go.
        """
        try:
            job = self.read_job(namespace, name)
        except InvalidObject:
            self._api.delete(path_of(API_VERSION, JOBS, namespace, name))
            return
        is_marked = job.metadata.deletion_timestamp is not None
        held = not set(FINALIZERS).isdisjoint(job.metadata.finalizers)
        if not is_at_rest(job):
            if not is_marked:
                self._remove(job if held else self._set_finalizers(job, (*job.metadata.finalizers, RELEASE_FINALIZER)))
            return
        if held:
            job = self._set_finalizers(job, without(job, FINALIZERS))
        if not is_marked:
            self._remove(job)

    # queues

    def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        if self._queues.started:
            found: Iterable[QLoRAQueue | None] = self._queues.values().values()
        else:
            found = [self._parser.queue(item) for item in self._api.get(path_of(API_VERSION, QUEUES))["items"]]
        return sorted((queue for queue in found if queue is not None), key=lambda queue: queue.metadata.name)

    def apply_queue(self, queue: QLoRAQueue) -> QLoRAQueue:
        """Create a queue, or replace its spec."""
        name = queue.metadata.name
        body: Json = {"apiVersion": API_VERSION, "kind": queue.kind, "metadata": {"name": name}}
        body["spec"] = queue.spec.to_wire()
        try:
            item = self._api.create(path_of(API_VERSION, QUEUES), body)
        except AlreadyExists:
            spec = queue.spec.model_dump(mode="json", by_alias=True)  # with nulls, which take a field away
            item = self._api.patch(path_of(API_VERSION, QUEUES, name=name), {"spec": spec})
        return self._took_queue(item)

    def update_queue_status(self, queue: QLoRAQueue, status: QLoRAQueueStatus) -> QLoRAQueue:
        """Replace the status alone."""
        name = queue.metadata.name
        path = path_of(API_VERSION, QUEUES, name=name)
        try:
            return self._took_queue(self._api.replace(f"{path}/status", queue_status_wire(queue, status)))
        except NotFound as error:
            self._queues.drop(f"/{name}")
            raise NotFound(f"there is no queue {name}") from error

    def delete_queue(self, name: str) -> None:
        """Remove a queue."""
        try:
            self._api.delete(path_of(API_VERSION, QUEUES, name=name))
        except NotFound as error:
            raise NotFound(f"there is no queue {name}") from error
        finally:
            self._queues.drop(f"/{name}")

    def _took_queue(self, item: Json) -> QLoRAQueue:
        taken = self._parser.queue(item)
        self._queues.put(item, taken)
        if taken is None:
            name = item["metadata"]["name"]
            raise InvalidObject(f"queue {name} as the server stored it cannot be read by this version")
        return taken

    # sweeps

    def list_sweeps(self, namespace: str | None = None) -> Sequence[QLoRASweep]:
        """All sweeps that parse, ordered by namespace and name."""
        known = (sweep for sweep in self._all_sweeps(namespace) if isinstance(sweep, QLoRASweep))
        return sorted((sweep for sweep in known if namespace in (None, sweep.metadata.namespace)), key=_place)

    def list_unreadable_sweeps(self) -> Sequence[UnreadableSweep]:
        """The sweeps that do not parse; the log says why they do not."""
        return sorted((s for s in self._all_sweeps() if isinstance(s, UnreadableSweep)), key=lambda sweep: sweep.key)

    def _all_sweeps(self, namespace: str | None = None) -> Iterable[QLoRASweep | UnreadableSweep | None]:
        if self._sweeps.started:
            return self._sweeps.values().values()
        read = self._namespaces if namespace is None or self._namespaces != EVERYWHERE else (namespace,)
        pages = (self._api.get(path_of(API_VERSION, SWEEPS, each))["items"] for each in read)
        return [self._parser.sweep(item) for page in pages for item in page]

    def create_sweep(self, sweep: QLoRASweep) -> QLoRASweep:
        """Store a new sweep; raises AlreadyExists, InvalidObject."""
        path = path_of(API_VERSION, SWEEPS, sweep.metadata.namespace)
        try:
            return self._took_sweep(self._api.create(path, sweep_wire(sweep)))
        except AlreadyExists as error:
            raise AlreadyExists(
                f"sweep {sweep.key} exists already; choose another name, or delete it first: "
                f"qlora sweeps delete {sweep.metadata.name}"
            ) from error

    def update_sweep_status(self, sweep: QLoRASweep, status: QLoRASweepStatus) -> QLoRASweep:
        """Replace the status alone."""
        wanted = of_sweeps.finalizers_with(sweep, status)
        if RELEASE_FINALIZER in wanted and RELEASE_FINALIZER not in sweep.metadata.finalizers:
            sweep = self._took_sweep(self._set_sweep_finalizers(sweep, wanted))
        path = path_of(API_VERSION, SWEEPS, *_place(sweep))
        try:
            written = self._took_sweep(self._api.replace(f"{path}/status", sweep_status_wire(sweep, status)))
        except NotFound as error:
            self._sweeps.drop(sweep.key)
            raise NotFound(f"there is no sweep {sweep.key}") from error
        if wanted == written.metadata.finalizers:
            return written
        try:
            return self._took_sweep(self._set_sweep_finalizers(written, wanted))
        except (NotFound, Conflict):
            return written  # whoever sees it still there takes it off

    def release_sweep(self, sweep: QLoRASweep | UnreadableSweep) -> None:
        """Take our finalizer off a sweep that is marked, one that does not parse included."""
        item = self._set_sweep_finalizers(sweep, of_sweeps.released(sweep.metadata))
        self._keep_sweep(item)

    def _set_sweep_finalizers(self, sweep: QLoRASweep | UnreadableSweep, finalizers: tuple[str, ...]) -> Json:
        meta = {"finalizers": list(finalizers), "uid": sweep.metadata.uid}
        meta["resourceVersion"] = sweep.metadata.resource_version
        path = path_of(API_VERSION, SWEEPS, sweep.metadata.namespace, sweep.metadata.name)
        try:
            return self._api.patch(path, {"metadata": meta})
        except NotFound as error:
            self._sweeps.drop(sweep.key)
            raise NotFound(f"there is no sweep {sweep.key}") from error

    def cancel_sweep(self, namespace: str, name: str) -> None:
        """Ask for its end."""
        asked = {"metadata": {"annotations": {CANCEL_ANNOTATION: "true"}}}
        try:
            self._took_sweep(self._api.patch(path_of(API_VERSION, SWEEPS, namespace, name), asked))
        except NotFound as error:
            raise NotFound(f"there is no sweep {namespace}/{name}; list them with: qlora sweeps") from error

    def delete_sweep(self, namespace: str, name: str) -> None:
        """Remove a sweep, or mark one that a finalizer keeps; the garbage collector deletes its trials after it."""
        try:
            left = self._api.delete(path_of(API_VERSION, SWEEPS, namespace, name))
        except NotFound as error:
            self._sweeps.drop(f"{namespace}/{name}")
            raise NotFound(f"there is no sweep {namespace}/{name}; list them with: qlora sweeps") from error
        if left.get("kind") == "QLoRASweep":
            self._keep_sweep(left)
        else:
            self._sweeps.drop(f"{namespace}/{name}")

    def _keep_sweep(self, item: Json) -> QLoRASweep | UnreadableSweep | None:
        taken = self._parser.sweep(item)
        meta: Json = item["metadata"]
        if meta.get("deletionTimestamp") is not None and not meta.get("finalizers"):
            self._sweeps.drop(f"{meta['namespace']}/{meta['name']}")  # nothing held it any more: this was its end
        else:
            self._sweeps.put(item, taken)
        return taken

    def _took_sweep(self, item: Json) -> QLoRASweep:
        taken = self._keep_sweep(item)
        if not isinstance(taken, QLoRASweep):
            raise InvalidObject(
                f"sweep {item['metadata']['name']} as the server stored it cannot be read by this version"
            )
        return taken

    # events

    def record_event(self, job: QLoRAJob, event: Event) -> None:
        """Tell people."""
        self._recorder.record(job, event)

    def list_events(self, namespace: str, name: str) -> Sequence[tuple[str, Event]]:
        """A job's events that the server still has, oldest first."""
        return self._recorder.list(self.get_job(namespace, name))

    def wait_for_change(self, since: str, timeout_seconds: float) -> str:
        """Block until something that is watched changes."""
        self._jobs.start()
        return self._changes.wait(since, timeout_seconds)

    # pieces

    def _all_jobs(self, namespace: str | None = None) -> Iterable[QLoRAJob | UnreadableJob]:
        """All that there are, possibly in more namespaces than in the one that is asked for."""
        if self._jobs.started and (self._watched == self._namespaces or namespace in self._watched):
            return self._jobs.values().values()
        read = self._namespaces if namespace is None or self._namespaces != EVERYWHERE else (namespace,)
        pages = (self._api.get(path_of(API_VERSION, JOBS, namespace))["items"] for namespace in read)
        return [self._parser.job_or_unreadable(item) for page in pages for item in page]

    def _took(self, item: Json) -> QLoRAJob:
        job = self._parser.job(item)
        if job.metadata.deletion_timestamp is not None and not job.metadata.finalizers:
            self._jobs.drop(job.key)  # nothing held it any more, so this write was its end
        else:
            self._jobs.put(item, job)
        return job

    def _path(self, job: QLoRAJob) -> str:
        return path_of(API_VERSION, JOBS, job.metadata.namespace, job.metadata.name)

    def _remove(self, job: QLoRAJob) -> None:
        """Delete this very object; the server answers with what is left of it while others hold it."""
        gone = self._api.delete(self._path(job), {"preconditions": {"uid": job.metadata.uid}})
        if gone.get("kind") == job.kind and gone["metadata"].get("finalizers"):
            self._took(gone)
        else:
            self._jobs.drop(job.key)

    def _release_finished(self, job: QLoRAJob, gone: Set[str]) -> QLoRAJob:
        """Take finalizers of ours off, with the last of which an object that is marked is gone.

        The status is written all the same; where this comes to nothing, it is tried again later.
        """
        for _ in range(RELEASE_TRIES):
            try:
                return self._set_finalizers(job, without(job, gone))
            except Conflict:
                job = self.read_job(job.metadata.namespace, job.metadata.name)
            except NotFound:
                break
        log.info("the finalizer stays on job %s for now", job.key)
        return job

    def _set_finalizers(self, job: QLoRAJob, finalizers: tuple[str, ...]) -> QLoRAJob:
        meta = {"finalizers": list(finalizers), "uid": job.metadata.uid}
        meta["resourceVersion"] = job.metadata.resource_version
        try:
            return self._took(self._api.patch(self._path(job), {"metadata": meta}))
        except (NotFound, Conflict) as error:
            raise self._put_right(job, error) from error

    def _put_right(self, job: QLoRAJob, error: NotFound | Conflict) -> NotFound | Conflict:
        """Makes the view hold what the server has of a job whose write was refused; returns the refusal to raise."""
        if self._jobs.started and isinstance(error, Conflict):
            self.read_job(job.metadata.namespace, job.metadata.name)
        elif isinstance(error, NotFound):
            self._jobs.drop(job.key)
            return NotFound(f"there is no job {job.key}")
        return Conflict(f"job {job.key} changed since it was read")


def _changes(stored: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str | None]:
    """What a merge patch says to get from the one to the other."""
    changed: dict[str, str | None] = {key: value for key, value in wanted.items() if stored.get(key) != value}
    return changed | {key: None for key in stored if key not in wanted}


def _require_mutable(stored: QLoRAJob, wanted: QLoRAJob) -> None:
    """The API server checks the same; here the field is named in the same words as everywhere."""
    for field in IMMUTABLE_SPEC_FIELDS:
        value_of = attrgetter(to_snake(field))
        if value_of(stored.spec) != value_of(wanted.spec):
            raise InvalidObject(
                f"spec.{field} of job {wanted.key} cannot be changed, because the work done so far depends on it; "
                f"submit a new job instead"
            )


def _place(thing: QLoRAJob | QLoRASweep) -> tuple[str, str]:
    return thing.metadata.namespace, thing.metadata.name
