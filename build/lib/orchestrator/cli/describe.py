"""`qlora describe`: one job's whole story on one page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Console
from rich.text import Text

from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.cli.output import Cell, columns
from orchestrator.cli.plan_view import length_words, plan_words
from orchestrator.cli.words import NOTHING, duration, figure, gib, progress_word, since, state_style, state_word
from orchestrator.core.commands import Event

ATTEMPT_HEADER = ("#", "STAGE", "GPU", "STARTED", "TOOK", "EXIT", "REASON", "MESSAGE")
EVENT_HEADER = ("AGE", "REASON", "MESSAGE")
LABEL_WIDTH = 14
MAX_EVENTS = 20
"""The newest so many events are shown."""
Field = tuple[str, str]


def show_job(console: Console, job: QLoRAJob, events: Sequence[tuple[str, Event]], now: datetime) -> None:
    """The page."""
    console.print(Text.assemble((job.key, "bold"), "  ", (state_word(job), state_style(job))))
    if job.status.summary:
        console.print(Text(job.status.summary))
    _print_section(console, "Spec", _spec_fields(job))
    _print_section(console, "Data and model", _prepared_fields(job))
    _print_section(console, "Estimate", _estimate_fields(job))
    _print_section(console, "Progress", _progress_fields(job))
    _print_section(console, "Result", _result_fields(job))
    conditions = [
        [
            Cell(text=condition.type.value),
            Cell(text=condition.status, style="good" if condition.status == "True" else ""),
            Cell(text=condition.reason.value),
            Cell(text=since(condition.last_transition_time, now)),
            Cell(text=condition.message, style="quiet"),
        ]
        for condition in job.status.conditions
    ]
    _print_table(console, "Conditions", ("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"), conditions)
    _print_table(console, _attempts_title(job), ATTEMPT_HEADER, [_attempt_row(a, now) for a in job.status.attempts])
    _print_table(
        console, "Events", EVENT_HEADER, [_event_row(time, event, now) for time, event in events[-MAX_EVENTS:]]
    )


def spec_digest(job: QLoRAJob) -> str:
    """SHA-256 of the spec's canonical JSON: two jobs with one digest ask for the same."""
    canonical = json.dumps(job.spec.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _spec_fields(job: QLoRAJob) -> Iterator[Field]:
    spec = job.spec
    yield "digest", spec_digest(job)
    yield "model", f"{spec.model.source} ({spec.model.revision})"
    yield "dataset", f"{spec.dataset.source} ({spec.dataset.format})"
    length = f"{spec.training.max_steps} steps" if spec.training.max_steps else f"{spec.training.epochs} epochs"
    yield (
        "training",
        (
            f"{length}, batch {spec.training.global_batch_size} x {spec.training.sequence_length} tokens, "
            f"learning rate {spec.training.learning_rate}, rank {spec.adapter.rank}"
        ),
    )
    yield "resources", f"vram {spec.resources.vram}, classes {', '.join(spec.resources.gpu_classes) or 'any'}"
    yield "queue", f"{spec.queue}, priority {spec.priority}"


def _prepared_fields(job: QLoRAJob) -> Iterator[Field]:
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
    if prepared.truncated_records or prepared.dropped_records:
        yield "too long", f"{prepared.truncated_records} truncated, {prepared.dropped_records} dropped"
    for warning in prepared.warnings:
        yield "warning", warning
    yield "digest", prepared.digest


def _estimate_fields(job: QLoRAJob) -> Iterator[Field]:
    estimate = job.status.estimate
    if estimate is None:
        return
    yield "GPU class", f"{estimate.gpu_class}: {gib(estimate.peak_bytes)} of {gib(estimate.usable_bytes)} usable"
    yield "plan", plan_words(estimate.plan)
    yield "length", length_words(estimate)


def _progress_fields(job: QLoRAJob) -> Iterator[Field]:
    status = job.status
    if status.prepared is not None:
        yield "steps", progress_word(job)
    if (progress := status.progress) is not None:
        yield "loss", f"{figure(progress.loss)}, held out {figure(progress.eval_loss)}"
        if progress.tokens_per_second is not None:
            yield "speed", f"{progress.tokens_per_second:.0f} tokens/s"
    if status.checkpoint is not None:
        yield "checkpoint", f"step {status.checkpoint.step} at {status.checkpoint.uri}"
    if status.evictions:
        yield "evictions", ", ".join(f"{reason} {count}" for reason, count in status.evictions.items())
    if status.gpu_seconds:
        yield "GPU time", duration(status.gpu_seconds)


def _result_fields(job: QLoRAJob) -> Iterator[Field]:
    status = job.status
    if status.adapter_uri is not None:
        yield "adapter", status.adapter_uri
    if status.adapter_digest is not None:
        yield "digest", status.adapter_digest
    if status.mlflow.run_id is not None:
        yield "MLflow run", f"{status.mlflow.run_id} ({status.mlflow.run_status or 'unknown'})"
    if status.mlflow.model_version is not None:
        yield "model", f"models:/{status.mlflow.registered_model}/{status.mlflow.model_version}"


def _attempts_title(job: QLoRAJob) -> str:
    total, shown = job.status.attempts_total, len(job.status.attempts)
    return f"Attempts (the last {shown} of {total})" if total > shown else "Attempts"


def _attempt_row(attempt: Attempt, now: datetime) -> list[Cell]:
    end = attempt.finish_time or now
    took = (end - attempt.start_time).total_seconds() if attempt.start_time is not None else None
    reason = attempt.reason or attempt.stop_reason
    return [
        Cell(text=str(attempt.number)),
        Cell(text=attempt.stage),
        Cell(text=attempt.gpu_class or NOTHING),
        Cell(text=since(attempt.start_time, now) + (" ago" if attempt.start_time else "")),
        Cell(text=duration(took)),
        Cell(text=NOTHING if attempt.exit_code is None else str(attempt.exit_code)),
        Cell(text=reason.value if reason is not None else NOTHING),
        Cell(text=attempt.message, style="quiet"),
    ]


def _event_row(time: str, event: Event, now: datetime) -> list[Cell]:
    style = "waiting" if event.warning else ""
    age = since(datetime.fromisoformat(time), now)
    return [Cell(text=age), Cell(text=event.reason.value, style=style), Cell(text=event.message, style="quiet")]


def _print_section(console: Console, title: str, fields: Iterator[Field]) -> None:
    lines = [Text.assemble((f"  {label:<{LABEL_WIDTH}}", "label"), value) for label, value in fields]
    if lines:
        console.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            console.print(line, overflow="fold")


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    if not rows:
        return
    console.print(Text(f"\n{title}", style="bold"))
    width = console.width - 2 if console.is_terminal else None
    for line in columns(header, rows, width=width):
        console.print(Text("  ") + line, no_wrap=True, overflow="ignore", crop=False)
