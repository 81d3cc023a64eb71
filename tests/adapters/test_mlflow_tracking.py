"""The controller's side of MLflow against real stores, looked at with MLflow's own client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.api.job import MlflowStatus, QLoRAJob, QLoRAJobStatus, TrackingSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.promotion import moved
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import BestTrial, QLoRASweep, QLoRASweepStatus, TrialStatus
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import InvalidObject, TrackingUnavailable
from orchestrator.settings import Settings
from tests.builders import NOW, make_attempt, submitted_job, submitted_sweep
from tests.trainer.fault_link import Cut, Fault, Link, Request, fault_link
from tests.trainer.mlflow_server import free_port, mlflow_server

# MLflow's imports and its database layer warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, tracking_uri=f"sqlite:///{home}/mlflow.db", tracking_timeout_seconds=120)
    MlflowTracking(settings).connect()
    return settings


def job(uid: str, **spec: Any) -> QLoRAJob:
    return submitted_job("medical", meta={"uid": uid}, **spec)


def recorded(wanted: QLoRAJob, run: MlflowStatus) -> QLoRAJob:
    """The job with the run on record."""
    return wanted.model_copy(update={"status": QLoRAJobStatus(mlflow=run)})


def runs(settings: Settings, experiment: str) -> list[Any]:
    client = MlflowClient(settings.tracking_uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def make_plan(micro_batch_size: int) -> MemoryPlan:
    return MemoryPlan(micro_batch_size=micro_batch_size, accumulation_steps=4, recompute_layers=0)


def test_a_database_is_new_until_it_has_been_connected_to(settings: Settings, tmp_path: Path) -> None:
    assert MlflowTracking(Settings(home=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/other.db")).is_new
    assert not MlflowTracking(Settings(home=tmp_path, tracking_uri="http://127.0.0.1:1")).is_new
    assert not MlflowTracking(settings).is_new


def test_a_job_has_one_run_however_often_it_is_asked_for(settings: Settings) -> None:
    first = MlflowTracking(settings).ensure_run(job("u-1"))
    second = MlflowTracking(settings).ensure_run(job("u-1"))
    assert first == second
    assert first.run_status == "RUNNING"
    found = [run for run in runs(settings, "team-a") if run.data.tags["qlora.dev/job-uid"] == "u-1"]
    assert [run.info.run_id for run in found] == [first.run_id]
    assert found[0].info.run_name == "medical"
    assert found[0].data.tags["qlora.dev/job"] == "medical"
    assert found[0].data.tags["qlora.dev/namespace"] == "team-a"
    assert found[0].data.tags["qlora.dev/queue"] == "default"


@pytest.mark.parametrize("tags", [{"qlora.dev/namespace": "team-b"}, {}])
def test_a_team_gets_no_run_in_another_teams_experiment(settings: Settings, tags: dict[str, str]) -> None:
    client, name = MlflowClient(settings.tracking_uri), f"theirs-{len(tags)}"
    client.create_run(client.create_experiment(name, tags=tags))
    tracking = MlflowTracking(settings)
    for _ in range(2):
        with pytest.raises(
            InvalidObject, match=rf"the experiment {name} (belongs|holds).*set spec\.tracking\.experiment"
        ):
            tracking.ensure_run(job("u-thief", tracking=TrackingSpec(experiment=name)))
    assert len(runs(settings, name)) == 1


def test_what_one_team_may_write_to_is_not_remembered_for_another(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    tracking.ensure_run(job("u-own", tracking=TrackingSpec(experiment="shared")))
    other = submitted_job("medical", "team-b", meta={"uid": "u-b"}, tracking=TrackingSpec(experiment="shared"))
    with pytest.raises(InvalidObject, match="belongs to namespace team-a, not to team-b"):
        tracking.ensure_run(other)
    found = MlflowClient(settings.tracking_uri).get_experiment_by_name("shared")
    assert found is not None
    assert found.tags["qlora.dev/namespace"] == "team-a"


def test_pages_show_who_made_a_run_and_that_its_experiment_is_training(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    kept = client.create_experiment("kept", tags={"mlflow.experimentKind": "forecasting"})
    bare = client.create_experiment("bare")
    for experiment, user in (("kept", None), ("bare", "ana"), ("fresh", None)):
        wanted = job(f"u-of-{experiment}", tracking=TrackingSpec(experiment=experiment))
        MlflowTracking(settings, user=user).ensure_run(wanted)
        (run,) = runs(settings, experiment)
        assert run.info.user_id == run.data.tags["mlflow.user"] == (user or "team-a")
        assert run.data.tags["mlflow.source.name"] == "team-a/medical"
    kinds = [client.get_experiment(each).tags["mlflow.experimentKind"] for each in (kept, bare)]
    assert kinds == ["forecasting", "custom_model_development"], "a person's choice stays"
    fresh = client.get_experiment_by_name("fresh")
    assert fresh is not None
    assert fresh.tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_run_of_a_finished_job_says_how_its_attempts_went_though_no_stage_could_tell(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    wanted = job("u-14", tracking=TrackingSpec(experiment="told"))
    attempts = tuple(
        make_attempt(number=number, plan=make_plan(size), reason=reason, finish_time=NOW)
        for number, size, reason in ((2, 4, Reason.OUT_OF_MEMORY), (3, 1, Reason.DIVERGED))
    )
    status = QLoRAJobStatus(mlflow=tracking.ensure_run(wanted), attempts=attempts, summary="diverged in step 3")
    for _ in range(2):
        tracking.finish_run(wanted.model_copy(update={"status": status}), "FAILED")
    (run,) = runs(settings, "told")
    assert run.info.status == "FAILED"
    plans = [json.loads(run.data.tags[f"qlora.dev/plan/{number}"])["microBatchSize"] for number in (2, 3)]
    assert plans == [4, 1]
    ends = [run.data.tags[f"qlora.dev/end{which}"] for which in ("/2", "/3", "")]
    assert ends == ["OutOfMemory", "Diverged", "diverged in step 3"]


FIRST_CALLS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.api.job import MlflowStatus, QLoRAJobStatus
from orchestrator.settings import Settings
from tests.builders import submitted_job

home = Path(sys.argv[1])
uri = f"sqlite:///{home}/mlflow.db"
tracking = MlflowTracking(Settings(home=home, tracking_uri=uri, mlflow_workers=4, tracking_timeout_seconds=120))
gone = submitted_job("gone").model_copy(update={"status": QLoRAJobStatus(mlflow=MlflowStatus(run_id="gone"))})
with ThreadPoolExecutor(4) as pool:
    calls = [pool.submit(tracking.connect), *(pool.submit(tracking.finish_run, gone, "KILLED") for _ in range(3))]
    for call in calls:
        call.result()
"""


def test_the_first_calls_may_come_from_all_workers_at_one_time(settings: Settings) -> None:
    """The calls come in a process that has not imported mlflow yet."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_CALLS, str(settings.home)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_another_job_of_the_name_has_another_run(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    assert tracking.ensure_run(job("u-2")).run_id != tracking.ensure_run(job("u-3")).run_id


def test_the_experiment_is_the_jobs_choice_and_its_artifacts_are_in_the_artifact_root(settings: Settings) -> None:
    wanted = job("u-4", tracking=TrackingSpec(experiment="medical/es"))
    status = MlflowTracking(settings).ensure_run(wanted)
    experiment = MlflowClient(settings.tracking_uri).get_experiment_by_name("medical/es")
    assert experiment is not None
    assert experiment.experiment_id == status.experiment_id
    assert Path(experiment.artifact_location.removeprefix("file://")).parent == settings.artifact_root


def test_the_last_status_is_given_once_and_taken_back_when_the_job_goes_on(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    experiment = TrackingSpec(experiment="ends")
    wanted = job("u-5", tracking=experiment)
    tracking.ensure_run(wanted)
    tracking.finish_run(wanted, "KILLED")
    ended = runs(settings, "ends")[0].info
    assert ended.status == "KILLED"
    tracking.finish_run(wanted, "KILLED")
    assert runs(settings, "ends")[0].info.end_time == ended.end_time
    assert tracking.ensure_run(wanted).run_status == "RUNNING"
    assert [run.info.status for run in runs(settings, "ends")] == ["RUNNING"]


def test_a_run_that_somebody_deleted_does_not_stop_the_job_from_ending(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    tracking.finish_run(job("u-6"), "FINISHED")
    run = tracking.ensure_run(job("u-9"))
    MlflowClient(settings.tracking_uri).delete_run(run.run_id)
    tracking.finish_run(recorded(job("u-9"), run), "FINISHED")
    tracking.finish_run(recorded(job("u-9"), MlflowStatus(run_id="no-such-run")), "FINISHED")


def test_a_run_on_record_is_ended_by_its_id(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    wanted = job("u-10", tracking=TrackingSpec(experiment="by-id"))
    wanted = recorded(wanted, tracking.ensure_run(wanted))
    MlflowClient(settings.tracking_uri).rename_experiment(wanted.status.mlflow.experiment_id, "renamed")
    tracking.finish_run(wanted, "FINISHED")
    assert [run.info.status for run in runs(settings, "renamed")] == ["FINISHED"]


def test_an_experiment_that_was_deleted_meanwhile_is_restored(settings: Settings) -> None:
    tracking = MlflowTracking(settings)
    experiment = TrackingSpec(experiment="away")
    first = tracking.ensure_run(job("u-11", tracking=experiment))
    MlflowClient(settings.tracking_uri).delete_experiment(first.experiment_id)
    with pytest.raises(TrackingUnavailable):
        tracking.ensure_run(job("u-12", tracking=experiment))
    assert tracking.ensure_run(job("u-12", tracking=experiment)).experiment_id == first.experiment_id


# --- the alias that a person asks for -----------------------------------------------------------------------------


def gated(name: str, version: str, uid: str, over: str | None = "holder") -> QLoRAJob:
    """A published job of `team-a` that asks for the alias `champion` of a model."""
    rule = {"metric": "f1", "atLeast": "0"} | ({} if over is None else {"over": over})
    wanted = job(uid)
    tracking = {"registeredModel": name, "promote": {"alias": "champion", "approval": "manual", "when": [rule]}}
    spec = wanted.spec.model_copy(update={"tracking": TrackingSpec.model_validate(tracking)})
    return recorded(wanted.model_copy(update={"spec": spec}), MlflowStatus(run_id="r", model_version=version))


def registered(client: MlflowClient, name: str, *uids: str, owner: str = "team-a", holder: str = "1") -> None:
    """A registered model with a version of each job, as publish leaves them after a comparison with the first."""
    client.create_registered_model(name, tags={"qlora.dev/namespace": owner})
    for uid in uids:
        tags = {"qlora.dev/job-uid": uid, "qlora.dev/gate/champion": "f1 is 0.6", "qlora.dev/compared/champion": "1"}
        client.create_model_version(name, source=f"s3://nowhere/{uid}", tags=tags)
    client.set_registered_model_alias(name, "champion", holder)


def holder_of(client: MlflowClient, name: str) -> str:
    return str(client.get_model_version_by_alias(name, "champion").version)


@pytest.mark.parametrize(("forced", "how"), [("", "approved"), ("it is better", "forced (it is better)")])
def test_an_approved_alias_moves_once_and_the_version_says_why(settings: Settings, forced: str, how: str) -> None:
    client, name = MlflowClient(settings.tracking_uri), f"terms-{len(forced)}"
    registered(client, name, "u-1", "u-2", "u-3")
    tracking, wanted = MlflowTracking(settings), gated(name, "2", "u-2")
    done = moved("champion", "2", f"{how}; f1 is 0.6")
    assert tracking.promote(wanted, forced) == done
    assert holder_of(client, name) == "2"
    assert client.get_model_version(name, "2").tags["qlora.dev/promoted/champion"] == f"{how}; f1 is 0.6"
    client.set_registered_model_alias(name, "champion", "3")
    assert MlflowTracking(settings).promote(wanted, "another reason") == done, "it has been done"
    assert holder_of(client, name) == "3"


def test_an_alias_that_moved_since_the_comparison_stays_unless_it_is_forced(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    registered(client, "raced", "u-1", "u-2", "u-3", holder="3")
    tracking, wanted = MlflowTracking(settings), gated("raced", "2", "u-2")
    found = tracking.promote(wanted, "")
    assert (found.promoted, found.reason) == (False, Reason.HOLDER_CHANGED)
    assert found.message.startswith("the alias champion stays with version 3: the adapter was compared with version 1")
    assert holder_of(client, "raced") == "3"
    assert "qlora.dev/promoted/champion" not in client.get_model_version("raced", "2").tags
    client.delete_model_version_tag("raced", "2", "qlora.dev/gate/champion")  # as a version of before there were any
    assert tracking.promote(wanted, "all the same") == moved("champion", "2", "forced (all the same)")
    assert holder_of(client, "raced") == "2"


def test_a_gate_that_looks_at_no_holder_lets_the_alias_move_from_anybody(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    registered(client, "alone", "u-1", "u-2", "u-3", holder="3")
    assert MlflowTracking(settings).promote(gated("alone", "2", "u-2", over=None), "").promoted
    assert holder_of(client, "alone") == "2"


def test_what_is_not_the_jobs_own_version_gets_no_alias_even_by_force(settings: Settings) -> None:
    client, tracking = MlflowClient(settings.tracking_uri), MlflowTracking(settings)
    registered(client, "own", "u-1", "u-2")
    registered(client, "team-bs", "u-1", "u-2", owner="team-b")
    for wanted, words in (
        (gated("own", "2", "u-9"), "version 2 of own is another job's"),
        (gated("own", "7", "u-2"), "version 7 of own is not in the registry any more"),
        (gated("nothing", "1", "u-2"), "version 1 of nothing is not in the registry any more"),
        (gated("team-bs", "2", "u-2"), "belongs to namespace team-b, not to team-a"),
    ):
        found = tracking.promote(wanted, "by all means")
        assert (found.promoted, found.reason) == (False, Reason.PROMOTION_REFUSED)
        assert words in found.message
    assert holder_of(client, "own") == holder_of(client, "team-bs") == "1"


def swept(name: str, index: int = 0) -> tuple[QLoRASweep, QLoRAJob]:
    """A sweep, and a trial of it as the store has it."""
    sweep = submitted_sweep(name, promote="champion")
    sweep = sweep.model_copy(update={"metadata": sweep.metadata.model_copy(update={"uid": f"uid-of-{name}"})})
    trial = trial_job(sweep, index)
    metadata = trial.metadata.model_copy(update={"uid": f"uid-of-{trial.metadata.name}"})
    return sweep, trial.model_copy(update={"metadata": metadata})


def family(settings: Settings, name: str) -> tuple[Any, list[Any]]:
    """The one run of a sweep, and its children."""
    of_sweep = [run for run in runs(settings, "team-a") if run.data.tags.get("qlora.dev/sweep") == name]
    [parent] = [run for run in of_sweep if "qlora.dev/job-uid" not in run.data.tags]
    children = [run for run in of_sweep if "qlora.dev/job-uid" in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    return parent, children


def test_the_runs_of_trials_are_children_of_one_run_which_ends_with_the_sweep(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    sweep, first = swept("rates")
    for trial in (first, swept("rates", 1)[1], first):
        MlflowTracking(settings).ensure_run(trial)  # each time as a controller that was just started
    parent, children = family(settings, "rates")
    assert (parent.info.run_name, parent.info.status, len(children)) == ("rates", "RUNNING", 2)
    registered(client, "team-a-rates", "uid-of-rates-1", "uid-of-rates-0")
    best = TrialStatus(index=0, job="rates-0", uid="uid-of-rates-0", parameters={}, value=0.5, model_version="2")
    named = BestTrial(index=0, job="rates-0", value=0.5)
    status = QLoRASweepStatus(best=named, trials=(best,), summary="Succeeded: trial rates-0 is the best")
    over = sweep.model_copy(update={"status": status})
    for _ in range(2):
        fact = MlflowTracking(settings).finish_sweep(over, "FINISHED", best)
    assert (fact.mlflow.run_id, fact.mlflow.run_status) == (parent.info.run_id, "FINISHED")
    assert fact.promotion == moved("champion", "2", "the best of sweep rates: eval/loss 0.5")
    assert client.get_model_version_by_alias("team-a-rates", "champion").version in (2, "2")
    parent, _ = family(settings, "rates")
    assert (parent.info.status, parent.data.tags["qlora.dev/best"]) == ("FINISHED", "rates-0")
    assert parent.data.metrics["best/eval/loss"] == 0.5
    another = best.model_copy(update={"model_version": "1"})
    refused = MlflowTracking(settings).finish_sweep(over, "FINISHED", another).promotion
    assert refused is not None
    assert (refused.promoted, refused.reason) == (False, Reason.PROMOTION_REFUSED), "it is another trial's version"


def test_the_run_of_a_deleted_sweep_ends_with_its_trials(settings: Settings) -> None:
    _, trial = swept("gone")
    found = MlflowTracking(settings).ensure_run(trial)
    metadata = trial.metadata.model_copy(update={"deletion_timestamp": NOW})
    deleted = recorded(trial.model_copy(update={"metadata": metadata}), found)
    MlflowTracking(settings).finish_run(deleted, "KILLED")
    parent, [child] = family(settings, "gone")
    assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")
    MlflowTracking(settings).ensure_run(swept("gone", 1)[1])
    assert family(settings, "gone")[0].info.status == "RUNNING", "it was one trial alone that was deleted"


def test_a_trial_that_comes_after_its_sweeps_end_does_not_open_the_sweeps_run_again(settings: Settings) -> None:
    sweep, first = swept("late")
    MlflowTracking(settings).ensure_run(first)
    MlflowTracking(settings).finish_sweep(sweep, "KILLED", None)
    MlflowTracking(settings).ensure_run(swept("late", 1)[1])
    parent, children = family(settings, "late")
    assert (parent.info.status, len(children)) == ("KILLED", 2)


def test_a_sweep_of_which_no_trial_had_a_run_has_none(settings: Settings) -> None:
    sweep, _ = swept("early")
    fact = MlflowTracking(settings).finish_sweep(sweep, "KILLED", None)
    assert fact.mlflow == MlflowStatus(run_status="KILLED")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real server."""
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("server"), port):
        yield port


@pytest.fixture
def link(server: int) -> Iterator[Link]:
    with fault_link("127.0.0.1", server) as link:
        yield link


def ensured(tracking: MlflowTracking, wanted: QLoRAJob) -> MlflowStatus:
    """As the controller has it: asked again for as long as MLflow is away."""
    for _ in range(20):
        try:
            return tracking.ensure_run(wanted)
        except TrackingUnavailable:
            time.sleep(0.3)
    raise AssertionError("there is no run after twenty tries")


@pytest.mark.parametrize("lost", [Cut.AFTER, Cut.LATE])
def test_a_run_whose_answer_is_lost_after_the_commit_is_made_once(
    server: int, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Cut
) -> None:
    """Whatever writes is carried out and its answer lost, once each."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # as an operator may have it
    written = link.lose_the_answer_to_each_write_once(lost)
    tracking = MlflowTracking(Settings(home=tmp_path, tracking_uri=link.url, tracking_timeout_seconds=60))
    wanted = job(f"u-{lost.name}", tracking=TrackingSpec(experiment=lost.name))
    status = ensured(tracking, wanted)
    assert [path.rpartition("mlflow/")[2] for path in sorted(written)][:2] == ["experiments/create", "runs/create"]
    made = MlflowClient(f"http://127.0.0.1:{server}")
    assert [run.info.run_id for run in made.search_runs([status.experiment_id])] == [status.run_id]


@pytest.mark.parametrize("lost", [Cut.AFTER, Cut.LATE])
def test_an_alias_moves_once_though_the_answer_to_each_write_is_lost(
    server: int, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Cut
) -> None:
    """As where the controller is killed after each: the alias has moved, and then the tag is there."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    client, name = MlflowClient(f"http://127.0.0.1:{server}"), f"lost-{lost.name}"
    registered(client, name, "u-1", "u-2", "u-3")
    written = link.lose_the_answer_to_each_write_once(lost)
    wanted = gated(name, "2", "u-2")
    for number, tagged in ((1, False), (2, True)):
        with pytest.raises(TrackingUnavailable):
            MlflowTracking(Settings(home=tmp_path, tracking_uri=link.url)).promote(wanted, "")
        assert len(written) == number
        assert holder_of(client, name) == "2"
        assert ("qlora.dev/promoted/champion" in client.get_model_version(name, "2").tags) is tagged
    client.set_registered_model_alias(name, "champion", "3")
    tracking = MlflowTracking(Settings(home=tmp_path, tracking_uri=link.url))
    assert tracking.promote(wanted, "") == moved("champion", "2", "approved; f1 is 0.6")
    assert holder_of(client, name) == "3", "somebody has moved it since"


def test_of_the_runs_that_two_controllers_make_at_once_the_one_on_record_stays(
    server: int, link: Link, tmp_path: Path
) -> None:
    """Both have looked for it before either makes it, and the job's status takes the word of one."""
    other = MlflowTracking(Settings(home=tmp_path, tracking_uri=f"http://127.0.0.1:{server}"))
    wanted = job("u-two", tracking=TrackingSpec(experiment="two"))
    other.ensure_run(job("u-before", tracking=TrackingSpec(experiment="two")))  # so that the experiment is there
    made: list[MlflowStatus] = []

    def rule(request: Request) -> Fault | None:
        if request.path.endswith("runs/create") and not made:
            made.append(other.ensure_run(wanted))
        return None

    link.rule = rule
    late = MlflowTracking(Settings(home=tmp_path, tracking_uri=link.url))
    assert late.ensure_run(wanted) != made[0], "its start time is the earlier one"
    wanted = recorded(wanted, made[0])
    for tracking in (late, other):
        assert tracking.ensure_run(wanted) == made[0]
    late.finish_run(wanted, "FINISHED")
    found = MlflowClient(f"http://127.0.0.1:{server}").search_runs([str(made[0].experiment_id)])
    assert [run.info.run_id for run in found if run.data.tags["qlora.dev/job-uid"] == "u-two"] == [made[0].run_id]
    assert len(found) == 2, "another job's run was touched"


def test_a_server_that_refuses_connections_is_unavailable(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    tracking = MlflowTracking(Settings(home=tmp_path, tracking_uri=f"http://127.0.0.1:{port}"))
    with pytest.raises(TrackingUnavailable, match=str(port)):
        tracking.ensure_run(job("u-7"))


def test_a_server_that_never_answers_is_unavailable_in_time_and_is_not_asked_twice_at_once(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracking = MlflowTracking(Settings(home=tmp_path, tracking_uri=uri, tracking_timeout_seconds=1))
        start = time.monotonic()
        with pytest.raises(TrackingUnavailable, match="within 1 s"):
            tracking.ensure_run(job("u-8"))
        assert time.monotonic() - start < 5
        with pytest.raises(TrackingUnavailable, match="still owes"):
            tracking.ensure_run(job("u-8"))


def test_as_many_calls_are_made_at_one_time_as_there_are_workers(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        settings = Settings(home=tmp_path, tracking_uri=uri, tracking_timeout_seconds=1, mlflow_workers=2)
        tracking = MlflowTracking(settings)
        for _ in range(2):
            with pytest.raises(TrackingUnavailable, match="within 1 s"):
                tracking.ensure_run(job("u-13"))
        with pytest.raises(TrackingUnavailable, match="still owes"):
            tracking.ensure_run(job("u-13"))
