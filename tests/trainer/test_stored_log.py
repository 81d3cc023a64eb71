"""An attempt's log in its job's store: there when the machine is gone, bounded, without secrets, never in the way."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qlora_trainer.storage import stored_log
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.stored_log import StoredLog
from test_outcome import SECRET, make_task, run_trainer

from orchestrator.adapters.job_store.stored_adapter import read_file
from orchestrator.api.formats import EARLIER_LOG_NAME, LOG_NAME, log_folder

FORMATTER = logging.Formatter("%(message)s")
LOGGER = logging.getLogger("a stage")


@contextmanager
def attached(handler: StoredLog) -> Iterator[StoredLog]:
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        LOGGER.removeHandler(handler)
        handler.end(10)


def stored(store: Path, name: str = LOG_NAME) -> list[str]:
    return (store / log_folder("publish", 3) / name).read_text().splitlines()


def test_the_whole_log_of_a_stage_is_in_the_store_when_it_has_ended(tmp_path: Path) -> None:
    store = tmp_path / "store"
    _, _, lines = run_trainer(tmp_path, "publish", make_task(store).model_dump_json(by_alias=True))
    kept = read_file(f"{store.as_uri()}/{log_folder('publish', 3)}", LOG_NAME).decode().splitlines()
    assert [line for line in kept if "the stage ended with USER_ERROR" in line]
    assert len(kept) == len(lines)


def test_no_secret_gets_into_it(tmp_path: Path) -> None:
    environment = {"HF_TOKEN": SECRET, "AZURE_STORAGE_ACCOUNT_KEY": "the-account-key", "WANDB_API_KEY": "f" * 40}
    store = tmp_path / "".join(environment.values())
    run_trainer(tmp_path, "publish", make_task(store).model_dump_json(by_alias=True), **environment)
    text = "\n".join(stored(store))
    assert "<HF_TOKEN><AZURE_STORAGE_ACCOUNT_KEY><WANDB_API_KEY>" in text
    assert not [secret for secret in environment.values() if secret in text]


def test_lines_are_stored_while_a_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_log, "SAVE_SECONDS", 0.02)
    with attached(StoredLog(make_task(tmp_path), FORMATTER)):
        LOGGER.info("it has begun")
        _until(lambda: (tmp_path / log_folder("publish", 3) / LOG_NAME).exists())
        assert stored(tmp_path) == ["it has begun"]


def test_it_is_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    with attached(StoredLog(make_task(tmp_path), FORMATTER, part_bytes=100)):
        for number in range(50):
            LOGGER.info("line %02d", number)  # eight bytes
        LOGGER.info("x" * 1000)
    files = sorted((tmp_path / log_folder("publish", 3)).iterdir())
    assert [file.name for file in files] == [EARLIER_LOG_NAME, LOG_NAME]
    assert all(file.stat().st_size <= 100 for file in files)
    assert stored(tmp_path) == ["x" * 99]
    assert stored(tmp_path, EARLIER_LOG_NAME)[-1] == "line 49"


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_logs_of_old_attempts_make_room(tmp_path: Path, kind: str) -> None:
    uri = f"{tmp_path.as_uri()}/job" if kind == "file" else f"memory://{tmp_path.name}/job"
    store = JobStore(uri)
    for attempt in (1, 2, 9, 10):
        store.keep_log("train", attempt, {LOG_NAME: b"a line\n"}, kept_attempts=2)
    assert store._backend.folders("logs") == ["logs/train-10", "logs/train-9"]


def test_a_store_that_is_away_is_told_of_once_and_gets_the_lines_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stored_log, "SAVE_SECONDS", 0.02)
    home = tmp_path / "mount"
    home.write_text("a file where a folder will be mounted")
    with attached(StoredLog(make_task(home / "store"), FORMATTER)):
        LOGGER.info("while it is away")
        _until(lambda: "has to wait" in caplog.text)
        time.sleep(0.2)
        home.unlink()
        _until(lambda: (home / "store").exists())
    assert caplog.text.count("has to wait") == 1
    assert stored(home / "store") == ["while it is away"]


def test_a_store_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes connections and never answers."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(stored_log, "SAVE_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        s3fs.S3FileSystem.clear_instance_cache()
        handler = StoredLog(make_task(tmp_path).model_copy(update={"store_uri": "s3://bucket/job"}), FORMATTER)
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
        LOGGER.info("a step")
        connection, _ = server.accept()  # by now it is being saved
        began = time.monotonic()
        for _ in range(1000):
            LOGGER.info("a step")
        LOGGER.removeHandler(handler)
        handler.end(0.2)
        assert time.monotonic() - began < 5
        assert "took too long" in caplog.text
        connection.close()
    handler.end(60)  # nobody listens any more, and so its thread comes to an end
    s3fs.S3FileSystem.clear_instance_cache()


def _until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
