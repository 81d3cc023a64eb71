"""A runtime that loses its Ray: starts or adopts one stage, then kills a part of Ray, or itself, or nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from orchestrator.adapters.local.processes import child_processes
from orchestrator.adapters.local.ray_stages import RayStages
from orchestrator.api.job import DatasetSource
from orchestrator.core.snapshot import StagePhase
from orchestrator.errors import RuntimeLost
from orchestrator.settings import Settings
from tests.builders import make_task, submitted_job

KEY = "team-a/medical-train-1"
TIMEOUT_SECONDS = 60.0
LOST = 70


def main(victim: str) -> None:
    runtime = RayStages(Settings())
    store = Path(os.environ["STORE"])
    job = submitted_job(meta={"uid": "uid-1"}, dataset=DatasetSource(source="file:///endless"))
    runtime.ensure(make_task(job, store=store), "24Gi")
    while runtime.observe()[KEY].phase is StagePhase.PENDING:
        time.sleep(0.1)
    if victim == "itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if victim != "nothing":
        victims = [process for name, process in child_processes() if name == victim]
        assert all(process.send(signal.SIGKILL) for process in victims), victims
        assert victims
    try:
        told = wait_for_progress(runtime, beyond=durable_step(store))
    except RuntimeLost as error:
        print(error)
        os._exit(LOST)
    (store / "finish").touch()
    while (fact := runtime.observe()[KEY]).phase is not StagePhase.EXITED:
        time.sleep(0.1)
    assert fact.exit_code == 0
    assert fact.progress is not None
    assert fact.progress.step >= told
    runtime.close()


def durable_step(store: Path) -> int:
    step = store / "step"
    return int(step.read_text()) if step.exists() else 0


def wait_for_progress(runtime: RayStages, beyond: int) -> int:
    """The first step after a given one that the trainer tells this runtime's agent of."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        progress = runtime.observe()[KEY].progress
        if progress is not None and progress.step > beyond:
            return progress.step
        time.sleep(0.1)
    raise TimeoutError("no progress was seen")


if __name__ == "__main__":
    main(sys.argv[1])
