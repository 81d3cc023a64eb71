"""What somebody tries who may log in to the machine that the embedded service runs on, and what a shell leaves behind.

The service is the real one, but for the trainer. What another user can read is tried as another user, which needs root;
who listens where is read by psutil, which the service does not use.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.adapters.local.listening import listening_elsewhere
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import DatasetSource
from orchestrator.api.reasons import ConditionType
from orchestrator.controller import supervisor
from orchestrator.errors import PermanentError, ServiceNotRunning
from orchestrator.settings import Settings
from tests.builders import submitted_job

FAKE_TRAINER = Path(__file__).parents[1] / "adapters" / "fake_trainer.py"
NOBODY = 65534
TIMEOUT_SECONDS = 480.0
KNOWN_TOKEN = "0" * 64
SHELL = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": KNOWN_TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}

pytestmark = pytest.mark.timeout(900)
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """Of a service that was started from a careless shell, in a home that was left open."""
    top = Path(tempfile.mkdtemp(prefix="qlora-strangers-"))
    top.chmod(0o755)
    home = top / "home"
    home.mkdir(mode=0o755)
    (home / "objects.db").touch(mode=0o644)
    for name in ("store", "logs"):
        (home / name).mkdir(mode=0o755)
        (home / name).chmod(0o755)
    (home / "logs" / "old.log").write_text("a secret")
    settings = Settings(
        home=home,
        gpu_classes="24Gi=1",
        trainer_command=f"{sys.executable} -S {FAKE_TRAINER}",
        grace_seconds=5,
        start_timeout_seconds=TIMEOUT_SECONDS,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHELL.items():
            patch.setenv(name, value)
        supervisor.start(settings)
        yield settings
        supervisor.stop(settings)
    shutil.rmtree(settings.runtime_folder)
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def running(settings: Settings) -> str:
    """The name of a job whose train stage runs."""
    SqliteStore(settings).create_job(submitted_job("watched", dataset=DatasetSource(source="file:///endless")))
    wait_for(lambda: list((settings.home / "stages" / "team-a").glob("watched-train-*/process.json")), "a train stage")
    return "watched"


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.1)


def service_processes(settings: Settings) -> list[psutil.Process]:
    """The supervisor's tree, and the stages', which are children of init."""
    found = supervisor.status(settings)
    assert found.supervisor_pid
    root = psutil.Process(found.supervisor_pid)
    shims = [p for p in psutil.process_iter() if str(settings.home) in command_line(p) and p.pid != os.getpid()]
    return [root, *root.children(recursive=True), *shims, *(c for shim in shims for c in shim.children(recursive=True))]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def as_nobody(attempt: Callable[[], object]) -> str:
    """What comes of an attempt by another user: `done`, or the error's name."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            attempt()
            os.write(writing, b"done")
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as told:
        return told.read()


def token_of(settings: Settings) -> str:
    found = supervisor.status(settings).controller_pid
    assert found
    gcs = next(p for p in psutil.Process(found).children(recursive=True) if p.name() == "gcs_server")
    return gcs.environ()["RAY_AUTH_TOKEN"]


@needs_root
def test_nothing_of_the_service_is_read_by_another_user(settings: Settings, running: str) -> None:
    assert running
    assert as_nobody(lambda: settings.home.stat()) == "done", "the way to the home is open, or this shows nothing"
    names = ("", "objects.db", "mlflow.db", "store", "logs", "logs/old.log", "logs/controller.jsonl", "stages")
    for name in names:
        assert as_nobody(lambda name=name: os.listdir(settings.home / name)) == "PermissionError", name
        assert as_nobody(lambda name=name: (settings.home / name).open().read(1)) == "PermissionError", name
    runtime = settings.runtime_folder  # whose name has the user's number
    assert as_nobody(lambda: os.listdir(runtime)) == "PermissionError"
    for path in settings.sockets_folder.iterdir():
        assert as_nobody(lambda path=path: socket.socket(socket.AF_UNIX).connect(str(path))) == "PermissionError"


def test_a_home_that_was_open_is_closed_and_new_files_are_private(settings: Settings, running: str) -> None:
    assert running
    paths = [settings.home, *settings.home.iterdir(), *(settings.home / "stages").rglob("*")]
    paths += (settings.home / "store").rglob("*")
    open_paths = [path for path in paths if not path.is_symlink() and path.exists() and path.stat().st_mode & 0o077]
    assert open_paths == []


def test_no_command_line_has_a_secret_and_every_start_has_its_own(settings: Settings, running: str) -> None:
    assert running
    token = token_of(settings)
    assert len(token) == 64
    assert token != KNOWN_TOKEN
    processes = service_processes(settings)
    assert len(processes) > 6
    assert all(token not in command_line(process) for process in processes)


@needs_root
def test_no_environment_of_the_service_is_read_by_another_user(settings: Settings, running: str) -> None:
    assert running
    for process in service_processes(settings):
        path = f"/proc/{process.pid}/environ"
        assert as_nobody(lambda path=path: Path(path).read_bytes()) in ("PermissionError", "FileNotFoundError")


def test_everything_listens_on_loopback_alone(settings: Settings, running: str) -> None:
    assert running
    ports: dict[str, str] = {}
    for process in service_processes(settings):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's helpers come and go
            for found in process.net_connections(kind="inet"):
                if found.status == psutil.CONN_LISTEN:
                    ports[f"{process.name()} {found.laddr.port}"] = found.laddr.ip
    assert any(name.startswith("gcs_server") for name in ports)
    assert {name: ip for name, ip in ports.items() if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")} == {}


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_service_that_would_listen_elsewhere_is_told(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as open_socket:
        open_socket.bind((address, 0))
        open_socket.listen()
        port = open_socket.getsockname()[1]
        [found] = [one for one in listening_elsewhere(os.getpid()) if one.endswith(f":{port}")]
        assert f" on {address}:{port}" in found


def test_who_has_no_token_cannot_join_ray_whatever_the_shell_said(settings: Settings, running: str) -> None:
    assert running
    controller = supervisor.status(settings).controller_pid
    gcs = next(p for p in psutil.Process(controller).children(recursive=True) if p.name() == "gcs_server")
    port = next(c.laddr.port for c in gcs.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN)
    command = [
        sys.executable,
        "-c",
        "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)",
        f"127.0.0.1:{port}",
    ]

    def ask(**environment: str) -> int:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        asked = subprocess.run(command, env={**clean, **environment}, capture_output=True, timeout=120, check=False)
        return asked.returncode

    assert ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token_of(settings)) == 0
    assert ask(RAY_AUTH_MODE="disabled") != 0
    assert ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=KNOWN_TOKEN) != 0


def test_a_runtime_folder_that_is_swept_away_is_a_lost_ray(settings: Settings, running: str) -> None:
    before = supervisor.status(settings).controller_pid
    shutil.rmtree(settings.runtime_folder)
    wait_for(lambda: supervisor.status(settings).ready and supervisor.status(settings).controller_pid != before, "Ray")
    assert settings.sockets_folder.is_dir()
    store = SqliteStore(settings)
    job = store.get_job("team-a", running)
    (settings.home / "store" / "team-a" / f"{running}-{job.metadata.uid}" / "finish").touch()
    wait_for(lambda: store.get_job("team-a", running).status.finish_time, "the job to finish")
    assert store.get_job("team-a", running).status.is_true(ConditionType.PUBLISHED)


def test_down_and_up_after_the_runtime_folder_was_swept_away(settings: Settings) -> None:
    shutil.rmtree(settings.runtime_folder)
    supervisor.stop(settings)
    assert supervisor.start(settings).ready


@needs_root
def test_a_home_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(PermanentError, match="belongs to user 65534"):
        supervisor.start(Settings(home=tmp_path))


def test_a_service_that_cannot_start_says_why_and_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "prometheus_client.py").write_text("raise ImportError('prometheus_client is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    settings = Settings(home=tmp_path / "home", start_timeout_seconds=TIMEOUT_SECONDS, restart_backoff_base_seconds=0.1)
    with pytest.raises(ServiceNotRunning, match="prometheus_client is broken"):
        supervisor.start(settings)
    assert not supervisor.status(settings).running


def test_the_page_of_mlflow_asks_every_user_for_the_password_and_ends_with_its_command(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "QLORA_HOME": str(tmp_path / "home"), "QLORA_TRACKING_URI": ""}
    del environment["QLORA_TRACKING_URI"]
    command = [sys.executable, "-m", "orchestrator.cli", "ui", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True) as ui:
        assert ui.stdout is not None
        url = ui.stdout.readline().strip()
        found = re.fullmatch(rf"http://qlora:(\S+)@127\.0\.0\.1:{port}", url)
        assert found, url
        server = psutil.Process(ui.pid).children(recursive=True)
        assert server
        assert all(found[1] not in command_line(process) for process in server)
        listening = [c.laddr for p in server for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        assert listening == [], "MLflow itself listens on its socket alone"
        key = base64.b64encode(f"qlora:{found[1]}".encode()).decode()
        assert get(port, "/version") == 401
        assert get(port, "/api/2.0/mlflow/experiments/search?max_results=5") == 401
        assert get(port, "/version", Authorization=f"Basic {key}") == 200
        assert get(port, "/api/2.0/mlflow/experiments/search?max_results=5", Authorization=f"Basic {key}") == 200
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(60) == 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in server)


def get(port: int, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status
