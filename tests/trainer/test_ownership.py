"""Whose a name in MLflow is: what a team tries with another team's registered model, alias or experiment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from qlora_trainer.outcome import StageError, UserError
from qlora_trainer.tracking import mlflow_run, registry
from qlora_trainer.tracking.names import refuse_foreign_names

from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec, TrackingSpec
from orchestrator.api.ownership import registered_model_name
from orchestrator.api.task import StageTask

pytestmark = pytest.mark.filterwarnings("ignore")
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts of an experiment that names no place
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def task(namespace: str, job: str = "j", **tracking: Any) -> StageTask:
    spec = QLoRAJobSpec(
        model=ModelSource(source="hf://a/b"),
        dataset=DatasetSource(source="hf://a/b"),
        tracking=TrackingSpec.model_validate(tracking),
    )
    return StageTask(
        stage="publish",
        namespace=namespace,
        job=job,
        uid=f"{namespace}.{job}",
        attempt=1,
        spec=spec,
        store_uri="file:///nowhere",
    )


def registration(client: MlflowClient, of: StageTask) -> registry.Registration:
    name = f"runs-{of.uid}"
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    run_id = client.create_run(experiment).info.run_id
    return registry.Registration(task=of, run_id=run_id, adapter_digest=DIGEST, description="")


def publish(client: MlflowClient, of: StageTask, scratch: Path) -> str:
    """What publish does with the registry, with an artifact that is next to nothing."""

    def save(folder: Path, _model: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")

    return registry.register(registration(client, of), save, scratch / of.uid)


def model_of(of: StageTask) -> str:
    return registered_model_name(of.spec.tracking, of.namespace, of.job)


def state(client: MlflowClient, name: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Tags, aliases and versions of a registered model."""
    model: Any = client.get_registered_model(name)
    versions = [str(version.version) for version in client.search_model_versions()]
    return dict(model.tags), {alias: str(number) for alias, number in model.aliases.items()}, versions


def test_equal_job_names_of_two_teams_share_no_registered_model(client: MlflowClient, tmp_path: Path) -> None:
    teams = task("team-a", "medical"), task("team-b", "medical")
    for of in teams:
        assert publish(client, of, tmp_path) == "1"
    assert [model_of(of) for of in teams] == ["team-a-medical", "team-b-medical"]


def test_the_first_publish_tags_the_model_and_the_second_adds_to_it(client: MlflowClient, tmp_path: Path) -> None:
    assert publish(client, task("a", "one", registeredModel="terms"), tmp_path) == "1"
    assert publish(client, task("a", "two", registeredModel="terms"), tmp_path) == "2"
    assert state(client, "terms") == ({"qlora.dev/namespace": "a"}, {"candidate": "2"}, ["2", "1"])


@pytest.mark.parametrize("name", ["terms", "o'neil", 'o\'neil "the" model', "müde Wörter", "a.b-c_d"])
def test_a_team_moves_no_alias_of_another_teams_model(client: MlflowClient, tmp_path: Path, name: str) -> None:
    publish(client, task("a", registeredModel=name, alias="production"), tmp_path)
    before = state(client, name)
    thief = task("b", registeredModel=name, alias="production")
    for attempt in (lambda: publish(client, thief, tmp_path), lambda: refuse_foreign_names(thief)):
        with pytest.raises(UserError) as refused:
            attempt()
        assert refused.value.message == (
            f"the registered model {name} belongs to namespace a, not to b; "
            f"set spec.tracking.registeredModel to a name that is yours, such as b-{name}"
        )
    assert state(client, name) == before
    assert client.search_logged_models([client.get_experiment_by_name("runs-b.j").experiment_id]) == []  # type: ignore[union-attr]


def test_names_that_run_together_are_told_apart_by_the_tag(client: MlflowClient, tmp_path: Path) -> None:
    publish(client, task("a-b", "c"), tmp_path)
    with pytest.raises(UserError, match=r"a-b-c belongs to namespace a-b, not to a; set spec\.tracking\.regis"):
        publish(client, task("a", "b-c"), tmp_path)


@pytest.mark.parametrize("made_by", ["somebody by hand", "another team's job, before there were owners"])
def test_a_model_without_an_owner_that_holds_others_versions_is_refused(
    client: MlflowClient, tmp_path: Path, made_by: str
) -> None:
    client.create_registered_model("terms")
    tags = {} if made_by == "somebody by hand" else {"qlora.dev/namespace": "b"}
    client.create_model_version("terms", source=tmp_path.as_uri(), tags=tags)
    with pytest.raises(UserError, match=r"holds what no job of namespace a made.* tag qlora\.dev/namespace=a"):
        publish(client, task("a", registeredModel="terms"), tmp_path)
    assert state(client, "terms") == ({}, {}, ["1"])
    client.set_registered_model_tag("terms", "qlora.dev/namespace", "b, a")
    assert publish(client, task("a", registeredModel="terms"), tmp_path) == "2"


def test_a_model_without_an_owner_that_holds_only_our_versions_becomes_ours(
    client: MlflowClient, tmp_path: Path
) -> None:
    client.create_registered_model("terms")
    client.create_model_version("terms", source=tmp_path.as_uri(), tags={"qlora.dev/namespace": "a"})
    assert publish(client, task("a", registeredModel="terms"), tmp_path) == "2"
    assert state(client, "terms")[0] == {"qlora.dev/namespace": "a"}


def test_two_teams_that_publish_the_same_name_at_once_get_one_owner(client: MlflowClient, tmp_path: Path) -> None:
    teams = [task(namespace, registeredModel="terms", alias="production") for namespace in ("a", "b", "c")]
    registrations = [registration(client, of) for of in teams]
    start, ended = threading.Barrier(len(teams)), dict[str, str]()

    def run(own: registry.Registration) -> None:
        start.wait()
        try:
            registry.insist("make a version", lambda c: registry._own_registered_model(c, own.task))
            client.create_model_version("terms", source=tmp_path.as_uri(), tags=own.tags)
            ended[own.task.namespace] = "published"
        except StageError as error:
            ended[own.task.namespace] = error.message

    threads = [threading.Thread(target=run, args=(own,)) for own in registrations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner = state(client, "terms")[0]["qlora.dev/namespace"]
    assert [namespace for namespace, end in ended.items() if end == "published"] == [owner]
    assert all(f"belongs to namespace {owner}" in end for name, end in ended.items() if name != owner)
    versions = client.search_model_versions("name = 'terms'")
    assert {version.tags["qlora.dev/namespace"] for version in versions} == {owner}


class LostBetween:
    """A client behind which somebody else takes the model right before a call."""

    def __init__(self, client: MlflowClient, call: str) -> None:
        self._client, self._call = client, call

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            self._call = ""
            self._client.create_registered_model("terms", tags={"qlora.dev/namespace": "b"})
        return getattr(self._client, name)


def test_a_name_that_is_taken_right_before_it_is_made_is_refused(client: MlflowClient) -> None:
    with pytest.raises(UserError, match="belongs to namespace b, not to a"):
        registry._own_registered_model(
            LostBetween(client, "create_registered_model"), task("a", registeredModel="terms")
        )


@pytest.mark.parametrize("tags", [{"qlora.dev/namespace": "b"}, {}])
def test_a_team_writes_no_run_into_anothers_experiment(client: MlflowClient, tags: dict[str, str]) -> None:
    experiment = client.create_experiment("theirs", tags=tags)
    client.create_run(experiment)
    thief = task("a", experiment="theirs")
    with pytest.raises(UserError, match=r"the experiment theirs (belongs|holds).*set spec\.tracking\.experiment"):
        refuse_foreign_names(thief)
    with pytest.raises(UserError, match="the experiment theirs"):
        mlflow_run.ensure_run(thief)
    assert len(client.search_runs([experiment])) == 1


def test_an_experiment_that_is_made_is_its_namespaces(client: MlflowClient) -> None:
    mlflow_run.ensure_run(task("a"))
    experiment = client.get_experiment_by_name("a")
    assert experiment is not None
    assert experiment.tags["qlora.dev/namespace"] == "a"
    refuse_foreign_names(task("a"))


def test_mlflow_that_is_away_fails_nobody_in_prepare(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    refuse_foreign_names(task("a"))
    assert "publish looks whose they are" in caplog.text


def test_a_fault_of_mlflow_while_it_is_asked_is_no_refusal(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MlflowException("try later", error_code=10)  # TEMPORARILY_UNAVAILABLE

    monkeypatch.setattr(MlflowClient, "get_registered_model", fail)
    with pytest.raises(Exception, match="try later") as raised:
        registry.refuse_foreign_model(client, task("a"))
    assert not isinstance(raised.value, UserError)
