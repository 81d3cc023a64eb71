"""What if: the forecast of the world as it is beside that of the same world with something changed.

Both are the decisions themselves, run ahead of time (`core/forecast`). Changes make another snapshot: more cards, other
quotas, a job more; nothing is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.core.forecast import MOST_EVENTS, Expectation, Forecast, forecast
from orchestrator.core.job.state_machine import GPU_STATES, TERMINAL_STATES, JobState, state_of
from orchestrator.core.snapshot import Snapshot

NEED_A_GPU = frozenset(JobState) - TERMINAL_STATES - {JobState.TRAINED, JobState.PUBLISHING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What is expected of one job, as things are and with the changes."""

    job: str
    """Its key."""
    queue: str
    state: JobState
    before: Expectation
    """Empty where it has no GPU and gets none within the forecast, or is one of the changes."""
    after: Expectation

    @property
    def holds_gpu(self) -> bool:
        """Whether it has one now; a start is then one after it has made way."""
        return self.state in GPU_STATES

    @property
    def later_seconds(self) -> float | None:
        """By how much its last step comes later, below zero sooner; its start, where nobody knows both ends. None where
        nobody knows both starts either."""
        for was, becomes in ((self.before.end, self.after.end), (self.before.start, self.after.start)):
            if was is not None and becomes is not None:
                return (becomes - was).total_seconds()
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Two forecasts, by job."""

    now: datetime
    jobs: Sequence[Prospect]
    """Those that still need a GPU: who has one, who gets one with the changes, as they start, and who does not."""
    before: Forecast
    after: Forecast


def simulate(present: Snapshot, changed: Snapshot, *, most_events: int = MOST_EVENTS) -> Simulation:
    """What is expected of each job of `changed`, which has all of the present ones.

    Either forecast looks no further than so many stages that end.
    """
    before, after = (forecast(each, most_events=most_events) for each in (present, changed))
    prospects = [
        Prospect(
            job=job.key,
            queue=job.spec.queue,
            state=state,
            before=before.jobs.get(job.key, Expectation()),
            after=after.jobs.get(job.key, Expectation()),
        )
        for job in changed.jobs
        if (state := state_of(job.status)) in NEED_A_GPU
    ]
    return Simulation(
        now=present.now, jobs=sorted(prospects, key=lambda each: _place(each, present.now)), before=before, after=after
    )


def _place(prospect: Prospect, now: datetime) -> tuple[int, datetime, datetime, str]:
    """In the list."""
    after, never = prospect.after, datetime.max.replace(tzinfo=now.tzinfo)
    rank = 0 if prospect.holds_gpu else 1 if after.start is not None else 2
    return rank, now if rank == 0 else after.start or never, after.end or never, prospect.job
