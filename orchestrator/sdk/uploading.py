"""Data files of this machine for a job of a cluster: they go into the bucket of the job's store.

A claim cannot be reached from here, so such a job is refused with what would do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.adapters.job_store import uploads
from orchestrator.api.job import QLoRAJob
from orchestrator.core.job.addresses import refused_file
from orchestrator.errors import InvalidObject
from orchestrator.sdk import extras
from orchestrator.sdk.preflight import check_dataset, local_path
from orchestrator.sdk.words import gib

BUCKET_SCHEME = "s3://"
TOLD_PERCENT = 10


def check_upload(job: QLoRAJob, default_store: str) -> None:
    """Raise InvalidObject for files that no pod would see, as far as they cannot be uploaded."""
    if _store(job, default_store) is None:
        refusal = refused_file(job.spec)
        if refusal is not None:
            raise InvalidObject(
                f"{refusal}; or name the cluster's bucket, for data files to be uploaded: QLORA_STORE_URI=s3://..."
            )
        return
    for field, path in _files(job).items():
        check_dataset(f"spec.dataset.{field}", path.as_uri())
    if (refusal := refused_file(_with_sources(job, dict.fromkeys(_files(job), "s3://bucket/data")).spec)) is not None:
        raise InvalidObject(refusal)


def uploaded(job: QLoRAJob, default_store: str, told: Callable[[str], None]) -> QLoRAJob:
    """The job with its data files in the bucket; raises InvalidObject, MissingExtra, StoreUnavailable."""
    store, files = _store(job, default_store), _files(job)
    if store is None or not files:
        return job
    extras.require("s3", purpose="uploading data")
    sources: dict[str, str] = {}
    for field, path in files.items():
        uri = sources[field] = uploads.upload_uri(path, store, job.metadata.namespace)
        uploads.upload(path, uri, _Progress(path.name, told))
    return _with_sources(job, sources)


class _Progress:
    """Says at every tenth how much of a file is sent."""

    def __init__(self, name: str, told: Callable[[str], None]) -> None:
        self._name, self._told, self._said = name, told, -1

    def __call__(self, sent: int, size: int) -> None:
        tenth = 100 * sent // size // TOLD_PERCENT
        if tenth > self._said:
            self._said = tenth
            self._told(f"uploading {self._name}: {tenth * TOLD_PERCENT} % of {gib(size)}")


def _store(job: QLoRAJob, default_store: str) -> str | None:
    uri = job.spec.store.uri if job.spec.store is not None else default_store
    return uri if uri.startswith(BUCKET_SCHEME) else None


def _files(job: QLoRAJob) -> dict[str, Path]:
    """The data files of this machine, by the field of `spec.dataset` that names them."""
    named = {"source": job.spec.dataset.source, "eval_source": job.spec.dataset.eval_source or ""}
    return {field: path for field, uri in named.items() if (path := local_path(uri)) is not None}


def _with_sources(job: QLoRAJob, sources: dict[str, str]) -> QLoRAJob:
    dataset = job.spec.dataset.model_copy(update=sources)
    return job.model_copy(update={"spec": job.spec.model_copy(update={"dataset": dataset})})
