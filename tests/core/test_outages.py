"""Many jobs that fail for the same cause: nobody's budget, one probe, one event, and on they go."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.api.job import QLoRAJob, Setback
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import Event, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from tests.builders import (
    NOW,
    POLICY,
    after,
    exited,
    failure,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
    written,
)

GPUS = gpus(_24Gi=8)


def hit(name: str, *, ago: float = 60, reason: Reason = Reason.TRANSIENT_ERROR, **spec: object) -> QLoRAJob:
    """A job whose last attempt the cause ended so long ago, and whose pause is over."""
    ended = make_attempt(finish_time=after(-ago), reason=reason, created_time=after(-ago - 10))
    return make_job(name, status=prepared_status(attempts=(ended,), attempts_total=2), **spec)


def world(*jobs: QLoRAJob) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    return snapshot(*jobs, stages=stages, gpu_classes=GPUS)


def placed(seen: Snapshot) -> list[str]:
    return [placement.claim.key.removeprefix("default/") for placement in schedule(seen).placements]


def running(name: str, *, seconds: float) -> QLoRAJob:
    return make_job(name, status=running_status(ran_seconds=seconds))


def told(seen: Snapshot) -> list[Event]:
    events = [event for c in decide(seen) if isinstance(c, WriteStatus) for event in c.events]
    return [event for event in events if event.reason is Reason.OUTAGE]


THREE = (hit("a"), hit("b"), hit("c"))


def test_one_job_at_a_time_tries_whether_an_outage_is_over_and_nobody_else_takes_a_gpu_for_it() -> None:
    fresh = make_job("fresh", status=prepared_status())
    seen = world(*THREE, fresh)
    assert len(placed(seen)) == 1
    waiting = written(decide(seen), "fresh").condition(ConditionType.ADMITTED)
    assert waiting.reason is Reason.OUTAGE
    assert waiting.message == (
        "3 jobs fail for TransientError in train (store file://): nobody's limit is spent, one job at a time tries "
        "again, and the others go on once it gets through"
    )


def test_while_one_tries_nobody_else_does() -> None:
    probing = make_job("probe", status=running_status(ran_seconds=POLICY.outage_probe_seconds - 100))
    assert placed(world(*THREE, probing)) == []


def test_once_somebody_got_through_all_go_on() -> None:
    through = running("through", seconds=POLICY.outage_probe_seconds)
    seen = world(*(replace_end(job, 200) for job in THREE), through)
    assert sorted(placed(seen)) == ["a", "b", "c"]


def replace_end(job: QLoRAJob, ago: float) -> QLoRAJob:
    return hit(job.metadata.name, ago=ago)


def test_a_stage_that_has_run_since_before_is_no_proof() -> None:
    assert len(placed(world(*THREE, running("old", seconds=5000)))) == 1


def test_two_jobs_are_no_outage_nor_are_three_with_stores_of_their_own() -> None:
    assert len(placed(world(*THREE[:2], make_job("fresh", status=prepared_status())))) == 3
    apart = [hit(name, store={"uri": f"s3://bucket-{name}/x"}) for name in "abc"]
    assert len(placed(world(*apart))) == 3


def test_what_one_job_after_another_meets_is_no_outage() -> None:
    broken = [hit(name, reason=Reason.BROKEN_GPU) for name in "abc"]
    assert len(placed(snapshot(*broken, gpu_classes=gpus(_24Gi=4, _48Gi=4)))) == 3


def test_an_outage_is_forgotten_when_nobody_has_failed_for_the_window() -> None:
    old = [hit(name, ago=POLICY.outage_window_seconds + 1) for name in "abc"]
    assert len(placed(world(*old))) == 3


def failing(name: str) -> QLoRAJob:
    spent = (Setback(reason=Reason.TRANSIENT_ERROR, count=9, seconds=POLICY.outage_limit_seconds),)
    return make_job(name, status=running_status(ran_seconds=30, setbacks=spent))


def test_nobodys_limit_is_spent_while_others_fail_for_the_same() -> None:
    job = failing("job")
    ended = exited(job, 81, failure(Reason.TRANSIENT_ERROR, "503"))
    alone = written(decide(snapshot(job, stages=(ended,))))
    assert alone.condition(ConditionType.FINISHED).reason is Reason.OUTAGE_LIMIT_EXCEEDED
    together = written(decide(snapshot(job, *THREE[:2], stages=(ended,))))
    assert together.finish_time is None
    assert together.setbacks[0].seconds == POLICY.outage_limit_seconds


def test_an_outage_is_told_once_when_it_begins() -> None:
    third = make_job("z", status=running_status(ran_seconds=30))
    ended = exited(third, 81, failure(Reason.TRANSIENT_ERROR, "503"))
    begins = snapshot(*THREE[:2], third, stages=(ended,))
    assert [event.warning for event in told(begins)] == [True]
    assert told(world(*THREE)) == []


def test_priority_queues_and_pauses_count_as_ever() -> None:
    """The first in line is the probe: neither a pause nor a held queue is overridden."""
    paused = make_job("a", status=hit("a").status.model_copy(update={"retry_after": after(30)}))
    held = hit("b", queue="held")
    seen = replace(world(paused, held, hit("c"), hit("d")), queues=(make_queue("held", hold=True),))
    assert placed(seen) == ["c"]
    assert seen.now == NOW
