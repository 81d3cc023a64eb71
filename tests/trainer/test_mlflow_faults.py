"""A real MLflow server behind a line with faults: one run, one version, every metric once, whatever the line does."""

from __future__ import annotations

import base64
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_link import Cut, Fault, Link, Refusal, fault_link, hurry
from mlflow import MlflowClient
from mlflow_server import free_port, mlflow_server
from qlora_trainer import publish
from qlora_trainer.outcome import Transient
from test_publish import RECORDS, make_store, make_task
from test_tracking import make_journal, make_logger, make_record

from orchestrator.api.reasons import Reason
from orchestrator.api.results import PublishResult
from orchestrator.api.task import StageTask
from orchestrator.api.tracking_login import LOGIN_FOLDER_VARIABLE, LOGIN_VARIABLES

pytestmark = pytest.mark.filterwarnings("ignore")
MAX_ATTEMPTS = 40
LOCKED_SECONDS = 3.0
EXPIRED = Refusal(status=401, body=b"the token has expired", kind="text/plain")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A server's port, and its folder with the database."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        with mlflow_server(folder, port):
            yield port, folder


@pytest.fixture
def link(server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    with fault_link("127.0.0.1", server[0]) as link:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", link.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        hurry(monkeypatch)
        yield link


@pytest.fixture
def client(server: tuple[int, Path], link: Link) -> MlflowClient:
    """Straight to the server, with the experiment that the controller makes."""
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{server[0]}")
    if client.get_experiment_by_name("team-a") is None:
        client.create_experiment("team-a", tags={"qlora.dev/namespace": "team-a"})
    return client


def publish_to_the_end(task: StageTask) -> PublishResult:
    """As a controller has it: an attempt that ends as transient is followed by the next."""
    for attempt in range(task.attempt, MAX_ATTEMPTS):
        try:
            return publish.run(task.model_copy(update={"attempt": attempt}))
        except Transient:
            continue
    raise AssertionError(f"it did not end in {MAX_ATTEMPTS} attempts")


def check(client: MlflowClient, task: StageTask, result: PublishResult) -> None:
    """One run, one logged model, one version with the alias, and each metric of each step once."""
    assert task.run_id is not None
    experiment = client.get_run(task.run_id).info.experiment_id
    by_uid = f"tags.`qlora.dev/job-uid` = '{task.uid}'"
    assert [run.info.run_id for run in client.search_runs([experiment], by_uid)] == [task.run_id]
    assert len(client.search_logged_models([experiment], by_uid)) == 1
    versions = client.search_model_versions(f"name = '{result.registered_model}'")
    assert [str(version.version) for version in versions] == [result.model_version]
    assert client.get_registered_model(result.registered_model).aliases == {"candidate": result.model_version}
    wanted = Counter((key, record.step, value) for record in RECORDS for key, value in record.metrics.items())
    keys = {key for key, _, _ in wanted}
    found = Counter((m.key, m.step, m.value) for key in keys for m in client.get_metric_history(task.run_id, key))
    assert found == wanted


def job(client: MlflowClient, tmp_path: Path, name: str) -> StageTask:
    task = make_task(client, make_store(tmp_path), uid=name)
    return task.model_copy(update={"job": name})


def test_writes_whose_answers_are_lost_are_done_once(client: MlflowClient, link: Link, tmp_path: Path) -> None:
    """The connection ends after the server has carried out what was asked, once for each thing that is asked."""
    task = job(client, tmp_path, "lost-answers")
    lost = link.lose_the_answer_to_each_write_once(Cut.AFTER)
    result = publish_to_the_end(task)
    assert len(lost) > 8, lost
    check(client, task, result)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("busy", Refusal(status=503, body=b"upstream connect error", kind="text/plain")),
        ("throttles", Refusal(status=429, body=b"slow down", kind="text/plain")),
        ("is-cut-off", Cut.BEFORE),
    ],
)
def test_a_server_that_answers_now_and_then_has_everything_once(
    client: MlflowClient, link: Link, tmp_path: Path, name: str, fault: Fault
) -> None:
    task = job(client, tmp_path, name)
    link.rule = lambda _request: fault if len(link.seen) % 25 < 4 else None
    result = publish_to_the_end(task)
    assert link.faults > 4
    check(client, task, result)


def test_a_token_that_has_expired_is_waited_for(client: MlflowClient, link: Link, tmp_path: Path) -> None:
    task = job(client, tmp_path, "expired")
    link.rule = lambda request: EXPIRED if request.method == "POST" and link.faults < 3 else None
    with pytest.raises(Transient, match="takes its credentials no longer") as refused:
        publish.run(task)
    assert refused.value.reason is Reason.CREDENTIALS_REFUSED
    check(client, task, publish_to_the_end(task))


def test_a_login_in_files_is_read_anew_when_it_is_changed(
    client: MlflowClient, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Secret's keys are in a pod; afterwards the login is a token instead of a user and a password."""
    folder = tmp_path / "login"
    folder.mkdir()
    monkeypatch.setenv(LOGIN_FOLDER_VARIABLE, str(folder))
    for variable in LOGIN_VARIABLES.values():
        monkeypatch.setenv(variable, "")  # and back to what it was, in the end
    taken = f"Basic {base64.b64encode(b'ada:old').decode()}"
    link.rule = lambda request: None if request.authorization == taken else EXPIRED
    (folder / "username").write_text("ada\n")
    (folder / "password").write_text("wrong")
    task = job(client, tmp_path, "login")
    with pytest.raises(Transient, match="takes its credentials no longer"):
        publish.run(task)
    (folder / "password").write_text("old\n")
    check(client, task, publish_to_the_end(task))
    (folder / "username").unlink()
    (folder / "password").unlink()
    (folder / "token").write_text("new")
    taken = "Bearer new"
    check(client, task, publish_to_the_end(task.model_copy(update={"attempt": 9})))


def test_a_database_that_is_locked_is_waited_for(
    client: MlflowClient, server: tuple[int, Path], link: Link, tmp_path: Path
) -> None:
    task = job(client, tmp_path, "locked")
    with sqlite3.connect(server[1] / "server.db", isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN EXCLUSIVE")
        held = threading.Timer(LOCKED_SECONDS, other.execute, ("ROLLBACK",))
        held.start()
        began = time.monotonic()
        result = publish_to_the_end(task)
        assert time.monotonic() - began > LOCKED_SECONDS / 2
        held.join()
    check(client, task, result)


def test_a_server_that_was_gone_for_a_whole_job_has_every_step_once_it_is_back(
    client: MlflowClient, link: Link, tmp_path: Path
) -> None:
    task, journal = job(client, tmp_path, "gone"), make_journal(5)
    link.rule = lambda _request: Cut.BEFORE
    logger = make_logger(task, journal)
    for step in range(6, 9):
        journal.append(make_record(step))
        time.sleep(0.1)
    assert logger.close(1) == 8
    with pytest.raises(Transient, match="MLflow is away"):
        publish.run(task)
    link.rule = lambda _request: None
    check(client, task, publish_to_the_end(task))
