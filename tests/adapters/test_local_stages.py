"""Stages on disk with a real shim and a real, if idle, trainer process; no Ray."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.local.processes import Process, boot_id
from orchestrator.adapters.local.slots import Slot
from orchestrator.adapters.local.stages import LocalStages, Stage, stage_log
from orchestrator.api.job import DatasetSource
from orchestrator.api.reasons import Reason
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import TransientError
from orchestrator.settings import Settings
from tests.builders import make_task, submitted_job

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
SLOT = (Slot(name="24Gi-0"),)
STEPS = 50  # of 20 ms
TIMEOUT_SECONDS = 30.0


class World:
    """One home folder and its stages."""

    def __init__(self, home: Path, **settings: object) -> None:
        command = f"{sys.executable} -S {FAKE_TRAINER}"
        self.settings = Settings(**{"home": home, "trainer_command": command, "grace_seconds": 5, **settings})
        self.settings.sockets_folder.mkdir(parents=True, exist_ok=True)
        self.stages = LocalStages(self.settings)
        self.store = home / "data"

    def make(self, script: str = "ok", *, name: str = "medical", uid: str = "uid-1", attempt: int = 1) -> Stage:
        dataset = DatasetSource(source=f"file:///{script}")
        job = submitted_job(name, meta={"uid": uid}, dataset=dataset, training={"max_steps": STEPS})
        task = make_task(job, attempt=attempt, store=self.store, grace_seconds=5)
        self.stages.ensure(task, "24Gi")
        return self.stages.get("team-a", f"{name}-train-{attempt}")

    def run(self, script: str = "ok", **names: object) -> Stage:
        stage = self.make(script, **names)  # type: ignore[arg-type]  # names of make
        assert self.launch(stage)
        return stage

    def launch(self, stage: Stage) -> bool:
        return self.stages.launch(stage, SLOT, {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()})

    def ended(self, stage: Stage) -> StageFact:
        wait_for(lambda: stage.phase is StagePhase.EXITED)
        return fact_of(stage)

    def starts(self) -> list[str]:
        """The stages that were started, once for each time."""
        log = self.store / "starts.log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def step(self) -> int:
        path = self.store / "step"
        return int(path.read_text()) if path.exists() else 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for stage in world.stages.all():
        world.stages.stop(stage, 0, Reason.CANCELLED)
    shutil.rmtree(world.settings.runtime_folder)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def fact_of(stage: Stage) -> StageFact:
    fact = stage.fact()
    assert fact is not None
    return fact


def processes_of(stage: Stage) -> tuple[Process, Process]:
    def both() -> bool:
        return json.loads((stage.folder / "process.json").read_text())["trainer"] is not None

    wait_for(both)
    record = json.loads((stage.folder / "process.json").read_text())
    return Process(*record["shim"]), Process(*record["trainer"])


def test_a_stage_goes_from_pending_over_running_to_its_result(world: World) -> None:
    stage = world.make()
    assert fact_of(stage).phase is StagePhase.PENDING
    assert world.starts() == []
    assert world.launch(stage)
    assert fact_of(stage).phase is StagePhase.RUNNING
    fact = world.ended(stage)
    assert fact.exit_code == 0
    assert fact.uid == "uid-1"
    assert fact.result is not None
    assert fact.result.train is not None
    assert fact.result.train.step == STEPS
    assert fact.disruption is None
    assert fact.start_time is not None
    assert fact.finish_time is not None
    assert (fact.finish_time - fact.start_time).total_seconds() >= STEPS * 0.02
    log = world.settings.home / "logs" / "stages" / "team-a" / "medical-train-1.log"
    assert log.read_text().startswith("train runs with pid ")


def test_a_new_service_sees_the_stages_of_the_one_before(world: World) -> None:
    stage = world.run()
    assert set(LocalStages(world.settings).observe()) == {"team-a/medical-train-1"}
    world.ended(stage)
    assert LocalStages(world.settings).observe()["team-a/medical-train-1"].exit_code == 0


def test_ensuring_twice_is_ensuring_once(world: World) -> None:
    stage = world.run()
    before = (stage.folder / "stage.json").stat().st_mtime_ns
    world.make()
    assert (stage.folder / "stage.json").stat().st_mtime_ns == before
    world.ended(stage)
    world.make()
    assert world.launch(stage)
    assert world.starts() == ["medical-train-1"]


def test_of_many_launchers_one_starts_the_stage(world: World) -> None:
    stage = world.make()
    launchers = [threading.Thread(target=lambda: world.launch(stage)) for _ in range(6)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    world.ended(stage)
    assert world.starts() == ["medical-train-1"]


def test_a_second_shim_of_a_stage_starts_nothing_while_the_first_runs_or_after(world: World) -> None:
    stage = world.run()
    first = processes_of(stage)
    start_another_shim(stage)
    world.ended(stage)
    wait_for(lambda: not first[0].alive)
    start_another_shim(stage)
    assert processes_of(stage) == first
    assert world.starts() == ["medical-train-1"]


def start_another_shim(stage: Stage) -> None:
    unused = os.open(os.devnull, os.O_RDONLY)
    command = [sys.executable, "-m", "orchestrator.adapters.local.shim", str(stage.folder), str(unused)]
    subprocess.run(command, pass_fds=(unused,), check=True, timeout=TIMEOUT_SECONDS)
    os.close(unused)


def test_a_slot_is_given_to_one_stage_at_a_time(world: World) -> None:
    first, second = world.run(name="first"), world.make(name="second")
    assert not world.launch(second)
    assert fact_of(second).phase is StagePhase.PENDING
    world.ended(first)
    assert world.launch(second)
    world.ended(second)
    assert world.starts() == ["first-train-1", "second-train-1"]


def test_concurrent_launches_share_the_slots_out(world: World) -> None:
    slots = tuple(Slot(name=f"24Gi-{number}") for number in range(2))
    stages = [world.make("stubborn", name=f"job-{number}") for number in range(5)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()}
    launchers = [
        threading.Thread(target=lambda stage=stage: world.stages.launch(stage, slots, environment)) for stage in stages
    ]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    running = [stage for stage in stages if fact_of(stage).phase is StagePhase.RUNNING]
    taken = [json.loads((stage.folder / "launch.json").read_text())["slot"] for stage in running]
    assert sorted(taken) == ["24Gi-0", "24Gi-1"]


def test_a_stop_ends_in_a_checkpoint(world: World) -> None:
    stage = world.run()
    wait_for(lambda: world.step() >= 3)
    world.stages.stop(stage, 5, Reason.PREEMPTED)
    world.stages.stop(stage, 5, Reason.PREEMPTED)
    fact = world.ended(stage)
    assert fact.exit_code == 85
    assert fact.result is not None
    assert fact.result.train is not None
    assert fact.result.train.step == world.step()
    assert 3 <= world.step() < STEPS
    assert fact.disruption is None


def test_a_stop_of_the_service_is_a_disruption(world: World) -> None:
    stage = world.run()
    wait_for(lambda: world.step() >= 1)
    world.stages.stop(stage, 5, Reason.DISRUPTED)
    assert world.ended(stage).disruption is Reason.DISRUPTED


def test_a_machine_that_shuts_down_is_a_disruption(world: World) -> None:
    stage = world.run()
    shim, _ = processes_of(stage)
    wait_for(lambda: world.step() >= 1)
    os.kill(shim.pid, signal.SIGTERM)
    fact = world.ended(stage)
    assert fact.exit_code == 85
    assert fact.disruption is Reason.DISRUPTED


def test_a_trainer_that_ignores_the_stop_is_killed_at_the_deadline(world: World) -> None:
    stage = world.run("stubborn")
    wait_for(world.starts)
    time.sleep(0.3)  # until it ignores SIGTERM
    asked = time.monotonic()
    world.stages.stop(stage, 1, Reason.PREEMPTED)
    assert world.ended(stage).exit_code == -signal.SIGKILL
    assert 0.9 < time.monotonic() - asked < 10


def ask_long_ago(stage: Stage, overdue_seconds: float) -> None:
    request = {"time_seconds": time.time() - overdue_seconds, "grace_seconds": 0, "reason": "NoProgress"}
    (stage.folder / "stop.json").write_text(json.dumps(request))


def test_a_stage_whose_shim_does_not_answer_is_killed_from_outside(world: World) -> None:
    stage = world.run("stubborn")
    shim, trainer = processes_of(stage)
    os.kill(shim.pid, signal.SIGSTOP)
    ask_long_ago(stage, 10)
    world.stages.stop(stage, 0, Reason.NO_PROGRESS)
    assert fact_of(stage).phase is StagePhase.RUNNING, "its shim is still given time"
    ask_long_ago(stage, 20)
    world.stages.stop(stage, 0, Reason.NO_PROGRESS)
    assert world.ended(stage).exit_code is None
    wait_for(lambda: not trainer.alive)


def test_a_stage_that_does_not_end_is_given_up_and_its_slot_is_nobodys_until_it_has(world: World) -> None:
    stage = world.run("stubborn")
    shim, trainer = processes_of(stage)
    os.kill(shim.pid, signal.SIGSTOP)  # as what hangs in a driver, it ends neither by itself nor soon
    ask_long_ago(stage, 70)
    assert fact_of(stage).phase is StagePhase.EXITED
    world.stages.delete(stage)
    assert world.stages.stranded() == {"24Gi": 1}
    another = world.make(name="another")
    assert not world.launch(another)
    trainer.send(signal.SIGKILL)
    shim.send(signal.SIGKILL)
    wait_for(lambda: not shim.alive and not trainer.alive)
    assert world.stages.stranded() == {}
    assert world.launch(another)
    world.stages.delete(stage)
    assert stage.record is None


def test_a_stage_stopped_before_its_start_never_starts(world: World) -> None:
    stage = world.make()
    world.stages.stop(stage, 5, Reason.CANCELLED)
    fact = fact_of(stage)
    assert fact.phase is StagePhase.EXITED
    assert fact.exit_code == 85
    assert world.launch(stage)
    time.sleep(0.3)
    assert world.starts() == []


def test_a_stage_whose_stop_was_interrupted_before_its_start_never_starts(world: World) -> None:
    stage = world.make()
    request = {"time_seconds": time.time(), "grace_seconds": 5, "reason": "Preempted"}
    (stage.folder / "stop.json").write_text(json.dumps(request))
    assert world.launch(stage)
    assert fact_of(stage).exit_code == 85
    assert world.starts() == []


def test_a_stop_request_that_was_never_signaled_is_obeyed(world: World) -> None:
    """The asking process has died between the two."""
    stage = world.run()
    wait_for(lambda: world.step() >= 1)
    request = {"time_seconds": time.time(), "grace_seconds": 5, "reason": "Preempted"}
    (stage.folder / "stop.json").write_text(json.dumps(request))
    assert world.ended(stage).exit_code == 85


@pytest.mark.parametrize(
    ("script", "exit_code", "message"),
    [("exit-80", 80, "line 7 is broken"), ("exit-82", 82, "line 7 is broken"), ("silent-1", 1, None)],
)
def test_exit_code_and_failure_are_kept(world: World, script: str, exit_code: int, message: str | None) -> None:
    fact = world.ended(world.run(script))
    assert fact.exit_code == exit_code
    failure = fact.result.failure if fact.result else None
    assert (failure.message if failure else None) == message


def test_a_termination_message_that_does_not_parse_is_no_result(world: World) -> None:
    fact = world.ended(world.run("garbage"))
    assert (fact.exit_code, fact.result) == (0, None)


def test_what_a_trainer_started_ends_with_it(world: World) -> None:
    world.ended(world.run("children"))
    child = int((world.store / "child").read_text())
    wait_for(lambda: Process.of(child) is None)


def test_a_command_that_cannot_start_says_so(tmp_path: Path) -> None:
    world = World(tmp_path, trainer_command="/nowhere/trainer")
    fact = world.ended(world.run())
    assert fact.exit_code == 127
    assert fact.result is not None
    assert fact.result.failure is not None
    assert "/nowhere/trainer" in fact.result.failure.message


@pytest.mark.parametrize("seed", range(6))
def test_a_shim_killed_at_any_time_takes_its_trainer_along_and_is_lost_once(world: World, seed: int) -> None:
    stage = world.run("endless")
    shim, trainer = processes_of(stage)
    time.sleep(random.Random(seed).uniform(0, STEPS * 0.02))
    assert shim.send(signal.SIGKILL)
    fact = world.ended(stage)
    assert fact.exit_code is None
    assert fact.finish_time is not None
    assert not trainer.alive
    assert world.launch(stage), "an ended stage is not launched again, and is no reason to wait"
    assert world.launch(world.make(name="next")), "its slot is free"
    assert world.starts().count("medical-train-1") == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_launcher_killed_at_any_time_starts_the_stage_at_most_once(world: World, seed: int) -> None:
    stage = world.make()
    program = (
        "import os, sys\n"
        "from orchestrator.adapters.local.slots import Slot\n"
        "from orchestrator.adapters.local.stages import LocalStages\n"
        "from orchestrator.settings import Settings\n"
        "stages = LocalStages(Settings())\n"
        "print('ready', flush=True)\n"
        "stages.launch(stages.get('team-a', 'medical-train-1'), (Slot(name='24Gi-0'),), dict(os.environ))\n"
    )
    environment = {**os.environ, **world.settings.environment()}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).uniform(0, 0.15))
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert world.launch(stage), "the next launcher starts it or finds it started"
    assert world.ended(stage).exit_code == 0
    assert world.starts() == ["medical-train-1"]


def test_a_restarted_machine_has_lost_its_stages(world: World) -> None:
    stage = world.make()
    process = [os.getpid(), Process.current().start_ticks, "00000000-0000-0000-0000-000000000000"]
    record = {"shim": process, "trainer": None, "start_time": "2026-01-01T00:00:00Z"}
    (stage.folder / "process.json").write_text(json.dumps(record))
    fact = fact_of(stage)
    assert (fact.phase, fact.exit_code, fact.disruption) == (StagePhase.EXITED, None, Reason.DISRUPTED)


def test_a_reused_pid_is_not_taken_for_the_stage(world: World) -> None:
    stage = world.make()
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    process = [bystander.pid, 1, boot_id()]
    record = {"shim": process, "trainer": process, "start_time": "2026-01-01T00:00:00Z"}
    (stage.folder / "process.json").write_text(json.dumps(record))
    fact = fact_of(stage)
    assert (fact.phase, fact.exit_code, fact.disruption) == (StagePhase.EXITED, None, None)
    assert not Process(*process).send(signal.SIGKILL)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_process_that_waits_to_be_reaped_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    process = Process.of(child.pid)
    assert process is not None
    assert process.alive
    child.kill()
    wait_for(lambda: not process.alive)
    assert child.wait() == -signal.SIGKILL


def test_deleting_forgets_the_stage_and_keeps_its_log(world: World) -> None:
    stage = world.run("exit-80")
    world.ended(stage)
    world.stages.delete(stage)
    world.stages.delete(stage)
    assert world.stages.observe() == {}
    assert list(stage.folder.parent.iterdir()) == []
    assert stage_log(world.settings, "team-a", "medical-train-1").exists()


def test_a_stage_that_runs_is_not_deleted(world: World) -> None:
    stage = world.run()
    world.stages.delete(stage)
    assert world.ended(stage).exit_code == 0


def test_logs_of_ended_stages_are_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, stage_logs_limit=2)
    for attempt in range(1, 5):
        stage = world.run("silent-1", attempt=attempt)
        world.ended(stage)
        world.stages.delete(stage)
    left = sorted(path.name for path in (tmp_path / "logs" / "stages" / "team-a").iterdir())
    assert left == ["medical-train-3.log", "medical-train-4.log"]


def test_a_job_created_again_does_not_inherit_an_ended_stage(world: World) -> None:
    world.ended(world.run("exit-80", uid="uid-1"))
    stage = world.run("ok", uid="uid-2")
    fact = world.ended(stage)
    assert (fact.uid, fact.exit_code) == ("uid-2", 0)


def test_a_job_created_again_waits_until_a_running_stage_has_made_way(world: World) -> None:
    stage = world.run(uid="uid-1")
    wait_for(lambda: world.step() >= 1)
    with pytest.raises(TransientError, match="medical-train-1"):
        world.make(uid="uid-2")
    assert world.ended(stage).exit_code == 85
    world.make(uid="uid-2")
    assert fact_of(stage).uid == "uid-2"
    assert fact_of(stage).phase is StagePhase.PENDING


def test_leftovers_of_interrupted_calls_are_swept_and_never_shown(world: World) -> None:
    stage = world.make()
    for name in (".new-other-train-1-abc", ".deleted-other-train-1-abc"):
        (stage.folder.parent / name).mkdir()
    assert set(world.stages.observe()) == {"team-a/medical-train-1"}
    world.stages.sweep()
    assert [path.name for path in stage.folder.parent.iterdir()] == ["medical-train-1"]
