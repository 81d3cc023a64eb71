"""All jobs together: order, quotas, victims, and the sentences of those who wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import StopStage, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from orchestrator.sizing.hardware import GpuClass
from tests.builders import (
    LLAMA_3_70B,
    after,
    gpus,
    make_job,
    make_queue,
    prepared_status,
    progress,
    running_status,
    snapshot,
    stage,
    written,
)


def waiting(name: str, **spec: object) -> QLoRAJob:
    return make_job(name, status=prepared_status(), **spec)


def large(name: str, **spec: object) -> QLoRAJob:
    return make_job(name, status=prepared_status(LLAMA_3_70B), **spec)


def running(name: str, *, gpu_class: str = "24Gi", spec: dict | None = None, **status: object) -> QLoRAJob:
    return make_job(name, status=running_status(gpu_class=gpu_class, **status), **(spec or {}))


def world(
    *jobs: QLoRAJob, gpu_classes: tuple[GpuClass, ...] = gpus(_24Gi=1), queues: tuple[QLoRAQueue, ...] = ()
) -> Snapshot:
    """A snapshot in which every active attempt's stage runs."""
    stages = tuple(stage(job) for job in jobs if job.status.active_attempt is not None)
    return snapshot(*jobs, stages=stages, gpu_classes=gpu_classes, queues=queues)


def line(seen: Snapshot) -> list[str]:
    return [claim.key.removeprefix("default/") for claim in schedule(seen).line]


def placed(seen: Snapshot) -> dict[str, str]:
    return {p.claim.key.removeprefix("default/"): p.estimate.gpu_class for p in schedule(seen).placements}


def victims(seen: Snapshot) -> dict[str, str | None]:
    """The victim of each claim that was promised a GPU; None where one is coming free already."""
    return {
        p.claim.key.removeprefix("default/"): p.victim.key.removeprefix("default/") if p.victim else None
        for p in schedule(seen).preemptions
    }


def refusal(seen: Snapshot, name: str) -> tuple[Reason, str]:
    found = schedule(seen).refusals[f"default/{name}"]
    return found.reason, found.message


# --- order -------------------------------------------------------------------------------------------------------


def test_priority_comes_before_age_and_age_before_the_uid() -> None:
    jobs = (
        waiting("b"),
        waiting("a"),
        waiting("old", age_seconds=60),
        waiting("urgent", priority=1),
        waiting("humble", priority=-1, age_seconds=600),
    )
    assert line(world(*jobs)) == ["urgent", "old", "a", "b", "humble"]


def test_priority_comes_before_fair_share() -> None:
    """The urgent job's queue has had GPU time and the other one none; still it is first."""
    jobs = (running("runs"), waiting("urgent", priority=1), waiting("fresh", queue="other", age_seconds=60))
    assert line(world(*jobs, queues=(make_queue("other"),))) == ["urgent", "fresh"]


def test_a_queues_own_lower_priorities_do_not_cost_its_urgent_job_its_turn() -> None:
    mine = [waiting(f"humble-{n}", age_seconds=99 - n) for n in range(3)] + [waiting("mine", priority=1, age_seconds=9)]
    jobs = (*mine, waiting("theirs", priority=1, queue="other"))
    assert line(world(*jobs, queues=(make_queue("other"),)))[:2] == ["mine", "theirs"]


def test_queues_take_turns_even_when_nobody_has_run_yet() -> None:
    queues = (make_queue("other"),)
    jobs = [waiting(f"mine-{n}", age_seconds=100 - n) for n in range(3)]
    jobs += [waiting(f"theirs-{n}", age_seconds=10 - n, queue="other") for n in range(3)]
    assert line(world(*jobs, queues=queues)) == ["mine-0", "theirs-0", "mine-1", "theirs-1", "mine-2", "theirs-2"]


def test_a_queue_of_twice_the_weight_gets_two_turns_for_one() -> None:
    queues = (make_queue("heavy", weight=2),)
    jobs = [waiting(f"light-{n}", age_seconds=100 - n) for n in range(2)]
    jobs += [waiting(f"heavy-{n}", age_seconds=10 - n, queue="heavy") for n in range(4)]
    assert line(world(*jobs, queues=queues)) == ["light-0", "heavy-0", "heavy-1", "light-1", "heavy-2", "heavy-3"]


def test_gpu_time_had_counts_by_the_cards_vram() -> None:
    """Equal seconds, but one queue had them on a card of twice the size: the other one is next."""
    big, small = running("big", gpu_class="48Gi", spec={"queue": "big"}), running("small", spec={"queue": "small"})
    jobs = (big, small, waiting("w-big", age_seconds=60, queue="big"), waiting("w-small", queue="small"))
    queues = (make_queue("big"), make_queue("small"))
    assert line(world(*jobs, gpu_classes=gpus(_24Gi=1, _48Gi=1), queues=queues)) == ["w-small", "w-big"]


# --- placement -----------------------------------------------------------------------------------------------------


def test_each_job_takes_the_smallest_free_class_that_fits_it() -> None:
    jobs = (large("large"), waiting("first", age_seconds=9), waiting("second", age_seconds=8), waiting("third"))
    seen = world(*jobs, gpu_classes=gpus(_24Gi=2, _48Gi=1, _80Gi=1))
    assert placed(seen) == {"first": "24Gi", "second": "24Gi", "large": "48Gi", "third": "80Gi"}


def test_nobody_behind_takes_what_the_head_of_the_line_could_use() -> None:
    jobs = (large("head", priority=1), waiting("behind"))
    assert placed(world(*jobs, gpu_classes=gpus(_48Gi=1))) == {"head": "48Gi"}


def test_a_job_behind_a_blocked_head_takes_what_the_head_cannot_use() -> None:
    jobs = (large("head", priority=1), waiting("behind"), running("runs", gpu_class="48Gi", spec={"priority": 2}))
    assert placed(world(*jobs, gpu_classes=gpus(_24Gi=1, _48Gi=1))) == {"behind": "24Gi"}


def test_a_job_for_which_all_gpus_are_taken_says_so() -> None:
    seen = world(waiting("waits"), running("runs"))
    assert refusal(seen, "waits") == (
        Reason.WAITING_FOR_GPU,
        "1 of 1 24Gi GPUs are in use; waits for one to come free, or add one",
    )


def test_a_queue_that_is_missing_or_held_admits_nothing_and_says_what_to_do() -> None:
    queues = (make_queue("held", hold=True),)
    seen = world(waiting("lost", queue="nowhere"), waiting("held", queue="held"), queues=queues)
    assert placed(seen) == {}
    assert refusal(seen, "lost") == (
        Reason.QUEUE_NOT_FOUND,
        "there is no queue nowhere; make it (qlora queue create nowhere) or set spec.queue to one of default, held",
    )
    assert refusal(seen, "held") == (Reason.QUEUE_HELD, "queue held is held, until: qlora queue release held")


def test_a_status_says_the_place_in_line_in_words_that_are_not_written_anew_for_each_job_that_starts() -> None:
    jobs = [waiting(f"job-{number:02}", age_seconds=100 - number) for number in range(12)]
    runs = running("runs", spec={"priority": 1})

    def told(*waiting: QLoRAJob) -> dict[str, QLoRAJobStatus]:
        commands = decide(world(*waiting, runs))
        return {c.job.metadata.name: c.status for c in commands if isinstance(c, WriteStatus) and c.words_only}

    first = told(*jobs)
    places = [first[job.metadata.name].summary.rpartition("; ")[2] for job in jobs]
    assert places == ["first in line"] + 9 * ["among the first ten in line"] + 2 * ["among the first hundred in line"]
    stored = [job.model_copy(update={"status": first[job.metadata.name]}) for job in jobs]
    assert told(*stored) == {}
    assert set(told(*stored[1:])) == {"job-01", "job-10"}, "one of them has started"


# --- quotas ----------------------------------------------------------------------------------------------------------


def test_a_queue_gets_no_more_than_its_quota() -> None:
    jobs = [waiting(f"job-{n}", age_seconds=10 - n) for n in range(3)]
    seen = world(*jobs, gpu_classes=gpus(_24Gi=3), queues=(make_queue("default", {"24Gi": 2}),))
    assert placed(seen) == {"job-0": "24Gi", "job-1": "24Gi"}
    assert refusal(seen, "job-2") == (
        Reason.WAITING_FOR_QUOTA,
        "queue default may use and uses 2 of 2 24Gi; waits for one to come free, or raise the quota",
    )


def test_a_class_that_the_quotas_do_not_list_may_not_be_used() -> None:
    seen = world(waiting("job"), gpu_classes=gpus(_48Gi=1), queues=(make_queue("default", {"24Gi": 2}),))
    assert refusal(seen, "job")[0] is Reason.WAITING_FOR_QUOTA


COHORT = (make_queue("default", {"24Gi": 1}, cohort="c"), make_queue("lender", {"24Gi": 1}, cohort="c"))


def test_a_queue_borrows_what_its_cohort_does_not_use() -> None:
    jobs = [waiting(f"job-{n}", age_seconds=10 - n) for n in range(3)]
    assert placed(world(*jobs, gpu_classes=gpus(_24Gi=3), queues=COHORT)) == {"job-0": "24Gi", "job-1": "24Gi"}


def test_a_borrowing_limit_holds() -> None:
    queues = (make_queue("default", {"24Gi": (1, 0)}, cohort="c"), COHORT[1])
    jobs = [waiting(f"job-{n}", age_seconds=10 - n) for n in range(2)]
    assert placed(world(*jobs, gpu_classes=gpus(_24Gi=3), queues=queues)) == {"job-0": "24Gi"}


def test_an_owner_goes_before_a_borrower_of_higher_priority() -> None:
    jobs = (running("mine"), waiting("borrower", priority=9), waiting("owner", queue="lender"))
    assert placed(world(*jobs, gpu_classes=gpus(_24Gi=2), queues=COHORT)) == {"owner": "24Gi"}


def test_an_owner_reclaims_from_a_borrower_whatever_the_priority() -> None:
    first, second = running("first", spec={"priority": 9}), running("second", spec={"priority": 9}, ran_seconds=900)
    seen = world(first, second, waiting("owner", queue="lender"), gpu_classes=gpus(_24Gi=2), queues=COHORT)
    [preemption] = schedule(seen).preemptions
    assert (preemption.victim.key, preemption.reason) == ("default/second", Reason.QUOTA_RECLAIMED)


def test_only_as_much_is_reclaimed_as_is_borrowed() -> None:
    jobs = (
        running("first"),
        running("second", ran_seconds=900),
        waiting("owner-1", queue="lender"),
        waiting("owner-2", queue="lender"),
    )
    assert victims(world(*jobs, gpu_classes=gpus(_24Gi=2), queues=COHORT)) == {"owner-1": "second"}


def test_nothing_is_reclaimed_from_a_queue_that_keeps_to_its_own_quota() -> None:
    """There are fewer GPUs than quotas: whoever came first has it."""
    seen = world(running("runs"), waiting("owner", queue="lender"), queues=COHORT)
    assert victims(seen) == {}
    assert refusal(seen, "owner")[0] is Reason.WAITING_FOR_GPU


def test_a_borrower_moves_nobody_of_another_queue() -> None:
    cheap = running("theirs", spec={"queue": "lender"}, ran_seconds=400)
    jobs = (running("mine"), cheap, waiting("urgent", priority=9))
    assert victims(world(*jobs, gpu_classes=gpus(_24Gi=2), queues=COHORT)) == {"urgent": "mine"}


# --- guarantees ------------------------------------------------------------------------------------------------------

OWNER = (make_queue("owner", {"24Gi": 1}),)


def test_no_priority_takes_what_a_queue_is_guaranteed() -> None:
    seen = world(running("theirs", spec={"queue": "owner"}), waiting("urgent", priority=1_000_000), queues=OWNER)
    assert victims(seen) == {}
    assert refusal(seen, "urgent")[0] is Reason.WAITING_FOR_GPU


def test_a_queues_own_priorities_still_count_within_its_guarantee() -> None:
    jobs = (running("theirs", spec={"queue": "owner"}), waiting("urgent", priority=1, queue="owner"))
    assert victims(world(*jobs, queues=OWNER)) == {"urgent": "theirs"}


@pytest.mark.parametrize("queue", ["default", "deleted"])
def test_an_owner_reclaims_from_a_queue_without_a_quota_and_from_one_that_is_gone(queue: str) -> None:
    jobs = (running("guest", spec={"queue": queue, "priority": 9}), waiting("owner", queue="owner"))
    [preemption] = schedule(world(*jobs, queues=OWNER)).preemptions
    assert (preemption.victim.key, preemption.reason) == ("default/guest", Reason.QUOTA_RECLAIMED)


def test_an_owner_reclaims_from_a_queue_whose_quota_was_lowered() -> None:
    queues = (*OWNER, make_queue("shrunk", {"24Gi": 1}))
    guests = [running(f"guest-{n}", spec={"queue": "shrunk"}, ran_seconds=400 + n) for n in range(2)]
    seen = world(*guests, waiting("owner", queue="owner"), gpu_classes=gpus(_24Gi=2), queues=queues)
    assert victims(seen) == {"owner": "guest-0"}


def test_a_guaranteed_gpu_that_is_free_goes_to_its_owner_before_any_priority() -> None:
    jobs = (waiting("urgent", priority=1_000_000), waiting("owner", queue="owner"))
    assert placed(world(*jobs, queues=OWNER)) == {"owner": "24Gi"}


def test_beyond_its_guarantee_a_queue_yields_to_priority() -> None:
    queues = (make_queue("owner", {"24Gi": (1, 1)}, cohort="c"), make_queue("lender", {"24Gi": 1}, cohort="c"))
    holders = [running(f"theirs-{n}", spec={"queue": "owner"}, ran_seconds=400 + n) for n in range(2)]
    seen = world(*holders, waiting("urgent", priority=5), gpu_classes=gpus(_24Gi=2), queues=queues)
    assert victims(seen) == {"urgent": "theirs-0"}


# --- victims ---------------------------------------------------------------------------------------------------------

URGENT = waiting("urgent", priority=5)


def about_to_end(name: str, seconds_left: float) -> QLoRAJob:
    """A running job whose trainer said that it would take so long, just now or when it should have been over."""
    heard = after(min(0, seconds_left))
    job = running(name, ran_seconds=5000)
    attempt = job.status.attempts[-1].model_copy(update={"progress_time": heard})
    report = progress(10, eta_seconds=max(0, seconds_left))
    return job.model_copy(update={"status": job.status.model_copy(update={"attempts": (attempt,), "progress": report})})


VICTIMS = {
    "fewest GPU-seconds since the last checkpoint": (
        (running("long-ago", checkpoint_age_seconds=400), running("just-now", checkpoint_age_seconds=10)),
        {"urgent": "just-now"},
    ),
    "without a checkpoint all is lost since the start": (
        (running("unsaved", ran_seconds=600), running("saved", ran_seconds=9000, checkpoint_age_seconds=539)),
        {"urgent": "saved"},
    ),
    "a checkpoint from before the start saves nothing of this run": (
        (
            running("resumed", ran_seconds=500, checkpoint_age_seconds=5000),
            running("saved", ran_seconds=9000, checkpoint_age_seconds=439),
        ),
        {"urgent": "saved"},
    ),
    "the lower priority among equals": (
        (running("higher", spec={"priority": 2}), running("lower", spec={"priority": 1})),
        {"urgent": "lower"},
    ),
    "the smaller uid among equals": ((running("b"), running("a")), {"urgent": "a"}),
    "never one of the same priority": (
        (running("equal", spec={"priority": 5}), running("above", spec={"priority": 6})),
        {},
    ),
    "who has just begun, and loses least": (
        (running("young", ran_seconds=10), running("saved", ran_seconds=9000, checkpoint_age_seconds=1)),
        {"urgent": "young"},
    ),
    "the lowest priority though it costs more: the other would move it in his turn": (
        (running("higher", spec={"priority": 2}, ran_seconds=400), running("lower", spec={"priority": 1})),
        {"urgent": "lower"},
    ),
    "nobody where one ends sooner than another could stop": (
        (about_to_end("ends", 30), running("runs", checkpoint_age_seconds=1)),
        {"urgent": None},
    ),
    "another than one that ends sooner than a move takes": (
        (about_to_end("ends", 60), running("runs", ran_seconds=9000)),
        {"urgent": "runs"},
    ),
    "nobody where there is no other than one that ends sooner than a move takes": (
        (about_to_end("ends", 60), running("equal", spec={"priority": 5})),
        {"urgent": None},
    ),
    "not the one that should have ended long ago": ((about_to_end("late", -600), running("runs")), {"urgent": "runs"}),
    "not one that was just moved": (
        (running("moved", ran_seconds=59, evictions={"Preempted": 1}), running("equal", spec={"priority": 5})),
        {},
    ),
    "one that was moved once its cool-down is over": (
        (running("moved", ran_seconds=60, evictions={"Preempted": 1}), running("equal", spec={"priority": 5})),
        {"urgent": "moved"},
    ),
    "nobody while a stage is stopping already": (
        (running("stopping", stop_reason=Reason.PREEMPTED), running("runs")),
        {"urgent": None},
    ),
    "nobody while a stage is stopping for another reason": (
        (running("suspended", stop_reason=Reason.SUSPENDED), running("runs")),
        {"urgent": None},
    ),
}


@pytest.mark.parametrize(("holders", "expected"), VICTIMS.values(), ids=VICTIMS)
def test_the_victim_is(holders: tuple[QLoRAJob, ...], expected: dict[str, str | None]) -> None:
    assert victims(world(*holders, URGENT, gpu_classes=gpus(_24Gi=2))) == expected


def test_never_more_victims_than_claims_that_need_one() -> None:
    holders = [running(f"runs-{n}") for n in range(4)]
    urgent = [waiting(f"urgent-{n}", priority=5) for n in range(2)]
    seen = world(*holders, *urgent, gpu_classes=gpus(_24Gi=4))
    assert victims(seen) == {"urgent-0": "runs-0", "urgent-1": "runs-1"}


def test_a_stage_that_is_stopping_is_coming_free_once_and_no_victim_again() -> None:
    holders = (running("stopping", stop_reason=Reason.PREEMPTED, ran_seconds=400), running("runs"))
    urgent = [waiting(f"urgent-{n}", priority=5) for n in range(3)]
    seen = world(*holders, *urgent, gpu_classes=gpus(_24Gi=2))
    assert victims(seen) == {"urgent-0": None, "urgent-1": "runs"}


def test_a_queue_that_preempts_never_moves_nobody() -> None:
    queues = (make_queue("polite", preemption="Never"),)
    seen = world(running("runs"), waiting("polite", priority=9, queue="polite"), queues=queues)
    assert victims(seen) == {}


def test_a_victim_on_a_class_that_the_claim_does_not_fit_is_of_no_use() -> None:
    holders = (running("small"), running("big", gpu_class="48Gi", ran_seconds=9000))
    seen = world(*holders, large("urgent", priority=5), gpu_classes=gpus(_24Gi=1, _48Gi=1))
    assert victims(seen) == {"urgent": "big"}


def test_own_quota_is_freed_by_a_job_of_the_own_queue_even_where_another_would_be_cheaper() -> None:
    queues = (make_queue("default", {"24Gi": 1}), make_queue("other"))
    holders = (running("mine", ran_seconds=9000), running("theirs", spec={"queue": "other"}, ran_seconds=400))
    assert victims(world(*holders, URGENT, gpu_classes=gpus(_24Gi=2), queues=queues)) == {"urgent": "mine"}


def test_an_eviction_is_written_first_and_asked_for_in_the_next_pass_until_the_stage_ends() -> None:
    victim = running("runs")
    commands = decide(world(victim, URGENT))
    writes = {c.job.metadata.name: c for c in commands if isinstance(c, WriteStatus)}
    assert set(writes) == {"runs", "urgent"}
    assert len(commands) == 2
    assert writes["runs"].status.active_attempt.stop_reason is Reason.PREEMPTED
    assert writes["runs"].events[-1].message == "makes way on 24Gi for default/urgent: priority 5 over 0"
    assert writes["urgent"].status.condition(ConditionType.ADMITTED).reason is Reason.WAITING_FOR_PREEMPTION

    stopping = make_job("runs", status=writes["runs"].status)
    blocked = make_job("urgent", status=writes["urgent"].status, priority=5)
    assert decide(world(stopping, blocked)) == (
        StopStage(namespace="default", name="runs-train-2", grace_seconds=120, reason=Reason.PREEMPTED),
    )


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_tells_a_waiting_job_its_place_what_it_fits_and_what_would_help() -> None:
    jobs = (running("runs", spec={"priority": 9}), waiting("ahead", age_seconds=60), waiting("behind"))
    needs = schedule(world(*jobs)).line[1].estimates[0].peak_bytes / 2**30
    larger = world(*jobs, gpu_classes=gpus(_32Gi=1))
    on_larger = schedule(larger).line[1].estimates[0].peak_bytes / 2**30
    assert explain(world(*jobs), "default/behind") == (
        "default/behind is queued: WaitingForGpu: 1 of 1 24Gi GPUs are in use; waits for one to come free, or add one.",
        "It is number 2 of 2 in line for a GPU (priority 0 in queue default); "
        "ahead of it: default/ahead (priority 0, queue default).",
        f"It needs {needs:.1f} of the 21.5 GiB of 24Gi; 1 of 1 24Gi GPUs are held by others: default/runs. "
        "Its steps take about a minute there.",
        f"The next smaller class, 20Gi, would fit, but there is none here: {needs:.1f} GiB. "
        "Its steps take about a minute there.",
        f"The next larger class, 32Gi, would fit, but there is none here: {on_larger:.1f} GiB. "
        "Its steps take about a minute there.",
        "Until one comes free only a job of lower priority could make way, and none may.",
        "When it starts cannot be told: nobody knows for how long default/runs will hold a GPU.",
    )


def test_explain_tells_both_sides_of_a_preemption() -> None:
    seen = world(running("runs", ran_seconds=400), URGENT)
    assert "default/runs makes way for it, which costs 400 GPU-seconds." in explain(seen, "default/urgent")
    assert "It makes way for default/urgent and comes back to the queue." in explain(seen, "default/runs")


def test_explain_knows_a_job_that_is_placed_now_and_one_that_does_not_exist() -> None:
    seen = world(waiting("job"))
    assert "A 24Gi GPU is free, and it gets it now." in explain(seen, "default/job")
    assert explain(seen, "default/nobody") == ("There is no job default/nobody.",)


@pytest.mark.parametrize(
    ("spot", "on_spot", "waits"),
    [
        ("required", 0, True),
        ("required", 1, False),
        ("required", None, False),
        ("forbidden", 2, True),
        ("forbidden", 1, False),
        ("forbidden", None, False),
        ("allowed", 0, False),
        ("allowed", 2, False),
    ],
)
def test_nobody_makes_way_for_a_job_that_no_machine_here_may_take(spot: str, on_spot: int | None, waits: bool) -> None:
    """A pod that no node takes comes back after a quarter of an hour, and would evict the next one."""
    classes = tuple(replace(each, spot=on_spot) for each in gpus(_24Gi=2))
    victims = [make_job(name, status=running_status()) for name in ("one", "two")]
    wanting = make_job("wanting", status=prepared_status(), priority=100)
    resources = wanting.spec.resources.model_copy(update={"spot": spot})
    wanting = wanting.model_copy(update={"spec": wanting.spec.model_copy(update={"resources": resources})})
    commands = decide(snapshot(*victims, wanting, stages=tuple(map(stage, victims)), gpu_classes=classes))
    admitted = written(commands, "wanting").condition(ConditionType.ADMITTED)
    assert admitted is not None
    assert (f"resources.spot is {spot}" in admitted.message) is waits
    stopped = [
        c for c in commands if isinstance(c, WriteStatus) and c.status.attempts and c.status.attempts[-1].stop_time
    ]
    assert len(stopped) == (0 if waits else 1)
