"""What a month took, by user, queue and job: the sums are the statuses', whatever becomes of jobs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import MonthlyUsage, QLoRAQueue, QLoRAQueueStatus
from orchestrator.core.commands import WriteQueueStatus
from orchestrator.core.decide import decide
from orchestrator.sdk.usage import DELETED, UsageBy, usage_rows
from orchestrator.sizing.hardware import priced
from tests.builders import NOW, after, gpus, make_attempt, make_job, make_queue, prepared_status, snapshot

MONTH = "2026-01"


def had(name: str, *months: tuple[str, str, float, float]) -> QLoRAQueue:
    told = tuple(
        MonthlyUsage(month=month, user=user, gpu_class="24Gi", gpu_seconds=seconds, dollars=dollars)
        for month, user, seconds, dollars in months
    )
    return make_queue(name).model_copy(update={"status": QLoRAQueueStatus(counted_until=NOW, months=told)})


def over(name: str, user: str, seconds: float, queue: str = "a") -> QLoRAJob:
    attempt = make_attempt(created_time=after(-seconds), start_time=after(-seconds), finish_time=NOW, queue=queue)
    job = make_job(name, status=prepared_status(attempts=(attempt,), attempts_total=2, finish_time=NOW), queue=queue)
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": user})})


QUEUES = (
    had("a", ("2025-12", "ann", 999, 9), (MONTH, "ann", 3600, 2), (MONTH, "ben", 1800, 1)),
    had("b", (MONTH, "ann", 400, 0)),
)


def rows(by: UsageBy, *jobs: QLoRAJob) -> list[tuple[str, str, str, float, float]]:
    found = usage_rows(QUEUES, jobs, MONTH, by)
    return [(row.queue, row.user, row.job, row.gpu_seconds, row.dollars) for row in found]


def test_users_and_queues_are_added_up() -> None:
    assert rows("user") == [("", "ann", "", 4000, 2), ("", "ben", "", 1800, 1)]
    assert rows("queue") == [("a", "", "", 5400, 3), ("b", "", "", 400, 0)]


def test_what_no_job_that_is_there_had_was_had_by_deleted_ones() -> None:
    jobs = (over("big", "ann", 2700), over("small", "ann", 450))
    assert rows("job", *jobs) == [
        ("a", "ann", DELETED, 450, 0.25),
        ("a", "ann", "big", 2700, 1.5),
        ("a", "ann", "small", 450, 0.25),
        ("a", "ben", DELETED, 1800, 1),
        ("b", "ann", DELETED, 400, 0),
    ]


@given(
    st.lists(st.tuples(st.sampled_from(("ann", "ben")), st.floats(1, 900_000)), max_size=8), st.sets(st.integers(0, 7))
)
def test_deleting_jobs_changes_no_sum_and_the_lines_of_no_other_job(
    jobs: list[tuple[str, float]], deleted: set[int]
) -> None:
    all_jobs = [over(f"job-{number}", user, seconds) for number, (user, seconds) in enumerate(jobs)]
    seen = snapshot(*all_jobs, queues=(make_queue("a"),), gpu_classes=priced(gpus(_24Gi=9), "24Gi=3.6"))
    [status] = [c.status for c in decide(seen) if isinstance(c, WriteQueueStatus)] or [QLoRAQueueStatus()]
    queue = make_queue("a").model_copy(update={"status": status})
    left = [job for number, job in enumerate(all_jobs) if number not in deleted]
    for by in ("user", "queue"):
        assert usage_rows([queue], left, MONTH, by) == usage_rows([queue], all_jobs, MONTH, by)
    before, later = (
        {(row.user, row.job): row for row in usage_rows([queue], some, MONTH, "job")} for some in (all_jobs, left)
    )
    assert not [job for _, job in before if job == DELETED]
    assert {job for _, job in later} - {DELETED} == {job.metadata.name for job in left}
    assert sum(row.dollars for row in later.values()) == pytest.approx(sum(row.dollars for row in before.values()))
    since_the_first = (NOW - NOW.replace(day=1, hour=0)).total_seconds()
    for (user, name), row in later.items():
        if name != DELETED:
            assert row.gpu_seconds == pytest.approx(before[user, name].gpu_seconds)
            seconds = jobs[int(name.removeprefix("job-"))][1]
            assert row.gpu_seconds == pytest.approx(min(seconds, since_the_first), abs=1e-3)
