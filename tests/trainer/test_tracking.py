"""The run logger and `reconcile` against real MLflow: SQLite, and a server that goes away and comes back.

What is asserted is what an MLflow client of its own reads back.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import free_port, is_healthy, mlflow_server
from qlora_trainer.outcome import Transient, UserError
from qlora_trainer.storage.backoff import Backoff
from qlora_trainer.storage.journal import Journal
from qlora_trainer.tracking import mlflow_run, model_card, run_page
from qlora_trainer.tracking.mlflow_run import RunLogger

from orchestrator.api.formats import JournalRecord, Sample
from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.mlflow_pages import SAMPLES_PATH
from orchestrator.api.record_fields import Format
from orchestrator.api.task import StageTask
from tests.builders import prepare_result

# MLflow's own pages and SQLAlchemy's pool speak of their deprecations; they are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """MLflow on a SQLite file of its own."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return MlflowClient(tracking_uri=uri)


def make_run(client: MlflowClient, tmp_path: Path) -> str:
    """What the controller does before training."""
    experiment = client.create_experiment("team-a", artifact_location=(tmp_path / "artifacts").as_uri())
    return client.create_run(experiment, tags={"qlora.dev/job-uid": "u-1"}).info.run_id


def make_task(run_id: str | None = None, data: Format = "messages", **training: object) -> StageTask:
    spec = QLoRAJobSpec(
        model=ModelSource(source="file:///models/base"),
        dataset=DatasetSource(source="file:///data.jsonl", format=data),
        training=TrainingSpec.model_validate(training),
        queue="research",
    )
    return StageTask(
        stage="train",
        namespace="team-a",
        job="job",
        uid="u-1",
        attempt=1,
        spec=spec,
        store_uri="file:///store/job",
        run_id=run_id,
    )


def make_logger(task: StageTask, journal: Journal) -> RunLogger:
    """One that does not let a test wait."""
    backoff = Backoff(first_pause_seconds=0.1, longest_pause_seconds=0.2)
    return RunLogger(task, journal, interval_seconds=0.05, backoff=backoff)


def make_journal(steps: int, *, time_ms: int = 1_000) -> Journal:
    return Journal(make_record(step, time_ms=time_ms) for step in range(1, steps + 1))


def make_record(step: int, *, time_ms: int = 1_000) -> JournalRecord:
    return JournalRecord(step=step, time_ms=time_ms + step, metrics={"train/loss": 1 / step, "train/mfu": step / 7})


def history(client: MlflowClient, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def expected(steps: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, steps + 1)]


def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_the_run_follows_a_growing_journal(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    journal = make_journal(3)
    logger = make_logger(make_task(run_id), journal)
    until(lambda: len(history(client, run_id)) == 3)
    journal.append(make_record(4))
    assert logger.close(30) == 0
    assert history(client, run_id) == expected(4)
    assert [metric.timestamp for metric in client.get_metric_history(run_id, "train/loss")] == [1001, 1002, 1003, 1004]


def test_the_run_is_found_by_the_jobs_uid_when_the_task_names_none(client: MlflowClient, tmp_path: Path) -> None:
    logger = make_logger(make_task(run_id=None), make_journal(2))
    time.sleep(0.3)  # there is no experiment yet; the controller makes it while training goes on
    run_id = make_run(client, tmp_path)
    until(lambda: len(history(client, run_id)) == 2)
    assert logger.close(30) == 0
    assert history(client, run_id) == expected(2)


def test_a_resumed_run_logs_every_step_once(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    assert make_logger(make_task(run_id), make_journal(15)).close(30) == 0
    # The checkpoint was of step 10: the journal is cut to it, and steps 11 to 20 are made again, later.
    resumed = Journal(make_journal(15).records()[:10])
    for step in range(11, 21):
        resumed.append(make_record(step, time_ms=9_000))
    assert make_logger(make_task(run_id), resumed).close(30) == 0
    for key in ("train/loss", "train/mfu"):
        assert [step for step, _ in history(client, run_id, key)] == list(range(1, 21))
    assert history(client, run_id) == expected(20)


def test_samples_are_shown_as_they_come_and_none_twice(client: MlflowClient, tmp_path: Path) -> None:
    def sampled(step: int) -> JournalRecord:
        samples = tuple(Sample(prompt=f"question {n}", reference="yes", answer=f"{step}.{n}") for n in range(2))
        return make_record(step).model_copy(update={"samples": samples})

    run_id = make_run(client, tmp_path)
    journal = Journal([make_record(1), sampled(2)])
    assert make_logger(make_task(run_id), journal).close(30) == 0
    journal.append(sampled(3))
    assert make_logger(make_task(run_id), Journal.from_bytes(journal.to_bytes())).close(30) == 0
    table = json.loads(Path(client.download_artifacts(run_id, SAMPLES_PATH, str(tmp_path))).read_text())
    assert table["columns"] == ["prompt", "reference", "step", "answer"]
    assert [row[2:] for row in table["data"]] == [[2, "2.0"], [3, "3.0"], [2, "2.1"], [3, "3.1"]]


def test_parameters_and_tags_say_what_the_job_is(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    make_logger(make_task(run_id, learning_rate="3e-4"), make_journal(1)).close(30)
    # A later attempt with another value must not fail: MLflow's parameters cannot be changed.
    make_logger(make_task(run_id, learning_rate="9e-4"), make_journal(2)).close(30)
    data = client.get_run(run_id).data
    assert data.params["training.learningRate"] == "3e-4"
    assert data.params["adapter.targetModules"] == "all-linear"
    assert data.tags["qlora.dev/queue"] == "research"
    assert data.tags["qlora.dev/base-model"] == "file:///models/base"
    assert data.tags["qlora.dev/card"]
    assert data.tags["qlora.dev/version/python"] == sys.version.split()[0]
    assert history(client, run_id) == expected(2)


def test_parameters_are_those_that_applied() -> None:
    by_steps = run_page.parameters(make_task(max_steps=7))
    assert (by_steps["training.maxSteps"], by_steps.get("training.epochs")) == ("7", None)
    by_epochs = run_page.parameters(make_task(epochs="2"))
    assert (by_epochs["training.epochs"], by_epochs.get("training.maxSteps")) == ("2", None)
    assert not {"dataset.split", "queue", "priority", "suspend", "resources.vram", "tracking.alias"} & by_epochs.keys()
    assert by_epochs["dataset.source"] == "file:///data.jsonl"


def test_parameters_of_preferences_are_theirs_alone() -> None:
    usual = run_page.parameters(make_task())
    assert usual["training.objective.type"] == "sft"
    assert not {"training.objective.beta", "training.objective.labelSmoothing"} & usual.keys()
    found = run_page.parameters(make_task(data="preference", objective={"type": "dpo", "beta": "0.2"}))
    assert (found["training.objective.type"], found["training.objective.beta"]) == ("dpo", "0.2")
    assert "dataset.trainOn" not in found


@pytest.mark.parametrize(
    ("chats", "asked", "told"),
    [(True, '{"messages": [', "the base's own, saved with the tokenizer"), (False, '{"prompt": "', "none was used")],
)
def test_a_model_is_asked_in_the_form_that_its_preferences_had(chats: bool, asked: str, told: str) -> None:
    task = make_task(data="preference", objective={"type": "dpo"})
    prepared = prepare_result().model_copy(update={"chats": chats})
    task = task.model_copy(update={"prepared": prepared})
    assert model_card.question(task).startswith(asked)
    assert ("apply_chat_template" in model_card.encoding(task)) is chats
    assert model_card.template(task) == told


def test_the_runs_status_is_left_to_the_controller(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    make_logger(make_task(run_id), make_journal(1)).close(30)
    assert client.get_run(run_id).info.status == "RUNNING"
    client.set_terminated(run_id, "KILLED")
    mlflow_run.reconcile(run_id, make_journal(2).records())
    assert client.get_run(run_id).info.status == "KILLED"


def test_long_values_are_cut(client: MlflowClient) -> None:
    task = make_task()
    model = task.spec.model.model_copy(update={"chat_template": "x" * 9000})
    task = task.model_copy(update={"spec": task.spec.model_copy(update={"model": model})})
    assert max(len(value) for value in run_page.parameters(task).values()) == 500


def test_reconcile_fills_every_gap_and_repeats_nothing(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    for step in (2, 3, 7):
        client.log_metric(run_id, "train/loss", 1 / step, timestamp=5, step=step)
    for _ in range(2):
        mlflow_run.reconcile(run_id, make_journal(2500).records())
    assert sorted(history(client, run_id)) == expected(2500)
    assert len(history(client, run_id, "train/mfu")) == 2500


def test_a_metric_that_is_not_a_number_does_not_stop_the_rest(client: MlflowClient, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path)
    records = [JournalRecord(step=1, time_ms=1, metrics={"train/grad_norm": float("nan"), "train/loss": 1.0})]
    mlflow_run.reconcile(run_id, [*records, make_record(2)])
    assert history(client, run_id) == expected(2)


def test_without_a_tracking_uri_metrics_stay_in_the_journal(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert make_logger(make_task(), make_journal(3)).close(1) == 3
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        mlflow_run.reconcile("0" * 32, make_journal(1).records())


def test_publish_gives_up_as_transient_when_mlflow_stays_away(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Transient, match="MLflow is away, cannot bring the metrics up to date"):
        mlflow_run.reconcile("0" * 32, make_journal(1).records(), Backoff(tries=5, first_pause_seconds=0.01))


def test_a_server_that_goes_away_and_comes_back_has_every_step_once(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    remote = MlflowClient(tracking_uri=uri)
    journal = make_journal(5)
    with mlflow_server(tmp_path, port):
        run_id = remote.create_run(remote.create_experiment("team-a"), tags={"qlora.dev/job-uid": "u-1"}).info.run_id
        logger = make_logger(make_task(run_id), journal)
        until(lambda: len(history(remote, run_id)) == 5)
    for step in range(6, 11):  # training does not notice
        journal.append(make_record(step))
        time.sleep(0.1)
    assert not is_healthy(port)
    with mlflow_server(tmp_path, port):
        until(lambda: len(history(remote, run_id)) == 10)
        journal.append(make_record(11))
        assert logger.close(30) == 0
        assert history(remote, run_id) == expected(11)
        assert len(history(remote, run_id, "train/mfu")) == 11


def test_closing_while_mlflow_is_away_is_quick_and_says_what_is_left(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    logger = make_logger(make_task("0" * 32), make_journal(4))
    time.sleep(0.3)
    started = time.monotonic()
    assert logger.close(5) == 4
    assert time.monotonic() - started < 5
    assert "4 of 4 journal records are not in MLflow yet" in caplog.text
