"""The sidecar of a stage's pod: `python -m orchestrator.adapters.ray_fabric.agent`, from the controller's image.

It serves the trainer's socket from its first to its last moment, whatever Ray does, and is a Ray node while there is
a head: it waits for one, as long as it takes, joins it, and throws its node away when the node ended or nobody has
asked for a while. (The second matters: a node whose head was replaced at the same address goes on without noticing.)

SIGTERM ends it at once. In a pod that ends, a native sidecar is only asked when the trainer has gone; when its image
is patched in place, the next one is there in moments, and the trainer connects again.
"""

from __future__ import annotations

import logging
import random
import socket
import sys
import threading
import time
from pathlib import Path

from pydantic import ValidationError

from orchestrator.adapters.ray_fabric.node import NodeFailed, RayNode
from orchestrator.adapters.ray_fabric.program import log_to_stderr, stop_on_signals
from orchestrator.adapters.ray_fabric.settings import AgentSettings, NodeSettings
from orchestrator.adapters.ray_fabric.wire import Answer, Look, ToAgent, to_agent
from orchestrator.api.protocol import MAX_MESSAGE_BYTES, Checkpoint, Preempt
from orchestrator.stage_agent import StageAgent

log = logging.getLogger(__name__)

RESOURCE_PREFIX = "stage:"
CONTROL_SOCKET_VARIABLE = "QLORA_RAY_CONTROL_SOCKET"
CONTROL_SOCKET_NAME = "control.sock"
QUESTION_SECONDS = 2.0
"""How long a relay may take to ask."""
CONNECT_SECONDS = 2.0
WATCH_SECONDS = 0.5


def main() -> int:
    """Serve until SIGTERM."""
    log_to_stderr()
    stop = stop_on_signals()
    settings = AgentSettings()  # pyright: ignore[reportCallIssue]  # the environment has the required fields
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with StageAgent(settings.agent_socket) as stage, Control(settings.folder / CONTROL_SOCKET_NAME, stage) as control:
        log.info("the agent of stage %s serves %s", settings.stage, settings.agent_socket)
        Member(settings, control).run(stop)
    return 0


class Control:
    """What the relay asks, answered one question a connection. A context manager."""

    def __init__(self, path: Path, stage: StageAgent) -> None:
        self.path = path
        self.asked_at: float | None = None
        """Monotonic time of the last question."""
        self._stage = stage
        path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            try:
                with connection:
                    self._talk(connection)
            except (OSError, ValidationError) as error:
                log.warning("a question of the relay is not answered: %s", error)

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(QUESTION_SECONDS)
        with connection.makefile("rb") as lines:
            question = to_agent.validate_json(lines.readline(MAX_MESSAGE_BYTES))
        self.asked_at = time.monotonic()
        connection.sendall(self._answer(question).model_dump_json(by_alias=True).encode() + b"\n")

    def _answer(self, question: ToAgent) -> Answer:
        match question:
            case Look():
                heard = False
            case Checkpoint():
                heard = self._stage.request_checkpoint()
            case Preempt(deadline_seconds=seconds):
                heard = self._stage.preempt(seconds)
        return Answer(heard=heard, progress=self._stage.progress, checkpointed=self._stage.checkpointed)


class Member:
    """The agent as a Ray node, of one head after another."""

    def __init__(self, settings: AgentSettings, control: Control) -> None:
        self._settings = settings
        self._control = control
        self._node = RayNode(settings, programs=["raylet"])
        self._pause = Pause(settings)

    def run(self, stop: threading.Event) -> None:
        """Be a member whenever there is a head, until `stop` is set."""
        try:
            while not stop.is_set():
                head = find_head(self._settings.address)
                if head is not None:
                    self._belong_to(head, stop)
                self._pause.wait(stop)
        finally:
            self._node.kill()

    def _belong_to(self, head: str, stop: threading.Event) -> None:
        joined_at = time.monotonic()
        try:
            self._node.join(
                head,
                RESOURCE_PREFIX + self._settings.stage,
                {CONTROL_SOCKET_VARIABLE: str(self._control.path)},
                stop,
            )
            log.info("joined the head at %s", head)
            joined_at = time.monotonic()
            self._stay(joined_at, stop)
        except NodeFailed as error:
            if not stop.is_set():
                log.warning("could not join the head at %s, training goes on: %s", head, error)
        self._node.kill()
        if (self._control.asked_at or 0.0) > joined_at:
            self._pause.reset()

    def _stay(self, joined_at: float, stop: threading.Event) -> None:
        """Until the node ends, or the head is silent for too long."""
        while not stop.wait(WATCH_SECONDS):
            if not self._node.alive:
                log.warning("the Ray node has ended; training goes on, and the next head is looked for")
                return
            silent_seconds = time.monotonic() - max(joined_at, self._control.asked_at or 0.0)
            if silent_seconds > self._settings.silence_seconds:
                log.warning("nobody asked for %.0f s: the head is lost, the next is looked for", silent_seconds)
                return


class Pause:
    """Between two tries: doubles up to a bound. Jittered, because every agent of a head loses it at the same time."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._seconds = settings.retry_base_seconds

    def wait(self, stop: threading.Event) -> None:
        """Wait, and longer the next time."""
        stop.wait(self._seconds * random.uniform(0.5, 1.0))  # noqa: S311 - not for secrets
        self._seconds = min(2 * self._seconds, self._settings.retry_max_seconds)

    def reset(self) -> None:
        """It went well: begin anew."""
        self._seconds = self._settings.retry_base_seconds


def find_head(address: str) -> str | None:
    """The first address behind the name that takes a connection: only the leader's head listens."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        log.info("the head's name %s does not resolve yet: %s", host, error)
        return None
    for ip in dict.fromkeys(str(target[0]) for *_, target in found):
        try:
            with socket.create_connection((ip, int(port)), timeout=CONNECT_SECONDS):
                return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        except OSError:
            continue
    return None


if __name__ == "__main__":
    sys.exit(main())
