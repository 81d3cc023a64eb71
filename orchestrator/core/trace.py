"""A trace played on queues and cards, in virtual time, by the decisions themselves.

The world is empty at first: of a snapshot count the queues, with what they have had, and the cards. Jobs arrive as the
trace says, prepared, train for as long as it says and no stage fails; what moves cost is what `core/forecast` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from orchestrator.api.job import QLoRAJob
from orchestrator.core.forecast import Course, Expectation
from orchestrator.core.snapshot import Snapshot

EVENTS_PER_JOB = 20
"""A trace whose jobs move more often than that, on the average, is not played to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One job of a trace."""

    job: QLoRAJob
    """As it is when it arrives: prepared, and created then."""
    come: datetime
    train_seconds: float
    """Time on a GPU, without what starts cost."""
    due: datetime | None = None
    """When it should be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of one of them."""

    arrival: Arrival
    start: datetime | None
    """Its first; None where it never got a GPU."""
    end: datetime | None
    moves: int

    @property
    def wait_seconds(self) -> float | None:
        """Until its first start."""
        return None if self.start is None else (self.start - self.arrival.come).total_seconds()

    @property
    def missed(self) -> bool:
        """Whether it should have been done by a time, and was not."""
        due = self.arrival.due
        return due is not None and (self.end is None or self.end > due)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A trace that was played."""

    fates: Sequence[Fate]
    """In the order of the trace."""
    seconds: float
    """From the first arrival until the last job ended."""
    utilisation: Mapping[str, float]
    """By class: the share of its GPUs' time in which a job had them."""
    is_cut: bool
    """Whether it was not played to its end."""


def play(snapshot: Snapshot, arrivals: Sequence[Arrival]) -> Played:
    """What becomes of the arrivals on the queues and cards of a snapshot; the first of them comes no sooner than it."""
    empty = replace(snapshot, jobs=(), stages={}, taken_names=frozenset(), runs={}, refused={}, unreadable=())
    course = Course.of(empty)
    for arrival in arrivals:
        course.expect(arrival.job, arrival.come, arrival.train_seconds)
    left = EVENTS_PER_JOB * len(arrivals)
    while left > 0 and course.events:
        left -= course.go_on()
        course.decide()
    fates = [_fate(arrival, course) for arrival in arrivals]
    last = max((fate.end for fate in fates if fate.end is not None), default=snapshot.now)
    seconds = (last - min((arrival.come for arrival in arrivals), default=last)).total_seconds()
    return Played(
        fates=fates,
        seconds=seconds,
        utilisation={
            each.name: course.held_seconds[each.name] / (each.capacity * seconds)
            for each in snapshot.gpu_classes
            if each.capacity and seconds > 0
        },
        is_cut=bool(course.events),
    )


def _fate(arrival: Arrival, course: Course) -> Fate:
    key = arrival.job.key
    known = course.expected.get(key, Expectation())
    done = key not in course.jobs and key in course.expected
    return Fate(arrival=arrival, start=known.start, end=known.end if done else None, moves=course.moves[key])
