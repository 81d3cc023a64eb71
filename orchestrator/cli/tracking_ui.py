"""`qlora ui`: an `mlflow server` for the embedded tracking store, in a process of its own, behind a password."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from orchestrator.cli.console import messages, say
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.output import print_text
from orchestrator.cli.tracking_proxy import TrackingProxy
from orchestrator.errors import PermanentError, ServiceNotRunning
from orchestrator.settings import Settings

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
SOCKET_NAME, PAGE_NAME = "mlflow.sock", "open.html"
PR_SET_PDEATHSIG = 1
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Nobody needs the server's own jobs here, and without them it starts in half the time."""


class Terminated(BaseException):
    """SIGTERM arrived."""


def server_command(settings: Settings, backend: Path) -> list[str]:
    """The command that serves the store on a unix socket; raises PermanentError where mlflow is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise PermanentError("mlflow is not installed; install it with: pip install 'qlora-orchestrator[local]'")
    store = ["--backend-store-uri", settings.tracking_uri, "--default-artifact-root", settings.artifact_root.as_uri()]
    where = ["--workers", "1", "--uvicorn-opts", f"--uds {backend}"]
    return [sys.executable, "-m", "mlflow", "server", *where, *store]


def serve(settings: Settings, port: int, start_seconds: float) -> ExitStatus:
    """Run the server until Ctrl-C, SIGTERM or its own end, telling its address once it answers."""
    with TemporaryDirectory(prefix="qlora-ui-") as private:  # which its owner alone can enter
        folder = Path(private)
        proxy = _proxy(port, folder / SOCKET_NAME)
        try:
            with terminable(), _server(server_command(settings, folder / SOCKET_NAME)) as server:
                with messages().status("starting MLflow", spinner_style="busy"):
                    _await(server, folder / SOCKET_NAME, start_seconds)
                threading.Thread(target=proxy.serve_forever, name="proxy", daemon=True).start()
                _tell(proxy, folder)
                _, told = server.communicate()
                raise ServiceNotRunning(f"mlflow server ended with status {server.returncode}: {_last_line(told)}")
        except (KeyboardInterrupt, Terminated):
            return ExitStatus.OK
        finally:
            proxy.server_close()


def _proxy(port: int, backend: Path) -> TrackingProxy:
    try:
        return TrackingProxy(port, backend)
    except OSError as error:
        raise PermanentError(f"port {port} cannot be used: {error.strerror}; name another one: --port") from error


def _tell(proxy: TrackingProxy, folder: Path) -> None:
    print_text(proxy.door.url)
    say("whoever has this address can change everything in MLflow; Ctrl-C ends it", style="quiet")
    if sys.stdout.isatty():
        page = folder / PAGE_NAME
        page.write_text(proxy.door.opening_page)
        webbrowser.open(page.as_uri())


@contextmanager
def terminable() -> Generator[None]:
    """SIGTERM ends what is inside as Ctrl-C does."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _server(command: list[str]) -> Generator[subprocess.Popen[str]]:
    """The server's processes, which end with this one, however it ends."""
    libc = ctypes.CDLL(None)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **ENVIRONMENT},
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    try:
        yield server
    finally:
        _end(server)


def _await(server: subprocess.Popen[str], backend: Path, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            _, told = server.communicate()
            raise ServiceNotRunning(f"mlflow server did not start: {_last_line(told)}")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(backend)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise ServiceNotRunning(f"mlflow server did not answer within {start_seconds:.0f} s")


def _end(server: subprocess.Popen[str]) -> None:
    """All of its processes: the workers are the server's children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.communicate(timeout=STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        except ValueError:  # its output was read to the end before
            server.wait()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
