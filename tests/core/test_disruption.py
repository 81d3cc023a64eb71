"""What the platform does to stages: machines that are taken away, and figures that nobody has to be told of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.job import MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import StageResult
from orchestrator.core.commands import StopStage
from orchestrator.core.decide import decide
from orchestrator.core.job.conditions import Finding, says_the_same, set_condition
from orchestrator.core.snapshot import StagePhase
from orchestrator.sizing.hardware import classify, memory_range_mib
from tests.builders import (
    NOW,
    POLICY,
    after,
    exited,
    failure,
    gpus,
    make_attempt,
    make_job,
    running_status,
    snapshot,
    stage,
    written,
)

GPUS = gpus(_24Gi=1)
CARDS = {"24Gi": (23_028, 24_576), "48Gi": (46_068, 49_140), "80Gi": (81_559, 81_920)}
"""Total MiB of cards that are sold as a class: A10G, RTX 3090; L40S, A6000; H100, A100."""


def training() -> QLoRAJob:
    return make_job(status=running_status())


def test_a_machine_that_is_about_to_go_is_left_with_a_checkpoint() -> None:
    job = training()
    going = stage(job, disruption=Reason.DISRUPTED, result=failure(Reason.DISRUPTED, "the node gpu-7 is drained"))
    status = written(decide(snapshot(job, stages=[going], gpu_classes=GPUS)))
    attempt = status.active_attempt
    assert attempt is not None
    assert (attempt.stop_reason, attempt.stop_time) == (Reason.DISRUPTED, NOW)
    assert "gpu-7" in "".join(told.message for told in status.conditions)
    asked = job.model_copy(update={"status": status})
    stops = [c for c in decide(snapshot(asked, stages=[going], gpu_classes=GPUS)) if isinstance(c, StopStage)]
    assert [(stop.name, stop.grace_seconds) for stop in stops] == [(going.name, POLICY.grace_seconds)]


@pytest.mark.parametrize("reason", [Reason.DISRUPTED, Reason.UNSCHEDULABLE])
def test_what_the_platform_ends_resumes_and_counts_as_no_failure(reason: Reason) -> None:
    job = training()
    ended = exited(job, None, failure(reason, "no room"), disruption=reason)
    status = written(decide(snapshot(job, stages=[ended])))
    assert status.attempts[-1].reason is reason
    assert status.failures_total == 0


def test_what_a_node_out_of_reach_never_ends_is_given_up_and_resumes_in_words() -> None:
    asked = make_attempt(start_time=after(-500), stop_time=after(-200), stop_reason=Reason.DISRUPTED, message="tainted")
    job = make_job(status=running_status().model_copy(update={"attempts": (asked,)}))
    unseen = exited(job, None, failure(Reason.LOST, "its node gpu-7 does not answer"), disruption=Reason.LOST)
    status = written(decide(snapshot(job, stages=[unseen])))
    assert (status.attempts[-1].reason, status.failures_total) == (Reason.DISRUPTED, 0)
    assert status.attempts[-1].message == "train attempt 2 stopped: tainted; its node gpu-7 does not answer"


@pytest.mark.parametrize("reason", [Reason.HOST_OUT_OF_MEMORY, Reason.KILLED])
def test_what_may_be_the_jobs_own_fault_is_tried_again_a_bounded_number_of_times(reason: Reason) -> None:
    job = training()
    ended = exited(job, None, failure(reason, "no image"), disruption=reason)
    status = written(decide(snapshot(job, stages=[ended])))
    assert status.attempts[-1].reason is reason
    assert status.failures_total == 1


def test_a_cpu_stage_that_is_quick_is_not_written_about_before_its_end() -> None:
    policy = replace(POLICY, progress_interval_seconds=30.0)
    attempt = make_attempt("prepare", 1, created_time=after(-5))
    has_run = MlflowStatus(run_id="run", run_status="RUNNING")
    job = make_job(status=QLoRAJobStatus(attempts=(attempt,), attempts_total=1, mlflow=has_run))
    starting = stage(job, StagePhase.PENDING)
    job = job.model_copy(
        update={"status": written(decide(snapshot(job, stages=[starting], gpu_classes=GPUS, policy=policy)))}
    )
    running = stage(job, StagePhase.RUNNING)
    assert decide(snapshot(job, stages=[running], gpu_classes=GPUS, policy=policy)) == ()
    slow = snapshot(job, stages=[running], gpu_classes=GPUS, policy=policy)
    status = written(decide(replace(slow, now=after(60))))
    assert status.attempts[0].start_time is not None


def test_a_condition_whose_figures_alone_differ_is_not_written_again() -> None:
    said = Finding(
        kind=ConditionType.ADMITTED, status="False", reason=Reason.WAITING_FOR_GPU, message="3 of 4 GPUs are in use"
    )
    (before,) = set_condition((), said, now=NOW, generation=1)
    assert says_the_same(before, Reason.WAITING_FOR_GPU, "4 of 4 GPUs are in use", 1)
    assert not says_the_same(before, Reason.WAITING_FOR_GPU, "no GPU is there", 1)
    assert not says_the_same(before, Reason.WAITING_FOR_QUOTA, "4 of 4 GPUs are in use", 1)
    assert not says_the_same(before, Reason.WAITING_FOR_GPU, "3 of 4 GPUs are in use", 2)


@pytest.mark.parametrize("name", CARDS)
def test_a_classs_range_of_memory_is_what_classify_puts_into_it(name: str) -> None:
    lower, upper = memory_range_mib(name)
    assert upper is not None
    for total_mib in (*CARDS[name], lower, upper - 1):
        assert classify(total_mib) == name
    assert classify(lower - 1) != name
    assert classify(upper) != name


def test_a_result_without_a_failure_says_that_the_machine_goes() -> None:
    job = training()
    going = stage(job, disruption=Reason.DISRUPTED, result=StageResult())
    status = written(decide(snapshot(job, stages=[going], gpu_classes=GPUS)))
    assert "taken away" in "".join(told.message for told in status.conditions)
