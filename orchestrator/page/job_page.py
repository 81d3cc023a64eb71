"""What a job's page shows: why it is where it is, its course, memory, attempts and results. All functions are pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from orchestrator.adapters.mlflow.run_reader import Curve, RunFigures, Table
from orchestrator.api.formats import Metric
from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.core.explain import explain_recorded, explain_scheduled
from orchestrator.core.job.state_machine import TERMINAL_STATES, state_of
from orchestrator.page.charts import Chart, Points, TimeLine, chart, time_line
from orchestrator.page.outlook import Ahead
from orchestrator.page.overview import share_done, when
from orchestrator.page.sight import Sight
from orchestrator.page.view import View
from orchestrator.sdk.explanation import NOT_RUNNING, ON_RECORD
from orchestrator.sdk.job_fields import (
    Field,
    estimate_fields,
    prepared_fields,
    progress_fields,
    result_fields,
    spec_fields,
    told_fields,
)
from orchestrator.sdk.words import NOTHING, duration, figure, gib, progress_word, since, state_style, state_word
from orchestrator.sizing.hardware import GIB

MOST_ROWS = 10
"""Of a table of answers."""
MOST_CHARACTERS = 2000
"""Of one answer."""
EVALUATIONS = "eval/"
"""How the names of metrics of evaluations begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBar:
    """Of the card's memory: what was expected, what was measured."""

    told: str
    predicted: int
    """In percent of what the card offers, as the next."""
    measured: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One attempt."""

    number: int
    stage: str
    gpu: str
    started: str
    took: str
    exit: str
    reason: str
    message: str
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """One job."""

    key: str
    namespace: str
    queue: str
    state: str
    style: str
    why: tuple[str, ...]
    share: int
    progress: str
    when: str
    memory: MemoryBar | None
    charts: tuple[Chart, ...]
    time_line: TimeLine | None
    attempts: tuple[AttemptRow, ...]
    sections: tuple[tuple[str, tuple[Field, ...]], ...]
    evaluations: tuple[Field, ...]
    tables: tuple[tuple[str, Table, int], ...]
    """Title, table, and how many rows more there are."""
    mlflow_link: str
    mlflow_note: str


def job_page(
    job: QLoRAJob, view: View, ahead: Ahead | None, sight: Sight, run: tuple[RunFigures, str], mlflow_url: str
) -> JobPage:
    """What one account sees of a job that it may see."""
    figures, note = run
    now, state = view.snapshot.now, state_of(job.status)
    sections = (
        ("Progress", progress_fields(job, now)),
        ("Spec", spec_fields(job)),
        ("Data and model", prepared_fields(job)),
        ("Estimate", estimate_fields(job)),
        ("Result", result_fields(job)),
        ("Notifications", told_fields(job)),
    )
    tables = (("What answers are worth", figures.scores), ("Answers to held-out prompts", figures.answers))
    return JobPage(
        key=job.key,
        namespace=job.metadata.namespace,
        queue=job.spec.queue,
        state=state_word(job),
        style=state_style(job),
        why=_why(job, view, sight),
        share=share_done(job),
        progress=progress_word(job),
        when=when(job, state, view.snapshot.policy, now, ahead if sight.whole else None),
        memory=memory_bar(job),
        charts=tuple(each for each in _charts(job, figures.curves) if each is not None),
        time_line=time_line(job, now),
        attempts=tuple(_attempt_row(attempt, now) for attempt in reversed(job.status.attempts)),
        sections=tuple((title, found) for title, fields in sections if (found := tuple(fields))),
        evaluations=tuple(_evaluations(figures.last)),
        tables=tuple((title, _cut(table), len(table.rows) - MOST_ROWS) for title, table in tables if table.rows),
        mlflow_link=mlflow_link(job, mlflow_url),
        mlflow_note=note,
    )


def mlflow_link(job: QLoRAJob, url: str) -> str:
    """The address of the job's run; empty where there is none, or MLflow has no pages there."""
    found = job.status.mlflow
    if not url.startswith(("http://", "https://")) or found.run_id is None or found.experiment_id is None:
        return ""
    return f"{url.rstrip('/')}/#/experiments/{quote(found.experiment_id, safe='')}/runs/{quote(found.run_id, safe='')}"


def memory_bar(job: QLoRAJob) -> MemoryBar | None:
    """Of the last attempt that has one: the allocator's peak that was expected, and the one that was."""
    estimate = job.status.estimate
    if estimate is None or not estimate.usable_bytes:
        return None
    trained = [a for a in job.status.attempts if a.stage == "train" and a.predicted_bytes is not None]
    predicted = trained[-1].predicted_bytes if trained else None
    predicted = predicted if predicted is not None else estimate.predicted_bytes
    measured = next((a.measured_bytes for a in reversed(trained) if a.measured_bytes is not None), None)
    told = f"{gib(predicted)} predicted, {gib(estimate.peak_bytes)} with the margin"
    told += f", {gib(measured)} measured ({100 * (measured / predicted - 1):+.1f} %)" if measured and predicted else ""
    return MemoryBar(
        told=f"{told}, of {gib(estimate.usable_bytes)} that {estimate.gpu_class} offers",
        predicted=min(100, round(100 * predicted / estimate.usable_bytes)),
        measured=min(100, round(100 * measured / estimate.usable_bytes)) if measured else None,
    )


def _why(job: QLoRAJob, view: View, sight: Sight) -> tuple[str, ...]:
    state = state_of(job.status)
    if state in TERMINAL_STATES:
        return (job.status.summary,) if job.status.summary else ()
    if view.whole and sight.whole:
        told = explain_scheduled(view.decided, view.snapshot, job.key)
    else:
        told = (*explain_recorded(job, view.snapshot.policy, view.snapshot.now), ON_RECORD)
    return told if view.running else (*told, NOT_RUNNING)


def _charts(job: QLoRAJob, curves: Mapping[str, Curve]) -> Sequence[Chart | None]:
    """What MLflow has, and after it what the status says of the last step."""
    progress, estimate = job.status.progress, job.status.estimate
    is_training = progress is not None and progress.stage == "train"
    step = float(progress.step) if progress is not None and is_training else -1.0
    loss, eval_loss, speed = (
        (progress.loss, progress.eval_loss, progress.tokens_per_second) if progress is not None else (None, None, None)
    )

    def points(metric: Metric, latest: float | None) -> Points:
        known = [(float(at), value) for at, value in curves.get(metric, ())]
        is_news = latest is not None and step > (known[-1][0] if known else -1.0)
        return [*known, (step, latest)] if is_news and latest is not None else known

    losses = (
        ("training", "first", points(Metric.TRAIN_LOSS, loss)),
        ("held out", "second", points(Metric.EVAL_LOSS, None if curves.get(Metric.EVAL_LOSS) else eval_loss)),
    )
    memory = [(float(at), value / GIB) for at, value in curves.get(Metric.VRAM_ALLOCATED_BYTES, ())]
    expected = ("predicted", estimate.predicted_bytes / GIB) if estimate is not None else None
    return (
        chart("Loss", losses),
        chart("Speed", (("tokens a second", "first", points(Metric.TOKENS_PER_SECOND, speed)),)),
        chart("Memory of the card", (("allocated", "first", memory),), " GiB", expected, kept=max),
    )


def _evaluations(last: Mapping[str, float]) -> Iterator[Field]:
    for name, value in sorted(last.items()):
        if name.startswith(EVALUATIONS):
            yield name.removeprefix(EVALUATIONS), figure(value)


def _attempt_row(attempt: Attempt, now: datetime) -> AttemptRow:
    end = attempt.finish_time or now
    took = (end - attempt.start_time).total_seconds() if attempt.start_time is not None else None
    reason = attempt.reason or attempt.stop_reason
    return AttemptRow(
        number=attempt.number,
        stage=attempt.stage,
        gpu=attempt.gpu_class or NOTHING,
        started=since(attempt.start_time, now) + (" ago" if attempt.start_time else ""),
        took=duration(took),
        exit=NOTHING if attempt.exit_code is None else str(attempt.exit_code),
        reason=reason.value if reason is not None else NOTHING,
        message=attempt.message,
        node=attempt.node or NOTHING,
    )


def _cut(table: Table) -> Table:
    def cell(text: str) -> str:
        return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"

    rows = tuple(tuple(cell(text) for text in row) for row in table.rows[:MOST_ROWS])
    return Table(columns=table.columns, rows=rows)
