"""One job through its life: a snapshot in, commands out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.job import (
    RELEASE_FINALIZER,
    Attempt,
    CheckpointStatus,
    MlflowStatus,
    QLoRAJob,
    QLoRAJobStatus,
    Setback,
)
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import Promotion, StageResult
from orchestrator.api.task import StageTask
from orchestrator.core.commands import (
    Command,
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    Event,
    FinishRun,
    StopStage,
    WriteStatus,
)
from orchestrator.core.decide import decide
from orchestrator.core.job.finalizer import finalizers_with
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import RunFact, StageFact, StagePhase
from orchestrator.sizing.plan_search import choose_class
from orchestrator.sizing.step_time import Work
from tests.builders import (
    DIGEST,
    LLAMA_3_8B,
    LLAMA_3_70B,
    NOW,
    POLICY,
    PUBLISHED,
    SMOLLM2_135M,
    after,
    exited,
    failure,
    gpus,
    make_attempt,
    make_job,
    prepare_result,
    prepared_status,
    progress,
    running_status,
    snapshot,
    stage,
    train_result,
    written,
)

GPUS = gpus(_24Gi=1, _48Gi=1)
WORK = Work.of(prepare_result())
DONE = {"finish_time": NOW, "summary": "done"}


def outside(commands: tuple[Command, ...]) -> list[Command]:
    """The commands that reach beyond the store."""
    return [command for command in commands if not isinstance(command, WriteStatus)]


def says(status: QLoRAJobStatus, kind: ConditionType) -> tuple[str, Reason] | None:
    condition = status.condition(kind)
    return (condition.status, condition.reason) if condition else None


def decide_one(job: QLoRAJob, *stages: StageFact, **fields: object) -> QLoRAJobStatus:
    return written(decide(snapshot(job, stages=stages, gpu_classes=GPUS, **fields)))


def stage_command(commands: tuple[Command, ...]) -> EnsureStage:
    [found] = [command for command in commands if isinstance(command, EnsureStage)]
    return found


def setbacks(reason: Reason, count: int) -> tuple[Setback, ...]:
    return (Setback(reason=reason, count=count),) if count else ()


STORED = "file:///store/default/job-uid-job/checkpoints"
RUN = MlflowStatus(run_id="run", experiment_id="1", run_status="RUNNING")


def preparing(run_id: str | None = "run", **fields: object) -> QLoRAJob:
    fields.setdefault("created_time", after(-100))
    attempts = (make_attempt("prepare", 1, **fields),)
    return make_job(status=QLoRAJobStatus(attempts=attempts, attempts_total=1, mlflow=MlflowStatus(run_id=run_id)))


def publishing(**fields: object) -> QLoRAJob:
    attempt = make_attempt("publish", 3, start_time=after(-30), **fields)
    return make_job(
        status=prepared_status(
            attempts=(attempt,), attempts_total=3, adapter_uri="file:///adapter", adapter_digest=DIGEST
        )
    )


def with_estimate(status: QLoRAJobStatus, spec_job: QLoRAJob) -> QLoRAJobStatus:
    chosen = choose_class(spec_job.spec, status.prepared.model, GPUS, work=WORK)
    plan_of = status.attempts[-1].model_copy(update={"plan": chosen.plan, "gpu_class": chosen.gpu_class})
    return status.model_copy(update={"estimate": chosen, "attempts": (*status.attempts[:-1], plan_of)})


# --- intent before creation ------------------------------------------------------------------------------------------


def test_a_new_job_gets_a_prepare_attempt_on_record_and_then_its_stage() -> None:
    job = make_job()
    commands = decide(snapshot(job))
    assert [type(command) for command in commands] == [WriteStatus, EnsureStage]
    status = written(commands)
    assert commands[1] == stage_command(decide(snapshot(make_job(status=status))))
    assert status.attempts == (Attempt(stage="prepare", number=1, created_time=NOW),)
    assert says(status, ConditionType.PREPARED) == ("False", Reason.PREPARING)


def test_a_recorded_attempt_without_a_stage_is_created_again_and_again_until_it_is_seen() -> None:
    job = preparing()
    world = snapshot(job)
    task = StageTask(
        stage="prepare",
        namespace="default",
        job="job",
        uid="uid-job",
        attempt=1,
        spec=job.spec,
        store_uri="file:///store/default/job-uid-job",
    )
    assert outside(decide(world)) == outside(decide(world)) == [EnsureStage(task=task, gpu_class=None)]


def test_a_train_task_says_all_that_the_trainer_needs() -> None:
    job = make_job(
        store={"uri": "s3://bucket/prefix/"}, status=prepared_status(attempts=(make_attempt(created_time=NOW),))
    )
    job = job.model_copy(update={"status": with_estimate(job.status, job)})
    [command] = outside(decide(snapshot(job, gpu_classes=GPUS, policy=replace(POLICY, trainer_threads=2))))
    assert command == EnsureStage(
        gpu_class="24Gi",
        task=StageTask(
            stage="train",
            namespace="default",
            job="job",
            uid="uid-job",
            attempt=2,
            spec=job.spec,
            store_uri="s3://bucket/prefix/default/job-uid-job",
            plan=job.status.estimate.plan,
            prepared=prepare_result(),
            run_id="run",
            threads=2,
        ),
    )


def test_a_stage_that_exists_is_not_created_again() -> None:
    job = preparing()
    assert outside(decide(snapshot(job, stages=(stage(job, StagePhase.PENDING),)))) == []


def test_a_stage_that_ran_and_is_missing_is_lost_and_never_created_again() -> None:
    job = make_job(status=running_status(number=2))
    commands = decide(snapshot(job, gpu_classes=()))
    assert outside(commands) == []
    status = written(commands)
    assert (status.attempts[-1].reason, status.attempts[-1].finish_time) == (Reason.LOST, NOW)
    assert status.failures_total == 0
    assert status.evictions == {"Lost": 1}
    assert state_of(status) is JobState.QUEUED


def test_a_stage_of_an_older_job_of_the_same_name_is_put_away_and_not_taken_for_this_jobs() -> None:
    job = preparing()
    stranger = replace(stage(job), uid="another")
    commands = outside(decide(snapshot(job, stages=(stranger,))))
    assert StopStage(namespace="default", name="job-prepare-1", grace_seconds=120, reason=Reason.FENCED) in commands


# --- the way of a job that nothing happens to -----------------------------------------------------------------------


def test_a_prepared_job_with_a_free_gpu_is_admitted_in_the_same_write() -> None:
    job = preparing(start_time=after(-20))
    status = decide_one(job, exited(job, 0, StageResult(prepare=prepare_result())))
    estimate = choose_class(job.spec, SMOLLM2_135M, GPUS, work=WORK)
    assert status.prepared == prepare_result()
    assert status.estimate == estimate
    assert status.attempts == (
        make_attempt(
            "prepare",
            1,
            created_time=after(-100),
            seen_time=NOW,
            start_time=after(-20),
            finish_time=NOW,
            exit_code=0,
            reason=Reason.SUCCEEDED,
            message="prepare attempt 1 succeeded",
        ),
        Attempt(
            stage="train",
            number=2,
            queue="default",
            gpu_class="24Gi",
            plan=estimate.plan,
            predicted_bytes=estimate.predicted_bytes,
            created_time=NOW,
        ),
    )
    assert (status.active_seconds, status.gpu_seconds) == (20, 0)
    assert says(status, ConditionType.PREPARED) == ("True", Reason.PREPARED)
    assert says(status, ConditionType.ADMITTED) == ("True", Reason.ADMITTED)
    assert says(status, ConditionType.CHECKPOINTED) == ("False", Reason.NO_CHECKPOINT)


def test_an_ended_stage_is_deleted_only_after_its_end_is_on_record() -> None:
    job = preparing(start_time=after(-20))
    gone = exited(job, 0, StageResult(prepare=prepare_result()))
    first = decide(snapshot(job, stages=(gone,), gpu_classes=GPUS))
    assert [type(command) for command in first] == [WriteStatus, EnsureStage]
    later = make_job(status=written(first))
    assert DeleteStage(namespace="default", name="job-prepare-1", recorded=True) in outside(
        decide(snapshot(later, stages=(gone,), gpu_classes=GPUS))
    )


def test_a_prepared_job_without_a_run_asks_for_one_and_trains_all_the_same() -> None:
    job = make_job(status=prepared_status(run_id=None))
    commands = decide(snapshot(job, gpu_classes=GPUS))
    assert [type(command) for command in commands] == [EnsureRun, WriteStatus, EnsureStage]
    assert state_of(written(commands)) is JobState.STARTING


def test_a_run_is_asked_for_when_there_is_something_to_show_and_recorded_with_the_next_write() -> None:
    job = preparing(run_id=None)
    going = stage(job)
    assert EnsureRun(job=job) not in decide(snapshot(job, stages=(going,))), "the data may turn out to be unfit"
    before = make_job(status=decide_one(job, going))
    prepared = make_job(status=decide_one(before, exited(before, 0, StageResult(prepare=prepare_result()))))
    assert EnsureRun(job=prepared) in decide(snapshot(prepared))
    waiting = make_job(status=prepared_status(run_id=None))
    runs = (RunFact(job=waiting, mlflow=RUN),)
    commands = decide(snapshot(waiting, gpu_classes=GPUS, runs=runs))
    assert [type(command) for command in commands] == [WriteStatus, EnsureStage]
    assert written(commands).mlflow == RUN
    assert stage_command(commands).task.run_id == "run"


def test_a_job_whose_data_are_refused_never_has_a_run() -> None:
    job = preparing(run_id=None, start_time=after(-20))
    over = make_job(status=decide_one(job, exited(job, 80, failure(Reason.USER_ERROR, "line 7"))))
    assert state_of(over.status) is JobState.FAILED
    assert outside(decide(snapshot(over))) == []


def test_a_run_that_comes_late_is_recorded_at_once() -> None:
    job = make_job(status=running_status().model_copy(update={"mlflow": MlflowStatus()}))
    runs = (RunFact(job=job, mlflow=RUN),)
    assert written(decide(snapshot(job, stages=(stage(job),), gpu_classes=GPUS, runs=runs))).mlflow == RUN


def test_a_run_that_comes_when_the_job_is_over_is_ended() -> None:
    job = make_job(status=running_status().model_copy(update={"mlflow": MlflowStatus()}))
    bad = exited(job, 80, failure(Reason.USER_ERROR, "line 7"))
    over = make_job(status=decide_one(job, bad))
    assert outside(decide(snapshot(over))) == [EnsureRun(job=over)]
    status = written(decide(snapshot(over, runs=(RunFact(job=over, mlflow=RUN),))))
    assert status.mlflow == RUN.model_copy(update={"run_status": "FAILED"})
    owing = make_job(status=status, finalizers=finalizers_with(over, status))
    assert decide(snapshot(owing)) == (FinishRun(job=owing, run_status="FAILED"),)


def test_the_run_of_a_job_that_is_gone_is_killed() -> None:
    job = preparing(run_id=None)
    runs = (RunFact(job=job, mlflow=RUN),)
    assert decide(snapshot(runs=runs)) == (FinishRun(job=job, run_status="KILLED"),)


def test_a_train_stage_seen_running_makes_the_job_training() -> None:
    job = make_job(status=prepared_status(attempts=(make_attempt(),), attempts_total=2))
    status = decide_one(job, stage(job, start_time=after(-3)))
    assert state_of(status) is JobState.TRAINING
    assert status.attempts[-1].start_time == after(-3)
    assert says(status, ConditionType.RUNNING) == ("True", Reason.TRAINING)


def test_trained_frees_the_gpu_and_publishes_in_the_same_write() -> None:
    job = make_job(status=running_status(ran_seconds=100))
    status = decide_one(job, exited(job, 0, train_result()))
    assert (status.adapter_uri, status.adapter_digest) == ("file:///adapter", DIGEST)
    assert (status.active_seconds, status.gpu_seconds) == (100, 100)
    assert status.checkpoint == CheckpointStatus(step=120, uri=f"{STORED}/step-00000120", time=NOW, attempt=2)
    assert says(status, ConditionType.ADMITTED) == ("False", Reason.TRAINED)
    assert state_of(status) is JobState.PUBLISHING
    assert status.progress.loss == 1.5


def test_who_gets_a_gpu_is_written_first_and_others_by_how_long_they_have_been_at_it() -> None:
    young, old = make_job("a-young", age_seconds=10), make_job("b-old", age_seconds=2000)
    trained = make_job("c-trained", status=running_status(ran_seconds=1000))
    ready, urgent = (
        make_job(name, status=prepared_status(), priority=p) for name, p in (("d-ready", 0), ("e-urgent", 9))
    )
    commands = decide(
        snapshot(
            *(young, old, trained, ready, urgent),
            stages=(exited(trained, 0, train_result()),),
            gpu_classes=gpus(_24Gi=3),
        )
    )
    names = [command.job.metadata.name for command in commands if isinstance(command, WriteStatus)]
    assert names == ["e-urgent", "d-ready", "b-old", "c-trained", "a-young"]


def test_publish_waits_for_a_run_and_holds_no_gpu() -> None:
    trained = make_job(status=prepared_status(run_id=None, adapter_uri="file:///adapter"))
    other = make_job("other", status=prepared_status())
    commands = decide(snapshot(trained, other, gpu_classes=gpus(_24Gi=1)))
    waiting = written(commands)
    assert says(waiting, ConditionType.PUBLISHED) == ("False", Reason.TRACKING_UNAVAILABLE)
    assert waiting.active_attempt is None
    assert state_of(written(commands, "other")) is JobState.STARTING


def test_a_run_that_publish_had_to_make_anew_takes_the_place_of_the_one_that_is_gone() -> None:
    job = publishing()
    assert PUBLISHED.publish is not None
    anew = StageResult(publish=PUBLISHED.publish.model_copy(update={"run_id": "another"}))
    assert decide_one(job, exited(job, 0, anew)).mlflow.run_id == "another"
    assert decide_one(job, exited(job, 0, PUBLISHED)).mlflow.run_id == job.status.mlflow.run_id


def test_a_published_job_has_succeeded_and_its_run_is_finished_until_the_job_is_released() -> None:
    job = publishing()
    commands = decide(snapshot(job, stages=(exited(job, 0, PUBLISHED),)))
    assert outside(commands) == []
    status = written(commands)
    assert says(status, ConditionType.FINISHED) == ("True", Reason.SUCCEEDED)
    assert (status.mlflow.registered_model, status.mlflow.model_version) == ("job", "1")
    assert status.mlflow.run_status == "FINISHED"
    done = make_job(status=status, finalizers=(RELEASE_FINALIZER,))
    assert decide(snapshot(done)) == (FinishRun(job=done, run_status="FINISHED"),)
    assert decide(snapshot(make_job(status=status))) == ()


def test_what_the_gate_of_an_alias_said_is_a_condition_and_an_event() -> None:
    job = publishing()
    assert PUBLISHED.publish is not None
    for promoted, reason in ((True, Reason.PROMOTED), (False, Reason.GATE_NOT_PASSED), (False, Reason.HOLDER_CHANGED)):
        promotion = Promotion(promoted=promoted, reason=reason, message="f1 is 0.5")
        result = StageResult(publish=PUBLISHED.publish.model_copy(update={"promotion": promotion}))
        commands = decide(snapshot(job, stages=(exited(job, 0, result),)))
        assert says(written(commands), ConditionType.PROMOTED) == (str(promoted), reason)
        assert says(written(commands), ConditionType.FINISHED) == ("True", Reason.SUCCEEDED)
        (write,) = [command for command in commands if isinstance(command, WriteStatus)]
        assert Event(reason=reason, message="f1 is 0.5", warning=not promoted) in write.events
    plain = decide_one(job, exited(job, 0, PUBLISHED))
    assert says(plain, ConditionType.PROMOTED) is None


# --- ends that are not success ---------------------------------------------------------------------------------------

# exit code, what else is known of the end, the reason it is booked as, failures counted, where the job is then
ENDS = {
    "preempted by the platform resumes": (85, {}, Reason.DISRUPTED, 0, JobState.QUEUED),
    "killed is retried": (137, {}, Reason.KILLED, 1, JobState.QUEUED),
    "killed as a local process reports it is retried": (-9, {}, Reason.KILLED, 1, JobState.QUEUED),
    "killed by a vanishing node resumes": (137, {"disruption": Reason.DISRUPTED}, Reason.DISRUPTED, 0, JobState.QUEUED),
    "an end that nobody saw resumes": (None, {}, Reason.LOST, 0, JobState.QUEUED),
    "fenced resumes": (84, {}, Reason.FENCED, 0, JobState.QUEUED),
    "a transient error is waited out": (81, {}, Reason.TRANSIENT_ERROR, 0, JobState.QUEUED),
    "an internal error is retried": (1, {}, Reason.INTERNAL_ERROR, 1, JobState.QUEUED),
    "an unknown code is retried": (7, {}, Reason.INTERNAL_ERROR, 1, JobState.QUEUED),
    "success without a result is retried": (0, {}, Reason.INTERNAL_ERROR, 1, JobState.QUEUED),
    "success of half the training is retried": (
        0,
        {"result": train_result(5, complete=False)},
        Reason.INTERNAL_ERROR,
        1,
        JobState.QUEUED,
    ),
    "a user error fails": (80, {}, Reason.USER_ERROR, 0, JobState.FAILED),
    "divergence fails": (83, {}, Reason.DIVERGED, 0, JobState.FAILED),
}


@pytest.mark.parametrize(("code", "known", "reason", "failures", "state"), ENDS.values(), ids=ENDS)
def test_an_end_is_booked_by_what_is_known_of_it(
    code: int | None, known: dict, reason: Reason, failures: int, state: JobState
) -> None:
    job = make_job(status=running_status(ran_seconds=100))
    status = written(decide(snapshot(job, stages=(stage(job, StagePhase.EXITED, exit_code=code, **known),))))
    assert (status.attempts[-1].reason, status.failures_total, state_of(status)) == (reason, failures, state)
    assert status.gpu_seconds == 100


def test_seconds_add_up_over_attempts() -> None:
    job = make_job(status=running_status(ran_seconds=100, active_seconds=30, gpu_seconds=20))
    status = decide_one(job, exited(job, 81))
    assert (status.active_seconds, status.gpu_seconds) == (130, 120)


STOPS = {
    "a checkpointed stop counts as what was asked for": (85, Reason.PREEMPTED),
    "a kill after the grace period counts as what was asked for": (137, Reason.PREEMPTED),
    "an end that nobody saw counts as what was asked for": (None, Reason.PREEMPTED),
    "an error of its own is still an error": (83, Reason.DIVERGED),
}


@pytest.mark.parametrize(("code", "reason"), STOPS.values(), ids=STOPS)
def test_a_stage_that_was_asked_to_stop(code: int | None, reason: Reason) -> None:
    job = make_job(status=running_status(stop_reason=Reason.PREEMPTED))
    status = written(decide(snapshot(job, stages=(exited(job, code),))))
    assert status.attempts[-1].reason is reason
    assert status.failures_total == 0


def test_a_preempted_job_waits_for_nothing_but_a_gpu_and_keeps_its_checkpoint() -> None:
    job = make_job(status=running_status(stop_reason=Reason.PREEMPTED, ran_seconds=1))
    status = written(decide(snapshot(job, stages=(exited(job, 85, train_result(40, complete=False)),))))
    assert status.retry_after is None
    assert status.evictions == {"Preempted": 1}
    assert status.checkpoint == CheckpointStatus(step=40, uri=f"{STORED}/step-00000040", time=NOW, attempt=2)
    assert says(status, ConditionType.EVICTED) == ("True", Reason.PREEMPTED)


def test_stages_that_vanish_at_once_are_started_the_base_backoff_apart() -> None:
    job = make_job(status=running_status(ran_seconds=4))
    assert written(decide(snapshot(job, gpu_classes=GPUS))).retry_after == after(-4 + POLICY.backoff_base_seconds)


@pytest.mark.parametrize(("before", "seconds"), [(0, 10), (1, 20), (2, 40), (6, 600), (60, 600)])
def test_the_backoff_doubles_up_to_its_bound(before: int, seconds: float) -> None:
    job = make_job(status=running_status(setbacks=setbacks(Reason.INTERNAL_ERROR, before)), backoff_limit=100)
    status = decide_one(job, exited(job, 1))
    assert status.retry_after == after(seconds)
    assert says(status, ConditionType.ADMITTED) == ("False", Reason.BACKING_OFF)


def test_one_failure_more_than_the_limit_fails_the_job_with_the_last_message() -> None:
    job = make_job(status=running_status(setbacks=setbacks(Reason.INTERNAL_ERROR, 2)), backoff_limit=2)
    status = decide_one(job, exited(job, 1, failure(Reason.INTERNAL_ERROR, "KeyError: 'x'")))
    finished = status.condition(ConditionType.FINISHED)
    assert (finished.status, finished.reason, finished.message) == (
        "True",
        Reason.BACKOFF_LIMIT_EXCEEDED,
        "3 failed attempts are more than backoffLimit 2; the last one: KeyError: 'x'",
    )


def test_a_user_error_fails_at_once_with_the_stages_own_words() -> None:
    job = preparing(start_time=after(-5))
    status = decide_one(job, exited(job, 80, failure(Reason.USER_ERROR, "line 7 of data.jsonl is not JSON")))
    finished = status.condition(ConditionType.FINISHED)
    assert (finished.reason, finished.message) == (Reason.USER_ERROR, "line 7 of data.jsonl is not JSON")
    assert status.summary == "UserError: line 7 of data.jsonl is not JSON"


def test_a_publish_that_finds_mlflow_away_is_retried_without_counting_and_keeps_the_adapter() -> None:
    job = publishing()
    tired = job.status.model_copy(update={"failures_total": job.spec.backoff_limit})
    job = make_job(status=tired)
    status = decide_one(job, exited(job, 81, failure(Reason.TRANSIENT_ERROR, "MLflow is away")))
    assert state_of(status) is JobState.TRAINED
    assert (status.adapter_uri, status.failures_total) == ("file:///adapter", job.spec.backoff_limit)
    assert after(8) <= status.retry_after <= after(10)
    assert says(status, ConditionType.PUBLISHED) == ("False", Reason.BACKING_OFF)


def test_after_a_backoff_the_job_goes_on() -> None:
    job = make_job(status=prepared_status(retry_after=after(1)))
    assert decide_one(job).active_attempt is None
    status = decide_one(job, now=after(1))
    assert (state_of(status), status.retry_after) == (JobState.STARTING, None)


def test_out_of_memory_resumes_at_once_on_a_fallback_plan_and_says_so() -> None:
    job = make_job(status=running_status(model=LLAMA_3_8B, checkpoint_age_seconds=10))
    job = job.model_copy(update={"status": with_estimate(job.status, job)})
    commands = decide(snapshot(job, stages=(exited(job, 82),), gpu_classes=GPUS))
    status = written(commands)
    assert job.status.estimate.plan.recompute_layers < 32
    assert status.attempts[-1].plan == job.status.estimate.plan.model_copy(update={"recompute_layers": 32})
    assert (status.step_ups, status.failures_total, status.attempts[-1].gpu_class) == (1, 1, "24Gi")
    [write] = [c for c in commands if isinstance(c, WriteStatus)]
    assert any(e.message.startswith("out of memory under micro-batch") for e in write.events)


def test_out_of_memory_with_nothing_left_does_not_fit() -> None:
    job = make_job(status=running_status(model=LLAMA_3_70B, gpu_class="48Gi"), vram="48Gi")
    status = with_estimate(job.status, job)
    everything_out = ("activations", "embeddings")
    last = status.estimate.plan.model_copy(
        update={"recompute_layers": 80, "micro_batch_size": 1, "offload": everything_out}
    )
    status = status.model_copy(update={"estimate": status.estimate.model_copy(update={"plan": last})})
    job = make_job(status=status, vram="48Gi")
    failed = decide_one(job, exited(job, 82))
    assert says(failed, ConditionType.FINISHED) == ("True", Reason.DOES_NOT_FIT)


def test_a_failed_jobs_run_is_failed_and_a_cancelled_ones_killed() -> None:
    for reason, run_status in ((Reason.USER_ERROR, "FAILED"), (Reason.CANCELLED, "KILLED")):
        job = make_job(status=prepared_status(), cancelled=reason is Reason.CANCELLED)
        if reason is Reason.USER_ERROR:
            job = make_job(status=running_status())
            finished = written(decide(snapshot(job, stages=(exited(job, 80),))))
        else:
            finished = written(decide(snapshot(job)))
        done = make_job(status=finished, finalizers=(RELEASE_FINALIZER,))
        assert FinishRun(job=done, run_status=run_status) in decide(snapshot(done))


# --- what the user wants -------------------------------------------------------------------------------------------


def test_cancelling_an_idle_job_ends_it() -> None:
    status = written(decide(snapshot(make_job(cancelled=True))))
    assert says(status, ConditionType.FINISHED) == ("True", Reason.CANCELLED)
    assert status.finish_time == NOW


def test_cancelling_a_running_job_stops_its_stage_first_and_ends_it_then() -> None:
    running = make_job(status=running_status(), cancelled=True)
    first = decide(snapshot(running, stages=(stage(running),)))
    assert outside(first) == []
    stopping = make_job(status=written(first), cancelled=True)
    assert decide(snapshot(stopping, stages=(stage(stopping),))) == (
        StopStage(namespace="default", name="job-train-2", grace_seconds=120, reason=Reason.CANCELLED),
    )
    ended = written(decide(snapshot(stopping, stages=(exited(stopping, 85),))))
    assert says(ended, ConditionType.FINISHED) == ("True", Reason.CANCELLED)


def test_a_cancelled_attempt_whose_stage_was_never_created_creates_none() -> None:
    job = make_job(status=prepared_status(attempts=(make_attempt(created_time=NOW),), attempts_total=2), cancelled=True)
    first = decide(snapshot(job))
    assert outside(first) == []
    ended = decide(snapshot(make_job(status=written(first), cancelled=True)))
    assert outside(ended) == []
    assert state_of(written(ended)) is JobState.CANCELLED


def test_suspending_stops_the_stage_and_resuming_goes_on_from_its_checkpoint() -> None:
    running = make_job(status=running_status(), suspend=True)
    stopping = make_job(status=decide_one(running, stage(running)), suspend=True)
    assert stopping.status.active_attempt.stop_reason is Reason.SUSPENDED
    held = decide_one(stopping, exited(stopping, 85, train_result(40, complete=False)))
    assert says(held, ConditionType.ADMITTED) == ("False", Reason.SUSPENDED)
    assert decide(snapshot(make_job(status=held, suspend=True), gpu_classes=GPUS)) == ()
    going_on = decide_one(make_job(status=held))
    assert (state_of(going_on), going_on.checkpoint.step) == (JobState.STARTING, 40)


def test_the_deadline_counts_all_stages_and_the_running_one() -> None:
    status = running_status(ran_seconds=60, active_seconds=50)
    in_time, late = (make_job(status=status, active_deadline_seconds=s) for s in (111, 110))
    assert decide_one(in_time, stage(in_time)).active_attempt.stop_time is None
    assert decide_one(late, stage(late)).active_attempt.stop_reason is Reason.DEADLINE_EXCEEDED


def finished(**job: object) -> QLoRAJob:
    status = written(decide(snapshot(make_job(cancelled=True))))
    return make_job(status=status.model_copy(update={"finish_time": after(-100)}), cancelled=True, **job)


def test_a_finished_job_is_deleted_after_its_time_to_live() -> None:
    early, due = finished(ttl_seconds_after_finished=101), finished(ttl_seconds_after_finished=100)
    assert decide(snapshot(early)) == ()
    assert decide(snapshot(due)) == (DeleteJob(job=due),)


def test_a_deleted_job_goes_only_when_its_stages_are_gone() -> None:
    job = finished(deleted=True)
    left = StageFact(namespace="default", name="job-prepare-1", phase=StagePhase.EXITED, exit_code=0)
    assert decide(snapshot(job, stages=(left,))) == (DeleteStage(namespace="default", name="job-prepare-1"),)
    assert decide(snapshot(job)) == (DeleteJob(job=job),)


# --- progress, history, bounds ---------------------------------------------------------------------------------------


def test_progress_is_written_no_more_often_than_the_interval() -> None:
    job = make_job(status=running_status(progress=progress(10, age_seconds=2)))
    settled = make_job(status=decide_one(job, stage(job, progress=progress(10, age_seconds=2))))
    for age_seconds, expected in ((1.5, None), (1.0, 12)):
        commands = decide(snapshot(settled, stages=(stage(settled, progress=progress(12, age_seconds=age_seconds)),)))
        assert (written(commands).progress.step if commands else None) == expected


def test_a_new_checkpoint_is_written_at_once() -> None:
    job = make_job(status=running_status(progress=progress(10)))
    report = progress(10, checkpoint_step=10, checkpoint_uri="file:///c/10")
    status = decide_one(job, stage(job, progress=report))
    assert status.checkpoint == CheckpointStatus(step=10, uri=f"{STORED}/step-00000010", time=NOW, attempt=2)
    assert says(status, ConditionType.CHECKPOINTED) == ("True", Reason.CHECKPOINT_SAVED)


def test_late_checkpoints_are_told_at_once_and_once() -> None:
    job = make_job(status=running_status(progress=progress(10)))
    words = "the store has not taken the checkpoint of step 8 for longer than the 900 s that it may lag behind"
    [write] = decide(snapshot(job, stages=(stage(job, progress=progress(10, warning=words)),)))
    assert isinstance(write, WriteStatus)
    assert write.events == (Event(reason=Reason.CHECKPOINT_LATE, message=words, warning=True),)
    assert write.status.progress == progress(10, warning=words)
    told = make_job(status=write.status)
    assert not decide(snapshot(told, stages=(stage(told, progress=progress(10, warning=words)),)))


def test_a_report_has_no_say_in_where_a_checkpoint_lies() -> None:
    """Whoever has the namespace's token can report in any stage's name."""
    job = make_job(status=running_status(progress=progress(10)))
    report = progress(10, checkpoint_step=10, checkpoint_uri="s3://theirs/checkpoints/step-00000010")
    assert "theirs" not in decide_one(job, stage(job, progress=report)).model_dump_json()


def test_the_history_is_bounded_and_attempts_go_on_counting() -> None:
    ended = tuple(make_attempt(number=n, finish_time=NOW, reason=Reason.PREEMPTED) for n in range(1, 33))
    status = decide_one(make_job(status=prepared_status(attempts=ended, attempts_total=32)))
    assert [attempt.number for attempt in status.attempts] == list(range(2, 34))
    assert status.attempts_total == 33


def test_prepare_and_publish_stages_are_bounded_and_go_by_priority() -> None:
    jobs = [make_job(f"job-{n}", priority=n) for n in range(4)]
    commands = decide(snapshot(*jobs, policy=replace(POLICY, cpu_stages_limit=2)))
    states = [state_of(written(commands, job.metadata.name)) for job in jobs]
    assert states == [JobState.NEW, JobState.NEW, JobState.PREPARING, JobState.PREPARING]
    assert written(commands, "job-0").condition(ConditionType.PREPARED).message == (
        "all 2 slots for prepare and publish stages are in use; waits for one"
    )


def test_a_job_that_fits_no_class_waits_where_gpus_may_come_and_fails_where_they_are_fixed() -> None:
    never_streamed = LLAMA_3_70B.model_copy(update={"record_by_record": True})
    job = make_job(status=prepared_status(never_streamed))
    small = gpus(_24Gi=1)
    waiting = written(decide(snapshot(job, gpu_classes=small)))
    assert says(waiting, ConditionType.ADMITTED) == ("False", Reason.DOES_NOT_FIT)
    fixed = replace(POLICY, gpu_classes_are_fixed=True)
    failed = written(decide(snapshot(job, gpu_classes=small, policy=fixed)))
    assert says(failed, ConditionType.FINISHED) == ("True", Reason.DOES_NOT_FIT)
    none_yet = written(decide(snapshot(job, policy=fixed)))
    assert says(none_yet, ConditionType.ADMITTED) == ("False", Reason.WAITING_FOR_GPU)


def test_a_job_with_a_checkpoint_resumes_on_the_class_and_plan_it_began_with() -> None:
    job = make_job(status=running_status(gpu_class="48Gi", stop_reason=Reason.PREEMPTED, checkpoint_age_seconds=5))
    chosen = choose_class(job.spec, SMOLLM2_135M, gpus(_48Gi=1), work=WORK)
    job = make_job(status=job.status.model_copy(update={"estimate": chosen}))
    resumed = decide_one(job, exited(job, 85))
    assert (resumed.attempts[-1].gpu_class, resumed.attempts[-1].plan) == ("48Gi", chosen.plan)
