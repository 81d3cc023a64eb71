"""Kill anything at any time, preempt again and again: the adapter stays the undisturbed run's, byte for byte.

QLORA_KILLS kills each of the trainer, the controller and Ray, one in six seconds, and as many preemptions, at instants
drawn from a seed, on a tiny model so that a round takes seconds. Everything is real: the service's own processes are
looked up by what they are and get SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, tiny_job
from tests.trainer.tiny_model import tiny_model

STEPS = 800
VICTIMS = ("trainer", "controller", "ray")
KILLS_OF_EACH = PREEMPTIONS = int(os.environ.get("QLORA_KILLS", "2"))
KILLS_WITHIN_SECONDS = 6.0 * len(VICTIMS) * KILLS_OF_EACH
LONGEST_LIFE_SECONDS = 10.0
"""A preempted trainer has lived no longer than this: about twice what it needs to start."""
ROUND_TIMEOUT_SECONDS = 1500.0
POLL_SECONDS = 0.1


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
    # One urgent job that wants the slot again and again: it is prepared once, so a round takes seconds.
    document = tiny_job("urgent", model, steps=STEPS, priority=100)
    urgent = client.submit({**document, "spec": {**document["spec"], "suspend": True}})
    preempted, jobs = 0, 0
    while preempted < PREEMPTIONS:
        jobs += 1
        name = f"preempted-{jobs}"
        handle = client.submit(tiny_job(name, model, steps=STEPS))
        while preempted < PREEMPTIONS and is_training(settings, handle):
            time.sleep(instants.uniform(0.0, LONGEST_LIFE_SECONDS))
            urgent.resume()
            preempted += wait_for_eviction(handle)
            urgent.suspend()
        job = handle.wait(timeout_seconds=ROUND_TIMEOUT_SECONDS)
        assert job.status.failures_total == 0, "a preemption is no failure"
        assert job.status.adapter_digest == undisturbed
        assert_one_finished_run(settings, name)


def wait_for_eviction(handle: JobHandle) -> int:
    """How many evictions have been added, once there is one or the job is over."""
    before = evictions(handle)
    wait_until(lambda: evictions(handle) > before or is_over(handle))
    return evictions(handle) - before


def is_training(settings: Settings, handle: JobHandle) -> bool:
    """Whether the job has a trainer, waited for; not so once it is over."""
    wait_until(lambda: processes(settings, handle.name, "trainer") or is_over(handle))
    return not is_over(handle)


def is_over(handle: JobHandle) -> bool:
    """Whether the job has ended, well or not."""
    return handle.status().finish_time is not None


def evictions(handle: JobHandle) -> int:
    """How often the job was made to leave."""
    return sum(handle.status().evictions.values())


def finished(client: Client, document: Document) -> str:
    """The adapter digest of a job that is left alone."""
    job = client.submit(document).wait(timeout_seconds=ROUND_TIMEOUT_SECONDS)
    assert job.status.adapter_digest is not None, job.status.summary
    return job.status.adapter_digest


def wait_until(probe: Callable[[], object]) -> None:
    """Return once the probe finds something."""
    deadline = time.monotonic() + ROUND_TIMEOUT_SECONDS
    while not probe():
        assert time.monotonic() < deadline, f"waited {ROUND_TIMEOUT_SECONDS} s in vain"
        time.sleep(POLL_SECONDS)


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
