"""Who may use a queue, and with which priority: whoever may not claims nothing, moves nobody, and is told why."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import Command, EnsureStage, StopStage, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from tests.builders import gpus, make_job, make_queue, prepared_status, running_status, snapshot, stage, written

NAMESPACES = ("team-a", "team-b", "team-c")
THEIRS = make_queue("theirs", {"24Gi": 1}, namespaces=("team-a", "team-b"))


def of(namespace: str, job: QLoRAJob) -> QLoRAJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})


def world(*jobs: QLoRAJob, queues: tuple[QLoRAQueue, ...] = (), cards: int = 1) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    return snapshot(*jobs, stages=stages, gpu_classes=gpus(_24Gi=cards), queues=queues)


def said(seen: Snapshot, kind: ConditionType = ConditionType.ADMITTED) -> tuple[Reason, str]:
    condition = written(decide(seen)).condition(kind)
    assert condition is not None
    return condition.reason, condition.message


def moves(seen: Snapshot) -> list[Command]:
    return [command for command in decide(seen) if isinstance(command, EnsureStage | StopStage)]


def stopped(seen: Snapshot) -> list[str]:
    """Jobs that were asked to make way."""
    return [p.victim.key for p in schedule(seen).preemptions if p.victim is not None]


def test_a_job_of_another_namespace_waits_in_words_whatever_its_priority() -> None:
    intruder = of("team-c", make_job(status=prepared_status(), queue="theirs", priority=1_000_000))
    runs = of("team-a", make_job("runs", status=running_status(), queue="theirs"))
    seen = world(intruder, runs, queues=(THEIRS,))
    assert said(seen) == (
        Reason.QUEUE_NOT_ALLOWED,
        "queue theirs is not for jobs of namespace team-c; set spec.queue to one of default, or have team-c added to "
        "the queue's spec.namespaces",
    )
    assert moves(seen) == []
    assert any(
        "QueueNotAllowed: queue theirs is not for jobs of namespace team-c" in s for s in explain(seen, "team-c/job")
    )
    [write] = [c for c in decide(seen) if isinstance(c, WriteStatus) and c.job.key == "team-c/job"]
    assert [event.reason for event in write.events] == [Reason.QUEUE_NOT_ALLOWED]


def test_nothing_is_prepared_for_a_queue_that_a_job_may_not_use() -> None:
    seen = world(of("team-c", make_job(queue="theirs")), queues=(THEIRS,))
    assert said(seen, ConditionType.PREPARED)[0] is Reason.QUEUE_NOT_ALLOWED
    assert moves(seen) == []


def test_what_is_trained_is_published_all_the_same() -> None:
    trained = of("team-c", make_job(status=prepared_status(adapter_uri="file:///a"), queue="theirs"))
    assert [c for c in decide(world(trained, queues=(THEIRS,))) if isinstance(c, EnsureStage)]


def test_a_priority_above_the_queues_bound_waits_until_it_is_lowered() -> None:
    bounded = make_queue("default", max_priority=100)
    runs = make_job("runs", status=running_status(), priority=-1)
    high = world(make_job(status=prepared_status(), priority=101), runs, queues=(bounded,))
    assert said(high) == (
        Reason.PRIORITY_TOO_HIGH,
        "queue default takes no priority above 100; lower spec.priority from 101",
    )
    assert stopped(high) == []
    assert stopped(world(make_job(status=prepared_status(), priority=100), runs, queues=(bounded,))) == ["default/runs"]


def test_the_default_queue_is_open_until_an_object_closes_it() -> None:
    job = of("team-c", make_job(status=prepared_status(), priority=1_000_000))
    assert moves(world(job))
    assert moves(world(job, queues=(make_queue("default", namespaces=("team-a",)),))) == []


def test_a_running_job_that_is_moved_into_anothers_queue_takes_none_of_its_quota_and_makes_way_first() -> None:
    moved = of("team-c", make_job("moved", status=running_status(), queue="theirs", priority=1_000_000))
    owner = of("team-a", make_job("owner", status=prepared_status(), queue="theirs", priority=-5))
    assert [p.claim.key for p in schedule(world(moved, owner, queues=(THEIRS,), cards=2)).placements] == [
        "team-a/owner"
    ], "its one GPU of quota is free"
    assert stopped(world(moved, owner, queues=(THEIRS,))) == ["team-c/moved"]


def test_a_running_job_is_no_safer_than_its_queues_bound_makes_it() -> None:
    bounded = make_queue("default", max_priority=10)
    runs = make_job("runs", status=running_status(), priority=1_000_000)
    waits = make_job("waits", status=prepared_status(), priority=20, queue="other")
    assert stopped(world(runs, waits, queues=(bounded, make_queue("other")))) == ["default/runs"]


@dataclass(frozen=True)
class Drawn:
    """A job in a few words."""

    namespace: str
    queue: str
    priority: int
    state: str
    gpu_seconds: int


JOBS = st.lists(
    st.builds(
        Drawn,
        namespace=st.sampled_from(NAMESPACES),
        queue=st.sampled_from(("default", "q1", "q2", "missing")),
        priority=st.sampled_from((-1_000_000, -3, 0, 3, 4, 1_000_000)),
        state=st.sampled_from(("new", "waiting", "running")),
        gpu_seconds=st.sampled_from((0, 0, 1000, 1_000_000)),
    ),
    min_size=1,
    max_size=8,
)
SOME = st.lists(st.sampled_from(NAMESPACES), max_size=3, unique=True).map(tuple)
QUEUES = st.fixed_dictionaries(
    {
        name: st.tuples(SOME, st.sampled_from((None, -3, 0, 3)), st.sampled_from((None, 0, 1, 2)))
        for name in ("default", "q1", "q2")
    }
)


def built(number: int, drawn: Drawn) -> QLoRAJob:
    had = {"gpu_seconds": drawn.gpu_seconds}
    status = {"new": QLoRAJobStatus, "waiting": prepared_status, "running": running_status}[drawn.state](**had)
    job = make_job(f"job-{number}", status=status, queue=drawn.queue, priority=drawn.priority, age_seconds=number)
    return of(drawn.namespace, job)


def is_allowed(job: QLoRAJob, rules: dict[str, tuple[tuple[str, ...], int | None, int | None]]) -> bool:
    """By the words of the documentation, and not by the code."""
    if job.spec.queue not in rules:
        return True
    _, bound, _ = rules[job.spec.queue]
    return is_open(job, rules) and (bound is None or job.spec.priority <= bound)


def is_open(job: QLoRAJob, rules: dict[str, tuple[tuple[str, ...], int | None, int | None]]) -> bool:
    """Whether GPU time that the job has had is its queue's, however high its priority is by now."""
    namespaces, _, _ = rules[job.spec.queue]
    return job.metadata.namespace in (namespaces or NAMESPACES)


@given(drawn=JOBS, rules=QUEUES, cards=st.integers(0, 4))
def test_who_may_not_use_a_queue_changes_nothing_for_anybody_else(
    drawn: list[Drawn], rules: dict[str, tuple[tuple[str, ...], int | None, int | None]], cards: int
) -> None:
    jobs = [built(number, each) for number, each in enumerate(drawn)]
    queues = tuple(
        make_queue(name, {} if quota is None else {"24Gi": quota}, namespaces=namespaces, max_priority=bound)
        for name, (namespaces, bound, quota) in rules.items()
    )
    waits = [
        j
        for j in jobs
        if j.status.active_attempt is None
        and not is_allowed(j, rules)
        and not (j.status.gpu_seconds and is_open(j, rules))
    ]
    with_them = world(*jobs, queues=queues, cards=cards)
    without = world(*(job for job in jobs if job not in waits), queues=queues, cards=cards)
    theirs = {job.key for job in waits}
    seen, alone = schedule(with_them), schedule(without)
    assert (seen.line, seen.placements, seen.preemptions) == (alone.line, alone.placements, alone.preemptions)
    assert {k: d.status for k, d in seen.drafts.items() if k not in theirs} == {
        k: d.status for k, d in alone.drafts.items()
    }
    assert not [
        c for c in decide(with_them) if isinstance(c, EnsureStage) and f"{c.task.namespace}/{c.task.job}" in theirs
    ]
    for key in theirs:
        assert seen.drafts[key].close() is not None, "nothing was said"
