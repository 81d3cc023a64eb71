"""The probes, asked over HTTP."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from orchestrator.controller.health import SILENCE_LIMIT_SECONDS, Health, served
from orchestrator.controller.metrics import Metrics


class World:
    """Both servers on free ports, and a clock that a test turns."""

    def __init__(self, stack: ExitStack) -> None:
        self.now = 0.0
        self.health = Health(tick_seconds=1.0, clock=lambda: self.now)
        self.metrics = Metrics()
        self.ports = free_port(), free_port()
        stack.enter_context(served(self.health, self.metrics.registry, *self.ports))

    def ask(self, path: str, port: int = 0) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def test_a_replica_that_starts_is_alive_and_not_ready(world: World) -> None:
    assert world.ask("/healthz") == (200, "ok\n")
    assert world.ask("/readyz") == (503, "the view of the cluster is not complete yet\n")


def test_a_leader_and_a_standby_are_ready(world: World) -> None:
    world.health.stands_by()
    assert world.ask("/readyz") == (200, "ok\n")
    world.health.round_done()
    assert world.ask("/readyz?verbose") == (200, "ok\n")


def test_failing_rounds_make_it_unready_but_no_restart_would_help(world: World) -> None:
    world.health.round_failed("the API server does not answer")
    assert world.ask("/readyz") == (503, "the API server does not answer\n")
    assert world.ask("/healthz") == (200, "ok\n")


def test_a_loop_that_hangs_is_neither_alive_nor_ready(world: World) -> None:
    world.health.round_done()
    world.now = SILENCE_LIMIT_SECONDS
    assert world.ask("/healthz") == (200, "ok\n")
    world.now += 1
    status, body = world.ask("/healthz")
    assert (status, body) == (503, "nothing was heard of the leader for 301 s, more than 300\n")
    assert world.ask("/readyz")[0] == 503


def test_metrics_are_on_a_port_of_their_own(world: World) -> None:
    world.metrics.leads(True)
    status, body = world.ask("/metrics", port=1)
    assert status == 200
    assert "\nqlora_leader 1.0\n" in body
    assert world.ask("/metrics")[0] == 404


def test_the_ports_are_free_again_afterwards() -> None:
    with ExitStack() as stack:
        ports = World(stack).ports
    for port in ports:
        with socket.create_server(("", port)):
            pass
