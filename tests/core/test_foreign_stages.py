"""What stands under a stage's name and is not the stage: nothing of it is believed, and nobody waits for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import pytest

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.results import StageResult
from orchestrator.api.stage_name import StageKind
from orchestrator.core.commands import Command, DeleteJob, EnsureStage, StopStage, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import StageFact, StagePhase
from tests.builders import (
    PUBLISHED,
    after,
    exited,
    failure,
    gpus,
    make_attempt,
    make_job,
    prepare_result,
    prepared_status,
    snapshot,
    stage,
    train_result,
    written,
)

RESULTS = {"prepare": StageResult(prepare=prepare_result()), "train": train_result(), "publish": PUBLISHED}
ONE = gpus(_24Gi=1)
Kind = TypeVar("Kind")


def begun(kind: StageKind, **attempt: Any) -> QLoRAJob:
    """A job whose attempt at a stage is on record; of its pod nothing is."""
    active = make_attempt(kind, 2, **{"created_time": snapshot().now, **attempt})
    more: dict[str, Any] = {"adapter_uri": "file:///adapter"} if kind == "publish" else {}
    status = prepared_status(attempts=(active,), attempts_total=2, **more)
    return make_job(status=QLoRAJobStatus(attempts=(active,), attempts_total=2) if kind == "prepare" else status)


def of_kind(commands: tuple[Command, ...], kind: type[Kind]) -> list[Kind]:
    return [command for command in commands if isinstance(command, kind)]


@pytest.mark.parametrize("kind", ["prepare", "train", "publish"])
@pytest.mark.parametrize("phase", [StagePhase.PENDING, StagePhase.RUNNING, StagePhase.EXITED])
def test_a_pod_that_nobody_vouches_for_is_neither_heard_nor_stopped_but_asked_about(
    kind: StageKind, phase: StagePhase
) -> None:
    job = begun(kind)
    result = RESULTS[kind] if phase is StagePhase.EXITED else None
    fact = stage(job, phase, exit_code=0 if result else None, result=result, vouched=False, stage_uid="a-strangers")
    commands = decide(snapshot(job, stages=(fact,), gpu_classes=ONE))
    assert [command.task.stage_name for command in of_kind(commands, EnsureStage)] == [fact.name]
    assert not of_kind(commands, StopStage)
    assert all(write.status.attempts == job.status.attempts for write in of_kind(commands, WriteStatus))


@pytest.mark.parametrize("kind", ["prepare", "train", "publish"])
def test_once_a_status_names_a_pod_only_that_one_is_heard(kind: StageKind) -> None:
    now = snapshot().now
    job = begun(kind, seen_time=now, start_time=now, stage_uid="ours")
    other = exited(job, 0, RESULTS[kind], vouched=False, stage_uid="a-strangers")
    lost = written(decide(snapshot(job, stages=(other,), gpu_classes=ONE)))
    assert lost.attempts[0].reason is Reason.LOST
    assert lost.mlflow.model_version is None
    ours = exited(job, 0, RESULTS[kind], vouched=False, stage_uid="ours")
    done = written(decide(snapshot(job, stages=(ours,), gpu_classes=ONE)))
    assert done.attempts[0].reason is Reason.SUCCEEDED, "a controller that has just started knows it by its uid"


def test_the_uid_of_a_pod_is_on_record_with_the_first_sight_of_it() -> None:
    job = begun("train")
    fact = stage(job, StagePhase.PENDING, stage_uid="ours")
    commands = decide(snapshot(job, stages=(fact,), gpu_classes=ONE))
    assert written(commands).attempts[-1].stage_uid == "ours"
    assert written(commands).attempts[-1].seen_time == snapshot().now


def test_a_pod_that_an_older_version_saw_goes_on_and_is_named_from_now_on() -> None:
    now = snapshot().now
    job = begun("train", seen_time=now, start_time=now)
    fact = stage(job, vouched=False, stage_uid="ours")
    status = written(decide(snapshot(job, stages=(fact,), gpu_classes=ONE)))
    assert (status.attempts[-1].stage_uid, status.attempts[-1].active) == ("ours", True)


def test_a_name_that_is_taken_costs_an_attempt_and_a_pause_and_says_so() -> None:
    job = begun("train")
    fact = exited(job, None, failure(Reason.NAME_TAKEN, "pod x is not ours"), disruption=Reason.NAME_TAKEN)
    commands = decide(snapshot(job, stages=(fact,), gpu_classes=ONE))
    status = written(commands)
    assert (status.attempts[-1].reason, status.attempts[-1].message) == (Reason.NAME_TAKEN, "pod x is not ours")
    assert state_of(status) is JobState.QUEUED
    assert status.failures_total == 0
    assert status.retry_after is not None
    [write] = of_kind(commands, WriteStatus)
    assert [(e.reason, e.warning) for e in write.events if e.reason is Reason.NAME_TAKEN] == [(Reason.NAME_TAKEN, True)]


@pytest.mark.parametrize("known", ["as stages", "as names"])
def test_names_that_are_known_to_be_taken_are_passed_over_and_cost_nothing(known: str) -> None:
    job = make_job(status=prepared_status())
    names = [f"job-train-{number}" for number in (2, 3)]
    facts = [
        StageFact(namespace="default", name=name, uid="uid-job", phase=StagePhase.PENDING, vouched=False)
        for name in names
    ]
    seen = snapshot(job, stages=tuple(facts) if known == "as stages" else (), gpu_classes=ONE)
    if known == "as names":
        seen = replace(seen, taken_names=frozenset(f"default/{name}" for name in names))
    commands = decide(seen)
    status = written(commands)
    assert [attempt.number for attempt in status.attempts] == [4]
    [write] = of_kind(commands, WriteStatus)
    assert Reason.NAME_TAKEN in [event.reason for event in write.events]


def test_gpus_of_a_pod_that_no_status_accounts_for_are_taken_and_nobody_is_moved_for_them() -> None:
    job = make_job(status=prepared_status())
    stranger = StageFact(
        namespace="default",
        name="other-train-1",
        uid="nobody",
        phase=StagePhase.RUNNING,
        vouched=False,
        gpus=1,
        gpu_class="24Gi",
    )
    free = decide(snapshot(job, gpu_classes=ONE))
    assert of_kind(free, EnsureStage)
    taken = decide(snapshot(job, stages=(stranger,), gpu_classes=ONE))
    assert not of_kind(taken, EnsureStage)
    assert written(taken).summary


def test_the_gpu_of_a_stage_that_runs_on_after_its_attempt_was_given_up_is_given_to_nobody() -> None:
    lost = make_attempt("train", 2, finish_time=after(-100), reason=Reason.LOST, stage_uid="ours")
    job = make_job(status=prepared_status(attempts=(lost,), attempts_total=2))
    came_back = StageFact(
        namespace="default",
        name="job-train-2",
        uid="uid-job",
        phase=StagePhase.RUNNING,
        stage_uid="ours",
        gpus=1,
        gpu_class="24Gi",
    )
    commands = decide(snapshot(job, stages=(came_back,), gpu_classes=ONE))
    assert not of_kind(commands, EnsureStage)
    assert [stop.name for stop in of_kind(commands, StopStage)] == ["job-train-2"]
    ended = replace(came_back, phase=StagePhase.EXITED)
    assert of_kind(decide(snapshot(job, stages=(ended,), gpu_classes=ONE)), EnsureStage)


def test_the_gpu_of_an_attempt_is_not_booked_twice_before_its_pod_is_vouched_for() -> None:
    starting = begun("train")
    fact = stage(starting, StagePhase.PENDING, vouched=False, gpus=1, gpu_class="24Gi")
    waiting = make_job("waiting", status=prepared_status(), priority=10)
    commands = decide(snapshot(starting, waiting, stages=(fact,), gpu_classes=gpus(_24Gi=2)))
    started = [command.task.job for command in of_kind(commands, EnsureStage)]
    assert sorted(started) == ["job", "waiting"]
    assert not of_kind(commands, StopStage)


def test_a_strangers_pod_does_not_keep_a_finished_job_from_going() -> None:
    ended = make_attempt("publish", 3, finish_time=after(-100), stage_uid="ours")
    status = prepared_status(attempts=(ended,), attempts_total=3, finish_time=after(-100), run_id=None)
    job = make_job(status=status, ttl_seconds_after_finished=1)
    strangers = StageFact(
        namespace="default", name="job-train-9", uid="uid-job", phase=StagePhase.RUNNING, vouched=False, stage_uid="x"
    )
    ours = replace(strangers, stage_uid="ours")
    assert of_kind(decide(snapshot(job, stages=(strangers,))), DeleteJob)
    assert not of_kind(decide(snapshot(job, stages=(ours,))), DeleteJob)


def test_what_calls_itself_ours_and_is_nobodys_is_ended() -> None:
    job = make_job(status=prepared_status())
    fact = StageFact(
        namespace="default",
        name="job-train-9",
        uid="uid-job",
        phase=StagePhase.RUNNING,
        vouched=False,
        start_time=snapshot().now - timedelta(seconds=5),
    )
    commands = decide(snapshot(job, stages=(fact,), gpu_classes=()))
    assert StopStage(namespace="default", name="job-train-9", grace_seconds=120, reason=Reason.FENCED) in commands
