"""Client: the service's verbs in Python.

    client = Client()
    job = client.submit("job.yaml")
    job.wait(timeout_seconds=3600)
    job.adapter(into="adapter")

Without arguments it is a client of the embedded service of this machine, as `Settings()` describes it. Objects are
checked here before they are stored, by the rules of the contract and by what this machine can know.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.errors import AlreadyExists, InvalidObject, NotFound, ServiceNotRunning
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.handle import JobHandle
from orchestrator.sdk.manifest import UserObject, load_manifest, parse_object
from orchestrator.sdk.preflight import check_files

JobLike = QLoRAJob | Mapping[str, object] | str | os.PathLike[str]
"""A job built in Python, its wire form, or the path of a manifest that holds exactly one."""
QueueLike = QLoRAQueue | Mapping[str, object] | str | os.PathLike[str]


class Client:
    """A client of one service; all methods raise OrchestratorError, and may be called from several threads."""

    def __init__(self, connection: Connection, *, namespace: str = "default") -> None:
        self.connection = connection
        self.namespace = namespace
        """Where jobs that name no namespace go, and where names are looked up."""

    def submit(self, job: JobLike) -> JobHandle:
        """Check and store a job; raises InvalidObject, AlreadyExists, ServiceNotRunning."""
        checked = self.check(job)
        if not self.connection.is_running():
            raise ServiceNotRunning("the service is not running, so nothing would run the job; start it: qlora up")
        return JobHandle(self.connection, self.connection.store.create_job(checked))

    def check(self, job: JobLike) -> QLoRAJob:
        """The job as `submit` would store it; raises what `submit` would raise, and changes nothing."""
        checked = self._in_namespace(_one(job, QLoRAJob))
        if self._exists(checked):
            raise AlreadyExists(
                f"job {checked.key} exists already; choose another metadata.name, "
                f"or remove it first: qlora delete {checked.metadata.name} -n {checked.metadata.namespace}"
            )
        check_files(checked, self.connection.default_store_uri)
        return checked

    def handle(self, name: str, *, namespace: str | None = None) -> JobHandle:
        """A handle on a job that exists; raises NotFound."""
        return JobHandle(self.connection, self.get(name, namespace=namespace))

    def get(self, name: str, *, namespace: str | None = None) -> QLoRAJob:
        """A job as it is now; raises NotFound."""
        return self.connection.store.get_job(namespace or self.namespace, name)

    def list(self, *, namespace: str | None = None, all_namespaces: bool = False) -> Sequence[QLoRAJob]:
        """Jobs, ordered by namespace and name."""
        return self.connection.store.list_jobs(None if all_namespaces else namespace or self.namespace)

    def delete(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a job; MLflow and the job's store keep what they have. Raises NotFound."""
        self.handle(name, namespace=namespace).delete()

    def apply_queue(self, queue: QueueLike) -> QLoRAQueue:
        """Create or replace a queue; raises InvalidObject."""
        return self.connection.store.apply_queue(_one(queue, QLoRAQueue))

    def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        return self.connection.store.list_queues()

    def _in_namespace(self, job: QLoRAJob) -> QLoRAJob:
        """The job in the client's namespace, unless it names its own."""
        if "namespace" in job.metadata.model_fields_set:
            return job
        metadata = job.metadata.model_copy(update={"namespace": self.namespace})
        return job.model_copy(update={"metadata": metadata})

    def _exists(self, job: QLoRAJob) -> bool:
        try:
            self.connection.store.get_job(job.metadata.namespace, job.metadata.name)
        except NotFound:
            return False
        return True
