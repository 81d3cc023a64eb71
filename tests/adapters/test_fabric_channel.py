"""The controller's end of a head for each namespace, with heads on paper at the other ends; no Ray."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.ray_fabric.channel import HEARD_LIMIT, NamespacedChannel

MINE, THEIRS = "team-a/mine-train-1", "team-b/theirs-train-1"
TIMEOUT_SECONDS = 30.0


class PaperHead:
    """Says what it is told to say, and keeps the orders that it got."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(1)
        self._server.settimeout(TIMEOUT_SECONDS)
        self._controller: socket.socket | None = None

    def say(self, key: str, step: int, *, told: bool = False) -> None:
        """A stage's progress; or that it was told to stop."""
        report = {"stage": "train", "step": step, "time": "2026-01-01T00:00:00Z"}
        request = {"type": "preempt", "deadlineSeconds": 60} if told else None
        word = {"key": key, "request": request, "answer": {"heard": told, "progress": report}}
        self._connection().sendall(json.dumps(word).encode() + b"\n")

    def orders(self) -> list[str]:
        """The stages that orders were for so far."""
        self._connection().setblocking(False)
        try:
            data = self._connection().recv(1 << 16)
        except BlockingIOError:
            data = b""
        self._connection().setblocking(True)
        return [json.loads(line)["key"] for line in data.splitlines()]

    def close(self) -> None:
        self._connection().close()
        self._server.close()

    def _connection(self) -> socket.socket:
        if self._controller is None:
            self._controller, _ = self._server.accept()
        return self._controller


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because a unix socket's path may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="qc", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def heads(folder: Path) -> Iterator[dict[str, PaperHead]]:
    """One for each of two teams."""
    heads = {name: PaperHead(folder / name / "fabric.sock") for name in ("team-a", "team-b")}
    yield heads
    for head in heads.values():
        head.close()


@pytest.fixture
def channel(folder: Path, heads: dict[str, PaperHead]) -> Iterator[NamespacedChannel]:
    """The controller's end of both."""
    with NamespacedChannel(folder / "fabric.sock", heads) as channel:
        yield channel


def test_each_head_is_believed_about_its_own_namespace_alone(
    channel: NamespacedChannel, heads: dict[str, PaperHead]
) -> None:
    """Whoever reads team-a's Secrets runs code in team-a's head, and team-b's jobs are none the worse."""
    heads["team-b"].say(THEIRS, 7)
    wait_for(lambda: steps(channel) == {THEIRS: 7})
    assert not channel.preempt(THEIRS, 60)
    heads["team-a"].say(THEIRS, 99, told=True)
    heads["team-a"].say("team-ab/theirs-train-1", 99)
    heads["team-a"].say(MINE, 3)
    wait_for(lambda: MINE in steps(channel))
    assert steps(channel) == {THEIRS: 7, MINE: 3}
    assert not channel.preempt(THEIRS, 60)
    heads["team-b"].say(THEIRS, 8, told=True)
    wait_for(lambda: channel.preempt(THEIRS, 60))


def test_an_order_goes_to_the_stages_own_head(channel: NamespacedChannel, heads: dict[str, PaperHead]) -> None:
    heads["team-b"].say(THEIRS, 1)
    heads["team-a"].say(MINE, 1)
    wait_for(lambda: len(steps(channel)) == 2)
    channel.request_checkpoint(THEIRS)
    channel.request_checkpoint("team-c/unknown-train-1")
    assert not channel.preempt("team-c/unknown-train-1", 60)
    wait_for(lambda: heads["team-b"].orders() == [THEIRS])
    assert heads["team-a"].orders() == []


def test_a_head_that_talks_without_end_fills_no_memory(channel: NamespacedChannel, heads: dict[str, PaperHead]) -> None:
    for number in range(HEARD_LIMIT + 50):
        heads["team-a"].say(f"team-a/made-up-train-{number}", 1)
    wait_for(lambda: f"team-a/made-up-train-{HEARD_LIMIT + 49}" in steps(channel))
    assert len(steps(channel)) <= HEARD_LIMIT


def steps(channel: NamespacedChannel) -> dict[str, int]:
    return {key: report.step for key, report in channel.progress().items()}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
