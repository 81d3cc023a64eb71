"""The fabric with a real Ray: a head and agents, each a process tree of its own, as a container is.

One world serves the whole file, because a Ray takes seconds to start; every test first waits until it is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.ray_fabric.channel import FabricChannel
from orchestrator.adapters.ray_fabric.settings import PORTS_PER_NODE
from orchestrator.ports import AgentChannel

SOCKET_STAGE = "team-a/socket-train-1"
CLIENT_STAGE = "team-a/client-train-1"
INTRUDER_STAGE = "team-a/intruder-train-1"
OTHER_STAGE = "team-b/other-train-1"
OTHER_HEAD = "head of team-b"
TRAINER = Path(__file__).with_name("fabric_trainer.py")
TOKEN = "a-token-that-only-this-namespace-knows"
OTHER_TOKEN = "a-token-that-only-the-next-namespace-knows"
TIMEOUT_SECONDS = 240.0
PREEMPTED = 85


class SocketTrainer:
    """A trainer that connects once and never again, and notices when its connection breaks."""

    def __init__(self, path: Path) -> None:
        self.step = 0
        self.requests: list[dict[str, object]] = []
        self.broken = False
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(path))
        for work in (self._report, self._read):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        if not self.broken:
            self._connection.shutdown(socket.SHUT_RDWR)

    def _report(self) -> None:
        while not self.broken:
            self.step += 1
            report = {"stage": "train", "step": self.step, "time": "2026-01-01T00:00:00Z"}
            try:
                self._connection.sendall(json.dumps({"type": "progress", "report": report}).encode() + b"\n")
            except OSError:
                self.broken = True
            time.sleep(0.1)

    def _read(self) -> None:
        with self._connection, self._connection.makefile("rb") as lines:
            for line in lines:
                self.requests.append(json.loads(line))
            self.broken = True


class World:
    """Programs that a test may start, kill as a container is killed, and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fabric_socket = folder / "fabric.sock"
        self.other_fabric_socket = folder / "other.sock"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.head_port, self.other_head_port, *node_ports = free_ports(8)
        names = ("head", OTHER_HEAD, SOCKET_STAGE, CLIENT_STAGE, INTRUDER_STAGE, OTHER_STAGE)
        self._node_ports = dict(zip(names, node_ports, strict=True))

    def agent_socket(self, stage: str) -> Path:
        return self.folder / f"{stage.rpartition('/')[2]}.sock"

    def start_head(self) -> None:
        self._start_program("head", {"PORT": str(self.head_port), "FABRIC_SOCKET": str(self.fabric_socket)})

    def start_other_head(self) -> None:
        environment = {"PORT": str(self.other_head_port), "FABRIC_SOCKET": str(self.other_fabric_socket)}
        self._start_program(OTHER_HEAD, environment, OTHER_TOKEN)

    def start_agent(self, stage: str, token: str = TOKEN, head_port: int = 0) -> None:
        environment = {
            "ADDRESS": f"localhost:{head_port or self.head_port}",
            "STAGE": stage,
            "SILENCE_SECONDS": "6",
            "RETRY_MAX_SECONDS": "2",
            "AGENT_SOCKET": str(self.agent_socket(stage)),
        }
        self._start_program(stage, environment, token)
        wait_for(self.agent_socket(stage).exists, "the agent's socket")

    def start_trainer(self, stage: str, notes: Path) -> subprocess.Popen[bytes]:
        return self._start("trainer", [str(TRAINER), str(notes)], QLORA_AGENT_SOCKET=str(self.agent_socket(stage)))

    def log(self, name: str) -> str:
        return self._log_path(name).read_text()

    def exit_code(self, name: str) -> int:
        return self._running.pop(name).wait(20)

    def terminate(self, name: str) -> None:
        """Ask it to end as a container is asked; whatever it leaves behind is a failure."""
        process = self._running.pop(name)
        tree = descendants(process.pid)
        process.terminate()
        assert process.wait(20) == 0
        assert not [pid for pid in tree if runs(pid)]

    def kill(self, name: str) -> None:
        """End it as a container ends whose first process is killed: with everything in it."""
        process = self._running.pop(name)
        tree = [process.pid, *descendants(process.pid)]
        for pid in tree:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(runs(pid) for pid in tree), "the killed processes to be gone")

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)

    def _start_program(self, name: str, environment: dict[str, str], token: str = TOKEN) -> None:
        port = self._node_ports[name]
        known = {"FOLDER": str(self.folder / str(port)), "NODE_PORT": str(port), **environment}
        module = "orchestrator.adapters.ray_fabric." + ("head" if name.startswith("head") else "agent")
        variables = {f"QLORA_RAY_{key}": value for key, value in known.items() if key != "AGENT_SOCKET"}
        if "AGENT_SOCKET" in known:
            variables["QLORA_AGENT_SOCKET"] = known["AGENT_SOCKET"]
        self._start(name, ["-m", module], RAY_AUTH_TOKEN=token, **variables)

    def _start(self, name: str, arguments: list[str], **variables: str) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([os.getcwd(), f"{os.getcwd()}/trainer_image"])
        with self._log_path(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "PYTHONPATH": paths, **variables},
                stdout=log,
                stderr=log,
            )
        return self._running[name]

    def _log_path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '.').replace(' ', '-')}.log"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    # Short, because a unix socket's path may have 107 bytes and Ray's own take 70 of them.
    folder = Path(tempfile.mkdtemp(prefix="qf", dir="/tmp"))
    world = World(folder)
    world.start_head()
    world.start_agent(SOCKET_STAGE)
    world.start_agent(CLIENT_STAGE)
    wait_for(world.fabric_socket.exists, "the head's socket")
    yield world
    world.close()
    print(*(f"{path.name}:\n{path.read_text()}" for path in folder.glob("*.log")), sep="\n")  # shown for a failure
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def channel(world: World) -> Iterator[FabricChannel]:
    assert not listens(world.head_port)  # there is no head where no controller leads
    with FabricChannel(world.fabric_socket) as channel:
        yield channel


@pytest.fixture(scope="module")
def trainer(world: World) -> Iterator[SocketTrainer]:
    trainer = SocketTrainer(world.agent_socket(SOCKET_STAGE))
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Path]:
    """A process with the real client; the file in which it notes the requests that it got."""
    notes = world.folder / "notes"
    notes.touch()
    world.start_trainer(CLIENT_STAGE, notes)
    return notes


@pytest.fixture
def whole(channel: FabricChannel, trainer: SocketTrainer, client: Path) -> AgentChannel:
    """The channel, through which both stages are heard."""
    wait_for(lambda: {SOCKET_STAGE, CLIENT_STAGE} <= channel.progress().keys(), "both stages to be heard")
    return channel


def test_progress_arrives_at_the_controllers_end(whole: AgentChannel, trainer: SocketTrainer) -> None:
    step = trainer.step
    wait_for(lambda: steps(whole)[SOCKET_STAGE] >= step, "a step that was made since")
    assert steps(whole)[SOCKET_STAGE] <= trainer.step
    assert set(whole.progress()) == {SOCKET_STAGE, CLIENT_STAGE}


def test_a_checkpoint_is_asked_of_one_stage_alone(whole: AgentChannel, trainer: SocketTrainer, client: Path) -> None:
    whole.request_checkpoint(CLIENT_STAGE)
    wait_for(client.read_text, "the request to arrive")
    assert client.read_text().startswith("checkpoint ")
    assert trainer.requests == []


def test_a_killed_agent_finds_its_trainer_again(whole: AgentChannel, world: World) -> None:
    world.kill(CLIENT_STAGE)
    step = steps(whole)[CLIENT_STAGE]
    world.start_agent(CLIENT_STAGE)
    wait_for(lambda: steps(whole).get(CLIENT_STAGE, 0) > step + 20, "progress after the agent's restart")


def test_a_killed_head_costs_the_trainer_nothing(whole: AgentChannel, world: World, trainer: SocketTrainer) -> None:
    world.kill("head")
    assert not listens(world.head_port)
    started = time.monotonic()
    assert whole.preempt(CLIENT_STAGE, 600) is False
    whole.request_checkpoint(CLIENT_STAGE)
    whole.progress()
    assert time.monotonic() - started < 0.1  # nobody waits for what is lost
    step = trainer.step
    world.start_head()
    wait_for(lambda: steps(whole).get(SOCKET_STAGE, 0) > step, "progress over the new head")
    assert not trainer.broken
    assert trainer.requests == []


def test_a_preemption_is_acknowledged_and_obeyed(whole: AgentChannel, world: World, trainer: SocketTrainer) -> None:
    asked_at = time.monotonic()
    wait_for(lambda: whole.preempt(SOCKET_STAGE, 300), "the acknowledgement")
    (request,) = trainer.requests
    assert request["type"] == "preempt"
    assert 300 - (time.monotonic() - asked_at) - 1 <= float(str(request["deadlineSeconds"])) <= 300
    assert whole.preempt(SOCKET_STAGE, 300)  # again is the same order
    assert len(trainer.requests) == 1


def test_the_trainers_own_client_obeys(whole: AgentChannel, world: World, client: Path) -> None:
    asked_at = time.monotonic()
    wait_for(lambda: whole.preempt(CLIENT_STAGE, 500), "the acknowledgement")
    assert world.exit_code("trainer") == PREEMPTED
    noted, seconds = client.read_text().splitlines()[-1].rsplit(maxsplit=1)
    assert noted == "stop within"
    assert 500 - (time.monotonic() - asked_at) - 1 <= int(seconds) <= 500


def test_a_node_with_another_token_is_refused(whole: AgentChannel, world: World) -> None:
    world.start_agent(INTRUDER_STAGE, token=OTHER_TOKEN)
    intruder = SocketTrainer(world.agent_socket(INTRUDER_STAGE))
    wait_for(lambda: "InvalidAuthToken" in world.log(INTRUDER_STAGE), "the refusal")
    assert INTRUDER_STAGE not in whole.progress()
    assert not intruder.broken  # its trainer is served all the same
    intruder.close()
    world.terminate(INTRUDER_STAGE)


def test_a_namespaces_token_opens_its_own_head_alone(whole: AgentChannel, world: World) -> None:
    """Two heads of one pod, as beside a controller: neither takes the other's token, and both serve."""
    world.start_other_head()
    wait_for(world.other_fabric_socket.exists, "the other head's socket")
    with FabricChannel(world.other_fabric_socket, namespace="team-b") as other:
        world.start_agent(OTHER_STAGE, OTHER_TOKEN, world.other_head_port)
        theirs = SocketTrainer(world.agent_socket(OTHER_STAGE))
        wait_for(lambda: OTHER_STAGE in other.progress(), "the other namespace's stage")
        world.start_agent(INTRUDER_STAGE, TOKEN, world.other_head_port)
        refusals = world.log(INTRUDER_STAGE).count("InvalidAuthToken")
        wait_for(lambda: world.log(INTRUDER_STAGE).count("InvalidAuthToken") > refusals, "the refusal")
        assert set(other.progress()) == {OTHER_STAGE}
        assert OTHER_STAGE not in whole.progress()
        theirs.close()
        for name in (INTRUDER_STAGE, OTHER_STAGE):
            world.terminate(name)
    world.terminate(OTHER_HEAD)


def test_a_program_that_is_asked_to_end_leaves_nothing_behind(
    whole: AgentChannel, world: World, channel: FabricChannel
) -> None:
    world.terminate(SOCKET_STAGE)
    channel.close()
    wait_for(lambda: not listens(world.head_port), "the head to end with the controller's connection")
    world.terminate("head")


def steps(channel: AgentChannel) -> dict[str, int]:
    return {key: report.step for key, report in channel.progress().items()}


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """First ports of free ranges, below those that the kernel hands out."""
    found: list[int] = []
    for first in random.sample(range(12_000, 32_000, 2 * PORTS_PER_NODE), 100):
        if not any(listens(port) for port in range(first, first + PORTS_PER_NODE)):
            found.append(first)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for known in found:
        found.extend(child for child, parent in parents.items() if parent == known)
    return found[1:]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
