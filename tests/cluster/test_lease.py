"""Leader election on a real API server: replicas are killed, frozen and cut off, and never do two lead."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.adapters.kubernetes.lease import LEASE_VERSION, LEASES, Lease, LeaseTimes
from orchestrator.errors import NotFound, RuntimeLost
from tests.cluster.control_plane import ControlPlane
from tests.cluster.lease_victim import TIMES

WAIT_SECONDS = 30.0
TAKEOVER_SECONDS = TIMES.duration_seconds + 2 * TIMES.retry_seconds + 4.0
"""With as long as a busy machine may keep a process from starting to write."""
PATH = path_of(LEASE_VERSION, LEASES, "default", "election")

Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def moments(tmp_path: Path) -> Path:
    """Where the replicas write down when they led."""
    (tmp_path / "moments").touch()
    return tmp_path / "moments"


@pytest.fixture
def start(cluster: ControlPlane, moments: Path) -> Iterator[Start]:
    """Starts replicas; a lease of an earlier test is gone."""
    with contextlib.suppress(NotFound):
        cluster.api().delete(PATH)
    running: list[subprocess.Popen[bytes]] = []

    def start_one(identity: str, kubeconfig: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.cluster.lease_victim"]
        arguments = [str(kubeconfig or cluster.kubeconfig), identity, str(moments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        running.append(subprocess.Popen([*command, *arguments], env=environment))
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.wait()


def read(moments: Path) -> list[tuple[float, str]]:
    """When, and who; in order of time. A last line may be cut off by a kill."""
    lines = [line.split(" ") for line in moments.read_text().split("\n")[:-1]]
    return sorted((float(line[0]), line[1]) for line in lines)


def until_led_by(moments: Path, identity: str) -> float:
    """Wait for the replica's first moment; when it was."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        for moment, leader in read(moments):
            if leader == identity:
                return moment
        assert time.monotonic() < deadline, f"{identity} never led"
        time.sleep(0.05)


def terms(moments: Path) -> list[str]:
    """Who led, one after another: a name twice means that two led in turns, or at one time."""
    return [leader for leader, _ in itertools.groupby(leader for _, leader in read(moments))]


def test_a_killed_leader_is_followed_by_another_and_they_never_overlap(start: Start, moments: Path) -> None:
    first = start("a")
    until_led_by(moments, "a")
    start("b")
    time.sleep(2 * TIMES.retry_seconds)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed_at = time.monotonic()
    taken_at = until_led_by(moments, "b")
    assert taken_at - killed_at < TAKEOVER_SECONDS
    assert terms(moments) == ["a", "b"]


def test_a_leader_that_ends_in_order_hands_over_at_once(start: Start, moments: Path) -> None:
    first = start("a")
    until_led_by(moments, "a")
    start("b")
    time.sleep(4 * TIMES.retry_seconds)
    first.send_signal(signal.SIGTERM)
    assert first.wait(WAIT_SECONDS) == 0
    ended_at = time.monotonic()
    assert until_led_by(moments, "b") - ended_at < TIMES.duration_seconds
    assert terms(moments) == ["a", "b"]


def test_a_leader_that_was_frozen_does_nothing_when_it_wakes(start: Start, moments: Path) -> None:
    first = start("a")
    until_led_by(moments, "a")
    start("b")
    time.sleep(2 * TIMES.retry_seconds)
    first.send_signal(signal.SIGSTOP)
    until_led_by(moments, "b")
    first.send_signal(signal.SIGCONT)
    assert first.wait(WAIT_SECONDS) == 75
    time.sleep(0.3)
    assert terms(moments) == ["a", "b"]


def test_of_many_that_start_together_one_leads(start: Start, moments: Path) -> None:
    for number in range(5):
        start(f"replica-{number}")
    deadline = time.monotonic() + WAIT_SECONDS
    while not read(moments) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3 * TIMES.retry_seconds)
    assert len(terms(moments)) == 1


@pytest.fixture
def api(cluster: ControlPlane, start: Start) -> KubeApi:
    """A connection; no lease is there."""
    return cluster.api()


def test_what_is_written_is_what_other_tools_read(api: KubeApi) -> None:
    lease = Lease(api, "default", "election", "a")
    assert lease.acquire()
    spec = api.get(PATH)["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("a", 15, 0)
    assert not Lease(api, "default", "election", "b").acquire()
    lease.release()
    assert Lease(api, "default", "election", "b").acquire()
    assert api.get(PATH)["spec"]["leaseTransitions"] == 1


def test_a_lease_that_was_not_renewed_in_time_allows_no_write(api: KubeApi) -> None:
    now = [0.0]
    lease = Lease(api, "default", "election", "a", LeaseTimes(), clock=lambda: now[0])
    with pytest.raises(RuntimeLost):
        lease.check()
    assert lease.acquire()
    now[0] = 9.9
    lease.check()
    now[0] = 10.0
    with pytest.raises(RuntimeLost, match="not renewed"):
        lease.check()


def test_a_standing_record_is_free_only_after_its_duration_by_the_own_clock(api: KubeApi) -> None:
    assert Lease(api, "default", "election", "a").acquire()
    now = [0.0]
    other = Lease(api, "default", "election", "b", clock=lambda: now[0])
    assert not other.acquire()
    now[0] = 14.9
    assert not other.acquire()
    now[0] = 15.0
    assert other.acquire()
    assert api.get(PATH)["spec"]["holderIdentity"] == "b"
