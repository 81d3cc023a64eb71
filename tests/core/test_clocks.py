"""Every time that is compared with the present is by the controller's clock, and moves with it when it is put."""

from __future__ import annotations

import pytest

from orchestrator.api.job import RELEASE_FINALIZER, MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Command, DeleteJob, ReleaseJob, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.job.setbacks import broken_nodes
from orchestrator.core.job.state_machine import JobState, state_of
from tests.builders import (
    NOW,
    POLICY,
    after,
    gpus,
    make_attempt,
    make_job,
    prepared_status,
    snapshot,
    written,
)

DAY, TTL_SECONDS = 86_400.0, 3600


def put(job: QLoRAJob, commands: tuple[Command, ...]) -> QLoRAJob:
    """The job as it is stored after a decision."""
    [status] = [command.status for command in commands if isinstance(command, WriteStatus)]
    return job.model_copy(update={"status": status})


def deletes(commands: tuple[Command, ...]) -> bool:
    return any(isinstance(command, DeleteJob) for command in commands)


def finished(seconds_ago: float, **spec: object) -> QLoRAJob:
    status = written(decide(snapshot(make_job(cancelled=True)))).model_copy(update={"finish_time": after(-seconds_ago)})
    return make_job(status=status, cancelled=True, **spec)


@pytest.mark.parametrize("step", [DAY, -DAY])
def test_a_finished_job_keeps_its_time_to_live_when_the_clock_is_put(step: float) -> None:
    job = finished(1800, ttl_seconds_after_finished=TTL_SECONDS)
    at_once = decide(snapshot(job, now=after(step), clock_step_seconds=step))
    assert not deletes(at_once), "half of it is left"
    job = put(job, at_once)
    assert not deletes(decide(snapshot(job, now=after(step + 1799))))
    assert deletes(decide(snapshot(job, now=after(step + 1800))))


def test_a_finished_job_does_not_wait_for_a_clock_that_was_put_back_unnoticed() -> None:
    job = finished(-DAY, ttl_seconds_after_finished=TTL_SECONDS)
    job = put(job, decide(snapshot(job)))
    assert job.status.finish_time == NOW
    assert deletes(decide(snapshot(job, now=after(TTL_SECONDS))))


@pytest.mark.parametrize("skew", [-DAY, 0, DAY])
@pytest.mark.parametrize("step", [-DAY, 0, DAY])
def test_how_long_a_deleted_job_waits_for_mlflow_is_counted_by_one_clock(skew: float, step: float) -> None:
    """Its deletion is stamped by the API server, whose clock may differ; meanwhile the controller's is put, too."""
    ended = QLoRAJobStatus(finish_time=after(-2 * DAY), mlflow=MlflowStatus(run_id="run", run_status="FAILED"))
    job = make_job(status=ended, finalizers=(RELEASE_FINALIZER,))
    deleted = job.metadata.model_copy(update={"deletion_timestamp": after(skew)})
    job = job.model_copy(update={"metadata": deleted})
    limit = POLICY.release_limit_seconds

    def released(seconds: float) -> bool:
        return any(isinstance(command, ReleaseJob) for command in decide(snapshot(job, now=after(seconds))))

    assert not released(0)
    job = put(job, decide(snapshot(job)))
    assert not released(limit - 1)
    if step:
        job = put(job, decide(snapshot(job, now=after(step + limit / 2), clock_step_seconds=step)))
    assert not released(step + limit - 1)
    assert released(step + limit)


@pytest.mark.parametrize("step", [DAY, -DAY])
def test_a_pause_lasts_as_long_when_the_clock_is_put(step: float) -> None:
    job = make_job(status=prepared_status(retry_after=after(100)))
    job = put(job, decide(snapshot(job, now=after(step), clock_step_seconds=step, gpu_classes=gpus(_24Gi=1))))
    assert job.status.retry_after == after(step + 100)
    assert state_of(job.status) is JobState.QUEUED


@pytest.mark.parametrize("step", [DAY, -DAY])
def test_a_broken_node_is_avoided_for_as_long_when_the_clock_is_put(step: float) -> None:
    ended = make_attempt(
        number=2, created_time=after(-100), finish_time=after(-60), reason=Reason.BROKEN_GPU, node="n1"
    )
    job = make_job(status=prepared_status(attempts=(ended,), attempts_total=2, retry_after=after(500)))
    job = put(job, decide(snapshot(job, now=after(step), clock_step_seconds=step, gpu_classes=gpus(_24Gi=1))))
    assert broken_nodes([job], after(step + POLICY.avoid_seconds - 61), POLICY) == ("n1",)
    assert broken_nodes([job], after(step + POLICY.avoid_seconds - 60), POLICY) == ()
