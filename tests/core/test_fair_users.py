"""Users of one queue: whose turn it is where `fairSharing: PerUser` shares it out among them."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus, UserUsage
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.scheduling.index import Index
from orchestrator.core.snapshot import Policy, Snapshot
from tests.builders import NOW, after, gpus, make_job, make_queue, prepared_status, running_status, snapshot, stage

POLICY = Policy(store_uri="file:///store", usage_half_life_seconds=100_000.0)
USERS = ("ann", "ben", "cay")


def shared(had: dict[str, float] | None = None, name: str = "team", **spec: object) -> QLoRAQueue:
    """A queue whose users have had a small card for so many seconds."""
    spec.setdefault("fair_sharing", "PerUser")
    usage = tuple(
        UserUsage(user=user, gpu_seconds=seconds, gib_seconds=24 * seconds) for user, seconds in (had or {}).items()
    )
    status = QLoRAQueueStatus(counted_until=after(-600), usage=usage)
    return make_queue(name, **spec).model_copy(update={"status": status})


def of(user: str, name: str, *, age_seconds: float = 0, status: object = None, **spec: object) -> QLoRAJob:
    spec.setdefault("queue", "team")
    job = make_job(name, status=status or prepared_status(), age_seconds=age_seconds, **spec)
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": user})})


def world(*jobs: QLoRAJob, queues: tuple[QLoRAQueue, ...], now: datetime = NOW, **facts: object) -> Snapshot:
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    facts.setdefault("gpu_classes", gpus(_24Gi=10))
    return snapshot(*jobs, stages=stages, queues=queues, policy=POLICY, now=now, **facts)


def line(seen: Snapshot) -> list[str]:
    return [claim.key for claim in schedule(seen).line]


def test_who_has_had_less_of_the_queue_goes_first() -> None:
    jobs = of("ann", "old", age_seconds=500), of("ben", "young")
    assert line(world(*jobs, queues=(shared({"ann": 9_000, "ben": 100}),))) == ["ben/young", "ann/old"]


def test_without_it_the_oldest_goes_first_whoevers_it_is() -> None:
    jobs = of("ann", "old", age_seconds=500), of("ben", "young")
    queue = shared({"ann": 9_000, "ben": 100}, fair_sharing="None")
    assert line(world(*jobs, queues=(queue,))) == ["ann/old", "ben/young"]


def test_priority_comes_before_it_and_age_after_it() -> None:
    jobs = (
        of("ann", "urgent", priority=5),
        of("ann", "plain", age_seconds=500),
        of("ben", "b", age_seconds=10),
        of("cay", "c", age_seconds=20),
    )
    seen = world(*jobs, queues=(shared({"ann": 9_000}),))
    assert line(seen) == ["ann/urgent", "cay/c", "ben/b", "ann/plain"]


def test_whoever_hands_in_many_jobs_at_once_does_not_keep_another_from_his_turn() -> None:
    many = [of("ann", f"a{number}", age_seconds=500 - number) for number in range(4)]
    seen = world(*many, of("ben", "b"), queues=(shared(),))
    assert line(seen) == ["ann/a0", "ben/b", "ann/a1", "ann/a2", "ann/a3"]


def test_what_is_held_now_counts() -> None:
    holder = of("ann", "holds", status=running_status(ran_seconds=5_000))
    jobs = of("ann", "old", age_seconds=500), of("ben", "young")
    assert line(world(holder, *jobs, queues=(shared(),))) == ["ben/young", "ann/old"]


def test_what_was_had_of_another_queue_does_not() -> None:
    jobs = of("ann", "old", age_seconds=500), of("ben", "young")
    queues = shared(), shared({"ann": 9_000}, name="other")
    assert line(world(*jobs, queues=queues)) == ["ann/old", "ben/young"]


def test_a_strict_queue_waits_for_the_user_whose_turn_it_is() -> None:
    jobs = of("ann", "small", age_seconds=500), of("ben", "large", vram="80Gi")
    queue = shared({"ann": 9_000}, queueing_strategy="StrictFIFO")
    seen = world(*jobs, queues=(queue,), gpu_classes=gpus(_24Gi=1, _80Gi=0))
    assert schedule(seen).placements == ()
    loose = shared({"ann": 9_000})
    assert [p.claim.key for p in schedule(world(*jobs, queues=(loose,), gpu_classes=seen.gpu_classes)).placements] == [
        "ann/small"
    ]


def test_explain_says_whose_turn_it_is() -> None:
    jobs = of("ann", "old", age_seconds=500), of("ben", "young")
    seen = world(*jobs, queues=(shared({"ann": 9_000, "ben": 100}),), gpu_classes=gpus(_24Gi=0))
    [told] = [sentence for sentence in explain(seen, "ann/old") if "shared out by user" in sentence]
    assert "ann has had" in told
    assert told.endswith("there; before it, with less: ben.")
    [other] = [sentence for sentence in explain(seen, "ben/young") if "shared out by user" in sentence]
    assert other.endswith("; nobody here has had less.")


@settings(max_examples=200)
@given(
    jobs=st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 1), st.integers(0, 900)), max_size=14),
    had=st.dictionaries(st.sampled_from(USERS), st.integers(1, 3_000).map(float)),
    holders=st.lists(st.sampled_from(USERS), max_size=2),
)
def test_each_next_one_is_of_the_user_with_least_once_those_before_have_started(
    jobs: list[tuple[str, int, int]], had: dict[str, float], holders: list[str]
) -> None:
    waiting = [of(user, f"w{n}", age_seconds=age, priority=p) for n, (user, p, age) in enumerate(jobs)]
    holding = [of(user, f"h{n}", status=running_status(ran_seconds=900)) for n, user in enumerate(holders)]
    seen = world(*waiting, *holding, queues=(shared(had),))
    shares = Index.of(seen).shares
    share = {user: max(each) for user, each in shares.users_at("team", NOW).items()}
    step = max(shares.user_step)
    assert step == pytest.approx(300 / 10 / (100_000 / 0.6931), rel=0.01), "a minimum run of one of ten cards"
    left = sorted(waiting, key=lambda job: (job.metadata.creation_timestamp or after(0), job.metadata.uid))
    taken = dict.fromkeys(USERS, 0)
    for key in line(seen):
        urgent = max(job.spec.priority for job in left)
        found = next(job for job in left if job.key == key)
        user = found.metadata.namespace
        assert found.spec.priority == urgent
        firsts = {job.metadata.namespace: job for job in reversed(left) if job.spec.priority == urgent}
        assert firsts[user] is found, "a user's own jobs go by age"
        least = min(share.get(each, 0.0) + taken[each] * step for each in firsts)
        assert share.get(user, 0.0) + taken[user] * step == pytest.approx(least)
        taken[user] += 1
        left.remove(found)
    assert left == []
