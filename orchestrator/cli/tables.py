"""The rows of `qlora get`: what kubectl's printer columns show, from the same status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.sweep import QLoRASweep
from orchestrator.cli.output import Cell, Columns
from orchestrator.core.forecast import Expectation
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.simulate import Prospect, Simulation
from orchestrator.core.sweep.search import parameters, trial_name
from orchestrator.sdk.simulation import SAME_SECONDS
from orchestrator.sdk.trace import TracePlayed, groups_of
from orchestrator.sdk.usage import UsageBy, UsageRow
from orchestrator.sdk.words import NOTHING, duration, figure, progress_word, since, state_style, state_word
from orchestrator.sizing.margins import Bound

JOB_HEADER = ("NAME", "QUEUE", "PRIORITY", "STATE", "GPU", "PROGRESS", "ETA", "AGE")
LEFT_OUT_FIRST = ("PRIORITY", "GPU", "QUEUE", "ETA")
WIDE_HEADER = ("LOSS", "EVAL LOSS", "RUN", "MODEL")
QUEUE_HEADER = ("NAME", "COHORT", "WEIGHT", "PREEMPTION", "STOP", "RUNNING", "WAITING", "LONGEST", "QUOTAS")
USAGE_FIELDS = ("month", "queue", "user", "job", "gpuSeconds", "dollars")
"""Of a program's answer."""
SIMULATION_HEADER = ("JOB", "QUEUE", "START", "NEW START", "END", "NEW END", "CHANGE")
CALIBRATION_HEADER = ("NAMESPACE", "ARCHITECTURE", "PLAN", "JOBS", "WORST", "MARGIN", "CERTAIN", "VERSIONS")
_SPEAKS_FOR_ITSELF = frozenset({JobState.PREPARING, JobState.TRAINING, JobState.PUBLISHING, JobState.SUCCEEDED})
_RUNNING = frozenset({JobState.STARTING, JobState.TRAINING, JobState.STOPPING})
_WAITING = frozenset({JobState.NEW, JobState.PREPARING, JobState.QUEUED})


def job_table(jobs: Iterable[QLoRAJob], now: datetime, *, wide: bool = False, namespaces: bool = False) -> Columns:
    """One row a job; on a narrow terminal without what `describe` tells better than how it goes."""
    header = (*(("NAMESPACE",) if namespaces else ()), *JOB_HEADER, *(WIDE_HEADER if wide else ()), "MESSAGE")
    rows = [_job_row(job, now, wide=wide, namespaces=namespaces) for job in jobs]
    return Columns(header=header, rows=rows, optional=() if wide else LEFT_OUT_FIRST)


SWEEP_HEADER = ("NAME", "TRIALS", "RUNNING", "SUCCEEDED", "STOPPED", "FAILED", "BEST", "VALUE", "AGE", "MESSAGE")


def sweep_table(sweeps: Iterable[QLoRASweep], now: datetime, *, namespaces: bool = False) -> Columns:
    """One row a sweep."""
    rows: list[list[Cell]] = []
    for sweep in sweeps:
        status, best = sweep.status, sweep.status.best
        counts = (sweep.spec.trials, status.running, status.succeeded, status.stopped, status.failed)
        texts = [
            *((sweep.metadata.namespace,) if namespaces else ()),
            sweep.metadata.name,
            *map(str, counts),
            best.job if best is not None else NOTHING,
            figure(best.value if best is not None else None),
            since(sweep.metadata.creation_timestamp, now),
            status.summary,
        ]
        rows.append([Cell(text=text) for text in texts])
    return Columns(header=(*(("NAMESPACE",) if namespaces else ()), *SWEEP_HEADER), rows=rows)


def trial_table(sweep: QLoRASweep, jobs: Mapping[str, QLoRAJob]) -> Columns:
    """One row a trial that is on record, the best first; of those without a figure the first."""
    sign = 1 if sweep.spec.metric.mode == "min" else -1
    fields = [dimension.field for dimension in sweep.spec.space]
    succeeded_first = sorted(
        sweep.status.trials,
        key=lambda trial: (trial.state != "Succeeded", trial.value is None, sign * (trial.value or 0.0), trial.index),
    )
    rows: list[list[Cell]] = []
    for trial in succeeded_first:
        job = jobs.get(trial.job)
        is_own = job is not None and job.metadata.uid == trial.uid
        progress = progress_word(job) if job is not None and is_own else NOTHING
        words = message(job) if job is not None and is_own and trial.state == "Running" else trial.message
        texts = [trial.job, *(trial.parameters.get(field, NOTHING) for field in fields), trial.state]
        rows.append([Cell(text=text) for text in (*texts, progress, figure(trial.value), words)])
    header = ("TRIAL", *(field.upper() for field in map(_last_word, fields)), "STATE", "PROGRESS", "VALUE", "MESSAGE")
    return Columns(header=header, rows=rows)


def planned_trials(sweep: QLoRASweep) -> Columns:
    """One row a trial that there would be."""
    fields = [dimension.field for dimension in sweep.spec.space]
    found = {trial_name(sweep, index): parameters(sweep.spec, index) for index in range(sweep.spec.trials)}
    rows = [[Cell(text=name), *(Cell(text=values[field]) for field in fields)] for name, values in found.items()]
    return Columns(header=("TRIAL", *(field.upper() for field in map(_last_word, fields))), rows=rows)


def _last_word(field: str) -> str:
    return field.rpartition(".")[2]


def _job_row(job: QLoRAJob, now: datetime, *, wide: bool, namespaces: bool) -> list[Cell]:
    status = job.status
    estimate = status.estimate
    active = state_of(status) in (JobState.TRAINING, JobState.PREPARING, JobState.PUBLISHING)
    eta_seconds = status.progress.eta_seconds if status.progress is not None and active else None
    cells = [
        Cell(text=job.metadata.name),
        Cell(text=job.spec.queue),
        Cell(text=str(job.spec.priority)),
        Cell(text=state_word(job), style=state_style(job)),
        Cell(text=estimate.gpu_class if estimate is not None else NOTHING),
        Cell(text=progress_word(job)),
        Cell(text=duration(eta_seconds)),
        Cell(text=since(job.metadata.creation_timestamp, now)),
    ]
    if namespaces:
        cells.insert(0, Cell(text=job.metadata.namespace))
    if wide:
        cells += _wide_cells(job)
    return [*cells, Cell(text=message(job), style="quiet")]


def message(job: QLoRAJob) -> str:
    """What the state alone does not say: why the job waits, or how it ended."""
    return "" if state_of(job.status) in _SPEAKS_FOR_ITSELF else job.status.summary


def queue_table(queues: Iterable[QLoRAQueue], jobs: Iterable[QLoRAJob], now: datetime) -> Columns:
    """One row a queue; LONGEST is for how long the one waits who has waited for longest."""
    everyone = [(job.spec.queue, state_of(job.status)) for job in jobs]
    rows: list[list[Cell]] = []
    for queue in queues:
        name, spec = queue.metadata.name, queue.spec
        quotas = ", ".join(f"{quota.gpu_class}={quota.nominal}" for quota in spec.quotas)
        texts = (
            name,
            spec.cohort or NOTHING,
            str(spec.weight),
            spec.preemption,
            spec.stops,
            str(sum(1 for of, state in everyone if of == name and state in _RUNNING)),
            str(sum(1 for of, state in everyone if of == name and state in _WAITING)),
            since(queue.status.pending_since, now),
            quotas or "no limit",
        )
        rows.append([Cell(text=text) for text in texts])
    return Columns(header=QUEUE_HEADER, rows=rows, optional=("PREEMPTION", "WEIGHT"))


def usage_table(rows: Iterable[UsageRow], by: UsageBy) -> Columns:
    """One row each, with what it is of."""
    names = {"user": ("user",), "queue": ("queue",), "job": ("queue", "user", "job")}[by]
    texts = [
        (row.month, *(getattr(row, name) for name in names), f"{row.gpu_seconds / 3600:.2f}", f"{row.dollars:.2f}")
        for row in rows
    ]
    header = ("MONTH", *(name.upper() for name in names), "GPU HOURS", "DOLLARS")
    return Columns(header=header, rows=[[Cell(text=text) for text in each] for each in texts], right=("GPU HOURS",))


def simulation_table(found: Simulation, most_jobs: int) -> Columns:
    """One row for each of the first jobs: how long until it starts and ends, as things are and with the changes."""
    rows = [_prospect_row(each, found) for each in found.jobs[:most_jobs]]
    return Columns(header=SIMULATION_HEADER, rows=rows, optional=("QUEUE", "START", "NEW START"))


def trace_table(found: TracePlayed) -> Columns:
    """One row for each queue, and for each user of a queue that has several; each figure with the changes, too."""
    sides = [groups_of(side) for side in (found.before, found.after) if side is not None]
    marks = ("", " NEW")[: len(sides)]
    header = ["QUEUE", "USER", "JOBS"]
    for name in ("MEAN WAIT", "P90 WAIT", "MOVES", "MISSED", "NEVER RAN"):
        header += [f"{mark} {name}".strip() for mark in marks]
    rows: list[list[Cell]] = []
    for groups in zip(*sides, strict=True):
        of = groups[0]
        cells = [of.queue, of.user or "all", str(of.jobs)]
        cells += [duration(group.mean_wait_seconds) for group in groups]
        cells += [duration(group.tail_wait_seconds) for group in groups]
        cells += [str(group.moves) for group in groups]
        cells += [str(group.missed) for group in groups]
        cells += [str(group.waiting) for group in groups]
        rows.append([Cell(text=text) for text in cells])
    return Columns(header=tuple(header), rows=rows, optional=("MOVES", "NEW MOVES", "NEVER RAN", "NEW NEVER RAN"))


def _prospect_row(prospect: Prospect, found: Simulation) -> list[Cell]:
    before, after, now = prospect.before, prospect.after, found.now
    times = (
        _start_word(prospect, before.start, now),
        _start_word(prospect, after.start, now),
        _until(before.end, now),
        _until(after.end, now),
    )
    word, style = _change_word(prospect, found)
    cells = [Cell(text=text) for text in (prospect.job, prospect.queue, *times)]
    return [*cells, Cell(text=word, style=style)]


def _start_word(prospect: Prospect, start: datetime | None, now: datetime) -> str:
    """A job that has a GPU starts once it has made way."""
    if not prospect.holds_gpu:
        return _until(start, now)
    return "runs" if start is None else f"again {_until(start, now)}"


def _until(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return NOTHING
    return "now" if moment <= now else duration((moment - now).total_seconds())


def _change_word(prospect: Prospect, found: Simulation) -> tuple[str, str]:
    """What the changes do to it, and the theme's style for that. What was not looked at is not told."""
    later, nothing = prospect.later_seconds, Expectation()
    if later is not None and abs(later) >= SAME_SECONDS:
        return (f"-{duration(-later)}", "good") if later < 0 else (f"+{duration(later)}", "bad")
    if prospect.before == nothing != prospect.after and not found.before.is_cut:
        return "starts", "good"
    if prospect.after == nothing != prospect.before and not found.after.is_cut:
        return "not expected", "bad"
    return "", ""


def _wide_cells(job: QLoRAJob) -> list[Cell]:
    status = job.status
    mlflow, progress = status.mlflow, status.progress
    model = f"{mlflow.registered_model}/{mlflow.model_version}" if mlflow.model_version is not None else NOTHING
    return [
        Cell(text=figure(progress.loss if progress is not None else None)),
        Cell(text=figure(progress.eval_loss if progress is not None else None)),
        Cell(text=mlflow.run_id or NOTHING),
        Cell(text=model),
    ]


def calibration_table(bounds: Iterable[Bound]) -> Columns:
    """What is known of each kind of plan; shares are of the predicted peak."""
    return Columns(header=CALIBRATION_HEADER, rows=[_calibration_row(bound) for bound in bounds])


def _calibration_row(bound: Bound) -> list[Cell]:
    return [
        Cell(text=bound.namespace),
        Cell(text=bound.architecture),
        Cell(text=bound.kind),
        Cell(text=str(bound.observations)),
        Cell(text=f"{bound.worst_share:+.2%}", style="bad" if bound.worst_share > 0 else ""),
        Cell(text=f"{bound.share:.2%}"),
        Cell(text="yes" if bound.certain else "no"),
        Cell(text=bound.versions or NOTHING, style="quiet"),
    ]
