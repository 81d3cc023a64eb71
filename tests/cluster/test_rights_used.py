"""No right that nobody uses: what accounts ask a real API server for, held against what the chart's roles grant.

The controller's program runs under the chart's own account and role, so a right that is missing fails here, too. People
are played by `kubectl` and the SDK. What was asked is read from the server's audit log.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import Forbidden, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.adapters.kubernetes.pods import KubernetesPods
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import ObjectMeta
from orchestrator.api.notification import Webhook
from orchestrator.api.queue import QLoRAQueue
from orchestrator.errors import NotFound
from tests.builders import ON_THE_HUB, submitted_job, submitted_sweep
from tests.cluster.accounts import (
    ROLE,
    Request,
    account,
    acting_as,
    audit_arguments,
    binding,
    chart_parts,
    create,
    kubeconfig_of,
    requests_of,
    roles_and_accounts,
)
from tests.cluster.binaries import program as binary
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.controller_program import Program
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import add_gpu_node, furnish, require
from tests.cluster.test_pods import make_task
from tests.deploy.render import NAMESPACE, documents

USERS = ("submitter", "viewer", "queue-admin")
PATIENCE_SECONDS = 120.0
VALUES = "jobs.namespaces={team-a},gpu.mode=dra"
OWNER_RIGHT = ("update", "qlora.dev", "qlorajobs/finalizers")
"""Asked for by an admission plugin of the server's and not by a request."""
SETTINGS = {"QLORA_NAMESPACE": NAMESPACE, "QLORA_WATCH_NAMESPACES": "team-a"}

Right = tuple[str, str, str]
"""Verb, group, resource."""


WEBHOOK = Webhook(name="ci", url="https://ci.example.com/hook", events=("job.queued",))
"""Its secret is looked for, and is not there."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that writes an audit log, asks for rights over owners, and has the chart's roles and policies."""
    require("etcd", "kube-apiserver", "kubectl", "helm")
    folder = tmp_path_factory.mktemp("rights")
    arguments = [*audit_arguments(folder), "--enable-admission-plugins=OwnerReferencesPermissionEnforcement"]
    with control_plane(folder, arguments={"kube-apiserver": arguments}) as plane:
        api = plane.api()
        furnish(api)
        api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        for document in documents(roles_and_accounts(VALUES) + chart_parts("admission", values=VALUES)):
            create(api, document)
        for name in USERS:
            create(api, account(name))
            create(api, binding("ClusterRoleBinding", name, f"{ROLE}-{name}"))
        add_gpu_node(api, "gpu-1", 24_564)
        yield plane


def test_the_controller_uses_each_of_its_rights_and_asks_for_no_other(
    plane: ControlPlane, new_database: Path, tmp_path: Path
) -> None:
    shutil.copyfile(new_database, tmp_path / "mlflow.db")
    program = Program(kubeconfig_of(plane, "controller"), tmp_path, SETTINGS)
    try:
        run_a_job_that_expires_and_one_that_is_suspended(plane.api(), program)
    finally:
        program.kill()
    meet_what_a_lost_answer_leaves(acting_as(plane, "controller"), plane.api())
    asked = list(requests_of(plane.folder, "controller"))
    assert [request for request in asked if request.code in (401, 403, 422)] == []
    granted = granted_to(plane.api(), "clusterroles", f"{ROLE}-cluster", f"{ROLE}-jobs") | granted_to(
        plane.api(), f"namespaces/{NAMESPACE}/roles", "qlora-orchestrator-leader"
    )
    assert used(asked) | {OWNER_RIGHT} == granted
    assert {request.name for request in asked if request.resource == "leases"} == {"qlora-orchestrator"}


def run_a_job_that_expires_and_one_that_is_suspended(api: KubeApi, program: Program) -> None:
    store = KubernetesStore(api)
    store.apply_queue(QLoRAQueue(metadata=ObjectMeta(name="default")))  # as the chart does
    with PaperKubelet(api, "gpu-1", train_seconds=0.2) as kubelet:
        store.create_job(submitted_job("brief", ttl_seconds_after_finished=1, **ON_THE_HUB))
        wait_for(program, lambda: is_gone(store, "brief"))
        sweep = submitted_sweep(trials=1, metric={"name": "train/loss"})
        store.create_sweep(sweep)
        wait_for(program, lambda: store.list_sweeps()[0].status.finish_time is not None)
        assert [trial.job for trial in store.list_sweeps()[0].status.trials] == ["search-0"]
        store.delete_sweep("team-a", "search")
    [queue] = store.list_queues()
    assert {had.user for had in queue.status.months} == {"team-a"}, "what the job had outlives it"
    with PaperKubelet(api, "gpu-1", train_seconds=PATIENCE_SECONDS) as kubelet:
        held = store.create_job(submitted_job("held", notifications=(WEBHOOK,), **ON_THE_HUB))
        wait_for(program, lambda: bool(kubelet.books.running.get(held.metadata.uid)))
        api.patch(path_of(API_VERSION, "qlorajobs", "team-a", "held"), {"spec": {"suspend": True}})
        wait_for(program, lambda: not kubelet.books.running[held.metadata.uid])


def meet_what_a_lost_answer_leaves(controller: KubeApi, admin: KubeApi) -> None:
    """A write whose answer was lost is made again: the pod is there, and the job is newer than the view has it."""
    job = KubernetesStore(admin).create_job(submitted_job("lost"))
    policy = PodPolicy(trainer_image="trainer:1", tracking_uri="http://mlflow", gpu_mode="dra")
    pods = KubernetesPods(controller, Changes(), policy, RuntimeBounds(), namespaces=("team-a",))
    for _ in range(2):
        pods.ensure(make_task(1, uid=job.metadata.uid), "24Gi")
    assert KubernetesStore(controller).read_job("team-a", "lost").metadata.uid == job.metadata.uid


def test_without_a_right_over_jobs_nobody_makes_one_the_owner_of_a_pod(plane: ControlPlane) -> None:
    """Why the role grants `qlorajobs/finalizers`: a server may ask for it (OpenShift does)."""
    api = plane.api()
    create(api, account("pod-maker"))
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "rules": rules}
    create(api, {**role, "metadata": {"name": "pod-maker"}})
    create(api, binding("RoleBinding", "pod-maker", "pod-maker"))
    job = KubernetesStore(api).create_job(submitted_job("owner"))
    owner = {"apiVersion": API_VERSION, "kind": "QLoRAJob", "name": "owner", "uid": job.metadata.uid}
    meta = {"name": "owned", "ownerReferences": [{**owner, "blockOwnerDeletion": True}]}
    pod = {"metadata": meta, "spec": {"containers": [{"name": "main", "image": "none"}]}}
    with pytest.raises(Forbidden, match="set blockOwnerDeletion"):
        acting_as(plane, "pod-maker").create("/api/v1/namespaces/team-a/pods", pod)
    acting_as(plane, "controller").create("/api/v1/namespaces/team-a/pods", pod)


def test_the_lease_is_the_only_one_of_its_namespace_that_is_touched(plane: ControlPlane) -> None:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
    other = plane.api().create(path, {"metadata": {"name": "of-somebody-else"}, "spec": {}})
    controller = acting_as(plane, "controller")
    with pytest.raises(Forbidden):
        controller.get(f"{path}/of-somebody-else")
    with pytest.raises(Forbidden):
        controller.replace(f"{path}/of-somebody-else", other)


SUBMITTED = json.dumps(
    {
        "apiVersion": API_VERSION,
        "kind": "QLoRAJob",
        "metadata": {"name": "mine", "namespace": "team-a"},
        "spec": {"model": {"source": "pvc://data/model"}, "dataset": {"source": "pvc://data/d.jsonl"}},
    }
)
QUEUE = json.dumps({"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": "shared"}, "spec": {}})
SWEEP = json.dumps(submitted_sweep("tried").to_wire())
LOOK_AT_SWEEPS = ("get qs", "get qs/first", "get qs --watch --request-timeout=1s")
LOOK_AT_JOBS = ("get qj", "get qj/seen -o yaml", "get qj --watch --request-timeout=1s")
LOOK_AT_QUEUES = ("get qq", "get qq/first", "get qq --watch --request-timeout=1s")
DAYS_WORK: dict[str, tuple[tuple[str, str], ...]] = {
    "submitter": (
        ("create -f -", SUBMITTED),
        ("replace -f -", SUBMITTED),
        ('patch qj/mine --type=merge -p {"spec":{"suspend":true}}', ""),
        ("describe qj/mine", ""),
        ("delete qj/mine", ""),
        ("create -f -", SWEEP),
        ("replace -f -", SWEEP),
        ("annotate qs/tried qlora.dev/cancel=true", ""),
        ("delete qs/tried", ""),
        *((command, "") for command in (*LOOK_AT_JOBS, *LOOK_AT_QUEUES, *LOOK_AT_SWEEPS)),
        ("get pods", ""),
        ("get pods/seen-train-1", ""),
        ("get pods --watch --request-timeout=1s", ""),
        ("logs seen-train-1", ""),
        ("events --watch --request-timeout=1s", ""),
    ),
    "viewer": tuple((command, "") for command in (*LOOK_AT_JOBS, *LOOK_AT_QUEUES, *LOOK_AT_SWEEPS)),
    "queue-admin": (
        ("create -f -", QUEUE),
        ("replace -f -", QUEUE),
        ('patch qq/shared --type=merge -p {"spec":{"weight":2}}', ""),
        ("delete qq/shared", ""),
        *((command, "") for command in (*LOOK_AT_JOBS, *LOOK_AT_QUEUES)),
    ),
}
"""Commands of kubectl, and what they read from standard input."""


@pytest.mark.parametrize("name", USERS)
def test_people_use_each_right_of_their_role_and_ask_for_no_other(
    plane: ControlPlane, seen: None, name: str, tmp_path: Path
) -> None:
    config = kubeconfig_of(plane, name)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(config)}
    for command, text in DAYS_WORK[name]:
        words = [str(binary("kubectl")), "--namespace=team-a", *command.split(" ")]
        subprocess.run(words, input=text, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if name == "submitter":
        KubernetesStore(KubeApi(kubeconfig=str(config))).list_events("team-a", "seen")
    asked = list(requests_of(plane.folder, name))
    assert [request for request in asked if request.code in (401, 403)] == []
    assert used(asked) == granted_to(plane.api(), "clusterroles", f"{ROLE}-{name}")


@pytest.fixture
def seen(plane: ControlPlane) -> None:
    """Something to look at."""
    api = plane.api()
    for path, body in (
        (path_of(API_VERSION, "qlorajobs", "team-a"), {**json.loads(SUBMITTED), "metadata": {"name": "seen"}}),
        (path_of(API_VERSION, "qlorasweeps", "team-a"), {**json.loads(SWEEP), "metadata": {"name": "first"}}),
        (path_of(API_VERSION, "qloraqueues"), {**json.loads(QUEUE), "metadata": {"name": "first"}}),
        (
            "/api/v1/namespaces/team-a/pods",
            {"metadata": {"name": "seen-train-1"}, "spec": {"containers": [{"name": "main", "image": "none"}]}},
        ),
    ):
        try:
            api.get(f"{path}/{body['metadata']['name']}")
        except NotFound:
            api.create(path, body)


def wait_for(program: Program, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        program.keep_running()
        assert time.monotonic() < deadline, program.log.read_text()[-4000:]
        time.sleep(0.1)


def is_gone(store: KubernetesStore, name: str) -> bool:
    try:
        store.read_job("team-a", name)
    except NotFound:
        return True
    return False


def used(asked: list[Request]) -> set[Right]:
    return {(request.verb, request.group, request.resource) for request in asked}


def granted_to(api: KubeApi, place: str, *roles: str) -> set[Right]:
    """Every verb on every resource that the roles grant."""
    return {
        (verb, group, resource)
        for role in roles
        for rule in api.get(f"/apis/rbac.authorization.k8s.io/v1/{place}/{role}")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
