"""One job that nothing can be decided about fails; the others' round goes on as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest

from orchestrator.api.job import QLoRAJob, QLoRAJobSpec, QLoRAJobStatus
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import StageResult
from orchestrator.core.commands import (
    Command,
    DeleteStage,
    EnsureStage,
    ReleaseUnreadable,
    ReportDefect,
    StopStage,
    WriteStatus,
)
from orchestrator.core.decide import decide
from orchestrator.core.scheduling import claims, cycle, index
from orchestrator.core.snapshot import StageFact, StagePhase, UnreadableJob
from tests.builders import (
    NOW,
    SMOLLM2_135M,
    after,
    exited,
    gpus,
    make_attempt,
    make_job,
    prepare_result,
    prepared_status,
    progress,
    running_status,
    snapshot,
    stage,
    written,
)

A_MIXTURE_WITHOUT_ITS_FIELDS = SMOLLM2_135M.model_copy(update={"model_type": "olmoe"})
DEFECTS = [OverflowError("int too large"), RecursionError("too deep"), KeyError("x"), ValueError("a\x1b[2Jb" * 500)]


def queued(name: str, model: ModelFacts, **fields: object) -> QLoRAJob:
    """Prepared, with facts that nobody has checked."""
    job = make_job(name, status=prepared_status(), **fields)
    prepared = prepare_result().model_copy(update={"model": model})
    return job.model_copy(update={"status": job.status.model_copy(update={"prepared": prepared})})


def finished_reason(commands: tuple[Command, ...], name: str) -> Reason | None:
    condition = written(commands, name).condition(ConditionType.FINISHED)
    return condition.reason if condition is not None else None


def test_a_job_that_cannot_be_sized_fails_alone() -> None:
    poison = queued("poison", A_MIXTURE_WITHOUT_ITS_FIELDS, priority=1000)
    commands = decide(snapshot(poison, queued("sound", SMOLLM2_135M), gpu_classes=gpus(_24Gi=1)))
    [started] = [command for command in commands if isinstance(command, EnsureStage)]
    assert started.task.job == "sound"
    assert finished_reason(commands, "poison") is Reason.INTERNAL_ERROR
    [write] = [command for command in commands if isinstance(command, WriteStatus) and command.job == poison]
    assert [(event.reason, event.warning) for event in write.events] == [(Reason.INTERNAL_ERROR, True)]
    [report] = [command for command in commands if isinstance(command, ReportDefect)]
    assert report.job == poison
    assert "Traceback" in report.trace


@pytest.mark.parametrize("error", DEFECTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("module", "where"),
    [(index, "reconcile"), (cycle, "start_cpu_stage"), (claims, "candidates"), (cycle, "admit")],
    ids=["reconcile", "start_cpu_stage", "candidates", "admit"],
)
def test_whatever_is_raised_wherever_is_one_jobs_failure(
    module: ModuleType, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., object] = getattr(module, where)
    poison = make_job("poison", rank=13) if where == "start_cpu_stage" else queued("poison", SMOLLM2_135M, rank=13)

    def raising(first: object, *rest: object, **named: object) -> object:
        spec = first if isinstance(first, QLoRAJobSpec) else getattr(first, "job", first).spec
        if spec.adapter.rank == 13:
            raise error
        return real(first, *rest, **named)

    monkeypatch.setattr(module, where, raising)
    commands = decide(snapshot(poison, queued("sound", SMOLLM2_135M), gpu_classes=gpus(_24Gi=2)))
    assert [c.task.job for c in commands if isinstance(c, EnsureStage)] == ["sound"]
    assert finished_reason(commands, "poison") is Reason.INTERNAL_ERROR
    message = written(commands, "poison").summary
    assert type(error).__name__ in message
    assert message.isprintable()
    assert len(message) < 600


def test_the_stage_of_a_job_that_cannot_be_gone_on_with_is_stopped_before_it_fails() -> None:
    """Here a report with a time without a zone, which no subtraction takes."""
    naive = progress(7).model_copy(update={"time": NOW.replace(tzinfo=None)})
    poison = make_job("poison", status=running_status(progress=progress(6)))
    sound = queued("sound", SMOLLM2_135M)
    seen = snapshot(poison, sound, stages=(stage(poison, progress=naive),), gpu_classes=gpus(_24Gi=2))
    commands = decide(seen)
    assert [c.task.job for c in commands if isinstance(c, EnsureStage)] == ["sound"]
    asked = written(commands, "poison").active_attempt
    assert asked is not None
    assert (asked.stop_time, asked.stop_reason) == (NOW, Reason.INTERNAL_ERROR)
    stopping = poison.model_copy(update={"status": written(commands, "poison")})
    ended = decide(snapshot(stopping, stages=(exited(stopping, 85, progress=naive),), gpu_classes=gpus(_24Gi=2)))
    assert finished_reason(ended, "poison") is Reason.INTERNAL_ERROR


def is_asked_to_stop(commands: tuple[Command, ...], job: QLoRAJob) -> bool:
    writes = (command for command in commands if isinstance(command, WriteStatus) and command.job == job)
    return any(write.status.attempts[-1].stop_time is not None for write in writes)


def test_a_job_whose_status_cannot_be_stored_claims_nothing_and_moves_nobody() -> None:
    """Otherwise it would take the GPU of a victim in every round, and never have it on record."""
    victim = make_job("victim", status=running_status())
    wanting = queued("wanting", SMOLLM2_135M, priority=1000)
    seen = snapshot(victim, wanting, stages=(stage(victim),), gpu_classes=gpus(_24Gi=1))
    assert is_asked_to_stop(decide(seen), victim)
    commands = decide(replace(seen, refused={wanting.metadata.uid: "422: status.steps: Invalid value"}))
    assert not is_asked_to_stop(commands, victim)
    assert finished_reason(commands, "wanting") is Reason.INTERNAL_ERROR


def test_a_refused_job_that_runs_is_stopped_first() -> None:
    job = make_job(status=running_status())
    seen = replace(
        snapshot(job, stages=(stage(job),), gpu_classes=gpus(_24Gi=1)), refused={job.metadata.uid: "too large"}
    )
    attempt = written(decide(seen)).active_attempt
    assert attempt is not None
    assert (attempt.stop_time, attempt.stop_reason) == (NOW, Reason.INTERNAL_ERROR)


def test_nobody_is_moved_for_a_job_whose_admission_could_not_be_stored() -> None:
    victim = make_job("victim", status=running_status())
    wanting = queued("wanting", SMOLLM2_135M, priority=1000)
    broken = wanting.status.model_copy(update={"attempts_total": 2**53 - 1})  # no attempt can be numbered after it
    wanting = wanting.model_copy(update={"status": broken})
    commands = decide(snapshot(victim, wanting, stages=(stage(victim),), gpu_classes=gpus(_24Gi=1)))
    assert not is_asked_to_stop(commands, victim)
    assert [c.job for c in commands if isinstance(c, ReportDefect)] == [wanting]


def test_nobody_is_moved_for_a_job_before_its_claim_is_on_record() -> None:
    """The store may refuse it, and the next round would know."""
    victim = make_job("victim", status=running_status())
    attempt = make_attempt("prepare", 1, start_time=after(-100))
    preparing = QLoRAJobStatus(attempts=(attempt,), attempts_total=1, mlflow=prepared_status().mlflow)
    wanting = make_job("wanting", status=preparing, priority=1000)
    ended = exited(wanting, 0, StageResult(prepare=prepare_result()))
    seen = snapshot(victim, wanting, stages=(stage(victim), ended), gpu_classes=gpus(_24Gi=1))
    commands = decide(seen)
    assert not is_asked_to_stop(commands, victim)
    recorded = wanting.model_copy(update={"status": written(commands, "wanting")})
    assert is_asked_to_stop(decide(replace(seen, jobs=(victim, recorded))), victim)


def test_running_out_of_memory_is_no_jobs_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("orchestrator.core.scheduling.index.reconcile", exhausted)
    with pytest.raises(MemoryError):
        decide(snapshot(make_job()))


# --- objects that do not parse -----------------------------------------------------------------------------------


def unreadable_stage(phase: StagePhase = StagePhase.RUNNING) -> StageFact:
    return StageFact(namespace="default", name="broken-train-2", phase=phase, start_time=after(-500))


def unreadable(**fields: object) -> UnreadableJob:
    return UnreadableJob(
        namespace="default", name="broken", uid="u", queue="default", stage="broken-train-2", gpu_class="24Gi", **fields
    )


def test_the_gpu_of_a_job_that_does_not_parse_is_taken() -> None:
    seen = snapshot(queued("sound", SMOLLM2_135M), stages=(unreadable_stage(),), gpu_classes=gpus(_24Gi=1))
    commands = decide(replace(seen, unreadable=(unreadable(),)))
    assert [type(command) for command in commands] == [WriteStatus]
    admitted = written(commands, "sound").condition(ConditionType.ADMITTED)
    assert admitted is not None
    assert admitted.reason is Reason.WAITING_FOR_GPU


def test_its_gpu_is_free_once_its_stage_has_ended_and_the_result_is_kept() -> None:
    ended = unreadable_stage(StagePhase.EXITED)
    seen = snapshot(queued("sound", SMOLLM2_135M), stages=(ended,), gpu_classes=gpus(_24Gi=1))
    commands = decide(replace(seen, unreadable=(unreadable(),)))
    assert [type(command) for command in commands] == [WriteStatus, EnsureStage]


@pytest.mark.parametrize(
    "fields",
    [{"stop": True}, {"stop": True, "deleted": True}, {"seconds_left": 100.0}],
    ids=["suspended or cancelled", "deleted", "past its deadline"],
)
def test_its_stage_is_stopped_where_its_user_wants_that(fields: dict[str, object]) -> None:
    seen = replace(snapshot(stages=(unreadable_stage(),)), unreadable=(unreadable(**fields),))
    [command] = decide(seen)
    assert isinstance(command, StopStage)
    assert command.name == "broken-train-2"


def test_its_stage_runs_on_otherwise() -> None:
    seen = replace(snapshot(stages=(unreadable_stage(),)), unreadable=(unreadable(seconds_left=1e6),))
    assert decide(seen) == ()


def test_a_deleted_one_goes_once_its_stage_is_gone() -> None:
    gone = unreadable(stop=True, deleted=True, held=True)
    ended = replace(snapshot(stages=(unreadable_stage(StagePhase.EXITED),)), unreadable=(gone,))
    [command] = decide(ended)
    assert isinstance(command, DeleteStage)
    assert decide(replace(snapshot(), unreadable=(gone,))) == (
        ReleaseUnreadable(namespace="default", name="broken", uid="u"),
    )
