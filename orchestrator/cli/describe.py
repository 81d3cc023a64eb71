"""`qlora describe`, `explain`, `simulate`: a job's whole story, why it is where it is, and what if; queues, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime

from rich.console import Console
from rich.text import Text

from orchestrator.api.job import Attempt, Condition, QLoRAJob
from orchestrator.api.queue import QLoRAQueue, UserUsage
from orchestrator.cli.output import Cell, Columns, print_columns, print_fields, print_paragraph
from orchestrator.cli.tables import job_table, simulation_table, trace_table
from orchestrator.core.commands import Event
from orchestrator.core.job.finalizer import outstanding
from orchestrator.sdk.explanation import Explanation
from orchestrator.sdk.job_fields import (
    Field,
    estimate_fields,
    prepared_fields,
    progress_fields,
    result_fields,
    spec_fields,
    told_fields,
)
from orchestrator.sdk.simulation import WhatIf
from orchestrator.sdk.trace import TracePlayed
from orchestrator.sdk.words import NOTHING, duration, short, since, state_style, state_word

CONDITION_HEADER = ("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE")
QUOTA_HEADER = ("CLASS", "HELD", "NOMINAL", "BORROWS", "BORROWED", "LENT")
USER_HEADER = ("USER", "GPU TIME", "VRAM TIME")
MAX_USERS_SHOWN = 10
SECONDS_AN_HOUR = 3600.0
ATTEMPT_HEADER = ("#", "STAGE", "GPU", "STARTED", "TOOK", "EXIT", "REASON", "MESSAGE")
NOTIFICATION_HEADER = ("#", "EVENT", "AGE", "TO", "LATEST TRY")
EVENT_HEADER = ("AGE", "REASON", "MESSAGE")
LABEL_CELLS = 16
MAX_EVENTS = 20
"""The newest so many events are shown."""
MAX_PROSPECTS = 100
"""Jobs of a simulation that are shown."""
_QUEUE_STATES = {"None": ("open", "good"), "Hold": ("held", "waiting"), "HoldAndDrain": ("drained", "waiting")}


def show_job(console: Console, job: QLoRAJob, events: Sequence[tuple[str, Event]], now: datetime) -> None:
    """The page. What the line on top says is not said again below, nor what conditions and attempts say in events."""
    status, kept = job.status, events[-MAX_EVENTS:]
    print_paragraph(console, Text.assemble((job.key, "bold"), "  ", (state_word(job), state_style(job))))
    if (why := status.summary.removeprefix(f"{state_word(job)}: ")) not in ("", state_word(job)):
        print_paragraph(console, Text(why))
    _print_section(console, "Spec", spec_fields(job))
    _print_section(console, "Data and model", prepared_fields(job))
    _print_section(console, "Estimate", estimate_fields(job))
    _print_section(console, "Progress", progress_fields(job, now))
    _print_section(console, "Result", result_fields(job))
    _print_section(console, "Notifications", told_fields(job))
    said = {status.summary.partition(": ")[2]}
    _print_table(console, "Outstanding notifications", NOTIFICATION_HEADER, _notification_rows(job, now))
    _print_table(console, "Conditions", CONDITION_HEADER, [_condition_row(c, now, said) for c in status.conditions])
    _print_table(console, _attempts_title(job), ATTEMPT_HEADER, [_attempt_row(a, now, said) for a in status.attempts])
    said |= {condition.message for condition in status.conditions} | {a.message for a in status.attempts}
    _print_table(console, "Events", EVENT_HEADER, [_event_row(time, event, now, said) for time, event in kept])


def show_queue(console: Console, queue: QLoRAQueue, unfinished: Sequence[QLoRAJob], now: datetime) -> None:
    """A queue's rules, what its jobs hold of each quota, and who they are."""
    spec = queue.spec
    state = _QUEUE_STATES[spec.stops]
    print_paragraph(console, Text.assemble((f"queue {queue.metadata.name}", "bold"), "  ", state))
    _print_section(console, "Rules", _queue_fields(queue))
    held = Counter(a.gpu_class for job in unfinished if (a := job.status.active_attempt) is not None and a.gpu_class)
    borrowing = {q.gpu_class: "any" if q.borrowing_limit is None else str(q.borrowing_limit) for q in spec.quotas}
    borrowed = {use.gpu_class: use.borrowed for use in queue.status.classes}
    lent = {use.gpu_class: use.lent for use in queue.status.classes}
    quotas = [
        [
            Cell(text=quota.gpu_class),
            Cell(text=str(held[quota.gpu_class])),
            Cell(text=str(quota.nominal)),
            Cell(text=borrowing[quota.gpu_class] if spec.cohort else NOTHING),
            Cell(text=str(borrowed.get(quota.gpu_class, 0))),
            Cell(text=str(lent.get(quota.gpu_class, 0))),
        ]
        for quota in spec.quotas
    ]
    _print_table(console, "Quotas", QUOTA_HEADER, quotas)
    most = sorted(queue.status.usage, key=lambda each: -each.gib_seconds)[:MAX_USERS_SHOWN]
    _print_table(console, "Had of late", USER_HEADER, [_user_row(each) for each in most])
    if unfinished:
        console.print(Text("\nUnfinished jobs", style="bold"))
        print_columns(console, job_table(unfinished, now, namespaces=True), indent="  ")


def show_explanation(console: Console, explanation: Explanation) -> None:
    """A sentence a line, in a terminal's width."""
    for sentence in explanation.sentences:
        print_paragraph(console, Text(sentence))


def show_simulation(console: Console, found: WhatIf) -> None:
    """What each job may expect, as things are and with the changes, and what comes of it."""
    print_columns(console, simulation_table(found.simulation, MAX_PROSPECTS))
    console.print()
    more = len(found.jobs) - MAX_PROSPECTS
    if more > 0:
        print_paragraph(console, Text(f"{more} more jobs are not shown here; all are in: --output json"))
    for note in found.notes:
        print_paragraph(console, Text(note))


def show_trace(console: Console, found: TracePlayed) -> None:
    """Waits by queue and user, moves and missed deadlines, and how much of the GPUs was used; with changes beside."""
    print_columns(console, trace_table(found))
    console.print()
    for which, side in (("as it is", found.before), ("with the changes", found.after)):
        if side is None:
            continue
        used = ", ".join(f"{name} {share:.0%}" for name, share in sorted(side.utilisation.items())) or "no GPU is here"
        print_paragraph(console, Text(f"GPU time used {which}: {used}; all was done in {duration(side.seconds)}."))
        if side.is_cut:
            print_paragraph(console, Text(f"Not played to its end {which}: jobs move too often."))


def _queue_fields(queue: QLoRAQueue) -> Iterator[Field]:
    spec = queue.spec
    yield "for jobs of", ", ".join(spec.namespaces) or "any namespace"
    yield "priority", "any" if spec.max_priority is None else f"at most {spec.max_priority}"
    yield "preemption", "its jobs move others of lower priority" if spec.preemption != "Never" else "it moves nobody"
    yield "fair share", f"weight {spec.weight}{', and among its namespaces' if spec.fair_sharing == 'PerUser' else ''}"
    yield (
        "order",
        "strict: nobody goes before the one who is next"
        if spec.queueing_strategy == "StrictFIFO"
        else ("whoever finds a GPU goes"),
    )
    if spec.turn_seconds is not None:
        yield "turns", f"{spec.turn_seconds} s, then a job yields to its equals"
    if spec.per_user.running is not None or spec.per_user.waiting is not None:
        running, waiting = (_bound(limit) for limit in (spec.per_user.running, spec.per_user.waiting))
        yield "of a namespace", f"{running} running, {waiting} waiting"
    if (budget := spec.budget) is not None:
        use = queue.status.budget
        hours, dollars = (use.gpu_hours, use.dollars) if use is not None else (0.0, 0.0)
        of_hours = [f"{hours:.1f} of {budget.gpu_hours} GPU-hours"] if budget.gpu_hours is not None else []
        of_dollars = [f"${dollars:.2f} of ${budget.dollars}"] if budget.dollars is not None else []
        then = "nothing is admitted then" if budget.when_spent == "Hold" else "a warning then"
        yield "budget", f"{', '.join((*of_hours, *of_dollars))} this month; {then}"
    yield "cohort", spec.cohort or "none: it neither lends nor borrows"
    if not spec.quotas:
        yield "quotas", "none: no limit"


def _bound(limit: int | None) -> str:
    return "any number" if limit is None else f"at most {limit}"


def _user_row(usage: UserUsage) -> list[Cell]:
    gpu_hours, gib_hours = usage.gpu_seconds / SECONDS_AN_HOUR, usage.gib_seconds / SECONDS_AN_HOUR
    return [Cell(text=usage.user), Cell(text=f"{gpu_hours:.1f} h"), Cell(text=f"{gib_hours:.0f} GiB h")]


def _notification_rows(job: QLoRAJob, now: datetime) -> list[list[Cell]]:
    return [
        [
            Cell(text=str(notification.number)),
            Cell(text=notification.event),
            Cell(text=since(notification.time, now)),
            Cell(text=", ".join(notification.recipients)),
            Cell(text=notification.failure or NOTHING, style="waiting" if notification.failure else ""),
        ]
        for notification in outstanding(job.status)
    ]


def _attempts_title(job: QLoRAJob) -> str:
    total, shown = job.status.attempts_total, len(job.status.attempts)
    return f"Attempts (the last {shown} of {total})" if total > shown else "Attempts"


def _condition_row(condition: Condition, now: datetime, said: Collection[str]) -> list[Cell]:
    return [
        Cell(text=condition.type.value),
        Cell(text=condition.status, style="good" if condition.status == "True" else ""),
        Cell(text=condition.reason.value),
        Cell(text=since(condition.last_transition_time, now)),
        Cell(text=_news(condition.message, said), style="quiet"),
    ]


def _attempt_row(attempt: Attempt, now: datetime, said: Collection[str]) -> list[Cell]:
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
        Cell(text=_news(attempt.message, said), style="quiet"),
    ]


def _event_row(time: str, event: Event, now: datetime, said: Collection[str]) -> list[Cell]:
    style = "waiting" if event.warning else ""
    age = since(datetime.fromisoformat(time), now)
    return [
        Cell(text=age),
        Cell(text=event.reason.value, style=style),
        Cell(text=_news(event.message, said), style="quiet"),
    ]


def _news(message: str, said: Collection[str]) -> str:
    return "" if message in said else message


def _print_section(console: Console, title: str, fields: Iterator[Field]) -> None:
    shown = [(label, short(value) if console.is_terminal else value) for label, value in fields]
    if shown:
        console.print(Text(f"\n{title}", style="bold"))
        print_fields(console, shown, LABEL_CELLS)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    if rows:
        console.print(Text(f"\n{title}", style="bold"))
        print_columns(console, Columns(header=header, rows=rows, wraps=True), indent="  ")
