"""Data files, and folders of a model and an adapter, of this machine for a job of a cluster: they go into the bucket of
the job's store.

A claim cannot be reached from here, so such a job is refused with what would do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.adapters.job_store import uploads
from orchestrator.api.job import QLoRAJob
from orchestrator.api.uris import file_path, file_uri
from orchestrator.core.job.addresses import refused_file
from orchestrator.errors import InvalidObject
from orchestrator.sdk import extras
from orchestrator.sdk.preflight import check_adapter, check_dataset, check_model
from orchestrator.sdk.words import gib

BUCKET_SCHEME = "s3://"
MODEL, ADAPTER = "model", "adapter"
TOLD_PERCENT = 10


def check_upload(job: QLoRAJob, default_store: str) -> None:
    """Raise InvalidObject for files that no pod would see, as far as they cannot be uploaded."""
    if _store(job, default_store) is None:
        refusal = refused_file(job.spec)
        if refusal is not None:
            raise InvalidObject(
                f"{refusal}. What is here is uploaded to a bucket alone: QLORA_STORE_URI=s3://..., or spec.store.uri; "
                "into a claim a pod of yours brings it (kubectl cp)"
            )
        return
    if file_path(job.spec.model.source) is not None:
        check_model(job.spec.model)
    check_adapter(job.spec.adapter)
    for field, path in _named(job).items():
        if field not in (MODEL, ADAPTER):
            check_dataset(f"spec.dataset.{field}", file_uri(path))
        uploads.refuse_large(path)
    if (refusal := refused_file(_with_sources(job, dict.fromkeys(_named(job), "s3://bucket/data")).spec)) is not None:
        raise InvalidObject(refusal)


def uploaded(job: QLoRAJob, default_store: str, told: Callable[[str], None]) -> QLoRAJob:
    """The job with what it names here in the bucket; raises InvalidObject, MissingExtra, StoreUnavailable."""
    store, named = _store(job, default_store), _named(job)
    if store is None or not named:
        return job
    extras.require("s3", purpose="uploading data and models")
    sources: dict[str, str] = {}
    for field, path in named.items():
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


def _named(job: QLoRAJob) -> dict[str, Path]:
    """What of this machine the job names: folders of model and adapter, and data files by the field of
    `spec.dataset`."""
    dataset, start = job.spec.dataset, job.spec.adapter.start_uri
    uris = {MODEL: job.spec.model.source, ADAPTER: start or ""}
    uris |= {"source": dataset.source, "eval_source": dataset.eval_source or ""}
    return {field: path for field, uri in uris.items() if (path := file_path(uri)) is not None}


def _with_sources(job: QLoRAJob, sources: dict[str, str]) -> QLoRAJob:
    data = {field: uri for field, uri in sources.items() if field not in (MODEL, ADAPTER)}
    spec = job.spec.model_copy(update={"dataset": job.spec.dataset.model_copy(update=data)})
    if MODEL in sources:
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": sources[MODEL]})})
    if ADAPTER in sources:
        adapter = spec.adapter.model_copy(update={"start": sources[ADAPTER]})
        spec = spec.model_copy(update={"adapter": adapter})
    return job.model_copy(update={"spec": spec})
