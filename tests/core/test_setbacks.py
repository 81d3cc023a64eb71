"""What the surroundings do to a job, and what it costs: budgets by cause, places passed over, silence, wrong clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.job import CheckpointStatus, QLoRAJob, QLoRAJobStatus, Setback
from orchestrator.api.reasons import ConditionType, Reason, Recovery
from orchestrator.core.commands import EnsureStage, Event, StopStage, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.job.setbacks import JITTER, outage_pause_seconds
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import StageFact, StagePhase
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    POLICY,
    after,
    exited,
    failure,
    gpus,
    make_attempt,
    make_job,
    prepared_status,
    progress,
    running_status,
    snapshot,
    stage,
    train_result,
    written,
)

GPUS = gpus(_24Gi=1, _48Gi=1)
WAITED_OUT = [reason for reason in Reason if reason.recovery is Recovery.WAIT]


def status_after(job: QLoRAJob, *stages: StageFact, **fields: object) -> QLoRAJobStatus:
    return written(decide(snapshot(job, stages=stages, **{"gpu_classes": GPUS, **fields})))


def events(job: QLoRAJob, *stages: StageFact) -> list[Event]:
    commands = decide(snapshot(job, stages=stages, gpu_classes=GPUS))
    return [event for command in commands if isinstance(command, WriteStatus) for event in command.events]


def with_setback(reason: Reason, count: int, seconds: float = 0.0, **spec: object) -> QLoRAJob:
    known = Setback(reason=reason, count=count, seconds=seconds)
    return make_job(status=running_status(ran_seconds=30, setbacks=(known,)), **spec)


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", WAITED_OUT)
def test_what_the_surroundings_do_holds_no_gpu_and_counts_no_failure(reason: Reason) -> None:
    job = make_job(status=running_status(ran_seconds=30, failures_total=3), backoff_limit=0)
    status = status_after(job, exited(job, None, failure(reason, "not today"), disruption=reason))
    assert state_of(status) is JobState.QUEUED
    assert status.failures_total == 3
    assert [(known.reason, known.count) for known in status.setbacks] == [(reason, 1)]
    assert NOW < status.retry_after <= after(POLICY.backoff_base_seconds)
    assert status.condition(ConditionType.ADMITTED).reason is Reason.BACKING_OFF
    assert "not today" in status.summary


def test_an_outage_ends_a_job_only_after_hours_and_says_so() -> None:
    patient = with_setback(Reason.TRANSIENT_ERROR, 40, POLICY.outage_limit_seconds - 1000)
    tired = with_setback(Reason.TRANSIENT_ERROR, 40, POLICY.outage_limit_seconds - 100)
    assert status_after(patient, exited(patient, 81)).finish_time is None
    finished = status_after(tired, exited(tired, 81, failure(Reason.TRANSIENT_ERROR, "503"))).condition(
        ConditionType.FINISHED
    )
    assert finished.reason is Reason.OUTAGE_LIMIT_EXCEEDED
    assert finished.message == (
        "TransientError for 41 attempts and longer than outageLimitSeconds 21600, without a new checkpoint; "
        "the last one: 503"
    )


def test_a_jobs_own_outage_limit_goes_before_the_services() -> None:
    job = with_setback(Reason.TRANSIENT_ERROR, 2, 100, outage_limit_seconds=110)
    assert status_after(job, exited(job, 81)).finish_time is not None


def test_waiting_for_a_place_never_ends_a_job() -> None:
    job = with_setback(Reason.UNSCHEDULABLE, 1000, POLICY.outage_limit_seconds)
    assert status_after(job, exited(job, None, disruption=Reason.UNSCHEDULABLE)).finish_time is None


def test_failures_are_counted_by_cause() -> None:
    job = with_setback(Reason.KILLED, 3, backoff_limit=3)
    status = status_after(job, exited(job, 1))
    assert status.finish_time is None
    assert {known.reason: known.count for known in status.setbacks} == {Reason.KILLED: 3, Reason.INTERNAL_ERROR: 1}


@pytest.mark.parametrize("how", ["reported", "with its end"])
def test_a_new_checkpoint_gives_the_retries_back(how: str) -> None:
    job = with_setback(Reason.INTERNAL_ERROR, 3, backoff_limit=3)
    known = CheckpointStatus(step=10, uri="file:///c/10", time=after(-500), attempt=1)
    job = make_job(status=job.status.model_copy(update={"checkpoint": known}), backoff_limit=3)
    if how == "reported":
        report = progress(20, checkpoint_step=20, checkpoint_uri="file:///c/20")
        assert status_after(job, stage(job, progress=report)).setbacks == ()
    else:
        ended = status_after(job, exited(job, 1, train_result(20, complete=False)))
        assert [(known.reason, known.count) for known in ended.setbacks] == [(Reason.INTERNAL_ERROR, 1)]


def test_an_old_checkpoint_reported_again_gives_nothing_back() -> None:
    job = with_setback(Reason.INTERNAL_ERROR, 3, backoff_limit=3)
    known = CheckpointStatus(step=10, uri="file:///c/10", time=after(-500), attempt=1)
    job = make_job(status=job.status.model_copy(update={"checkpoint": known}), backoff_limit=3)
    report = progress(10, checkpoint_step=10, checkpoint_uri="file:///c/10")
    assert status_after(job, exited(job, 1, progress=report)).finish_time == NOW


def test_pauses_differ_between_jobs_and_never_for_the_same_attempt() -> None:
    pauses = {outage_pause_seconds(POLICY, 3, f"uid-{n}", 4) for n in range(20)}
    assert len(pauses) == 20
    assert all(40 * (1 - JITTER) <= pause <= 40 for pause in pauses)
    assert outage_pause_seconds(POLICY, 3, "uid", 4) == outage_pause_seconds(POLICY, 3, "uid", 4)


# --- places that are passed over -------------------------------------------------------------------------------------


def queued_after(reason: Reason, *, node: str | None = None, ago: float = 60, **fields: object) -> QLoRAJob:
    ended = make_attempt(finish_time=after(-ago), reason=reason, node=node)
    return make_job(status=prepared_status(attempts=(ended,), attempts_total=2, **fields))


def test_a_class_that_took_no_pod_is_passed_over_for_a_while() -> None:
    assert status_after(queued_after(Reason.UNSCHEDULABLE)).active_attempt.gpu_class == "48Gi"
    later = queued_after(Reason.UNSCHEDULABLE, ago=POLICY.avoid_seconds)
    assert status_after(later).active_attempt.gpu_class == "24Gi"


def test_a_class_is_tried_again_where_no_other_fits() -> None:
    status = status_after(queued_after(Reason.UNSCHEDULABLE), gpu_classes=gpus(_24Gi=1))
    assert status.active_attempt.gpu_class == "24Gi"


def test_a_job_with_a_checkpoint_moves_on_too_rather_than_to_wait() -> None:
    first = status_after(make_job(status=prepared_status(LLAMA_3_8B)))
    job = queued_after(
        Reason.UNSCHEDULABLE,
        estimate=first.estimate,
        checkpoint=CheckpointStatus(step=3, uri="file:///c", time=after(-90)),
    )
    assert status_after(job).active_attempt.gpu_class == "48Gi"


def test_explain_names_what_is_passed_over() -> None:
    job = queued_after(Reason.UNSCHEDULABLE)
    sentences = explain(snapshot(job, gpu_classes=gpus(_48Gi=0)), job.key)
    assert "Passed over for now, since they failed it lately: 24Gi." in sentences


def test_a_node_with_a_broken_card_is_avoided_by_everybody() -> None:
    hurt, other = queued_after(Reason.BROKEN_GPU, node="gpu-7"), make_job("other", status=prepared_status())
    commands = decide(snapshot(hurt, other, gpu_classes=gpus(_24Gi=2)))
    begun = {command.task.job: command for command in commands if isinstance(command, EnsureStage)}
    assert {name: (command.gpu_class, command.task.avoid_nodes) for name, command in begun.items()} == {
        "job": ("24Gi", ("gpu-7",)),
        "other": ("24Gi", ("gpu-7",)),
    }


def test_a_broken_card_is_told_with_its_node_and_its_error() -> None:
    job = make_job(status=running_status(ran_seconds=20))
    ended = exited(job, 86, failure(Reason.BROKEN_GPU, "CUDA error: uncorrectable ECC error"), node="gpu-7")
    status = status_after(job, ended)
    assert (status.attempts[-1].reason, status.attempts[-1].node) == (Reason.BROKEN_GPU, "gpu-7")
    warning = next(event for event in events(job, ended) if event.reason is Reason.BROKEN_GPU)
    assert (warning.message, warning.warning) == ("CUDA error: uncorrectable ECC error (on node gpu-7)", True)


def test_a_broken_card_on_no_known_node_sends_the_job_to_another_class() -> None:
    assert status_after(queued_after(Reason.BROKEN_GPU)).active_attempt.gpu_class == "48Gi"


# --- host memory ---------------------------------------------------------------------------------------------------


def test_host_memory_is_doubled_within_its_bound_and_then_the_settings_are_named() -> None:
    factors: list[float] = []
    status = running_status(ran_seconds=30)
    while len(factors) < 5:
        job = make_job(status=status)
        status = status_after(job, exited(job, 137, disruption=Reason.HOST_OUT_OF_MEMORY))
        if status.finish_time is not None:
            break
        commands = decide(snapshot(make_job(status=status), gpu_classes=GPUS))
        [begun] = [command for command in commands if isinstance(command, EnsureStage)]
        factors.append(begun.task.host_memory_factor)
    assert factors == [2, 4]
    finished = status.condition(ConditionType.FINISHED)
    assert finished.reason is Reason.HOST_OUT_OF_MEMORY
    assert "QLORA_HOST_MEMORY_FACTOR_MAX" in finished.message


# --- silence ---------------------------------------------------------------------------------------------------------


def silent(seconds: float, *, known: int = 0, **report: object) -> tuple[QLoRAJob, StageFact]:
    """A stage of steps of 5 s, whose last step was seen so long ago."""
    report = {"eta_seconds": 550.0, "tokens_per_second": 4000.0, **report}
    last = progress(10, age_seconds=seconds, **report)
    status = running_status(ran_seconds=50_000, progress=last)
    attempt = status.attempts[-1].model_copy(update={"progress_time": after(-seconds)})
    spent = (Setback(reason=Reason.NO_PROGRESS, count=known),) if known else ()
    job = make_job(status=status.model_copy(update={"attempts": (attempt,), "setbacks": spent}), backoff_limit=0)
    return job, stage(job, progress=last)


def test_a_stage_without_a_step_for_long_is_stopped_and_resumed_at_no_cost() -> None:
    bound_seconds = POLICY.stall_seconds + POLICY.stall_steps * 5
    patient, fact = silent(bound_seconds - 1)
    assert status_after(patient, fact).active_attempt.stop_reason is None
    job, fact = silent(bound_seconds + 1)
    status = status_after(job, fact)
    assert status.active_attempt.stop_reason is Reason.NO_PROGRESS
    assert any(event.warning and event.message.startswith("no progress: step 10") for event in events(job, fact))
    stopping = make_job(status=status, backoff_limit=0)
    assert any(isinstance(command, StopStage) for command in decide(snapshot(stopping, stages=(fact,))))
    resumed = status_after(stopping, exited(stopping, 137))
    assert (state_of(resumed), resumed.failures_total) == (JobState.QUEUED, 0)


def test_a_second_silence_in_a_row_counts() -> None:
    job, fact = silent(50_000, known=1)
    stopping = make_job(status=status_after(job, fact), backoff_limit=0)
    finished = status_after(stopping, exited(stopping, 137)).condition(ConditionType.FINISHED)
    assert finished.reason is Reason.BACKOFF_LIMIT_EXCEEDED


def test_slow_steps_and_a_start_have_the_time_they_need() -> None:
    slow, fact = silent(10_000, eta_seconds=110 * 600.0)
    assert status_after(slow, fact).active_attempt.stop_reason is None
    starting, fact = silent(10_000, tokens_per_second=None, eta_seconds=None)
    assert status_after(starting, fact).active_attempt.stop_reason is None


def test_a_stage_of_which_nothing_is_heard_any_more_is_left_alone() -> None:
    job, fact = silent(50_000)
    assert status_after(job, replace(fact, progress=None)).active_attempt.stop_reason is None


@pytest.mark.parametrize("has_agents", [True, False])
def test_a_stage_that_has_never_reported_is_stopped_where_it_could_have(has_agents: bool) -> None:
    policy = replace(POLICY, has_agents=has_agents)
    job = make_job(status=running_status(ran_seconds=POLICY.stall_start_seconds + 1))
    status = status_after(job, stage(job), policy=policy)
    assert (status.active_attempt.stop_reason is Reason.NO_PROGRESS) is has_agents


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [-86_400, -300, 300, 86_400])
def test_a_nodes_clock_moves_no_start_no_end_and_no_deadline(skew: float) -> None:
    attempt = make_attempt(created_time=after(-60))
    job = make_job(status=prepared_status(attempts=(attempt,), attempts_total=2), active_deadline_seconds=3600)
    status = status_after(job, stage(job, start_time=after(skew - 50)))
    assert attempt.created_time <= status.active_attempt.start_time <= NOW
    assert status.active_attempt.stop_reason is None
    going = make_job(status=status)
    ended = status_after(going, exited(going, 1, finish_time=after(skew))).attempts[-1]
    assert status.active_attempt.start_time <= ended.finish_time <= NOW


@pytest.mark.parametrize("skew", [-86_400, 86_400])
def test_the_later_step_counts_whatever_its_stamp(skew: float) -> None:
    job = make_job(status=running_status())
    first = progress(10, age_seconds=skew, checkpoint_step=10, checkpoint_uri="file:///c/10")
    job = make_job(status=status_after(job, stage(job, progress=first)))
    second = progress(20, checkpoint_step=20, checkpoint_uri="file:///c/20")
    assert status_after(job, stage(job, progress=second)).checkpoint.step == 20
    third = progress(20, age_seconds=-5, checkpoint_step=15, checkpoint_uri="file:///c/15")
    job = make_job(status=status_after(job, stage(job, progress=second)))
    assert status_after(job, stage(job, progress=third)).checkpoint.step == 20


def test_a_later_attempt_that_had_to_go_back_says_where_it_is() -> None:
    known = CheckpointStatus(step=20, uri="file:///c/20", time=after(-50), attempt=1)
    job = make_job(status=running_status().model_copy(update={"checkpoint": known}))
    back = progress(12, checkpoint_step=12, checkpoint_uri="file:///c/12")
    assert status_after(job, stage(job, progress=back)).checkpoint.step == 12


def test_a_controllers_clock_that_is_put_back_makes_nobody_wait_for_it() -> None:
    waiting = make_job(status=prepared_status(retry_after=after(86_400)))
    assert state_of(status_after(waiting)) is JobState.STARTING
    running = make_job(status=running_status(ran_seconds=-3600), active_deadline_seconds=60)
    assert status_after(running, stage(running)).active_attempt.stop_reason is None


@pytest.mark.parametrize("step_seconds", [86_400.0, -86_400.0])
def test_a_controllers_clock_that_is_put_ends_no_job_by_its_deadline_and_takes_none_for_stuck(
    step_seconds: float,
) -> None:
    """Running for half an hour of an hour when the clock is put: half an hour is left, and then the deadline counts."""
    job = make_job(status=running_status(ran_seconds=1800), active_deadline_seconds=3600)
    known = progress(10)
    job = make_job(status=status_after(job, stage(job, progress=known)), active_deadline_seconds=3600)

    def at(seconds: float, **fields: object) -> QLoRAJobStatus:
        return status_after(job, stage(job, progress=known), now=after(step_seconds + seconds), **fields)

    job = make_job(status=at(0, clock_step_seconds=step_seconds), active_deadline_seconds=3600)
    assert job.status.active_attempt is not None
    assert job.status.active_attempt.stop_reason is None
    in_time = decide(
        snapshot(job, stages=(stage(job, progress=known),), gpu_classes=GPUS, now=after(step_seconds + 1700))
    )
    assert not [command for command in in_time if isinstance(command, StopStage)]
    assert at(1900).active_attempt.stop_reason is Reason.DEADLINE_EXCEEDED


# --- attempts are used once ------------------------------------------------------------------------------------------


def test_a_stage_that_was_seen_and_is_missing_has_ended_though_it_never_ran() -> None:
    attempt = make_attempt(created_time=after(-5))
    job = make_job(status=prepared_status(attempts=(attempt,), attempts_total=2))
    seen = status_after(job, stage(job, StagePhase.PENDING))
    assert seen.active_attempt.seen_time == NOW
    commands = decide(snapshot(make_job(status=seen), gpu_classes=GPUS))
    assert [command for command in commands if isinstance(command, EnsureStage)] == []
    assert written(commands).attempts[-1].reason is Reason.LOST


def test_an_attempt_of_which_no_stage_comes_gives_its_gpu_back() -> None:
    attempt = make_attempt(created_time=after(-POLICY.creation_limit_seconds))
    job = make_job(status=prepared_status(attempts=(attempt,), attempts_total=2))
    status = status_after(job)
    assert (status.active_attempt, status.attempts[-1].reason) == (None, Reason.START_FAILED)
    assert status.attempts[-1].message == "no stage came of train attempt 2 in 300 s"
