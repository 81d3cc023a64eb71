"""Builders for objects that tests hand to adapters: everything has a default, a test names what it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.api.job import DatasetSource, ModelSource, ObjectMeta, QLoRAJob, QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.task import StageTask


def make_spec(**fields: Any) -> QLoRAJobSpec:
    """A spec of a small job."""
    defaults: dict[str, Any] = {
        "model": ModelSource(source="file:///models/tiny"),
        "dataset": DatasetSource(source="file:///data/tiny.jsonl"),
    }
    return QLoRAJobSpec(**{**defaults, **fields})


def make_job(name: str = "medical", namespace: str = "team-a", *, meta: dict[str, Any] | None = None, **spec: Any):
    """A job as a user would submit it."""
    metadata = ObjectMeta(name=name, namespace=namespace, **(meta or {}))
    return QLoRAJob(metadata=metadata, spec=make_spec(**spec))


def make_task(job: QLoRAJob, stage: Any = "train", attempt: int = 1, *, store: Path, **fields: Any) -> StageTask:
    """An attempt at a stage of a job."""
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0) if stage == "train" else None
    return StageTask(
        stage=stage,
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid=job.metadata.uid,
        attempt=attempt,
        spec=job.spec,
        store_uri=f"file://{store}",
        plan=plan,
        **fields,
    )
