"""The embedded service as its users have it: all is real, supervisor, controller, Ray and shims, but for the trainer.

Anything may be killed with SIGKILL at any instant: no stage is started twice, none is lost, and the job finishes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.local.processes import Process
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import DatasetSource, QLoRAJob
from orchestrator.api.reasons import ConditionType
from orchestrator.controller import supervisor
from orchestrator.errors import ServiceNotRunning
from orchestrator.settings import Settings
from tests.builders import submitted_job

FAKE_TRAINER = Path(__file__).parents[1] / "adapters" / "fake_trainer.py"
TIMEOUT_SECONDS = 480.0

pytestmark = pytest.mark.timeout(900)


class Service:
    """One home folder with a running service."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(
            home=home,
            gpu_classes="24Gi=1",
            trainer_command=f"{sys.executable} -S {FAKE_TRAINER}",
            grace_seconds=10,
            backoff_base_seconds=0.2,
            backoff_max_seconds=1.0,
            restart_backoff_base_seconds=0.1,
            start_timeout_seconds=TIMEOUT_SECONDS,
        )
        self.store = SqliteStore(self.settings)

    def submit(self, name: str, script: str = "endless") -> QLoRAJob:
        return self.store.create_job(submitted_job(name, dataset=DatasetSource(source=f"file:///{script}")))

    def job(self, name: str) -> QLoRAJob:
        return self.store.get_job("team-a", name)

    def data(self, name: str) -> Path:
        return self.settings.home / "store" / "team-a" / f"{name}-{self.job(name).metadata.uid}"

    def starts(self, name: str) -> list[str]:
        log = self.data(name) / "starts.log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def step(self, name: str) -> int:
        path = self.data(name) / "step"
        return int(path.read_text()) if path.exists() else 0

    def train_shim(self, name: str) -> Process | None:
        """The shim of the job's train stage, while that runs."""
        for folder in (self.settings.home / "stages" / "team-a").glob(f"{name}-train-*"):
            try:
                shim = Process(*json.loads((folder / "process.json").read_text())["shim"])
            except FileNotFoundError:
                continue
            if shim.alive:
                return shim
        return None

    def victim(self, kind: str, name: str) -> Process | None:
        if kind == "shim":
            return self.train_shim(name)
        controller = supervisor.status(self.settings).controller_pid
        if controller is None:
            return None
        return Process.of(controller) if kind == "controller" else child_of(controller, kind)


def child_of(parent: int, name: str) -> Process | None:
    for entry in Path("/proc").iterdir():
        try:
            head, _, tail = (entry / "stat").read_text().rpartition(")")
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(tail.split()[1]) == parent and head.partition("(")[2] == name:
            return Process.of(int(entry.name))
    return None


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("home"))
    supervisor.start(service.settings)
    yield service
    supervisor.stop(service.settings)
    shutil.rmtree(service.settings.runtime_folder)


def finish(service: Service, name: str) -> QLoRAJob:
    (service.data(name) / "finish").touch()
    wait_for(lambda: service.job(name).status.finish_time, f"{name} to finish")
    job = service.job(name)
    assert job.status.is_true(ConditionType.PUBLISHED), job.status.summary
    return job


def test_starting_twice_is_starting_once(service: Service) -> None:
    before = supervisor.status(service.settings)
    assert before.running
    assert before.ready
    after = supervisor.start(service.settings)
    assert (after.supervisor_pid, after.controller_pid) == (before.supervisor_pid, before.controller_pid)


@pytest.mark.parametrize(("victim", "kills"), [("controller", 3), ("raylet", 1), ("gcs_server", 1), ("shim", 3)])
def test_killing_starts_no_stage_twice_and_loses_none(service: Service, victim: str, kills: int) -> None:
    name = f"killed-{victim.replace('_', '-')}"
    instants = random.Random(name)
    service.submit(name)
    for _ in range(kills):
        wait_for(lambda: service.step(name) > 0 and service.victim(victim, name), victim)
        time.sleep(instants.uniform(0, 3))
        found = service.victim(victim, name)
        if found is not None:
            found.send(signal.SIGKILL)
    wait_for(lambda: service.train_shim(name), "the train stage to run")
    steps = service.step(name)
    wait_for(lambda: service.step(name) > steps, "a step")
    job = finish(service, name)
    starts = service.starts(name)
    assert len(starts) == len(set(starts)), "a stage was started twice"
    assert set(starts) == {job.stage_name(attempt) for attempt in job.status.attempts}
    if victim == "shim":
        assert len(starts) > 3
    else:
        assert starts == [f"{name}-prepare-1", f"{name}-train-2", f"{name}-publish-3"], "running stages were adopted"
    assert job.status.failures_total == 0
    wait_for(
        lambda: not list((service.settings.home / "stages" / "team-a").glob(f"{name}-*")), "stages to be forgotten"
    )


def test_a_killed_controller_at_the_very_start_of_a_stage_starts_it_once(service: Service) -> None:
    instants = random.Random("start")
    for number in range(3):
        name = f"early-{number}"
        service.submit(name, "ok")
        time.sleep(instants.uniform(0, 1.5))
        found = service.victim("controller", name)
        if found is not None:
            found.send(signal.SIGKILL)
        wait_for(lambda name=name: service.job(name).status.finish_time, f"{name} to finish")
        job = service.job(name)
        starts = service.starts(name)
        assert len(starts) == len(set(starts))
        assert job.status.is_true(ConditionType.PUBLISHED), job.status.summary


def test_down_checkpoints_and_up_goes_on(service: Service) -> None:
    service.submit("moved")
    wait_for(lambda: service.step("moved") > 3, "steps")
    supervisor.stop(service.settings)
    status = supervisor.status(service.settings)
    assert not status.running
    assert service.train_shim("moved") is None
    step = service.step("moved")
    time.sleep(0.3)
    assert service.step("moved") == step
    assert not processes_that_mention(str(service.settings.runtime_folder))
    supervisor.start(service.settings)
    wait_for(lambda: service.step("moved") > step, "the job to go on")
    job = finish(service, "moved")
    assert [attempt.exit_code for attempt in job.status.attempts] == [0, 85, 0, 0]
    assert job.status.failures_total == 0


def test_down_can_leave_stages_running(service: Service) -> None:
    service.submit("kept")
    wait_for(lambda: service.step("kept") > 3, "steps")
    supervisor.stop(service.settings, keep_stages=True)
    step = service.step("kept")
    wait_for(lambda: service.step("kept") > step, "steps without a service")
    supervisor.start(service.settings)
    job = finish(service, "kept")
    assert [attempt.exit_code for attempt in job.status.attempts] == [0, 0, 0]


def test_a_killed_supervisor_takes_its_controller_along_and_up_brings_both_back(service: Service) -> None:
    service.submit("orphaned")
    wait_for(lambda: service.step("orphaned") > 3, "steps")
    before = supervisor.status(service.settings)
    assert before.supervisor_pid is not None
    assert before.controller_pid is not None
    os.kill(before.supervisor_pid, signal.SIGKILL)
    wait_for(lambda: Process.of(before.controller_pid or 0) is None, "the controller to end")
    after = supervisor.start(service.settings)
    assert after.ready
    assert after.controller_pid != before.controller_pid
    job = finish(service, "orphaned")
    assert len(job.status.attempts) == 3


def test_one_job_is_one_mlflow_run(service: Service) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(service.settings.tracking_uri)
        experiment = client.get_experiment_by_name("team-a")
        assert experiment is not None
        jobs = {job.metadata.uid for job in service.store.list_jobs()}

        def ended() -> bool:
            runs = client.search_runs([experiment.experiment_id])
            tags = sorted(run.data.tags["qlora.dev/job-uid"] for run in runs)
            return tags == sorted(jobs) and {run.info.status for run in runs} == {"FINISHED"}

        wait_for(ended, "every job to have one finished run")


def test_a_setting_that_cannot_work_is_told(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, gpu_classes="7Gi=1", start_timeout_seconds=TIMEOUT_SECONDS)
    with pytest.raises(ServiceNotRunning, match="7Gi"):
        supervisor.start(settings)
    assert not supervisor.status(settings).running


def processes_that_mention(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found.append(command)
    return found
