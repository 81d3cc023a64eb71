"""`qlora ui`: an `mlflow server` on loopback for the embedded tracking store, in a process of its own."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import webbrowser

from orchestrator.cli.console import say
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.output import print_text
from orchestrator.errors import PermanentError, ServiceNotRunning
from orchestrator.settings import Settings

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0


def server_command(settings: Settings, port: int) -> list[str]:
    """The command that serves the store; raises PermanentError where mlflow is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise PermanentError("mlflow is not installed; install it with: pip install 'qlora-orchestrator[local]'")
    store = ["--backend-store-uri", settings.tracking_uri, "--default-artifact-root", settings.artifact_root.as_uri()]
    return [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1", *store]


def serve(command: list[str], port: int, start_seconds: float) -> ExitStatus:
    """Run the server until Ctrl-C or its own end, telling its address once it answers."""
    _require_free(port)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _await(server, port, start_seconds)
        url = f"http://{LOOPBACK}:{port}"
        print_text(url)
        say("Ctrl-C stops it", style="quiet")
        if sys.stdout.isatty():
            webbrowser.open(url)
        _, told = server.communicate()
        raise ServiceNotRunning(f"mlflow server ended with status {server.returncode}: {_last_line(told)}")
    except KeyboardInterrupt:
        return ExitStatus.OK
    finally:
        _stop(server)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PermanentError(f"port {port} cannot be used: {error.strerror}; name another one: --port") from error


def _await(server: subprocess.Popen[str], port: int, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            _, told = server.communicate()
            raise ServiceNotRunning(f"mlflow server did not start: {_last_line(told)}")
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise ServiceNotRunning(f"mlflow server did not answer within {start_seconds:.0f} s")


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.communicate()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
