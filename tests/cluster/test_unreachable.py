"""A node that stops heartbeating, as a cluster's own node controller deals with it: its job goes on elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import Json, path_of
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from tests.builders import ON_THE_HUB, submitted_job
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.controller_program import Program
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import add_gpu_node, furnish, require

WAIT_SECONDS = 120.0
ARGUMENTS = {
    "kube-controller-manager": ["--node-monitor-grace-period=4s", "--node-monitor-period=500ms"],
    "kube-apiserver": ["--default-unreachable-toleration-seconds=2", "--default-not-ready-toleration-seconds=2"],
}
SETTINGS = {"QLORA_GRACE_SECONDS": "1", "QLORA_STRANDED_SECONDS": "2"}


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A cluster whose node controller evicts from nodes that it does not hear of, after seconds."""
    require("etcd", "kube-apiserver", "kube-controller-manager")
    with control_plane(tmp_path / "plane", "kube-controller-manager", arguments=ARGUMENTS) as plane:
        furnish(plane.api())
        yield plane


@pytest.fixture
def program(plane: ControlPlane, new_database: Path, tmp_path: Path) -> Iterator[Program]:
    """The controller, not started yet."""
    shutil.copyfile(new_database, tmp_path / "mlflow.db")
    program = Program(plane.kubeconfig, tmp_path, SETTINGS)
    yield program
    program.kill()


def test_a_job_goes_on_elsewhere_when_its_node_stops_heartbeating(plane: ControlPlane, program: Program) -> None:
    api, store = plane.api(), KubernetesStore(plane.api())
    for name in ("gpu-1", "gpu-2"):
        add_gpu_node(api, name, 24_564)
    store.create_job(submitted_job("medical", **ON_THE_HUB))

    def pods() -> dict[str, Json]:
        return {item["metadata"]["name"]: item for item in api.get(path_of("v1", "pods", "team-a"))["items"]}

    with PaperKubelet(api, "gpu-1", "gpu-2", train_seconds=5.0, heartbeats=True) as kubelet:
        until(program, store, lambda job: job.status.is_true(ConditionType.RUNNING))
        kubelet.unreachable = frozenset({"gpu-1"})
        job = until(program, store, lambda job: job.status.is_true(ConditionType.FINISHED))
        trains = [attempt for attempt in job.status.attempts if attempt.stage == "train"]
        assert [(a.reason, a.node) for a in trains] == [(Reason.DISRUPTED, "gpu-1"), (Reason.SUCCEEDED, "gpu-2")]
        assert "gpu-1 does not answer" in (trains[0].message or "")
        lost = pods()[job.stage_name(trains[0])]
        assert lost["metadata"]["deletionTimestamp"], "nobody but its kubelet may say that it has ended"
        kubelet.unreachable = frozenset()
        until(program, store, lambda job: job.stage_name(trains[0]) not in pods())


def until(program: Program, store: KubernetesStore, done: Callable[[QLoRAJob], bool]) -> QLoRAJob:
    """The job once it is as wanted."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not done(job := store.read_job("team-a", "medical")):
        program.keep_running()
        told = f"{job.status.summary}\n{program.log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"it did not come in time: {told}"
        time.sleep(0.1)
    return job
