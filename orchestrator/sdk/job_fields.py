"""A job's facts as pairs of a label and words: what `qlora describe` and the service's page show. All are pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime

from orchestrator.api.formats import formats_of
from orchestrator.api.job import ObjectiveSpec, QLoRAJob
from orchestrator.sdk.words import duration, figure, gib, length_words, plan_words, progress_word, since

Field = tuple[str, str]


def spec_digest(job: QLoRAJob) -> str:
    """SHA-256 of the spec's canonical JSON: two jobs with one digest ask for the same."""
    canonical = json.dumps(job.spec.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def spec_fields(job: QLoRAJob) -> Iterator[Field]:
    """What is asked for."""
    spec = job.settled_spec
    yield "digest", spec_digest(job)
    yield "model", f"{spec.model.source} ({spec.model.revision})"
    yield "dataset", f"{spec.dataset.source} ({spec.dataset.format})"
    length = f"{spec.training.max_steps} steps" if spec.training.max_steps else f"{spec.training.epochs} epochs"
    yield (
        "training",
        (
            f"{length}, batch {spec.training.global_batch_size} x {spec.training.sequence_length} tokens, "
            f"learning rate {spec.training.learning_rate}, {_rank(job)}"
            f"{_objective(spec.training.objective)}"
        ),
    )
    yield "resources", f"vram {spec.resources.vram}, classes {', '.join(spec.resources.gpu_classes) or 'any'}"
    if spec.adapter.start is not None:
        yield "goes on from", spec.adapter.start
    yield "queue", f"{spec.queue}, priority {spec.priority}"


def prepared_fields(job: QLoRAJob) -> Iterator[Field]:
    """What prepare found."""
    prepared = job.status.prepared
    if prepared is None:
        return
    yield "model", f"{prepared.model.architecture}, revision {prepared.model.revision}"
    yield (
        "training",
        (
            f"{prepared.train_records} records in {prepared.train_sequences} sequences, "
            f"{prepared.train_tokens} tokens, {prepared.supervised_tokens} with loss"
        ),
    )
    yield "held out", f"{prepared.eval_records} records in {prepared.eval_sequences} sequences"
    if prepared.start is not None:
        yield "goes on from", f"{prepared.start.source}, {prepared.start.digest}"
    if prepared.truncated_records or prepared.dropped_records:
        yield "too long", f"{prepared.truncated_records} truncated, {prepared.dropped_records} dropped"
    for warning in prepared.warnings:
        yield "warning", warning
    yield "digest", prepared.digest


def estimate_fields(job: QLoRAJob) -> Iterator[Field]:
    """What it is expected to take."""
    estimate = job.status.estimate
    if estimate is None:
        return
    yield "GPU class", f"{estimate.gpu_class}: {gib(estimate.peak_bytes)} of {gib(estimate.usable_bytes)} usable"
    yield "plan", plan_words(estimate.plan)
    yield "length", length_words(estimate)


def progress_fields(job: QLoRAJob, now: datetime) -> Iterator[Field]:
    """How far it is."""
    status = job.status
    if status.prepared is not None:
        yield "steps", progress_word(job)
    if (progress := status.progress) is not None:
        yield "loss", f"{figure(progress.loss)}, held out {figure(progress.eval_loss)}"
        if progress.tokens_per_second is not None:
            yield "speed", f"{progress.tokens_per_second:.0f} tokens/s"
    if progress is not None and (progress.skipped_steps or progress.rollbacks):
        yield "unstable", f"{progress.skipped_steps or 0} updates left out, {progress.rollbacks or 0} rollbacks"
    if status.checkpoint is not None:
        yield "checkpoint", f"step {status.checkpoint.step} at {status.checkpoint.uri}"
    if progress is not None and progress.warning is not None and status.active_attempt is not None:
        yield "warning", progress.warning
    if status.evictions:
        yield "evictions", ", ".join(f"{reason} {count}" for reason, count in status.evictions.items())
    budget = status.eviction_budget
    if budget is not None and budget.left is not None:
        renewed = "" if budget.renew_time is None else f", one more in {since(now, budget.renew_time)}"
        yield "moves left", f"{budget.left}{renewed}"
    if status.gpu_seconds:
        yield "GPU time", duration(status.gpu_seconds)


def told_fields(job: QLoRAJob) -> Iterator[Field]:
    """Who is told of the job, and what is not; what is outstanding has a table."""
    if job.spec.notifications:
        yield "webhooks", ", ".join(webhook.name for webhook in job.spec.notifications)
    told = job.status.notifications
    if told is not None:
        lost = f", {told.undelivered} deliveries given up" if told.undelivered else ""
        yield "told", f"{told.total} events, {len(told.outstanding)} outstanding{lost}"


def result_fields(job: QLoRAJob) -> Iterator[Field]:
    """Where its results are."""
    status = job.status
    if status.adapter_uri is not None:
        yield "adapter", status.adapter_uri
    if status.adapter_digest is not None:
        yield "digest", status.adapter_digest
    if status.mlflow.run_id is not None:
        yield "MLflow run", f"{status.mlflow.run_id} ({status.mlflow.run_status or 'unknown'})"
    if status.mlflow.model_version is not None:
        yield "model", f"models:/{status.mlflow.registered_model}/{status.mlflow.model_version}"
    yield from formats_of(job).items()


def _rank(job: QLoRAJob) -> str:
    is_unknown = job.spec.adapter.start is not None and job.status.start is None
    return "the rank of the adapter that it goes on from" if is_unknown else f"rank {job.settled_spec.adapter.rank}"


def _objective(objective: ObjectiveSpec) -> str:
    """What is not said of the usual one."""
    if objective.type == "sft":
        return ""
    smoothed = f", label smoothing {objective.label_smoothing}" if float(objective.label_smoothing) else ""
    return f", {objective.type} with beta {objective.beta}{smoothed}"
