"""What was had of the GPUs in a month, by user, queue or job, from what queues' statuses keep.

The sums are the statuses', so nothing that is done to jobs changes them. Of the jobs that are there, the attempts tell
what each of them had; the rest was of jobs that are deleted, and is one row for each user and queue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.core.scheduling.usage import LEAST_SECONDS, by_month

DELETED = "(deleted)"
"""In the place of the names of jobs that are not there any more."""

UsageBy = Literal["user", "queue", "job"]
"""What a row is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """What one of them had."""

    month: str
    queue: str
    """Empty where a row is of all queues."""
    user: str
    """Empty where a row is of all users."""
    job: str
    """Empty where a row is of all jobs."""
    gpu_seconds: float
    dollars: float
    """By the prices of the time. Of a job: its part of what its user paid for GPUs of the class."""

    def to_wire(self) -> dict[str, object]:
        """With wire names, without what it is not of."""
        names = {"month": self.month, "queue": self.queue, "user": self.user, "job": self.job}
        figures: dict[str, object] = {"gpuSeconds": round(self.gpu_seconds, 3), "dollars": round(self.dollars, 4)}
        return {name: value for name, value in names.items() if value} | figures


Of = tuple[str, str, str]
"""Queue, user, job."""
Had = tuple[float, float]
"""GPU-seconds and dollars."""


def usage_rows(queues: Sequence[QLoRAQueue], jobs: Iterable[QLoRAJob], month: str, by: UsageBy) -> Sequence[UsageRow]:
    """The rows of a month such as `2026-11`, in the order of their names."""
    found: defaultdict[Of, Had] = defaultdict(lambda: (0.0, 0.0))
    of_jobs = _of_jobs(queues, jobs, month) if by == "job" else {}
    for queue in queues:
        name = queue.metadata.name
        for each in queue.status.months:
            if each.month != month:
                continue
            left, price = each.gpu_seconds, each.dollars / each.gpu_seconds if each.gpu_seconds else 0.0
            for job, seconds in of_jobs.get((name, each.user, each.gpu_class), {}).items():
                seconds = min(seconds, left)
                left -= seconds
                _add(found, (name, each.user, job), seconds, price)
            of = {"user": ("", each.user, ""), "queue": (name, "", ""), "job": (name, each.user, DELETED)}[by]
            _add(found, of, left, price)
    return [
        UsageRow(month=month, queue=queue, user=user, job=job, gpu_seconds=seconds, dollars=dollars)
        for (queue, user, job), (seconds, dollars) in sorted(found.items())
        if seconds >= LEAST_SECONDS
    ]


def _add(found: defaultdict[Of, Had], of: Of, seconds: float, price: float) -> None:
    found[of] = found[of][0] + seconds, found[of][1] + seconds * price


def _of_jobs(
    queues: Sequence[QLoRAQueue], jobs: Iterable[QLoRAJob], month: str
) -> dict[tuple[str, str, str], dict[str, float]]:
    """GPU-seconds that are counted, by queue, user and class, and then by job."""
    counted = {queue.metadata.name: queue.status.counted_until for queue in queues}
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for job in jobs:
        for attempt in job.status.attempts:
            queue = attempt.queue or job.spec.queue
            until = counted.get(queue)
            if attempt.stage != "train" or until is None:
                continue
            end = min(attempt.finish_time or until, until)
            seconds = sum(length for name, length in by_month(attempt.created_time, end) if name == month)
            of_job = found.setdefault((queue, job.metadata.namespace, attempt.gpu_class or ""), {})
            of_job[job.metadata.name] = of_job.get(job.metadata.name, 0.0) + seconds
    return found
