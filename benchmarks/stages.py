"""Run the trainer's stages as processes of their own, for benchmarks that stop, kill and resume them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.api.formats import JOURNAL_NAME
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult, TrainResult
from orchestrator.api.task import StageTask

# The trainer's own entry point, behind a cap on the allocator: what a smaller card would give it.
CAPPED = """
import sys, torch
cap = float(sys.argv.pop(1)) * 2**30
if torch.cuda.is_available() and cap:
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
import runpy
sys.argv[0] = "qlora_trainer"
runpy.run_module("qlora_trainer", run_name="__main__", alter_sys=True)
"""
TIMEOUT_SECONDS = 900
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all runs of a benchmark share."""

    folder: Path
    spec: QLoRAJobSpec
    plan: MemoryPlan
    cap_gib: float = 0.0
    """Cap on the allocator; 0 is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A signal, and when it is sent: at a step, or so long after the start."""

    signal_number: signal.Signals
    at_step: int | None = None
    after_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One process's end."""

    exit_code: int
    result: StageResult
    seconds: float
    stop_seconds: float | None = None
    """Seconds from the signal to the exit."""

    @property
    def trained(self) -> TrainResult:
        """The train result, empty where the process was killed before it could write one."""
        return self.result.train or TrainResult(step=0, complete=False)

    def journal(self) -> list[dict[str, Any]]:
        """The records of a run that is complete."""
        assert self.trained.adapter_uri is not None, "the run is complete"
        path = Path(self.trained.adapter_uri.removeprefix("file://")) / JOURNAL_NAME
        return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(bench: Bench, name: str) -> StageTask:
    """Prepare the data of a job of this name; the task of its first train stage."""
    task = StageTask(
        stage="prepare",
        namespace="benchmarks",
        job=name,
        uid=name,
        attempt=1,
        spec=bench.spec,
        store_uri=f"file://{bench.folder}/store/{name}",
        threads=os.cpu_count() or 1,
    )
    prepared = finish(bench, task, start(bench, task)).result.prepare
    return task.model_copy(update={"stage": "train", "plan": bench.plan, "prepared": prepared, "attempt": 2})


def next_attempt(task: StageTask) -> StageTask:
    """The same task, tried once more."""
    return task.model_copy(update={"attempt": task.attempt + 1})


def train(bench: Bench, task: StageTask, stop: Stop | None = None) -> Ended:
    """One train process, stopped on the way if asked to; raises RuntimeError with its log if it failed."""
    began = time.monotonic()
    process = start(bench, task)
    asked = None
    if stop is not None:
        wait_for(bench, task, process, stop)
        asked = time.monotonic()
        process.send_signal(stop.signal_number)
    ended = finish(bench, task, process)
    now = time.monotonic()
    ended = replace(ended, seconds=now - began, stop_seconds=None if asked is None else now - asked)
    print(f"{task.job} attempt {task.attempt}: exit {ended.exit_code} after {ended.seconds:.1f} s", file=sys.stderr)
    return ended


def start(bench: Bench, task: StageTask) -> subprocess.Popen[bytes]:
    """Start a stage as the container would."""
    cap = str(bench.cap_gib if task.stage == "train" else 0)
    with log_path(bench, task).open("wb") as log:
        command = [sys.executable, "-c", CAPPED, cap, task.stage]
        return subprocess.Popen(command, env=environment(bench, task), stderr=log)


def environment(bench: Bench, task: StageTask) -> dict[str, str]:
    """What a stage's process finds."""
    variables = {
        **os.environ,
        "QLORA_TASK": task.model_dump_json(by_alias=True),
        "QLORA_TERMINATION_LOG": str(termination_log(bench, task)),
        "QLORA_ALLOW_RANDOM_WEIGHTS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    variables.pop("MLFLOW_TRACKING_URI", None)
    return variables


def finish(bench: Bench, task: StageTask, process: subprocess.Popen[bytes]) -> Ended:
    """Wait for a stage's end; raises RuntimeError with the end of its log if it failed."""
    code = process.wait(timeout=TIMEOUT_SECONDS)
    written = termination_log(bench, task)
    result = StageResult.model_validate_json(written.read_text()) if written.exists() else StageResult()
    if code not in (ExitCode.OK, ExitCode.PREEMPTED, -signal.SIGKILL):
        raise RuntimeError(f"{task.stage} exited with {code}:\n{log_path(bench, task).read_text()[-4000:]}")
    return Ended(exit_code=code, result=result, seconds=0.0)


def wait_for(bench: Bench, task: StageTask, process: subprocess.Popen[bytes], stop: Stop) -> None:
    """Wait until it is time for the signal, or the process has ended by itself."""
    began = time.monotonic()
    while time.monotonic() - began < TIMEOUT_SECONDS and process.poll() is None:
        due = time.monotonic() - began >= stop.after_seconds
        if due and (stop.at_step is None or has_logged_step(log_path(bench, task), stop.at_step)):
            return
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the instant never came:\n{log_path(bench, task).read_text()[-4000:]}")


def has_logged_step(log: Path, step: int) -> bool:
    """Whether the trainer's log tells of this step."""
    return f'"message": "step {step} of ' in log.read_text()


def termination_log(bench: Bench, task: StageTask) -> Path:
    """Where the stage leaves its result."""
    return bench.folder / f"{task.stage_name}.json"


def log_path(bench: Bench, task: StageTask) -> Path:
    """Where the stage's log goes."""
    return bench.folder / f"{task.stage_name}.log"
