"""Following one job live: a progress bar on a terminal, a plain line for every change elsewhere.

`qlora run` and `qlora wait` use it. Everything goes to stderr, so that stdout holds the answer alone. Ctrl-C asks
what to do and never ends a job by itself.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.api.job import QLoRAJob
from orchestrator.api.words import without_logins
from orchestrator.cli.console import messages
from orchestrator.sdk.handle import JobHandle, JobResult, is_finished
from orchestrator.sdk.progress import News, figures, note
from orchestrator.sdk.words import duration, figure, state_style, state_word

BAR_WIDTH = 36
REFRESHES_PER_SECOND = 8
STAGES = ("prepare", "train", "publish")
_SPINNER = Spinner("dots", style="busy")  # one for all redraws, or it would begin anew with each


class Interruption(StrEnum):
    """What Ctrl-C is to mean."""

    DETACH = "detach"
    CANCEL = "cancel"
    KEEP = "keep"


def follow(handle: JobHandle, timeout_seconds: float | None) -> QLoRAJob:
    """The job once it has finished, shown all the while; raises KeyboardInterrupt, WaitTimedOut."""
    console = messages()
    if not console.is_terminal:
        return _follow_plainly(handle, timeout_seconds, console)
    job = handle.object()
    watch = handle.start_watch(timeout_seconds)
    with Live(
        get_renderable=lambda: live_view(job, datetime.now(UTC)),
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
    ):
        while not watch.ended:
            job = watch.step() or job
    return job


def ask_about_interruption() -> Interruption:
    """What the person at the terminal wants; without one, to detach."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return Interruption.DETACH
    try:
        answer = messages().input(
            "Detach and let the job go on [D], cancel it [c], or keep following [k]? ", markup=False
        )
    except (EOFError, KeyboardInterrupt):
        return Interruption.DETACH
    choices = {"c": Interruption.CANCEL, "k": Interruption.KEEP}
    return choices.get(answer.strip().lower()[:1], Interruption.DETACH)


def live_view(job: QLoRAJob, now: datetime) -> RenderableType:
    """The running job in four lines at most: where it is, how far, how well, and what holds it."""
    lines = [_stage_line(job, now), _bar_line(job)]
    lines.append(Text("  " + "   ".join(told)) if (told := figures(job)) else None)
    lines.append(Text("  " + said, style="quiet", no_wrap=True, overflow="ellipsis") if (said := note(job)) else None)
    return Group(*(line for line in lines if line is not None))


def result_panel(job: QLoRAJob, result: JobResult) -> Panel:
    """What came of a job that succeeded."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="label", no_wrap=True)
    table.add_column(overflow="fold")
    if result.eval_loss is not None and result.eval_loss_before is not None:
        table.add_row("held-out loss", f"{figure(result.eval_loss_before)} -> [bold]{figure(result.eval_loss)}[/]")
    elif result.train_loss is not None:
        table.add_row("training loss", figure(result.train_loss))
    table.add_row("steps", f"{result.steps}, {duration(_active_seconds(job))} in stages")
    table.add_row("adapter", Text(result.adapter_uri))
    table.add_row("digest", Text(result.adapter_digest or "-"))
    table.add_row("MLflow run", Text(result.run_id or "-"))
    table.add_row("model version", Text(result.model_uri or "-"))
    table.add_row("registry", Text(without_logins(result.tracking_uri or "the cluster's MLflow", instead="")))
    return Panel(
        table, title=f"[good]{job.metadata.name} succeeded[/]", title_align="left", border_style="quiet", expand=False
    )


def result_lines(job: QLoRAJob, result: JobResult) -> str:
    """The panel's content for pipes: one `name: value` a line."""
    fields = {
        "job": job.key,
        "state": "Succeeded",
        "evalLossBefore": figure(result.eval_loss_before),
        "evalLoss": figure(result.eval_loss),
        "steps": str(result.steps),
        "adapter": result.adapter_uri,
        "digest": result.adapter_digest or "-",
        "run": result.run_id or "-",
        "model": result.model_uri or "-",
        "registry": without_logins(result.tracking_uri or "-", instead=""),
    }
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


def _follow_plainly(handle: JobHandle, timeout_seconds: float | None, console: Console) -> QLoRAJob:
    news = News()
    job = handle.object()
    for job in handle.watch(timeout_seconds):
        if (line := news.line(job)) is not None:
            console.print(line, markup=False, soft_wrap=True)
    return job


def _stage_line(job: QLoRAJob, now: datetime) -> RenderableType | None:
    """`medical-es  prepare > train > publish  Training on cpu  1m20s`, with a spinner while a stage is at work."""
    current = _stage_index(job)
    names = Text()
    for index, stage in enumerate(STAGES):
        if index:
            names.append(" › ", style="quiet")
        names.append(stage, style="good" if index < current else "current" if index == current else "quiet")
    grid = Table.grid(padding=(0, 2))
    attempt = job.status.active_attempt
    where = f"on {attempt.gpu_class}" if attempt is not None and attempt.gpu_class else ""
    state = Text(f"{state_word(job)} {where}".strip(), style=state_style(job))
    began = attempt.start_time if attempt is not None else None
    took = Text(duration((now - began).total_seconds()) if began is not None else "", style="quiet")
    mark = _SPINNER if attempt is not None else Text("·", style="waiting")
    grid.add_row(mark, Text(job.metadata.name, style="bold"), names, state, took)
    return grid


def _bar_line(job: QLoRAJob) -> RenderableType | None:
    progress = job.status.progress
    at_work = job.status.active_attempt is not None
    known = progress is not None and progress.steps > 0 and progress.stage == STAGES[min(_stage_index(job), 2)]
    prepared, checkpoint = job.status.prepared, job.status.checkpoint
    grid = Table.grid(padding=(0, 2))
    if known and progress is not None:
        done, total = progress.step, progress.steps
    elif not at_work and prepared is not None:
        done, total = (checkpoint.step if checkpoint is not None else 0), prepared.steps
    else:
        return None
    if done == 0 and at_work and note(job):  # what it does before the first step says more than an empty bar
        return None
    bar = ProgressBar(
        total=total, completed=done, width=BAR_WIDTH, complete_style="bar.complete", finished_style="good"
    )
    grid.add_row("", bar, f"{done}/{total}", Text(f"{100 * done / total:.0f}%", style="quiet"))
    return grid


def _stage_index(job: QLoRAJob) -> int:
    if job.status.adapter_uri is not None:
        return 3 if is_finished(job) else 2
    return 1 if job.status.prepared is not None else 0


def _active_seconds(job: QLoRAJob) -> float:
    return job.status.active_seconds
