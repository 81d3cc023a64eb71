"""Checkpoints on their way to a slow S3 server: how long training goes on, what it says, and how it stops meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fault_link import Link, Request
from qlora_trainer import train
from s3_server import S3Server
from test_resume import losses, start, termination, wait_for_line
from test_stop import Agent, socket_path
from test_store_faults import link, server, task_on
from toy_job import digest_of_adapter, make_task

from orchestrator.api.task import StageTask

__all__ = ["link", "server", "socket_path"]  # fixtures

UPLOAD_SECONDS = 3.0
JOB: dict[str, Any] = {"steps": 12, "eval_rows": 0, "checkpoint": {"every_steps": 4}}


def slow_task(server: S3Server, name: str, **fields: object) -> StageTask:
    """A toy job in the bucket, which saves after four steps of some ten milliseconds."""
    task = make_task(server.bucket / name, **JOB)
    return task.model_copy(update={"store_uri": task_on(server, name).store_uri, **fields})


def slow(link: Link, seconds: float = UPLOAD_SECONDS) -> None:
    """Let every checkpoint take so long."""

    def rule(request: Request) -> None:
        if request.method == "PUT" and "/checkpoints/" in request.path and "optimizer" in request.path:
            time.sleep(seconds)

    link.rule = rule


def lines(caplog: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    """Which of the parts the log says, in its order."""
    return [part for record in caplog.records for part in parts if part in record.getMessage()]


STEP_5, STEP_6, STEP_8 = "step 5 of 12", "step 6 of 12", "step 8 of 12"
DURABLE = "checkpoints/step-00000004 is durable"


def test_training_goes_on_while_a_checkpoint_is_stored_until_the_next_is_due(
    server: S3Server, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    slow(link)
    train.run(slow_task(server, "until-the-next"))
    waits = "waiting until the checkpoint of step 4 is stored"
    assert lines(caplog, STEP_5, STEP_8, waits, DURABLE) == [STEP_5, STEP_8, waits, DURABLE]


def test_training_waits_for_a_checkpoint_that_lags_behind_for_longer_than_is_set(
    server: S3Server, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    slow(link)
    task = slow_task(server, "lag", checkpoint_lag_seconds=0.001)
    train.run(task)
    assert lines(caplog, STEP_5, STEP_6, DURABLE) == [STEP_5, DURABLE, STEP_6]
    assert "of step 4 for longer than the 0.001 s that it may lag behind; training waits for it" in caplog.text
    undisturbed = Path(server.bucket / "undisturbed")
    train.run(make_task(undisturbed, **JOB))
    assert digest_of_adapter(server.bucket / "lag") == digest_of_adapter(undisturbed)
    assert losses(server.bucket / "lag") == losses(undisturbed)


def test_who_asks_to_stop_while_training_waits_for_the_store_is_heard(
    server: S3Server, link: Link, tmp_path: Path
) -> None:
    slow(link)
    process = start(slow_task(server, "stopped", checkpoint_lag_seconds=0.001, grace_seconds=1), tmp_path)
    wait_for_line(tmp_path, "waiting until the checkpoint of step 4 is stored", process)
    process.terminate()
    assert process.wait(30) == 85
    assert termination(tmp_path)["train"]["step"] == 5, "the step boundary that it waited at"
    log = (tmp_path / "log").read_text()
    assert STEP_6 not in log
    assert "s are left, and saving step 5 may take" in log
    assert "if it is not stored in time, the job goes on from step 0" in log


def test_the_agent_hears_that_a_signal_leaves_too_little_time(
    server: S3Server, link: Link, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_AGENT_SOCKET", str(socket_path))
    agent = Agent(socket_path)
    threading.Thread(target=agent.accept, daemon=True).start()
    slow(link)
    train.run(slow_task(server, "told", grace_seconds=1))
    warnings = {message["report"].get("warning") for message in agent.messages if message["type"] == "progress"}
    agent.close()
    assert None in warnings, "before the first checkpoint there is nothing to tell"
    assert any("s to reach the store, and a signal to stop leaves 1 s" in str(warning) for warning in warnings)
