"""Sweeps: the same trials whoever makes them and however often that one is killed, early stops, bounds, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.api.job import CANCEL_ANNOTATION, RELEASE_FINALIZER, QLoRAJob
from orchestrator.api.reasons import ConditionType, ExitCode, Reason
from orchestrator.api.sweep import (
    DECIMAL_FIELDS,
    INTEGER_FIELDS,
    QLoRASweep,
    QLoRASweepSpec,
    SweepDimension,
    SweepMeta,
)
from orchestrator.core.commands import CreateJob, ReleaseSweep, ReportDefect, WriteSweepStatus
from orchestrator.core.decide import decide
from orchestrator.core.snapshot import UnreadableJob, UnreadableSweep
from orchestrator.core.sweep.search import drawn, parameters, refusal, trial_job
from tests.builders import NOW, POLICY, gpus, make_job, snapshot
from tests.core.world import World

JOB: dict[str, Any] = {
    "model": {"source": "file:///model"},
    "dataset": {"source": "file:///data.jsonl", "evalFraction": "0.1"},
    "training": {"optimizer": "paged_adamw_8bit"},
    "evaluation": {"everySteps": 1},
    "backoffLimit": 0,
}
SPACE: list[dict[str, Any]] = [
    {"field": "training.learningRate", "logUniform": {"min": "1e-5", "max": "1e-3"}},
    {"field": "adapter.rank", "choice": ["8", "16"]},
]


def make_sweep(name: str = "sweep", **spec: Any) -> QLoRASweep:
    fields = {"job": JOB, "space": SPACE, "trials": 5, "parallel": 2, **spec}
    meta = SweepMeta(name=name, uid=f"uid-of-{name}", resource_version="1", creation_timestamp=NOW)
    return QLoRASweep(metadata=meta, spec=QLoRASweepSpec.model_validate(fields))


def rate(job: QLoRAJob) -> float:
    return float(job.spec.training.learning_rate)


def make_world(*sweeps: QLoRASweep) -> World:
    """Trials of a higher learning rate are better, all the time."""
    world = World(
        policy=POLICY, gpu_classes=list(gpus(_24Gi=3)), eval_loss=lambda job, step: 1 - 100 * rate(job) / step
    )
    world.sweeps = {sweep.key: sweep for sweep in sweeps}
    return world


def settle(world: World) -> None:
    world.mlflow_away = False
    for _ in range(150):
        world.pass_once()
        for key in world.live_stages():
            world.run_stage(key)
        world.pass_time(20)
        over = [sweep for sweep in world.sweeps.values() if sweep.status.mlflow.run_status is not None]
        if len(over) == len(world.sweeps):
            break
    world.pass_once()


def outcome(world: World, name: str = "sweep") -> tuple[Reason, str]:
    found = world.sweeps[f"default/{name}"].status.condition(ConditionType.FINISHED)
    assert found is not None
    return found.reason, found.message


def trials_of(world: World) -> dict[str, Any]:
    return {key: job.spec for key, job in world.jobs.items()}


STORY = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.none() | st.integers(0, 9)),
        st.tuples(st.just("run"), st.integers(0, 5)),
        st.tuples(st.just("lose"), st.integers(0, 5)),
        st.tuples(st.just("mlflow"), st.booleans()),
    ),
    max_size=30,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(story=STORY)
@example(story=[("pass", 1), ("pass", 2), ("pass", None), ("pass", 0), ("pass", 2)])
def test_kills_change_nothing_of_the_trials_nor_of_who_is_best(story: list[tuple[str, Any]]) -> None:
    world, undisturbed = make_world(make_sweep(trials=4)), make_world(make_sweep(trials=4))
    for step in story:
        play(world, [step])
        running = sum(job.status.finish_time is None for job in world.jobs.values())
        assert running <= 2, "no more than spec.parallel"
    settle(world)
    settle(undisturbed)
    assert outcome(world) == outcome(undisturbed)
    assert outcome(world)[0] is Reason.SUCCEEDED
    assert trials_of(world) == trials_of(undisturbed)
    assert len(world.jobs) == 4
    best = max(world.jobs.values(), key=rate)
    found = world.sweeps["default/sweep"].status.best
    assert found is not None
    assert found.job == best.metadata.name
    assert not [c for c in decide(world.snapshot()) if isinstance(c, WriteSweepStatus)], "it comes to rest"


def play(world: World, story: list[tuple[str, Any]]) -> None:
    for what, detail in story:
        live = world.live_stages()
        if what == "pass":
            world.pass_once(detail)
        elif what == "mlflow":
            world.mlflow_away = detail
        elif live:
            (world.run_stage if what == "run" else world.lose)(live[detail % len(live)])


def go_on(world: World, rounds: int) -> None:
    """Everything goes well, until there is nothing left or the rounds are over."""
    for _ in range(rounds):
        world.pass_once()
        for key in world.live_stages():
            world.run_stage(key)
        world.pass_time(20)
        if not world.sweeps and not world.jobs:
            break


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rounds=st.integers(0, 30), before=STORY, after=STORY)
@example(rounds=12, before=[], after=[("pass", number) for number in range(9)])
@example(rounds=6, before=[("mlflow", True)], after=[("pass", None), ("run", 0), ("run", 1)] * 6)
@example(
    rounds=2, before=[], after=[("pass", None), ("run", 0), ("run", 0), ("pass", None), ("pass", None), ("pass", 1)]
)
def test_a_sweep_that_is_deleted_leaves_neither_an_open_run_nor_a_trial(
    rounds: int, before: list[tuple[str, Any]], after: list[tuple[str, Any]]
) -> None:
    """At whatever moment, and whenever the controller is killed; MLflow is there again in time."""
    world = make_world(make_sweep(trials=4))
    go_on(world, rounds)
    play(world, before)
    world.delete_sweep("default/sweep")
    play(world, after)
    world.mlflow_away = False
    go_on(world, 60)
    assert world.sweeps == {}
    assert world.jobs == {}
    assert world.left_behind == []
    assert [run for run in world.mlflow.values() if run == "RUNNING"] == []
    for run in world.parents.values():
        assert run[0] == "RUNNING"
        assert len(run) == 2, "it ends, and once"


def test_a_deleted_sweep_waits_for_mlflow_so_long_and_goes_with_words() -> None:
    world = make_world(make_sweep(trials=2))
    go_on(world, 6)
    assert world.parents
    world.mlflow_away = True
    world.delete_sweep("default/sweep")
    go_on(world, 60)
    assert "default/sweep" in world.sweeps, "it waits"
    assert all(job.cancelled for job in world.jobs.values())
    world.pass_time(POLICY.release_limit_seconds)
    world.pass_once()
    assert world.sweeps == {}
    [words] = world.left_behind
    assert "QLORA_RELEASE_LIMIT_SECONDS" in words
    assert "uid-of-sweep" in words


def test_a_sweep_that_owes_nothing_goes_at_once() -> None:
    world = make_world(make_sweep(trials=2))
    settle(world)
    assert world.sweeps["default/sweep"].metadata.finalizers == ()
    world.delete_sweep("default/sweep")
    assert world.sweeps == {}


def test_the_finalizer_is_put_right_where_a_controller_was_killed_or_an_older_one_left_none() -> None:
    world = make_world(make_sweep(trials=2))
    world.pass_once()
    for wrong, right in (((), (RELEASE_FINALIZER,)), ((RELEASE_FINALIZER,), ())):
        sweep = world.sweeps["default/sweep"]
        assert sweep.metadata.finalizers == right
        meta = sweep.metadata.model_copy(update={"finalizers": wrong})
        world.sweeps[sweep.key] = sweep.model_copy(update={"metadata": meta})
        world.pass_once()
        assert world.sweeps[sweep.key].metadata.finalizers == right
        settle(world)


def test_a_deleted_sweep_that_this_version_cannot_read_is_let_go() -> None:
    meta = SweepMeta(name="newer", uid="u", finalizers=(RELEASE_FINALIZER,), deletion_timestamp=NOW)
    newer = UnreadableSweep(metadata=meta)
    [release] = [c for c in decide(replace(snapshot(), unreadable_sweeps=(newer,))) if isinstance(c, ReleaseSweep)]
    assert release.sweep == newer
    assert "cannot read it" in release.message
    for update in ({"deletion_timestamp": None}, {"finalizers": ()}):
        left = UnreadableSweep(metadata=meta.model_copy(update=update))
        assert not decide(replace(snapshot(), unreadable_sweeps=(left,)))


def test_trials_are_ordinary_jobs_of_the_sweeps() -> None:
    world = make_world(make_sweep(job={**JOB, "queue": "research", "priority": 7, "ttlSecondsAfterFinished": 0}))
    world.pass_once()
    first, second = world.jobs.values()
    assert [first.metadata.name, second.metadata.name] == ["sweep-0", "sweep-1"]
    assert first.metadata.labels == {"qlora.dev/sweep": "sweep", "qlora.dev/trial": "0"}
    assert first.sweep is not None
    assert (first.sweep.uid, first.spec.queue, first.spec.priority) == ("uid-of-sweep", "research", 7)
    assert first.spec.tracking.registered_model == "default-sweep"
    assert first.spec.tracking.alias is None, "trials take no alias from each other"
    assert first.spec.ttl_seconds_after_finished is None, "what came of a trial is not lost before it is counted"
    assert first.spec.training != second.spec.training
    world.pass_once()
    assert len(world.jobs) == 2


def test_a_trial_that_is_not_among_the_best_at_a_rung_is_cancelled_and_others_go_on() -> None:
    sweep = make_sweep(earlyStop={"firstStep": 2, "eta": 2}, trials=6, parallel=3)
    world = make_world(sweep)
    settle(world)
    status = world.sweeps[sweep.key].status
    assert outcome(world)[0] is Reason.SUCCEEDED
    stopped = [trial for trial in status.trials if trial.state == "Stopped"]
    assert stopped
    assert status.stopped == len(stopped)
    assert status.best is not None
    assert status.best.job == max(world.jobs.values(), key=rate).metadata.name, "the best was never stopped"
    for trial in status.trials:
        for rung in trial.rungs:
            # By hand: those that had come to the rung before, and how many of them are better.
            if trial.stopped_at == rung.step:
                better = [t for t in status.trials for r in t.rungs if r.step == rung.step and r.value < rung.value]
                assert better, "the only one, or the best, goes on"
    for trial in stopped:
        job = world.jobs[f"default/{trial.job}"]
        assert job.cancelled
        assert job.status.checkpoint is not None, "its checkpoint stays"


def test_one_failure_is_one_trials_and_more_than_the_bound_end_the_sweep() -> None:
    world = make_world(make_sweep(maxFailures=1, trials=5, parallel=1))
    failures = 0
    for _ in range(80):
        world.pass_once()
        for key in world.live_stages():
            if world.tasks[key].stage == "train" and world.stages[key].phase.value == "Running":
                world.fail_stage(key, ExitCode.INTERNAL_ERROR)
                failures += 1
            else:
                world.run_stage(key)
        world.pass_time(700)
    reason, message = outcome(world)
    assert reason is Reason.TOO_MANY_FAILURES
    assert message.startswith("2 trials failed, of which spec.maxFailures allows 1; the last: ")
    assert len(world.jobs) == 2
    assert all(job.status.finish_time for job in world.jobs.values())


def test_a_cancelled_sweep_cancels_its_trials_and_makes_no_more() -> None:
    world = make_world(make_sweep())
    world.pass_once()
    sweep = world.sweeps["default/sweep"]
    meta = sweep.metadata.model_copy(update={"annotations": {CANCEL_ANNOTATION: "true"}})
    world.sweeps[sweep.key] = sweep.model_copy(update={"metadata": meta})
    settle(world)
    assert outcome(world)[0] is Reason.CANCELLED
    assert len(world.jobs) == 2
    assert all(job.cancelled for job in world.jobs.values())
    assert world.sweeps[sweep.key].status.mlflow.run_status == "KILLED"


def test_a_job_that_was_deleted_is_no_trial_any_more_and_is_not_made_again() -> None:
    world = make_world(make_sweep(trials=2))
    world.pass_once()
    world.pass_once()
    world.jobs.pop("default/sweep-0")
    world.stages.pop("default/sweep-0-prepare-1")
    settle(world)
    first, second = world.sweeps["default/sweep"].status.trials
    assert (first.state, first.message) == ("Cancelled", "its job was deleted")
    assert second.state == "Succeeded"
    assert "default/sweep-0" not in world.jobs


def test_a_job_of_its_trials_name_that_is_not_its_own_is_left_alone() -> None:
    world = make_world(make_sweep(trials=2))
    world.submit(make_job("sweep-1", suspend=True))
    settle(world)
    first, second = world.sweeps["default/sweep"].status.trials
    assert first.state == "Succeeded"
    assert (second.state, second.message) == ("Failed", "job sweep-1 is there already, and no trial of this sweep")
    assert not world.jobs["default/sweep-1"].cancelled


def test_a_trial_that_this_version_cannot_read_is_waited_for() -> None:
    world = make_world(make_sweep(trials=1))
    world.pass_once()
    world.pass_once()
    seen = replace(world.snapshot(), jobs=(), unreadable=(UnreadableJob(namespace="default", name="sweep-0"),))
    assert not [c for c in decide(seen) if isinstance(c, WriteSweepStatus | CreateJob)]


def test_a_defect_of_one_sweep_is_not_anothers() -> None:
    broken, sound = make_sweep("broken"), make_sweep("sound")
    broken = broken.model_copy(update={"spec": broken.spec.model_copy(update={"space": None})})
    commands = decide(replace(snapshot(), sweeps=(broken, sound)))
    assert [c.job.metadata.name for c in commands if isinstance(c, ReportDefect)] == ["broken"]
    assert [c.job.metadata.name for c in commands if isinstance(c, CreateJob)] == ["sound-0", "sound-1"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"space": [{"field": "adapter.rank", "choice": ["8", "513"]}]}, "no job takes 513 as adapter.rank"),
    ({"space": [{"field": "training.warmupRatio", "uniform": {"min": "0", "max": "1"}}]}, "no job takes 1 as training"),
    (
        {"space": [{"field": "training.scheduler", "choice": ["cosine", "cosin"]}]},
        "no job takes cosin as training.sched",
    ),
    (
        {
            "job": {**JOB, "training": {"maxSteps": 10}},
            "space": [{"field": "training.epochs", "uniform": {"min": "1", "max": "3"}}],
        },
        "training.epochs means nothing beside spec.job.training.maxSteps",
    ),
    (
        {"job": {**JOB, "adapter": {"from": "job:other"}}, "space": [{"field": "adapter.rank", "choice": ["8"]}]},
        "rank and alpha are taken over",
    ),
    (
        {
            "job": {**JOB, "adapter": {"experts": True, "dropout": "0"}},
            "space": [{"field": "adapter.dropout", "choice": ["0", "0.1"]}],
        },
        "experts have no dropout",
    ),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED)
def test_what_no_job_takes_is_refused_in_words_before_any_trial_is_made(spec: dict[str, Any], words: str) -> None:
    sweep = make_sweep(**spec)
    assert words in (refusal(sweep) or "")
    world = make_world(sweep)
    world.pass_once()
    assert outcome(world)[0] is Reason.USER_ERROR
    assert words in outcome(world)[1]
    assert outcome(world)[1].startswith("spec.space")
    assert world.jobs == {}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"space": []}, "at least 1 item"),
    ({"space": [{"field": "training.learningrate", "choice": ["1e-4"]}]}, "Input should be 'training.epochs'"),
    ({"space": [{"field": "adapter.rank"}]}, "takes one of choice"),
    ({"space": [{"field": "training.learningRate", "logUniform": {"min": "0", "max": "1"}}]}, "min must be above 0"),
    ({"space": [{"field": "training.learningRate", "uniform": {"min": "1", "max": "1"}}]}, "max must be above min"),
    ({"space": [{"field": "adapter.rank", "uniform": {"min": "1", "max": "8"}}]}, "are for decimal fields"),
    ({"space": [{"field": "training.epochs", "integer": {"min": 1, "max": 8}}]}, "for fields that are whole numbers"),
    ({"space": [{"field": "adapter.rank", "choice": ["8.5"]}]}, "choice must hold numbers"),
    ({"space": [SPACE[0], SPACE[0]]}, "space must name each field once"),
    ({"job": {**JOB, "dataset": {"source": "file:///data.jsonl"}}}, "eval/loss is logged only where something is held"),
    ({"metric": {"name": "eval/bleu"}}, "Input should be 'eval/loss' or 'train/loss'"),
    ({"earlyStop": {"firstStep": 5}, "job": {**JOB, "evaluation": {"everySteps": 2}}}, "must be a multiple of"),
    ({"trials": 0}, "greater than or equal to 1"),
    ({"promote": "v1"}, "which MLflow reserves"),
]


@pytest.mark.parametrize(("spec", "words"), BAD)
def test_a_spec_that_cannot_work_is_refused_at_creation(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_sweep(**spec)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31 - 1),
    index=st.integers(0, 255),
    low=st.decimals("0.000000000001", 10, places=12),
    factor=st.floats(1.001, 1e6),
)
def test_every_value_that_is_drawn_is_one_that_the_field_takes(seed: int, index: int, low: Any, factor: float) -> None:
    """Between its bounds, and written so that a job reads it."""
    high = f"{min(float(low) * factor, 9e9):.6f}"
    if not float(low) < float(high):
        return
    ends = {"min": f"{low:f}", "max": high}
    for way in ("uniform", "logUniform"):
        sweep = make_sweep(seed=seed, space=[{"field": "training.weightDecay", way: ends}])
        value = float(trial_job(sweep, index).spec.training.weight_decay)
        assert float(low) <= value <= float(high)


def test_values_are_spread_as_the_dimension_says() -> None:
    """A draw is a share of the dimension: the middle of it is the middle of the values, or of their logarithms."""
    ends = {"min": "0.0001", "max": "1"}
    dimension = SweepDimension.model_validate
    assert float(drawn(dimension({"field": "training.weightDecay", "uniform": ends}), 0.5)) == pytest.approx(0.50005)
    assert float(drawn(dimension({"field": "training.weightDecay", "logUniform": ends}), 0.5)) == pytest.approx(0.01)
    integers = dimension({"field": "adapter.rank", "integer": {"min": 3, "max": 6}})
    assert [drawn(integers, share) for share in (0, 0.26, 0.51, 0.99)] == ["3", "4", "5", "6"]
    sweep = make_sweep(trials=256)
    drawn_rates = sorted(float(parameters(sweep.spec, index)["training.learningRate"]) for index in range(256))
    assert drawn_rates[64] == pytest.approx(10**-4.5, rel=0.3)
    assert drawn_rates[192] == pytest.approx(10**-3.5, rel=0.3)
    assert len(set(drawn_rates)) == 256


def test_every_field_of_the_space_is_one_of_a_job() -> None:
    """A value that is drawn for it reaches the job's spec under that very name."""
    words = {"training.scheduler": "cosine", "training.optimizer": "adamw_8bit"}
    numbers = dict.fromkeys(DECIMAL_FIELDS, "0.25") | dict.fromkeys(INTEGER_FIELDS, "7")
    for field, value in (words | numbers).items():
        sweep = make_sweep(space=[{"field": field, "choice": [value]}])
        section, name = field.split(".")
        wire: Any = trial_job(sweep, 0).spec.to_wire()
        assert str(wire[section][name]) == value
        assert refusal(sweep) is None
