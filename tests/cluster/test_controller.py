"""The controller's program on a real API server, killed -9 before and after each of its writes.

A proxy between the two counts the writes and kills the controller at the one that it is told; another controller is
started then. MLflow is a real database; pods are played by a kubelet on paper.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.job import RELEASE_FINALIZER, DatasetSource, ModelSource, QLoRAJob, StoreSpec
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.errors import OrchestratorError
from tests.builders import ON_THE_HUB, submitted_job
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controller_program import Program
from tests.cluster.fault_proxy import Faults, Proxy, fault_proxy
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import add_gpu_node, clear

FINISH_SECONDS = 300.0
MIN_KILLS = 10
"""Two jobs take some twenty writes; fewer kills than this would mean that the proxy was not asked."""
NODES = {"gpu-1": 24_564, "gpu-2": 24_564}


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster with two GPUs and nothing else."""
    api = cluster.api()
    clear(api)
    for item in api.get(path_of("v1", "pods", "team-a"))["items"]:
        path = path_of("v1", "pods", "team-a", item["metadata"]["name"])
        with contextlib.suppress(OrchestratorError):
            api.delete(path, {"gracePeriodSeconds": 0})
    for item in api.get(path_of("v1", "nodes"))["items"]:
        api.delete(path_of("v1", "nodes", name=item["metadata"]["name"]))
    with contextlib.suppress(OrchestratorError):
        api.delete("/apis/coordination.k8s.io/v1/namespaces/default/leases/qlora-orchestrator")
    for name, memory_mib in NODES.items():
        add_gpu_node(api, name, memory_mib)
    yield api
    clear(api)
    api.close()


@pytest.fixture
def proxy(cluster: ControlPlane) -> Iterator[Proxy]:
    """A proxy between the controller and the API server."""
    with fault_proxy(cluster.url) as proxy:
        yield proxy


@pytest.fixture
def program(cluster: ControlPlane, proxy: Proxy, new_database: Path, tmp_path: Path) -> Iterator[Program]:
    """The controller, not started yet."""
    shutil.copyfile(new_database, tmp_path / "mlflow.db")
    settings = {"QLORA_RESERVED_CLAIMS": "mlflow"}
    program = Program(cluster.kubeconfig_for(cluster.token, url=proxy.url, name="controller"), tmp_path, settings)
    yield program
    program.kill()


def run_until_finished(program: Program, store: KubernetesStore, names: list[str]) -> dict[str, QLoRAJob]:
    """Keep the controller going until the jobs have succeeded and nothing is held for them."""
    deadline = time.monotonic() + FINISH_SECONDS
    while True:
        program.keep_running()
        jobs = {name: store.read_job("team-a", name) for name in names}
        if all(is_over(job) for job in jobs.values()):
            return jobs
        if time.monotonic() > deadline:
            told = {name: (job.status.summary, job.status.mlflow) for name, job in jobs.items()}
            raise AssertionError(f"not finished: {told}\n{program.log.read_text()[-4000:]}")
        time.sleep(0.1)


def is_over(job: QLoRAJob) -> bool:
    return (
        job.status.is_true(ConditionType.FINISHED)
        and job.status.mlflow.run_status == "FINISHED"
        and RELEASE_FINALIZER not in job.metadata.finalizers
    )


def runs_of(folder: Path) -> list[tuple[str, str]]:
    """(job's uid, status) of every run in MLflow's database."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
            "WHERE t.key = 'qlora.dev/job-uid'"
        ).fetchall()


def check(api: KubeApi, kubelet: PaperKubelet, jobs: dict[str, QLoRAJob], folder: Path) -> None:
    """No job lost, no second pod at one time, no GPU kept, one run each."""
    assert kubelet.books.overlaps == []
    assert sorted(runs_of(folder)) == sorted((job.metadata.uid, "FINISHED") for job in jobs.values())
    for item in api.get(path_of("v1", "pods", "team-a"))["items"]:
        assert item["status"]["phase"] in ("Succeeded", "Failed"), item["metadata"]["name"]
    for job in jobs.values():
        assert kubelet.books.steps[job.metadata.uid] == 120
        stages = [(attempt.stage, attempt.number) for attempt in job.status.attempts]
        assert len(stages) == len(set(stages)) == job.status.attempts_total


def submit_two(store: KubernetesStore) -> list[str]:
    for name in ("first", "second"):
        store.create_job(submitted_job(name, **ON_THE_HUB))
    return ["first", "second"]


def test_two_jobs_come_through_and_every_write_is_counted(
    api: KubeApi, proxy: Proxy, program: Program, tmp_path: Path
) -> None:
    store = KubernetesStore(api)
    with PaperKubelet(api, "gpu-1") as kubelet:
        jobs = run_until_finished(program, store, submit_two(store))
        check(api, kubelet, jobs, tmp_path)
    assert all(kubelet.books.started[job.metadata.uid] == 1 for job in jobs.values())


FOREIGN: dict[str, dict[str, Any]] = {
    "a-file": {"model": ModelSource(source="file:///var/cache/qlora/huggingface/hub/models--acme--secret")},
    "another-team": {"model": ModelSource(source="s3://adapters/jobs/team-b/medical-1/adapter")},
    "another-job": {"store": StoreSpec(uri="s3://adapters/jobs/team-b/medical-1")},
    "reserved": {"dataset": DatasetSource(source="pvc://mlflow/mlflow.csv")},
}


def test_a_job_that_names_what_is_not_its_own_ends_without_a_pod(api: KubeApi, proxy: Proxy, program: Program) -> None:
    """The controller's own word, where no admission policy stands before it."""
    store = KubernetesStore(api)
    for name, spec in FOREIGN.items():
        store.create_job(submitted_job(name, **{**ON_THE_HUB, **spec}))
    deadline = time.monotonic() + FINISH_SECONDS
    while True:
        program.keep_running()
        jobs = [store.read_job("team-a", name) for name in FOREIGN]
        if all(job.status.is_true(ConditionType.FINISHED) for job in jobs):
            break
        assert time.monotonic() < deadline, program.log.read_text()[-4000:]
        time.sleep(0.1)
    assert {finished.reason for job in jobs if (finished := job.status.condition(ConditionType.FINISHED))} == {
        Reason.USER_ERROR
    }
    assert [job.status.attempts_total for job in jobs] == [0] * len(FOREIGN)
    assert api.get(path_of("v1", "pods", "team-a"))["items"] == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_each_of_its_writes_it_loses_nothing(
    api: KubeApi, proxy: Proxy, program: Program, tmp_path: Path, moment: str
) -> None:
    """Kills come after every write that was carried out, and before every other: one that never passes ends nothing."""
    store = KubernetesStore(api)
    killed: list[int] = []

    def kill_at(number: int, when: str) -> None:
        if when == moment and (moment == "after" or number % 2 == 0):
            killed.append(number)
            program.kill()

    proxy.on_write = kill_at
    with PaperKubelet(api, "gpu-1") as kubelet:
        jobs = run_until_finished(program, store, submit_two(store))
        check(api, kubelet, jobs, tmp_path)
    assert len(killed) >= MIN_KILLS


def test_a_faulty_connection_delays_jobs_and_loses_none(
    api: KubeApi, proxy: Proxy, program: Program, tmp_path: Path
) -> None:
    store = KubernetesStore(api)
    proxy.faults = Faults(
        drop_events=0.1,
        repeat_events=0.1,
        delay_events=0.1,
        delay_seconds=0.2,
        end_watches=0.05,
        stale_reads=0.1,
        errors=0.1,
        lost_answers=0.1,
    )
    with PaperKubelet(api, "gpu-1") as kubelet:
        jobs = run_until_finished(program, store, submit_two(store))
        check(api, kubelet, jobs, tmp_path)
