"""What a control plane needs before a test can use it: our resources and namespaces; and what the machine needs."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.api.base import API_VERSION
from orchestrator.errors import AlreadyExists, NotFound, OrchestratorError
from tests.cluster.binaries import MissingProgramError, program

CRDS = Path(__file__).parents[2] / "helm/qlora-orchestrator/files/crds"
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
NAMESPACES = ("team-a", "team-b")
ESTABLISHED_SECONDS = 30.0


def require(*names: str) -> None:
    """Skip on a machine without these programs; where everything has to run that is a failure."""
    try:
        for name in names:
            program(name)
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


def furnish(api: KubeApi) -> None:
    """Our resources, established, and the tests' namespaces."""
    for file in sorted(CRDS.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            apply_crd(api, document)
    for name in NAMESPACES:
        try:
            api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        except AlreadyExists:
            continue


def clear(api: KubeApi) -> None:
    """Take away the jobs, sweeps and queues of earlier tests, whoever holds them."""
    for namespace in NAMESPACES:
        for item in api.get(path_of(API_VERSION, "qlorasweeps", namespace))["items"]:
            api.delete(path_of(API_VERSION, "qlorasweeps", namespace, item["metadata"]["name"]))
        for item in api.get(path_of(API_VERSION, "qlorajobs", namespace))["items"]:
            path = path_of(API_VERSION, "qlorajobs", namespace, item["metadata"]["name"])
            if item["metadata"].get("finalizers"):
                api.patch(path, {"metadata": {"finalizers": None}})
            with contextlib.suppress(NotFound):  # it waited for its finalizer only
                api.delete(path)
    for item in api.get(path_of(API_VERSION, "qloraqueues"))["items"]:
        api.delete(path_of(API_VERSION, "qloraqueues", name=item["metadata"]["name"]))


def add_gpu_node(api: KubeApi, name: str, memory_mib: int) -> None:
    """A node with one GPU, ready for pods that nobody runs."""
    labels = {"nvidia.com/gpu.memory": str(memory_mib)}
    api.create(path_of("v1", "nodes"), {"metadata": {"name": name, "labels": labels}})
    have = {"nvidia.com/gpu": "1", "cpu": "8", "memory": "64Gi", "pods": "10"}
    status = {"allocatable": have, "capacity": have, "conditions": [{"type": "Ready", "status": "True"}]}
    api.patch(f"{path_of('v1', 'nodes', name=name)}/status", {"status": status}, STRATEGIC_PATCH)


def apply_crd(api: KubeApi, document: Json) -> None:
    """Create a resource definition and wait until it is served."""
    api.create(CRD_PATH, document)
    deadline = time.monotonic() + ESTABLISHED_SECONDS
    path = f"{CRD_PATH}/{document['metadata']['name']}"
    while not _is_served(api, api.get(path)):
        assert time.monotonic() < deadline, f"{document['metadata']['name']} was not established"
        time.sleep(0.05)


def _is_served(api: KubeApi, found: Json) -> bool:
    conditions: list[Json] = found.get("status", {}).get("conditions") or []
    if not any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions):
        return False
    spec: Json = found["spec"]
    try:
        api.get(f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}")
    except OrchestratorError:
        return False
    return True


def clear_all(api: KubeApi) -> None:
    """Also without pods, nodes and the controller's lease: a cluster that nobody has used."""
    clear(api)
    for namespace in ("team-a", "team-b"):
        for item in api.get(path_of("v1", "pods", namespace))["items"]:
            with contextlib.suppress(OrchestratorError):
                api.delete(path_of("v1", "pods", namespace, item["metadata"]["name"]), {"gracePeriodSeconds": 0})
    for item in api.get(path_of("v1", "nodes"))["items"]:
        api.delete(path_of("v1", "nodes", name=item["metadata"]["name"]))
    with contextlib.suppress(OrchestratorError):
        api.delete("/apis/coordination.k8s.io/v1/namespaces/default/leases/qlora-orchestrator")
