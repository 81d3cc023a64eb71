"""What queues have had: how it decays, whose turn it makes it, and that a write of it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus, UserUsage
from orchestrator.core.commands import DeleteJob, WriteQueueStatus
from orchestrator.core.decide import decide
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.scheduling.index import Index
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.sizing.hardware import priced
from tests.builders import (
    NOW,
    after,
    exited,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
    train_result,
)

HALF_LIFE = 100_000.0
POLICY = Policy(store_uri="file:///store", usage_half_life_seconds=HALF_LIFE)
DAY = 86_400.0


def had(name: str, seconds: float, *, ago: float = 0.0, user: str = "default", **spec: object) -> QLoRAQueue:
    """A queue whose jobs have had a small card for so long, counted until so long ago."""
    usage = (UserUsage(user=user, gpu_seconds=seconds, gib_seconds=24 * seconds),)
    return make_queue(name, **spec).model_copy(
        update={"status": QLoRAQueueStatus(counted_until=after(-ago), usage=usage)}
    )


def world(*jobs: QLoRAJob, queues: tuple[QLoRAQueue, ...] = (), now: datetime = NOW, **facts: object) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    facts.setdefault("gpu_classes", gpus(_24Gi=1))
    return snapshot(*jobs, stages=stages, queues=queues, policy=POLICY, now=now, **facts)


def waiting(name: str, queue: str, age_seconds: float = 0) -> QLoRAJob:
    return make_job(name, status=prepared_status(), queue=queue, age_seconds=age_seconds)


def line(seen: Snapshot) -> list[str]:
    return [claim.key.removeprefix("default/") for claim in schedule(seen).line]


def statuses(seen: Snapshot) -> dict[str, QLoRAQueueStatus]:
    return {c.queue.metadata.name: c.status for c in decide(seen) if isinstance(c, WriteQueueStatus)}


def share(seen: Snapshot, queue: str) -> float:
    return max(Index.of(seen).shares.at(seen.now)[queue])


def seconds_of(status: QLoRAQueueStatus) -> float:
    return sum(each.gpu_seconds for each in status.usage)


# --- whose turn it is --------------------------------------------------------------------------------------------


def test_what_was_had_long_ago_counts_less_than_what_was_had_just_now() -> None:
    queues = (had("long-ago", 20_000, ago=3 * HALF_LIFE), had("lately", 10_000))
    assert line(world(waiting("a", "lately", 60), waiting("b", "long-ago"), queues=queues)) == ["b", "a"]


def test_after_a_half_life_half_is_left() -> None:
    before = share(world(queues=(had("a", 10_000),)), "a")
    assert share(world(queues=(had("a", 10_000),), now=after(HALF_LIFE)), "a") == pytest.approx(before / 2)


def test_who_holds_the_only_gpu_for_ever_has_all_of_it() -> None:
    holder = make_job("a", status=running_status(ran_seconds=40 * HALF_LIFE), queue="a")
    assert share(world(holder, queues=(make_queue("a"),)), "a") == pytest.approx(1)


def test_a_deleted_job_is_not_forgotten() -> None:
    queues = (had("greedy", 10_000), make_queue("modest"))
    assert line(world(waiting("g", "greedy", 60), waiting("m", "modest"), queues=queues)) == ["m", "g"]


def test_weights_divide_what_was_had() -> None:
    queues = (had("heavy", 10_000, weight=3), had("light", 5_000))
    assert line(world(waiting("l", "light", 60), waiting("h", "heavy"), queues=queues)) == ["h", "l"]


@given(factor=st.floats(0, 20), amounts=st.lists(st.floats(1, 1e6), min_size=2, max_size=5, unique=True))
def test_time_alone_changes_nobodys_turn(factor: float, amounts: list[float]) -> None:
    queues = tuple(had(f"q{n}", round(amount, 3)) for n, amount in enumerate(amounts))
    jobs = [waiting(f"j{n}", f"q{n}", n) for n in range(len(amounts))]
    assert line(world(*jobs, queues=queues)) == line(world(*jobs, queues=queues, now=after(factor * HALF_LIFE)))


# --- what is written -------------------------------------------------------------------------------------------


def test_a_status_is_written_when_its_time_has_come_and_says_what_was_had() -> None:
    runs = make_job("runs", status=running_status(ran_seconds=1000), queue="a")
    queue = had("a", 500, ago=POLICY.usage_write_seconds)
    assert statuses(world(runs, queues=(queue,), now=after(-1))) == {}
    status = statuses(world(runs, queues=(queue,)))["a"]
    assert status.counted_until == NOW
    assert seconds_of(status) == pytest.approx(530, rel=1e-2)
    [month] = status.months
    assert (month.month, month.user, month.gpu_class, month.gpu_seconds) == ("2026-01", "default", "24Gi", 30.0)


def test_nothing_is_written_of_a_queue_of_which_nothing_changes() -> None:
    assert statuses(world(queues=(had("a", 500, ago=1e6),))) == {}


def test_the_end_of_a_hold_is_written_at_once_and_before_the_job_can_be_deleted() -> None:
    job = make_job("ends", status=running_status(ran_seconds=1000), queue="a", ttl_seconds_after_finished=0)
    queue = had("a", 0, ago=5)
    seen = replace(world(job, queues=(queue,)), stages={fact.key: fact for fact in [exited(job, 0, train_result())]})
    commands = decide(seen)
    assert isinstance(commands[0], WriteQueueStatus)
    assert [each.gpu_seconds for each in commands[0].status.months] == [5.0]


def test_a_job_is_not_deleted_before_what_it_had_is_counted() -> None:
    ended = make_attempt(created_time=after(-50), start_time=after(-50), finish_time=after(-20))
    over = prepared_status(run_id=None, attempts=(ended,), attempts_total=2, finish_time=after(-10))
    job = make_job("over", status=over, queue="a", ttl_seconds_after_finished=0)

    def deletes(queue: QLoRAQueue) -> bool:
        return any(isinstance(command, DeleteJob) for command in decide(world(job, queues=(queue,))))

    assert not deletes(had("a", 0, ago=25))
    assert deletes(had("a", 0, ago=20))
    assert deletes(make_queue("b"))


@given(cuts=st.lists(st.floats(0, 5 * HALF_LIFE), max_size=5), start=st.floats(0, HALF_LIFE))
def test_how_often_it_is_written_changes_neither_what_was_had_nor_anybodys_share(
    cuts: list[float], start: float
) -> None:
    job = make_job("runs", status=running_status(ran_seconds=-start), queue="a")
    end = after(6 * HALF_LIFE)
    once = world(job, queues=(had("a", 700),), now=end)
    queue = had("a", 700)
    for cut in sorted(cuts):
        status = statuses(world(job, queues=(queue,), now=after(start + cut))).get("a", queue.status)
        queue = queue.model_copy(update={"status": status})
    often = world(job, queues=(queue,), now=end)
    assert share(often, "a") == pytest.approx(share(once, "a"), rel=1e-6)
    months = [sum(m.gpu_seconds for m in statuses(seen)["a"].months) for seen in (once, often)]
    assert months[0] == pytest.approx(months[1], abs=1e-4)
    assert months[0] == pytest.approx(6 * HALF_LIFE - start, abs=1e-4)


def test_a_moved_job_is_on_the_account_of_the_queue_that_gave_it_its_gpu() -> None:
    status = running_status(ran_seconds=1000)
    given = status.model_copy(update={"attempts": (status.attempts[0].model_copy(update={"queue": "a"}),)})
    moved = make_job("moved", status=given, queue="b")
    told = statuses(world(moved, queues=(make_queue("a"), make_queue("b"))))
    assert [name for name, status in told.items() if status.months] == ["a"]


def test_months_are_told_apart_in_utc_and_priced() -> None:
    began = datetime(2025, 12, 31, 23, 0, tzinfo=UTC)
    runs = make_job("runs", status=running_status(ran_seconds=(NOW - began).total_seconds()), queue="a")
    classes = priced(gpus(_24Gi=1), "24Gi=2")
    status = statuses(world(runs, queues=(make_queue("a"),), gpu_classes=classes))["a"]
    assert [(m.month, m.gpu_seconds, m.dollars) for m in status.months] == [
        ("2025-12", 3600.0, 2.0),
        ("2026-01", 12 * 3600.0, 24.0),
    ]


# --- clocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-DAY, DAY])
def test_a_clock_that_is_put_neither_adds_to_what_was_had_nor_takes_from_it(step: float) -> None:
    runs = make_job("runs", status=running_status(ran_seconds=1000), queue="a")
    over = make_attempt(created_time=after(-900), start_time=after(-900), finish_time=after(-500), queue="a")
    ended = make_job("ended", status=prepared_status(attempts=(over,), attempts_total=2, finish_time=after(-400)))
    queue = had("a", 700, ago=10)
    plain = statuses(world(runs, ended, queues=(queue,), now=after(30)))["a"]
    put = statuses(world(runs, ended, queues=(queue,), now=after(step + 30), clock_step_seconds=step))["a"]
    assert put.counted_until == after(step + 30)
    assert put.usage == plain.usage
    assert sum(m.gpu_seconds for m in put.months) == sum(m.gpu_seconds for m in plain.months) == 40.0


def test_a_clock_that_was_put_back_unnoticed_is_no_reason_to_count_anything_twice() -> None:
    runs = make_job("runs", status=running_status(ran_seconds=1000), queue="a")
    queue = had("a", 700, ago=-DAY)
    status = statuses(world(runs, queues=(queue,)))["a"]
    assert (status.counted_until, seconds_of(status), status.months) == (NOW, 700.0, ())


def test_a_week_is_the_half_life_unless_somebody_says_otherwise() -> None:
    assert timedelta(seconds=Policy(store_uri="file:///store").usage_half_life_seconds) == timedelta(days=7)


def test_a_status_that_only_a_stranger_can_have_written_keeps_no_queues_from_being_counted() -> None:
    long_ago = datetime(1, 1, 1, tzinfo=UTC)
    odd = (
        make_attempt(number=2, created_time=long_ago, finish_time=long_ago + timedelta(days=40), gpu_class="24Gi"),
        make_attempt(number=3, created_time=after(-900), gpu_class="no class"),
    )
    stranger = make_job("stranger", status=prepared_status(attempts=odd, attempts_total=3), queue="a")
    runs = make_job("runs", status=running_status(ran_seconds=1000), queue="a")
    [month] = statuses(world(stranger, runs, queues=(make_queue("a"),)))["a"].months
    assert (month.month, month.gpu_seconds) == ("2026-01", 1000.0)
