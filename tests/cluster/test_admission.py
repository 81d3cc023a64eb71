"""The chart's admission policies on a real API server: what who may do everything in a namespace may not do there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.api import Forbidden, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.objects import sweep_status_wire
from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds
from orchestrator.adapters.kubernetes.pod_manifest import JOB_UID_LABEL, MANAGED_BY_LABEL, MANAGER
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.adapters.kubernetes.pods import KubernetesPods
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import NOTIFY_FINALIZER, RELEASE_FINALIZER, MlflowStatus
from orchestrator.api.sweep import QLoRASweepStatus, TrialStatus
from orchestrator.errors import InvalidObject
from tests.builders import submitted_sweep
from tests.cluster.accounts import RBAC, account, acting_as, binding, chart_parts, create
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import furnish, require
from tests.cluster.test_pods import make_task
from tests.deploy.render import NAMESPACE, documents, rendered

VALUES = (
    "jobs.namespaces={team-a},modelCache=pvc://models,admissionPolicy.reservedClaims={payroll},"
    "webhooks.allowedHosts={ci.team-a.svc,*.Hooks.example,10.0.0.9}"
)
VALUES_FILES = sorted((Path(__file__).parents[1] / "deploy" / "values").glob("*.yaml"))
PARTS = ("admission", "rbac/controller", "controller/service-account")
ACTIVE_SECONDS = 60.0
PODS = "/api/v1/namespaces/team-a/pods"
JOBS = path_of(API_VERSION, "qlorajobs", "team-a")
SWEEPS = path_of(API_VERSION, "qlorasweeps", "team-a")
UID = "0b1d3c52-6f0e-4a57-9a45-2f1a4f4a8a11"
OWNER = {"apiVersion": API_VERSION, "kind": "QLoRAJob", "name": "victim", "uid": UID}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with the policies in force for team-a, and a tenant who may do everything in both teams'."""
    require("etcd", "kube-apiserver", "helm")
    with control_plane(tmp_path_factory.mktemp("admission")) as plane:
        api = plane.api()
        furnish(api)
        api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        for document in documents(chart_parts(*PARTS, values=VALUES)):
            create(api, document)
        create(api, account("tenant"))
        everything: Json = {"apiVersion": RBAC, "kind": "ClusterRole", "metadata": {"name": "everything"}}
        create(api, everything | {"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]})
        api.create(
            "/api/v1/namespaces/kube-system/serviceaccounts", {"metadata": {"name": "generic-garbage-collector"}}
        )
        create(api, everywhere("generic-garbage-collector", "kube-system"))
        for namespace in ("team-a", "team-b"):
            bound = binding("RoleBinding", "tenant", "everything")
            create(api, {**bound, "metadata": {"name": "tenant", "namespace": namespace}})
        wait_until_in_force(acting_as(plane, "tenant"))
        yield plane


def everywhere(name: str, namespace: str) -> Json:
    """Binds an account to everything in all namespaces."""
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    return {**binding("ClusterRoleBinding", name, "everything"), "subjects": [subject]}


def wait_until_in_force(tenant: KubeApi) -> None:
    deadline = time.monotonic() + ACTIVE_SECONDS
    for number in range(10_000):
        try:
            tenant.create(PODS, pod(f"early-{number}", labels={JOB_UID_LABEL: UID}))
            tenant.delete(f"{PODS}/early-{number}", {"gracePeriodSeconds": 0})
        except Forbidden:
            return
        assert time.monotonic() < deadline, "the policy did not come into force"
        time.sleep(0.2)


@pytest.fixture
def tenant(plane: ControlPlane) -> KubeApi:
    """Who may do everything in a team's namespace."""
    return acting_as(plane, "tenant")


@pytest.fixture
def stage(plane: ControlPlane) -> Iterator[str]:
    """The path of a stage's pod, made by the controller."""
    policy = PodPolicy(trainer_image="trainer:1", tracking_uri="http://mlflow")
    task = make_task(1, uid=UID)
    KubernetesPods(acting_as(plane, "controller"), Changes(), policy, RuntimeBounds()).ensure(task, "24Gi")
    path = f"{PODS}/{task.stage_name}"
    assert plane.api().get(path)["metadata"]["labels"][JOB_UID_LABEL] == UID
    yield path
    plane.api().delete(path, {"gracePeriodSeconds": 0})


@pytest.mark.parametrize(
    "marks",
    [
        {"labels": {JOB_UID_LABEL: UID}},
        {"labels": {"qlora.dev/job": "victim"}},
        {"labels": {MANAGED_BY_LABEL: MANAGER}},
        {"ownerReferences": [OWNER]},
    ],
    ids=["its job's uid", "its job's name", "its manager", "its owner"],
)
def test_who_may_create_pods_makes_none_in_a_jobs_name(tenant: KubeApi, marks: Json) -> None:
    with pytest.raises(Forbidden, match="submit a QLoRAJob instead"):
        tenant.create(PODS, pod("victim-train-2", **marks))
    tenant.create(PODS, pod("victim-train-2", labels={"app": "mine"}))
    try:
        with pytest.raises(Forbidden, match="submit a QLoRAJob instead"):
            tenant.patch(f"{PODS}/victim-train-2", {"metadata": marks})
    finally:
        tenant.delete(f"{PODS}/victim-train-2", {"gracePeriodSeconds": 0})


def test_a_stages_pod_keeps_its_marks_and_images_whoever_writes_to_it(tenant: KubeApi, stage: str) -> None:
    with pytest.raises(Forbidden, match="the controller's to set"):
        tenant.patch(stage, {"metadata": {"labels": {MANAGED_BY_LABEL: None}}})
    with pytest.raises(Forbidden, match="the controller's to set"):
        tenant.patch(stage, {"metadata": {"ownerReferences": None}})
    wanted = tenant.get(stage)["spec"]["containers"]
    with pytest.raises(Forbidden, match="its images"):
        tenant.patch(stage, {"spec": {"containers": [{**wanted[0], "image": "mine:1"}]}})
    assert (
        tenant.patch(stage, {"metadata": {"annotations": {"seen": "yes"}}})["metadata"]["annotations"]["seen"] == "yes"
    )


def test_a_job_may_be_deleted_without_its_pods(plane: ControlPlane, stage: str) -> None:
    """The server's garbage collector takes the owner off then, under an account of its own."""
    collector = acting_as(plane, "collector")
    left = collector.patch(stage, {"metadata": {"ownerReferences": None}})
    assert "ownerReferences" not in left["metadata"]


def test_other_pods_and_other_namespaces_are_none_of_its_business(tenant: KubeApi) -> None:
    tenant.create(PODS, pod("mine", labels={"app": "mine"}))
    tenant.patch(f"{PODS}/mine", {"spec": {"containers": [{"name": "main", "image": "newer"}]}})
    tenant.delete(f"{PODS}/mine", {"gracePeriodSeconds": 0})
    elsewhere = "/api/v1/namespaces/team-b/pods"
    tenant.create(elsewhere, pod("theirs", labels={MANAGED_BY_LABEL: MANAGER}))
    tenant.delete(f"{elsewhere}/theirs", {"gracePeriodSeconds": 0})


def test_a_status_is_the_controllers_to_write(plane: ControlPlane, tenant: KubeApi, job: str) -> None:
    path = f"{JOBS}/{job}/status"
    with pytest.raises(Forbidden, match="status is the controller's"):
        tenant.patch(path, {"status": {"summary": "done"}})
    controller = acting_as(plane, "controller")
    stored = controller.get(f"{JOBS}/{job}")
    assert controller.replace(path, {**stored, "status": {"summary": "seen"}})["status"]["summary"] == "seen"


def test_a_finalizer_stays_while_the_job_holds_something(plane: ControlPlane, tenant: KubeApi, job: str) -> None:
    path = f"{JOBS}/{job}"
    held = {"metadata": {"finalizers": [RELEASE_FINALIZER, "example.com/mine"]}}
    for status in ({"mlflow": {"runId": "r", "runStatus": "RUNNING"}}, {"attempts": [attempt()], "attemptsTotal": 1}):
        plane.api().patch(path, held)
        plane.api().patch(f"{path}/status", {"status": {"mlflow": None, "attempts": None, **status}})
        with pytest.raises(Forbidden, match="holds a GPU"):
            tenant.patch(path, {"metadata": {"finalizers": None}})
        assert tenant.patch(path, {"metadata": {"finalizers": [RELEASE_FINALIZER]}})["metadata"]["finalizers"]
    plane.api().patch(f"{path}/status", {"status": {"mlflow": None, "attempts": None}})
    assert "finalizers" not in tenant.patch(path, {"metadata": {"finalizers": None}})["metadata"]


def test_the_finalizer_of_webhooks_stays_until_they_have_been_told(
    plane: ControlPlane, tenant: KubeApi, job: str
) -> None:
    path, over = f"{JOBS}/{job}", "2026-11-01T00:00:00Z"
    waiting = {"number": 1, "event": "job.succeeded", "time": over, "reason": "Succeeded", "recipients": ["job/ci"]}
    held: list[Json] = [
        {"notifications": {"total": 1}},
        {"notifications": {"total": 1, "outstanding": [waiting]}, "finishTime": over},
    ]
    for status in held:
        plane.api().patch(path, {"metadata": {"finalizers": [NOTIFY_FINALIZER]}})
        plane.api().patch(f"{path}/status", {"status": status})
        with pytest.raises(Forbidden, match="webhooks are still to be told"):
            tenant.patch(path, {"metadata": {"finalizers": None}})
    plane.api().patch(f"{path}/status", {"status": {"notifications": {"outstanding": None}}})
    assert "finalizers" not in tenant.patch(path, {"metadata": {"finalizers": None}})["metadata"]


def test_a_sweep_keeps_its_finalizer_and_its_status_until_its_run_has_its_end(
    plane: ControlPlane, tenant: KubeApi
) -> None:
    store = KubernetesStore(acting_as(plane, "controller"), namespaces=("team-a",))
    sweep = KubernetesStore(tenant, namespaces=("team-a",)).create_sweep(submitted_sweep())
    path = f"{SWEEPS}/search"
    trial = TrialStatus(index=0, job="search-0", uid="u", parameters={})
    sweep = store.update_sweep_status(sweep, QLoRASweepStatus(trials=(trial,)))
    with pytest.raises(Forbidden, match="status is the controller's"):
        tenant.patch(f"{path}/status", {"status": {"mlflow": {"runStatus": "KILLED"}}})
    with pytest.raises(Forbidden, match="MLflow run may be open"):
        tenant.patch(path, {"metadata": {"finalizers": None}})
    over = sweep.status.model_copy(update={"finish_time": datetime(2026, 11, 1, tzinfo=UTC)})
    sweep = store.update_sweep_status(sweep, over)
    with pytest.raises(Forbidden, match="MLflow run may be open"):
        tenant.patch(path, {"metadata": {"finalizers": None}})
    tenant.delete(path)
    [sweep] = store.list_sweeps("team-a")
    told = over.model_copy(update={"mlflow": MlflowStatus(run_status="KILLED")})
    plane.api().replace(f"{path}/status", sweep_status_wire(sweep, told))
    tenant.patch(path, {"metadata": {"finalizers": None}})
    assert store.list_sweeps("team-a") == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"model": {"source": "file:///models/tiny"}}, "file:// names files of one machine"),
        ({"store": {"uri": "file:///var/lib/qlora/cache"}}, "file:// names files of one machine"),
        (
            {"dataset": {"source": "pvc://payroll/2026.jsonl"}},
            "claims that no job may name: qlora-orchestrator-mlflow, payroll, models",
        ),
        ({"model": {"source": "pvc://qlora-orchestrator-mlflow/artifacts"}}, "claims that no job may name"),
        ({"store": {"uri": "pvc://payroll"}}, "claims that no job may name"),
        ({"store": {"uri": "pvc://models/mine"}}, "claims that no job may name: .*, models"),
        ({"model": {"source": "pvc://models/hub/models--theirs"}}, "claims that no job may name: .*, models"),
        ({"dataset": {"source": "pvc://models/d.jsonl"}}, "claims that no job may name: .*, models"),
    ],
    ids=[
        *("a machine's model", "a machine's folder", "reserved data", "MLflow's claim", "a reserved store"),
        *("the cache", "a cached model", "cached data"),
    ],
)
def test_a_job_that_names_what_is_not_its_own_is_refused(tenant: KubeApi, spec: Json, words: str) -> None:
    with pytest.raises(InvalidObject, match=words):
        tenant.create(JOBS, submission("greedy", **spec))


WEBHOOK_WORDS = "a webhook is https:// and a name"


@pytest.mark.parametrize(
    ("url", "is_taken"),
    [
        ("https://ci.example.com/hook", True),
        ("http://ci.example.com/hook", False),
        ("https://169.254.169.254/latest/meta-data", False),
        ("https://10.0.0.1/", False),
        ("https://[::1]:6443/api", False),
        ("https://[fd00:ec2::254]/", False),
        ("https://localhost/", False),
        ("https://a.LOCALHOST/", False),
        ("https://2130706433/", False),
        ("https://127.1/", False),
        ("http://ci.team-a.svc:8080/hook", True),
        ("http://a.hooks.example/hook", True),
        ("http://hooks.example/hook", False),
        ("http://10.0.0.9/hook", True),
        ("https://ci.team-a.svc.evil.example/", True),
        ("http://ci.team-a.svc.evil.example/", False),
    ],
)
def test_a_webhook_that_is_no_public_name_is_refused_unless_its_host_is_allowed(
    tenant: KubeApi, url: str, is_taken: bool
) -> None:
    job = submission("talkative", notifications=[{"name": "ci", "url": url}])
    if not is_taken:
        with pytest.raises(InvalidObject, match=WEBHOOK_WORDS):
            tenant.create(JOBS, job)
        return
    tenant.create(JOBS, job)
    KubernetesStore(tenant, namespaces=("team-a",)).delete_job("team-a", "talkative")


def test_a_job_that_names_what_is_its_own_is_taken(tenant: KubeApi) -> None:
    spec = {"model": {"source": "pvc://models-of-ours/tiny"}, "store": {"uri": "pvc://payroll-of-ours/mine"}}
    tenant.create(JOBS, submission("modest", **spec))
    KubernetesStore(tenant, namespaces=("team-a",)).delete_job("team-a", "modest")


def test_what_is_there_already_can_be_stopped(plane: ControlPlane, tenant: KubeApi) -> None:
    plane.api().create(JOBS, submission("older", model={"source": "file:///models/tiny"}))
    assert tenant.patch(f"{JOBS}/older", {"spec": {"suspend": True}})["spec"]["suspend"] is True
    tenant.delete(f"{JOBS}/older")


@pytest.mark.parametrize("values", [None, *VALUES_FILES], ids=lambda path: path.stem if path else "defaults")
def test_the_server_understands_the_policies_of_any_values(plane: ControlPlane, values: Path | None) -> None:
    """It compiles the expressions when a policy is created."""
    for document in documents(rendered(values, "--show-only", "templates/admission.yaml")):
        if document["kind"] == "ValidatingAdmissionPolicy":
            metadata: Any = document["metadata"]
            name = f"{metadata['name']}-{values.stem if values else 'defaults'}"
            create(plane.api(), {**document, "metadata": {"name": name}})


@pytest.fixture
def job(plane: ControlPlane) -> Iterator[str]:
    """A job of team-a."""
    plane.api().create(JOBS, submission("held"))
    yield "held"
    plane.api().patch(f"{JOBS}/held", {"metadata": {"finalizers": None}})
    plane.api().delete(f"{JOBS}/held")


def submission(name: str, **spec: Json) -> Json:
    sources = {"model": {"source": "pvc://data/model"}, "dataset": {"source": "pvc://data/d.jsonl"}}
    return {"apiVersion": API_VERSION, "kind": "QLoRAJob", "metadata": {"name": name}, "spec": {**sources, **spec}}


def attempt() -> Json:
    return {"number": 1, "stage": "train", "createdTime": "2026-11-01T00:00:00Z"}


def pod(name: str, **metadata: Any) -> Json:
    spec = {"containers": [{"name": "main", "image": "none"}]}
    return {"metadata": {"name": name, **metadata}, "spec": spec}
