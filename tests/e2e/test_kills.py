"""Kill anything at any time, preempt again and again: the adapter stays the undisturbed run's, byte for byte.

Thirty kills (ten each of the trainer, the controller and Ray, all in the same five minutes) and ten preemptions, at
instants drawn from a seed, on a tiny model so that a round takes seconds. Everything is real: the service's own
processes are looked up by what they are and get SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from mlflow import MlflowClient

from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, tiny_job
from tests.trainer.tiny_model import tiny_model

STEPS = 800
VICTIMS = ("trainer", "controller", "ray")
KILLS_OF_EACH = 10
KILLS_WITHIN_SECONDS = 300.0
PREEMPTIONS = 10
LONGEST_LIFE_SECONDS = 12.0
"""A preempted trainer has lived no longer than this: about twice what it needs to start."""
ROUND_TIMEOUT_SECONDS = 1500.0
POLL_SECONDS = 0.1
Found = TypeVar("Found")


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def undisturbed(client: Client, model: Path) -> str:
    """The digest of the adapter of a run that nobody disturbed."""
    return finished(client, tiny_job("undisturbed", model, steps=STEPS))


@pytest.mark.timeout(1800)
def test_killing_changes_nothing(client: Client, settings: Settings, model: Path, undisturbed: str) -> None:
    instants = kill_instants(random.Random("kills"))
    start = time.monotonic()
    jobs = 0
    while instants:
        jobs += 1
        name = f"killed-{jobs}"
        handle = client.submit(tiny_job(name, model, steps=STEPS))
        while instants and handle.status().finish_time is None:
            after_seconds, victim = instants[0]
            if time.monotonic() - start >= after_seconds and kill_one(settings, handle.name, victim):
                instants.pop(0)
            time.sleep(POLL_SECONDS)
        job = handle.wait(timeout_seconds=ROUND_TIMEOUT_SECONDS)
        assert job.status.adapter_digest == undisturbed, job.status.summary
        assert_one_finished_run(settings, name)


def kill_instants(seeded: random.Random) -> list[tuple[float, str]]:
    """When to kill what, in order. Whatever is not there to be killed at its instant is killed as soon as it is."""
    return sorted(
        (seeded.uniform(0.0, KILLS_WITHIN_SECONDS), victim) for victim in VICTIMS for _ in range(KILLS_OF_EACH)
    )


def kill_one(settings: Settings, job: str, victim: str) -> bool:
    """Kill one process of this kind; whether there was one."""
    found = processes(settings, job, victim)
    return bool(found) and kill(found[0])


@pytest.mark.timeout(1800)
def test_preempting_changes_nothing(client: Client, settings: Settings, model: Path, undisturbed: str) -> None:
    instants = random.Random("preempt")
    handle = client.submit(tiny_job("preempted", model, steps=STEPS))
    for number in range(PREEMPTIONS):
        wait_for(lambda: processes(settings, "preempted", "trainer"), handle)
        time.sleep(instants.uniform(0.0, LONGEST_LIFE_SECONDS))
        urgent = client.submit(tiny_job(f"urgent-{number}", model, steps=STEPS, priority=100))
        wait_for(lambda count=number + 1: sum(handle.status().evictions.values()) >= count, handle)
        urgent.cancel()
    job = handle.wait(timeout_seconds=ROUND_TIMEOUT_SECONDS)
    assert sum(job.status.evictions.values()) >= PREEMPTIONS
    assert job.status.failures_total == 0, "a preemption is no failure"
    assert job.status.adapter_digest == undisturbed
    assert_one_finished_run(settings, "preempted")


def finished(client: Client, document: Document) -> str:
    """The adapter digest of a job that is left alone."""
    job = client.submit(document).wait(timeout_seconds=ROUND_TIMEOUT_SECONDS)
    assert job.status.adapter_digest is not None, job.status.summary
    return job.status.adapter_digest


def wait_for(probe: Callable[[], Found], handle: JobHandle) -> Found:
    """What the probe finds, once it finds anything, while the job is not over."""
    deadline = time.monotonic() + ROUND_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if answer := probe():
            return answer
        status = handle.status()
        assert status.finish_time is None, f"{handle.name} ended too early: {status.summary}"
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"waited {ROUND_TIMEOUT_SECONDS} s for {handle.name}: {handle.status().summary}")


def processes(settings: Settings, job: str, victim: str) -> list[int]:
    """The running processes of one kind that belong to this service, found in /proc by command line and environment."""
    patterns = {
        "trainer": ("-m qlora_trainer train",),
        "controller": ("-m orchestrator.controller ",),
        "ray": ("raylet/raylet", "gcs_server"),
    }[victim]
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        ours = str(settings.home) in environment or str(settings.home) in command
        if victim == "trainer":
            ours = ours and f'"job":"{job}"' in environment
        if ours and any(pattern in command for pattern in patterns):
            found.append(int(entry.name))
    return found


def kill(process: int) -> bool:
    """Send SIGKILL; whether the process was there to take it."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def assert_one_finished_run(settings: Settings, experiment_name: str) -> None:
    """MLflow shows one run, FINISHED, with each step once."""
    mlflow = MlflowClient(settings.tracking_uri)
    experiment = mlflow.get_experiment_by_name(experiment_name)
    assert experiment is not None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        runs = mlflow.search_runs([experiment.experiment_id])
        if [run.info.status for run in runs] == ["FINISHED"]:
            break
        time.sleep(0.5)
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = mlflow.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))
