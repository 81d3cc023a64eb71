"""The head's container, beside the controller's: `python -m orchestrator.adapters.ray_fabric.head`.

While a controller is connected to its socket, and only then, it runs a Ray head and the driver; so of several
controllers it is the leader's head that listens, and agents find it by trying. When the controller hangs up, or any
part of Ray ends, all of Ray is killed, and the next connection starts anew. It passes the connection to the driver and
looks at no message itself. It needs no credentials but Ray's token and should have none: who has the token can run
code here.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import threading

from orchestrator.adapters.ray_fabric.node import RAY_ENVIRONMENT, NodeFailed, RayNode
from orchestrator.adapters.ray_fabric.program import log_to_stderr, stop_on_signals
from orchestrator.adapters.ray_fabric.settings import HeadSettings

log = logging.getLogger(__name__)

ACCEPT_SECONDS = 0.5
WATCH_SECONDS = 0.2
DRIVER_MODULE = "orchestrator.adapters.ray_fabric.driver"


class Head:
    """The head of one controller after another."""

    def __init__(self, settings: HeadSettings) -> None:
        self._settings = settings
        self._node = RayNode(settings, programs=["gcs_server", "raylet"])
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        settings.fabric_socket.unlink(missing_ok=True)
        self._server.bind(str(settings.fabric_socket))
        self._server.listen(1)
        self._server.settimeout(ACCEPT_SECONDS)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        try:
            while not stop.is_set():
                try:
                    controller, _ = self._server.accept()
                except TimeoutError:
                    continue
                with controller:
                    self._lead(controller, stop)
        finally:
            self._node.kill()
            self._server.close()

    def _lead(self, controller: socket.socket, stop: threading.Event) -> None:
        log.info("a controller is here; Ray starts")
        try:
            self._node.start_head(self._settings.port, stop)
            driver = self._start_driver(controller)
            while not stop.wait(WATCH_SECONDS):
                if _hung_up(controller):
                    log.info("the controller has left; Ray ends")
                    break
                if driver.poll() is not None or not self._node.alive:
                    log.warning("Ray has ended (driver: %s); the controller has to come again", driver.returncode)
                    break
        except NodeFailed as error:
            log.error("Ray's head did not start; the controller has to come again: %s", error)
        self._node.kill()

    def _start_driver(self, controller: socket.socket) -> subprocess.Popen[bytes]:
        settings = self._settings
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                DRIVER_MODULE,
                f"{settings.node_ip or '127.0.0.1'}:{settings.port}",
                settings.node_ip,
            ],
            stdin=controller.fileno(),
            env={**os.environ, **RAY_ENVIRONMENT},
        )


def _hung_up(controller: socket.socket) -> bool:
    poll = select.poll()
    poll.register(controller, select.POLLRDHUP)
    return bool(poll.poll(0))


def main() -> int:
    """Serve until SIGTERM."""
    log_to_stderr()
    stop = stop_on_signals()
    settings = HeadSettings()
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    Head(settings).run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
