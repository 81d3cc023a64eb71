"""One Ray node as child processes of this one: started, watched, killed. Imports no Ray.

Ray's own command starts the node and leaves its processes behind. This process adopts them (it is a child subreaper,
as the first process of a container is anyway), so all of them, and nothing else, are its descendants: killing its
children until there are none leaves nothing of Ray.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event

from orchestrator.adapters.ray_fabric.settings import PORTS_PER_NODE, NodeSettings

log = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
POLL_SECONDS = 0.2
RAY_FOLDER_NAME = "ray"
OUTPUT_NAME = "start.log"
OUTPUT_TAIL_BYTES = 2000
FIRST_WORKER_PORT = 6  # of a node's ports; those before it are named in `_arguments`
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nothing is packaged and sent: every node has the same image
    "RAY_memory_monitor_refresh_ms": "0",  # the container's limit is the only judge of memory
    "RAY_enable_metrics_collection": "0",  # nobody reads Ray's own figures
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # a node without its head ends, and the agent joins the next
    "RAY_NUM_REDIS_GET_RETRIES": "3",  # our own retries are patient, and they find the head's new address
    "RAY_ROTATION_MAX_BYTES": str(2**20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
}


class NodeFailed(Exception):
    """The node did not start; says what Ray said."""


class RayNode:
    """Runs at most one node at a time."""

    def __init__(self, settings: NodeSettings, programs: Sequence[str]) -> None:
        """`programs` are those that the node stands and falls with."""
        self._settings = settings
        self._programs = set(programs)
        _adopt_orphans()

    def start_head(self, port: int, stop: Event) -> None:
        """Start a head that listens on the port. Raises NodeFailed."""
        self._start(["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor"], {}, {}, stop)

    def join(self, address: str, resource: str, environment: Mapping[str, str], stop: Event) -> None:
        """Start a node of the head at the address, with one of the resource. Raises NodeFailed."""
        self._start([f"--address={address}"], {resource: 1}, environment, stop)

    @property
    def alive(self) -> bool:
        """Whether all that the node stands and falls with runs."""
        return self._programs <= {name for _, name, state in _children() if state not in ("Z", "X")}

    def kill(self) -> None:
        """Leave nothing of the node, nor of anything else that this process started."""
        # Children stay children until they are waited for here, so no pid can come to mean somebody else. Their own
        # children come next: orphans are adopted.
        while children := list(_children()):
            for pid, _, _ in children:
                os.kill(pid, signal.SIGKILL)
            for pid, _, _ in children:
                os.waitpid(pid, 0)

    def _start(
        self, role: Sequence[str], resources: Mapping[str, float], environment: Mapping[str, str], stop: Event
    ) -> None:
        folder = self._settings.folder / RAY_FOLDER_NAME
        shutil.rmtree(folder, ignore_errors=True)  # a new start must not take an older Ray's files for its own
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *self._arguments(resources)]
        with (folder / OUTPUT_NAME).open("wb") as output:
            starting = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **RAY_ENVIRONMENT, **environment},
            )
            code = _wait(starting, self._settings.start_seconds, stop)
        if code != 0:
            said = (folder / OUTPUT_NAME).read_bytes()[-OUTPUT_TAIL_BYTES:].decode(errors="replace").strip()
            outcome = "did not come to an end" if code is None else f"ended with {code}"
            raise NodeFailed(f"`{' '.join(command[1:])}` {outcome}: {said}")

    def _arguments(self, resources: Mapping[str, float]) -> list[str]:
        settings = self._settings
        folder = settings.folder / RAY_FOLDER_NAME
        first = settings.node_port
        arguments = {
            "node-manager-port": first,
            "object-manager-port": first + 1,
            "runtime-env-agent-port": first + 2,
            "dashboard-agent-grpc-port": first + 3,
            "dashboard-agent-listen-port": first + 4,
            "metrics-export-port": first + 5,
            "min-worker-port": first + FIRST_WORKER_PORT,
            "max-worker-port": first + PORTS_PER_NODE - 1,
            "num-cpus": 0,  # nothing is placed here but what asks for this very node
            "num-gpus": 0,
            "resources": json.dumps(resources),
            "object-store-memory": settings.object_store_bytes,
            "plasma-directory": folder,  # /dev/shm of a container may be too small
            "temp-dir": folder,
            "include-log-monitor": "false",
        }
        if settings.node_ip:
            arguments["node-ip-address"] = settings.node_ip
        return ["--disable-usage-stats", *(f"--{name}={value}" for name, value in arguments.items())]


def _wait(process: subprocess.Popen[bytes], seconds: float, stop: Event) -> int | None:
    """The exit code; None if the process was still at it when the time was up or `stop` was set."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not stop.wait(POLL_SECONDS):
        pass
    return process.returncode


def _adopt_orphans() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the parent of Ray's orphans")


def _children() -> Iterator[tuple[int, str, str]]:
    """Children of this process: pid, the program's name (at most 15 characters), state. Zombies are among them."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            head, _, tail = (entry / "stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = tail.split()[:2]
        if int(parent) == os.getpid():
            yield int(entry.name), head.partition("(")[2], state
