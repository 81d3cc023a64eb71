"""The agent's socket, spoken to as a trainer would, with the bytes of the protocol."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.stage_agent import StageAgent

REPORT = {"stage": "train", "step": 7, "steps": 10, "loss": 1.5, "time": "2026-01-01T00:00:00Z"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@pytest.fixture
def agent(path: Path) -> Iterator[StageAgent]:
    with StageAgent(path) as agent:
        yield agent


def connect(path: Path) -> socket.socket:
    trainer = socket.socket(socket.AF_UNIX)
    trainer.settimeout(10)
    trainer.connect(str(path))
    return trainer


def say(trainer: socket.socket, message: object) -> None:
    trainer.sendall(json.dumps(message).encode() + b"\n")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_the_last_report_is_kept(agent: StageAgent, path: Path) -> None:
    assert agent.progress is None
    with connect(path) as trainer:
        say(trainer, {"type": "progress", "report": REPORT})
        say(trainer, {"type": "progress", "report": {**REPORT, "step": 8}})
        wait_for(lambda: agent.progress is not None and agent.progress.step == 8)
    assert agent.progress is not None
    assert agent.progress.loss == 1.5


def test_a_checkpoint_is_asked_for_and_acknowledged(agent: StageAgent, path: Path) -> None:
    def answer() -> None:
        with connect(path) as trainer, trainer.makefile("rb") as lines:
            ready.set()
            asked.append(json.loads(lines.readline()))
            say(trainer, {"type": "checkpointed", "step": 9, "uri": "file:///c/step-9"})

    asked: list[object] = []
    ready = threading.Event()
    trainer = threading.Thread(target=answer)
    trainer.start()
    assert ready.wait(10)
    wait_for(agent.request_checkpoint)
    found = agent.wait_for_checkpoint(after_step=8, timeout_seconds=10)
    trainer.join()
    assert asked == [{"type": "checkpoint"}]
    assert found is not None
    assert (found.step, found.uri) == (9, "file:///c/step-9")
    assert agent.wait_for_checkpoint(after_step=9, timeout_seconds=0.1) is None


def test_preempt_reaches_a_trainer_that_connects_later_with_the_time_that_is_left(
    agent: StageAgent, path: Path
) -> None:
    assert not agent.preempt(30)
    time.sleep(0.2)
    with connect(path) as trainer, trainer.makefile("rb") as lines:
        message = json.loads(lines.readline())
    assert message["type"] == "preempt"
    assert 20 < message["deadlineSeconds"] < 29.9


def test_nonsense_is_ignored_and_the_conversation_goes_on(agent: StageAgent, path: Path) -> None:
    with connect(path) as trainer:
        trainer.sendall(b"\xff\xfe nonsense\n")
        say(trainer, {"type": "unheard-of"})
        trainer.sendall(b"x" * 200_000 + b"\n")
        say(trainer, {"type": "progress", "report": REPORT})
        wait_for(lambda: agent.progress is not None)


def test_a_trainer_that_hung_up_can_come_back(agent: StageAgent, path: Path) -> None:
    with connect(path):
        wait_for(agent.request_checkpoint)
    wait_for(lambda: not agent.request_checkpoint())
    with connect(path) as trainer:
        say(trainer, {"type": "progress", "report": REPORT})
        wait_for(lambda: agent.progress is not None)


def test_a_trainer_that_reads_nothing_does_not_hold_the_agent_up(agent: StageAgent, path: Path) -> None:
    with connect(path):
        wait_for(agent.request_checkpoint)
        start = time.monotonic()
        while agent.request_checkpoint() and time.monotonic() - start < 30:
            pass
        assert time.monotonic() - start < 30


def test_the_next_agent_takes_the_path_over(path: Path) -> None:
    first = StageAgent(path)
    with StageAgent(path) as second:
        first.close()
        with connect(path) as trainer:
            say(trainer, {"type": "progress", "report": REPORT})
            wait_for(lambda: second.progress is not None)
        assert first.progress is None
    assert os.path.exists(path)
