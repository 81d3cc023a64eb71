"""Being asked to stop: by signal or by the agent, at start-up, at a step boundary, or in the middle of a long step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer import train
from qlora_trainer.outcome import Preempted
from qlora_trainer.training.stop import REPORT_EVERY_SECONDS, AgentClient, Stop, StopNow, Watchdog
from test_resume import digest_of_adapter, losses, start, termination, wait_for_line
from toy_job import make_task

from orchestrator.api.results import ProgressReport

# --- the request


def test_the_earliest_deadline_counts() -> None:
    stop = Stop(grace_seconds=100)
    assert stop.seconds_left() == float("inf")
    stop.ask(50)
    stop.ask(90)
    assert 49 < stop.seconds_left() <= 50
    stop.ask(10)
    assert 9 < stop.seconds_left() <= 10


def test_a_checkpoint_request_is_taken_once() -> None:
    stop = Stop(grace_seconds=1)
    stop.ask_for_checkpoint()
    assert stop.take_checkpoint_request()
    assert not stop.take_checkpoint_request()
    assert not stop.asked.is_set()


def terminate_and_sleep() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def test_a_signal_interrupts_the_start_up_and_later_only_leaves_a_note() -> None:
    stop = Stop(grace_seconds=30)
    with stop.listening():
        with pytest.raises(StopNow):
            terminate_and_sleep()
        assert 29 < stop.seconds_left() <= 30
        os.kill(os.getpid(), signal.SIGTERM)  # a second one, while the first is being obeyed
        time.sleep(0.01)

    stop = Stop(grace_seconds=30)
    with stop.listening():
        stop.end_start_up()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.asked.is_set()


def test_a_request_that_was_swallowed_by_a_library_still_ends_the_start_up() -> None:
    stop = Stop(grace_seconds=30)
    with stop.listening():
        with contextlib.suppress(BaseException):  # what an import of some library may do
            terminate_and_sleep()
        with pytest.raises(StopNow):
            stop.end_start_up()


def _import_natively() -> None:
    """What a native module does that is interrupted while it is initialized."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except BaseException as interruption:
        raise ImportError("initialization failed") from interruption


def test_an_error_that_native_code_makes_of_the_interruption_counts_as_the_stop() -> None:
    stop = Stop(grace_seconds=30)
    assert not stop.explains(ImportError("before any request, an error is an error"))
    assert stop.explains(StopNow())
    with stop.listening(), pytest.raises(ImportError) as caught:
        _import_natively()
    assert stop.explains(caught.value)


def test_a_signal_is_noticed_while_the_main_thread_is_deep_in_native_code() -> None:
    stop = Stop(grace_seconds=30)
    stop.end_start_up()
    noticed: list[float] = []

    def watch() -> None:
        if stop.asked.wait(60):
            noticed.append(time.monotonic())

    with stop.listening():
        watcher = threading.Thread(target=watch)
        watcher.start()
        matrix = torch.ones(3000, 3000)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        matrix @ matrix  # one native call, as a backward pass is: Python's own handler runs only after it
        returned = time.monotonic()
        watcher.join()
    assert noticed[0] < returned


# --- the watchdog


def test_the_watchdog_rescues_when_the_grace_period_runs_out_and_never_inside_an_update() -> None:
    stop, lock, rescued = Stop(grace_seconds=30), threading.RLock(), threading.Event()
    watchdog = Watchdog(stop, lock, seconds_needed=lambda: 29.8, rescue=rescued.set)
    with watchdog.watching():
        time.sleep(0.05)
        assert not rescued.is_set()
        with lock:
            stop.ask(30)
            assert not rescued.wait(0.6)  # 0.2 s to spare, then it waits for the update to end
        assert rescued.wait(5)


def test_the_watchdog_leaves_a_thread_alone_that_comes_back_in_time() -> None:
    stop, rescued = Stop(grace_seconds=30), threading.Event()
    watchdog = Watchdog(stop, threading.RLock(), seconds_needed=lambda: 1.0, rescue=rescued.set)
    with watchdog.watching():
        stop.ask(30)
        time.sleep(0.05)
    assert not rescued.is_set()


# --- the agent


class Agent:
    """The other end of the socket: a real server that keeps what it is told."""

    def __init__(self, path: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._server.settimeout(120)  # a trainer imports its libraries first, on a machine that others use
        self.messages: list[dict[str, Any]] = []
        self._connection: socket.socket | None = None

    def accept(self) -> None:
        self._connection, _ = self._server.accept()
        threading.Thread(target=self._read, args=(self._connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            while line := lines.readline():
                self.messages.append(json.loads(line))

    def send(self, text: str) -> None:
        assert self._connection is not None
        self._connection.sendall(text.encode() + b"\n")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
        self._server.close()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # A unix socket's path may have 107 bytes; pytest's temporary folders can be longer.
    path = Path(f"/tmp/qlora-test-{os.getpid()}-{time.monotonic_ns()}.sock")
    yield path
    path.unlink(missing_ok=True)


def make_report(step: int) -> ProgressReport:
    return ProgressReport(stage="train", step=step, steps=9, time=datetime.now(tz=UTC))


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_agent_hears_the_latest_figures_at_most_once_a_second(socket_path: Path) -> None:
    agent = Agent(socket_path)
    client = AgentClient(socket_path, Stop(grace_seconds=30))
    client.start()
    agent.accept()
    started = time.monotonic()
    for step in range(150):
        client.report(make_report(step))
        time.sleep(0.01)
    client.announce_checkpoint(149, "file:///job/checkpoints/step-00000149")
    client.close()
    wait_until(lambda: agent.messages and agent.messages[-1].get("report", {}).get("step") == 149)
    assert any(message["type"] == "checkpointed" for message in agent.messages)
    progress = [message["report"]["step"] for message in agent.messages if message["type"] == "progress"]
    assert progress == sorted(set(progress))
    assert 1 <= len(progress) <= time.monotonic() - started + 2
    agent.close()


def test_the_agent_may_come_late_go_and_come_back(socket_path: Path) -> None:
    client = AgentClient(socket_path, stop := Stop(grace_seconds=30))
    client.start()
    time.sleep(0.1)  # nobody is there
    first = Agent(socket_path)
    first.accept()
    client.announce_checkpoint(1, "file:///job/checkpoints/step-00000001")
    client.report(make_report(1))
    wait_until(lambda: len(first.messages) == 2)
    time.sleep(2 * REPORT_EVERY_SECONDS)
    assert [message["type"] for message in first.messages] == ["checkpointed", "progress"]  # each once
    first.close()
    socket_path.unlink()
    second = Agent(socket_path)
    second.accept()
    wait_until(lambda: len(second.messages) == 2)
    assert second.messages == first.messages  # the latest, although nothing is new
    client.report(make_report(2))
    wait_until(lambda: len(second.messages) == 3)
    assert second.messages[2]["report"]["step"] == 2
    second.send("this is not JSON")
    second.send('{"type": "checkpoint"}')
    wait_until(stop.take_checkpoint_request)
    client.close()
    second.close()


def test_the_agents_preempt_is_a_signal_with_its_own_deadline(socket_path: Path) -> None:
    agent = Agent(socket_path)
    stop = Stop(grace_seconds=600)
    with stop.listening():
        client = AgentClient(socket_path, stop)
        client.start()
        agent.accept()
        # The signal may come before the agent's call is over, so that is not made here.
        threading.Timer(0.1, agent.send, ['{"type": "preempt", "deadlineSeconds": 20}']).start()
        with pytest.raises(StopNow):
            time.sleep(10)
    assert 10 < stop.seconds_left() <= 20
    client.close()
    agent.close()


def test_the_agents_deadline_may_leave_more_time_than_a_signal_which_still_counts_when_it_comes(
    socket_path: Path,
) -> None:
    stop, agent = Stop(grace_seconds=15), Agent(socket_path)
    with stop.listening():
        stop.end_start_up()
        client = AgentClient(socket_path, stop)
        client.start()
        agent.accept()
        agent.send('{"type": "preempt", "deadlineSeconds": 120}')
        assert stop.asked.wait(10)
        time.sleep(0.1)
        assert 100 < stop.seconds_left() <= 120
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.seconds_left() <= 15)
    client.close()
    agent.close()


def test_a_job_obeys_its_agent_and_answers_with_the_checkpoint(
    tmp_path: Path, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_AGENT_SOCKET", str(socket_path))
    agent = Agent(socket_path)

    def command() -> None:
        try:
            agent.accept()
            wait_until(lambda: any(m.get("report", {}).get("step", 0) > 0 for m in agent.messages), seconds=120)
            agent.send('{"type": "checkpoint"}')
            wait_until(lambda: any(message["type"] == "checkpointed" for message in agent.messages), seconds=120)
        finally:  # a failure above must not leave the job training
            agent.send('{"type": "preempt", "deadlineSeconds": 60}')

    commander = threading.Thread(target=command)
    commander.start()
    with pytest.raises(Preempted) as caught:
        train.run(make_task(tmp_path, steps=5000))
    commander.join()
    result = caught.value.result
    assert result is not None
    answers = [message for message in agent.messages if message["type"] == "checkpointed"]
    assert len(answers) == 2
    assert answers[-1] == {"type": "checkpointed", "step": result.step, "uri": result.checkpoint_uri}
    assert (tmp_path / "checkpoints" / f"step-{result.step:08d}" / "manifest.json").is_file()
    agent.close()


# --- inside a step


WAYS_OUT = ("the grace period is shorter than the rest of step", "the grace period runs out inside step")


@pytest.mark.parametrize("micro_batch_size", [1, 64])
def test_a_step_that_outlasts_the_grace_period_is_given_up_and_the_boundary_before_it_is_saved(
    tmp_path: Path, micro_batch_size: int
) -> None:
    """Many micro-batches let the loop itself see it; one long one leaves it to the watchdog."""
    fields: dict[str, Any] = {
        "steps": 3,
        "rows": 64,
        "eval_rows": 0,
        "global_batch_size": 64,
        "micro_batch_size": micro_batch_size,
        "recompute_layers": 0,
    }
    store = tmp_path / "job"
    process = start(make_task(store, grace_seconds=1, **fields), tmp_path)
    wait_for_line(tmp_path, "step 1 of 3", process)
    time.sleep(0.05)
    asked = time.monotonic()
    process.terminate()
    assert process.wait(30) == 85
    assert time.monotonic() - asked < 10
    log = (tmp_path / "log").read_text()
    assert any(way_out in log for way_out in WAYS_OUT)
    assert "step 3 of 3" not in log
    step = termination(tmp_path)["train"]["step"]
    assert f"step {step} of 3" in log
    assert f"step {step + 1} of 3" not in log
    assert (store / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()

    train.run(make_task(tmp_path / "undisturbed", **fields))
    train.run(make_task(store, attempt=2, **fields))
    assert digest_of_adapter(store) == digest_of_adapter(tmp_path / "undisturbed")
    assert losses(store) == losses(tmp_path / "undisturbed")
