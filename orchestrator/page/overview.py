"""What the first page shows of a view: cards, queues, and a hundred jobs at a time. All functions are pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.core.explain import span
from orchestrator.core.job.remaining import remaining_seconds
from orchestrator.core.job.state_machine import GPU_STATES, JobState, state_of
from orchestrator.core.snapshot import Policy
from orchestrator.page.outlook import Ahead
from orchestrator.page.sight import Sight
from orchestrator.page.view import View
from orchestrator.sdk.progress import note
from orchestrator.sdk.words import NOTHING, duration, figure, gib, progress_word, since, state_style, state_word
from orchestrator.sizing.hardware import GpuClass

JOBS_A_PAGE = 100
MOST_QUEUES = 100
MOST_CELLS = 256
"""Cards of one class that are drawn; of more, the number is told."""
GROUPS: Mapping[str, frozenset[JobState]] = {
    "training": GPU_STATES,
    "waiting": frozenset({JobState.QUEUED}),
    "preparing": frozenset({JobState.NEW, JobState.PREPARING}),
    "publishing": frozenset({JobState.TRAINED, JobState.PUBLISHING}),
    "failed": frozenset({JobState.FAILED}),
    "cancelled": frozenset({JobState.CANCELLED}),
    "succeeded": frozenset({JobState.SUCCEEDED}),
}
"""What one may ask for as `state`, in the order in which jobs are listed: who has a GPU, who wants one, who is done."""
_GROUP_OF = {state: name for name, states in GROUPS.items() for state in states}
_RANKS = {name: rank for rank, name in enumerate(("training", "waiting", "preparing", "publishing"))}
_STOPS = {"None": "open", "Hold": "held", "HoldAndDrain": "drained"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of the jobs somebody wants to see."""

    namespace: str = ""
    queue: str = ""
    state: str = ""
    page: int = 1

    def link(self, **changes: str | int) -> str:
        """The address of the same with something else."""
        wanted = {"namespace": self.namespace, "queue": self.queue, "state": self.state, "page": self.page, **changes}
        query = urlencode({name: value for name, value in wanted.items() if value and (name, value) != ("page", 1)})
        return f"?{query}#jobs" if query else "./#jobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job in the list."""

    key: str
    link: str
    queue: str
    priority: int
    state: str
    style: str
    gpu: str
    share: int
    """Of its steps that are made, in percent."""
    progress: str
    loss: str
    when: str
    why: str
    age: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CardCell:
    """One card."""

    told: str
    link: str
    """Of the job that has it; empty where nobody has."""
    filled: int
    """What of its memory the job takes, in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardClass:
    """The cards of one class."""

    name: str
    told: str
    held: int
    capacity: int
    cells: tuple[CardCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaBar:
    """What a queue holds of a quota."""

    gpu_class: str
    held: int
    nominal: int
    share: int
    """In percent, at most 100."""
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRow:
    """One queue."""

    name: str
    link: str
    state: str
    running: int
    waiting: int
    longest: str
    quotas: tuple[QuotaBar, ...]
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The first page."""

    asked: Asked
    counts: tuple[tuple[str, int, str], ...]
    """Group, number and link."""
    classes: tuple[CardClass, ...]
    queues: tuple[QueueRow, ...]
    more_queues: int
    jobs: tuple[JobRow, ...]
    found: int
    pages: int
    namespaces: tuple[str, ...]
    queue_names: tuple[str, ...]


def overview(view: View, ahead: Ahead | None, asked: Asked, sight: Sight) -> Overview:
    """What one account sees of a view."""
    seen = sight.of(view.snapshot.jobs)
    states = {job.key: state_of(job.status) for job in seen}
    found = [job for job in seen if _is_asked_for(job, states[job.key], asked)]
    pages = max(1, -(-len(found) // JOBS_A_PAGE))
    asked = Asked(namespace=asked.namespace, queue=asked.queue, state=asked.state, page=min(asked.page, pages))
    places: Mapping[str, int] = ahead.places if ahead is not None else {}
    ordered = sorted(found, key=lambda job: _place(job, states[job.key], places))
    shown = ordered[(asked.page - 1) * JOBS_A_PAGE : asked.page * JOBS_A_PAGE]
    tally = Counter(_GROUP_OF[state] for state in states.values())
    queues = _queues(view, seen, states) if view.sees_queues and sight.queues else ()
    return Overview(
        asked=asked,
        counts=tuple((name, tally[name], asked.link(state=name, page=1)) for name in GROUPS),
        classes=_classes(view, seen, sight) if view.sees_cards and sight.whole else (),
        queues=queues[:MOST_QUEUES],
        more_queues=max(0, len(queues) - MOST_QUEUES),
        jobs=tuple(job_row(job, states[job.key], view, ahead, sight) for job in shown),
        found=len(found),
        pages=pages,
        namespaces=tuple(sorted({job.metadata.namespace for job in seen}))[:MOST_QUEUES],
        queue_names=tuple(sorted({job.spec.queue for job in seen}))[:MOST_QUEUES],
    )


def job_link(job: QLoRAJob) -> str:
    """The address of a job's page, seen from the first one; names of Kubernetes need no quoting."""
    return f"jobs/{job.metadata.namespace}/{job.metadata.name}"


def job_row(job: QLoRAJob, state: JobState, view: View, ahead: Ahead | None, sight: Sight) -> JobRow:
    """A line of the list."""
    status, now = job.status, view.snapshot.now
    attempt = status.active_attempt
    gpu = attempt.gpu_class if attempt is not None and attempt.gpu_class else None
    if gpu is None and status.estimate is not None:
        gpu = status.estimate.gpu_class
    return JobRow(
        key=job.key,
        link=job_link(job),
        queue=job.spec.queue,
        priority=job.spec.priority,
        state=state_word(job),
        style=state_style(job),
        gpu=gpu or NOTHING,
        share=share_done(job),
        progress=progress_word(job),
        loss=figure(status.progress.loss) if status.progress is not None else NOTHING,
        when=when(job, state, view.snapshot.policy, now, ahead if sight.whole else None),
        why=note(job),
        age=since(job.metadata.creation_timestamp, now),
    )


def share_done(job: QLoRAJob) -> int:
    """Of its steps that are made, in percent."""
    done, _, all_of_them = progress_word(job).partition("/")
    return min(100, round(100 * int(done) / int(all_of_them))) if all_of_them and int(all_of_them) else 0


def when(job: QLoRAJob, state: JobState, policy: Policy, now: datetime, ahead: Ahead | None) -> str:
    """When it is expected to end, or to start, in words; nothing where nobody knows."""
    if state in GPU_STATES:
        seconds = remaining_seconds(job.status, policy, now)
        return f"ends in {duration(seconds)}" if seconds is not None else NOTHING
    progress = job.status.progress
    if state in (JobState.PREPARING, JobState.PUBLISHING) and progress is not None and progress.eta_seconds is not None:
        return f"ends in {duration(progress.eta_seconds)}"
    if state is not JobState.QUEUED or ahead is None:
        return NOTHING
    place = f"number {ahead.places[job.key]}" if job.key in ahead.places else ""
    return ", ".join(filter(None, (place, _start(job, now, ahead)))) or NOTHING


def _start(job: QLoRAJob, now: datetime, ahead: Ahead) -> str:
    expected = ahead.of(job.key)
    if expected is not None and expected.start is not None:
        left = expected.start - now
        on = f" on {expected.gpu_class}" if expected.gpu_class else ""
        return f"starts in {span(left)}{on}" if left.total_seconds() > 0 else f"starts now{on}"
    if job.key not in ahead.places or ahead.forecast.endless:
        return ""
    return f"not within {span(ahead.forecast.until - ahead.time)}"


def _is_asked_for(job: QLoRAJob, state: JobState, asked: Asked) -> bool:
    return (
        asked.namespace in ("", job.metadata.namespace)
        and asked.queue in ("", job.spec.queue)
        and (not asked.state or state in GROUPS.get(asked.state, frozenset()))
    )


def _place(job: QLoRAJob, state: JobState, places: Mapping[str, int]) -> tuple[int, float, str]:
    """Who has a GPU, then who waits in the order of the line, then the others, the latest first."""
    rank = _RANKS.get(_GROUP_OF[state], len(_RANKS))
    if state is JobState.QUEUED and job.key in places:
        return rank, places[job.key] - 1e12, job.key
    ended = job.status.finish_time or job.metadata.creation_timestamp
    return rank, -ended.timestamp() if ended is not None else 0.0, job.key


def _classes(view: View, jobs: Iterable[QLoRAJob], sight: Sight) -> tuple[CardClass, ...]:
    holders: dict[str, list[QLoRAJob]] = defaultdict(list)
    for job in jobs:
        attempt = job.status.active_attempt
        if attempt is not None and attempt.gpu_class and sight.sees(job.metadata.namespace):
            holders[attempt.gpu_class].append(job)
    known = {each.name: each for each in view.snapshot.gpu_classes}
    gone = [name for name in holders if name not in known]
    return (
        *(_card_class(each.name, each, holders[each.name]) for each in known.values()),
        *(_card_class(name, None, holders[name]) for name in sorted(gone)),
    )


def _card_class(name: str, known: GpuClass | None, holders: Sequence[QLoRAJob]) -> CardClass:
    capacity = known.capacity if known is not None else 0
    free = max(0, capacity - len(holders))
    cells = [_cell(job, known) for job in holders[:MOST_CELLS]]
    cells += [CardCell(told="free", link="", filled=0)] * min(free, MOST_CELLS - len(cells))
    usable = f", {gib(known.usable_bytes)} usable each" if known is not None else ", of cards that are gone"
    return CardClass(
        name=name,
        told=f"{len(holders)} of {capacity} in use{usable}",
        held=len(holders),
        capacity=capacity,
        cells=tuple(cells),
    )


def _cell(job: QLoRAJob, known: GpuClass | None) -> CardCell:
    attempt, estimate = job.status.active_attempt, job.status.estimate
    taken = estimate.peak_bytes if estimate is not None else 0
    if attempt is not None and attempt.measured_bytes is not None:
        taken = attempt.measured_bytes
    usable = known.usable_bytes if known is not None else estimate.usable_bytes if estimate is not None else 0
    filled = min(100, round(100 * taken / usable)) if usable else 100
    return CardCell(
        told=f"{job.key}, {progress_word(job)}, {filled} % of the memory", link=job_link(job), filled=max(8, filled)
    )


def _queues(view: View, jobs: Sequence[QLoRAJob], states: Mapping[str, JobState]) -> tuple[QueueRow, ...]:
    """Those in which something goes on first; and one that no object describes, where jobs name it."""
    known = {queue.metadata.name: queue for queue in view.snapshot.queues}
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    held: dict[str, Counter[str]] = defaultdict(Counter)
    for job in jobs:
        state, attempt = states[job.key], job.status.active_attempt
        if state in GPU_STATES:
            running[job.spec.queue] += 1
        elif state is JobState.QUEUED:
            waiting[job.spec.queue] += 1
        if attempt is not None and attempt.gpu_class:
            held[attempt.queue or job.spec.queue][attempt.gpu_class] += 1
    names = sorted({*known, *running, *waiting}, key=lambda name: (-running[name] - waiting[name], name))
    now = view.snapshot.now
    return tuple(_queue_row(name, known.get(name), running[name], waiting[name], held[name], now) for name in names)


def _queue_row(
    name: str, queue: QLoRAQueue | None, running: int, waiting: int, held: Mapping[str, int], now: datetime
) -> QueueRow:
    return QueueRow(
        name=name,
        link=Asked().link(queue=name),
        state=_STOPS[queue.spec.stops] if queue is not None else "open",
        running=running,
        waiting=waiting,
        longest=since(queue.status.pending_since if queue is not None and waiting else None, now),
        quotas=_quotas(queue, held) if queue is not None else (),
        budget=_budget(queue) if queue is not None else "",
    )


def _quotas(queue: QLoRAQueue, held: Mapping[str, int]) -> tuple[QuotaBar, ...]:
    uses = {use.gpu_class: use for use in queue.status.classes}
    bars: list[QuotaBar] = []
    for quota in queue.spec.quotas:
        use, has = uses.get(quota.gpu_class), held.get(quota.gpu_class, 0)
        notes = (
            f"{use.borrowed} borrowed" if use is not None and use.borrowed else "",
            f"{use.lent} lent" if use is not None and use.lent else "",
        )
        bars.append(
            QuotaBar(
                gpu_class=quota.gpu_class,
                held=has,
                nominal=quota.nominal,
                share=min(100, round(100 * has / quota.nominal)) if quota.nominal else 100 * bool(has),
                note=", ".join(filter(None, notes)),
            )
        )
    return tuple(bars)


def _budget(queue: QLoRAQueue) -> str:
    budget, use = queue.spec.budget, queue.status.budget
    if budget is None:
        return ""
    hours, dollars = (use.gpu_hours, use.dollars) if use is not None else (0.0, 0.0)
    parts = (
        f"{hours:.1f} of {budget.gpu_hours} GPU-hours" if budget.gpu_hours is not None else "",
        f"${dollars:.2f} of ${budget.dollars}" if budget.dollars is not None else "",
    )
    return ", ".join(filter(None, parts))
