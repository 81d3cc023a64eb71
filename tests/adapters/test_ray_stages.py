"""The StageRuntime contract on a local Ray, and what becomes of stages when Ray's parts die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.local.processes import Process, child_processes
from orchestrator.adapters.local.ray_stages import RayStages
from orchestrator.settings import Settings
from tests.adapters.runtime_contract import RuntimeContract

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")

# Ray's own modules warn about themselves, and leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        home=tmp_path_factory.mktemp("home"),
        gpu_classes="24Gi=1",
        trainer_command=f"{sys.executable} -S {FAKE_TRAINER}",
    )


@pytest.fixture(scope="module")
def runtime(settings: Settings) -> Iterator[RayStages]:
    runtime = RayStages(settings)
    yield runtime
    runtime.close()
    shutil.rmtree(settings.runtime_folder)


class TestRayStages(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _runtime(self, runtime: RayStages, settings: Settings, tmp_path: Path) -> None:
        self.runtime = runtime
        self.stores = tmp_path
        self.settings = settings

    def test_everything_ends(self) -> None:
        assert self.runtime.observe() == {}, "a test of this module left stages"

    def test_a_holder_that_dies_is_replaced_and_the_stage_goes_on(self) -> None:
        task = self.task()
        self.runtime.ensure(task, "24Gi")
        self.until(task, lambda fact: fact.progress is not None)
        assert kill(holders()) >= 1
        fact = self.ended(task)
        assert fact.exit_code == 0
        assert len(self.starts(task)) == 1
        self.forget(task)

    def test_a_trainer_runs_at_the_priority_of_the_service(self) -> None:
        task = self.task("stubborn")
        self.runtime.ensure(task, "24Gi")
        self.until(task, lambda _: self.starts(task))
        trainer = int((self.stores / task.job / "starts.log").read_text().split()[1])
        assert os.getpriority(os.PRIO_PROCESS, trainer) == os.getpriority(os.PRIO_PROCESS, 0)
        self.stop(task, grace_seconds=1)
        self.ended(task)
        self.forget(task)

    def test_no_path_of_a_socket_is_too_long(self) -> None:
        deep = self.settings.model_copy(update={"home": Path("/" + "/".join(["a-long-name"] * 20))})
        assert len(bytes(deep.sockets_folder / ("u" * 13 + "-1000000.sock"))) <= 107

    def test_rays_logs_are_found_from_the_home_folder(self) -> None:
        assert list((self.settings.home / "ray").glob("session_*/logs"))


def test_stages_outlive_ray_and_are_adopted_by_the_next(tmp_path: Path) -> None:
    """Each part of Ray in its turn is killed under a running stage; another Ray adopts the stage."""
    program = Path(__file__).with_name("ray_victim.py")
    settings = Settings(
        home=tmp_path / "home", gpu_classes="24Gi=1", trainer_command=f"{sys.executable} -S {FAKE_TRAINER}"
    )
    settings.home.mkdir()
    paths = os.pathsep.join(sys.path)  # a program of the tests finds them as pytest does
    environment = {**os.environ, **settings.environment(), "STORE": str(tmp_path / "store"), "PYTHONPATH": paths}
    outcomes: list[int] = []
    for victim in ("raylet", "gcs_server", "itself"):
        outcomes.append(subprocess.run([sys.executable, str(program), victim], env=environment, timeout=180).returncode)
    last = subprocess.run([sys.executable, str(program), "nothing"], env=environment, timeout=180)
    assert outcomes == [70, 70, -signal.SIGKILL]
    assert last.returncode == 0
    starts = (tmp_path / "store" / "starts.log").read_text().splitlines()
    assert len(starts) == 1, "the one start outlived every Ray"
    wait_for(lambda: not processes_that_mention(str(settings.runtime_folder)))
    shutil.rmtree(settings.runtime_folder)


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def processes_that_mention(text: str) -> list[str]:
    """Command lines in /proc: nothing of a Ray that is gone may stay."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command and Process.of(int(entry.name)) is not None:
                found.append(command)
    return found


def holders() -> list[int]:
    """The worker processes of this process's Ray that run a holder."""
    raylets = [process.pid for name, process in child_processes() if name == "raylet"]
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in raylets and command.startswith(b"ray::hold"):
            found.append(int(entry.name))
    return found


def kill(pids: list[int]) -> int:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)
