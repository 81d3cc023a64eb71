"""Plans, jobs and clients as notebooks show them: small tables, every text escaped. All functions are pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from orchestrator.api.job import QLoRAJob
from orchestrator.api.words import in_lines
from orchestrator.sdk.planning import JobPlan
from orchestrator.sdk.progress import figures, note
from orchestrator.sdk.words import NOTHING, dollars, duration, gib, progress_word, state_word

JOBS_HEADER = ("name", "namespace", "state", "GPU", "progress", "what")
PLAN_HEADER = ("class", "here", "peak", "batch", "recomputed layers", "time", "price", "why")


class JobList(list[QLoRAJob]):
    """Jobs, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return jobs_html(self)


def jobs_html(jobs: Iterable[QLoRAJob]) -> str:
    """A row a job."""
    return table(JOBS_HEADER, [_job_row(job) for job in jobs])


def plan_html(plan: JobPlan) -> str:
    """What a job would take, class by class."""
    rows = [
        (
            alternative.gpu_class,
            NOTHING if alternative.capacity is None else str(alternative.capacity),
            gib(estimate.peak_bytes) if (estimate := alternative.estimate) is not None else NOTHING,
            str(estimate.plan.micro_batch_size) if estimate is not None else NOTHING,
            str(estimate.plan.recompute_layers) if estimate is not None else NOTHING,
            duration(estimate.seconds) if estimate is not None else NOTHING,
            dollars(estimate.dollars) if estimate is not None else NOTHING,
            alternative.remark,
        )
        for alternative in plan.alternatives
    ]
    told = [plan.guess, *plan.notes, plan.refusal.message if plan.refusal is not None else None]
    notes = "".join(f"<p>{_text(sentence)}</p>" for sentence in told if sentence is not None)
    return f"<b>{_text(plan.job)}</b>{notes}{table(PLAN_HEADER, rows)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _job_row(job: QLoRAJob) -> Sequence[str]:
    meta, estimate = job.metadata, job.status.estimate
    told = "  ".join(figures(job)) or note(job)
    gpu = estimate.gpu_class if estimate is not None else NOTHING
    return meta.name, meta.namespace, state_word(job), gpu, progress_word(job), told


def _text(text: str) -> str:
    return escape(in_lines(text))
