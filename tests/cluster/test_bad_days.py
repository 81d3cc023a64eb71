"""A cluster's ordinary bad days on a real API server with its controllers: jobs wait in words, and go on by themselves.

Admission webhooks that refuse, break and hang, a quota, evictions, a token that is taken back, a namespace and the
resource itself deleted with jobs in them. Pods are played by a kubelet on paper.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import STAGE_LABEL
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.errors import NotFound
from tests.builders import ON_THE_HUB, submitted_job
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.controller_program import Program
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import CRD_PATH, CRDS, add_gpu_node, apply_crd, furnish, require
from tests.cluster.webhook import WORDS, webhook_server

WAIT_SECONDS = 120.0
END_SECONDS = 60.0
"""Within which what is deleted is gone."""
SETTINGS = {"QLORA_GRACE_SECONDS": "1", "QLORA_CREATION_LIMIT_SECONDS": "2", "QLORA_STRANDED_SECONDS": "2"}
NODES = ("gpu-1", "gpu-2")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster with two GPUs, whose controllers keep quotas, and take away what goes with what is deleted."""
    require("etcd", "kube-apiserver", "kube-controller-manager")
    folder = tmp_path_factory.mktemp("bad-days")
    with control_plane(folder / "plane", "kube-controller-manager") as plane:
        furnish(plane.api())
        for name in NODES:
            add_gpu_node(plane.api(), name, 24_564)
        yield plane


@pytest.fixture(scope="module")
def kubelet(plane: ControlPlane) -> Iterator[PaperKubelet]:
    with PaperKubelet(plane.api(), *NODES, heartbeats=True) as kubelet:
        yield kubelet


@pytest.fixture(scope="module")
def program(plane: ControlPlane, new_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The controller, with an account whose token can be taken back."""
    folder = tmp_path_factory.mktemp("controller")
    shutil.copyfile(new_database, folder / "mlflow.db")
    give_token(plane)
    program = Program(plane.folder / "controller.kubeconfig", folder, SETTINGS)
    yield program
    program.kill()


def give_token(plane: ControlPlane) -> None:
    """An account that may do everything, and a kubeconfig with its token."""
    api, account = plane.api(), path_of("v1", "serviceaccounts", "default")
    api.create(account, {"metadata": {"name": "controller"}})
    bindings = path_of("rbac.authorization.k8s.io/v1", "clusterrolebindings")
    subject = {"kind": "ServiceAccount", "name": "controller", "namespace": "default"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    if not [item for item in api.get(bindings)["items"] if item["metadata"]["name"] == "controller"]:
        api.create(bindings, {"metadata": {"name": "controller"}, "roleRef": role, "subjects": [subject]})
    token = api.create(f"{account}/controller/token", {"spec": {"expirationSeconds": 3600}})["status"]["token"]
    plane.kubeconfig_for(token, name="controller")


def until(
    program: Program, done: Callable[[], bool], what: Callable[[], object], seconds: float = WAIT_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        program.keep_running()
        assert time.monotonic() < deadline, f"{what()}\n{program.log.read_text()[-4000:]}"
        time.sleep(0.05)


def succeeded(job: QLoRAJob) -> bool:
    finished = job.status.condition(ConditionType.FINISHED)
    return finished is not None and finished.reason is Reason.SUCCEEDED


def is_gone(api: KubeApi, path: str) -> bool:
    try:
        api.get(path)
    except NotFound:
        return True
    return False


def trains(job: QLoRAJob) -> list[Reason | None]:
    return [attempt.reason for attempt in job.status.attempts if attempt.stage == "train"]


def test_pods_that_are_refused_give_their_gpu_back_say_why_and_go_on_by_themselves(
    plane: ControlPlane, program: Program, kubelet: PaperKubelet, tmp_path: Path
) -> None:
    """Four namespaces, each with its own trouble about pods with GPUs; a fifth gets its job done meanwhile."""
    api, store = plane.api(), KubernetesStore(plane.api())
    reasons = {
        "denies": Reason.ADMISSION_REFUSED,
        "breaks": Reason.START_FAILED,
        "sleeps": Reason.START_FAILED,
        "quota": Reason.QUOTA_EXCEEDED,
    }
    quotas = path_of("v1", "resourcequotas", "quota")
    with webhook_server(tmp_path) as server:
        for name in reasons:
            api.create(path_of("v1", "namespaces"), {"metadata": {"name": name}})
            if name != "quota":
                server.register(api, name, name, {STAGE_LABEL: "train"})
        api.create(quotas, {"metadata": {"name": "none"}, "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}})
        until(program, lambda: "hard" in api.get(f"{quotas}/none").get("status", {}), lambda: "no quota")
        for name in reasons:
            store.create_job(submitted_job("medical", namespace=name, **ON_THE_HUB))

        def jobs() -> dict[str, QLoRAJob]:
            return {name: store.read_job(name, "medical") for name in reasons}

        def told() -> object:
            return {name: (job.status.summary, trains(job)) for name, job in jobs().items()}

        until(program, lambda: all(reasons[name] in trains(job) for name, job in jobs().items()), told)
        assert all(set(trains(job)) - {None} == {reasons[name]} for name, job in jobs().items())
        words = {
            name: next(a.message for a in job.status.attempts if a.reason is reasons[name])
            for name, job in jobs().items()
        }
        assert WORDS in words["denies"]
        assert "exceeded quota: none" in words["quota"]
        store.create_job(submitted_job("other", **ON_THE_HUB))
        until(program, lambda: succeeded(store.read_job("team-a", "other")), told)
        for name in reasons:
            server.withdraw(api, name)
        api.delete(f"{quotas}/none")
        until(program, lambda: all(succeeded(job) for job in jobs().values()), told)


def test_an_eviction_costs_no_failure(plane: ControlPlane, program: Program, kubelet: PaperKubelet) -> None:
    api, store = plane.api(), KubernetesStore(plane.api())
    kubelet.train_seconds = 3.0
    store.create_job(submitted_job("evicted", **ON_THE_HUB))

    def job() -> QLoRAJob:
        return store.read_job("team-a", "evicted")

    until(program, lambda: job().status.is_true(ConditionType.RUNNING), lambda: job().status.summary)
    attempt = job().status.active_attempt
    assert attempt is not None
    name = job().stage_name(attempt)
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": "team-a"}}
    api.create(f"{path_of('v1', 'pods', 'team-a', name)}/eviction", body)
    until(program, lambda: succeeded(job()), lambda: job().status.summary)
    assert trains(job()) == [Reason.DISRUPTED, Reason.SUCCEEDED]
    assert job().status.failures_total == 0


def test_a_token_that_is_taken_back_ends_nothing(plane: ControlPlane, program: Program, kubelet: PaperKubelet) -> None:
    """The account is deleted while a stage runs; whatever comes of it then, it is read with the token of the next."""
    api, store = plane.api(), KubernetesStore(plane.api())
    kubelet.train_seconds = 600.0
    store.create_job(submitted_job("tokens", **ON_THE_HUB))

    def job() -> QLoRAJob:
        return store.read_job("team-a", "tokens")

    until(program, lambda: job().status.is_true(ConditionType.RUNNING), lambda: job().status.summary)
    api.delete(path_of("v1", "serviceaccounts", "default", "controller"))
    until(program, lambda: "have expired or are not known there" in program.log.read_text(), lambda: "no 401")
    kubelet.train_seconds = 0.1
    time.sleep(2)  # the stage ends, and nobody may tell
    assert not succeeded(job())
    give_token(plane)
    until(program, lambda: succeeded(job()), lambda: job().status.summary)
    assert trains(job()) == [Reason.SUCCEEDED]
    assert job().status.failures_total == 0


def test_a_namespace_that_is_deleted_with_jobs_in_it_is_gone_and_leaves_its_gpus(
    plane: ControlPlane, program: Program, kubelet: PaperKubelet
) -> None:
    api, store = plane.api(), KubernetesStore(plane.api())
    kubelet.train_seconds = 600.0
    api.create(path_of("v1", "namespaces"), {"metadata": {"name": "doomed"}})
    for name in ("runs", "runs-too", "waits"):
        store.create_job(submitted_job(name, namespace="doomed", **ON_THE_HUB))

    def running() -> list[str]:
        jobs = (store.read_job("doomed", name) for name in ("runs", "runs-too", "waits"))
        return [job.metadata.name for job in jobs if job.status.is_true(ConditionType.RUNNING)]

    until(program, lambda: len(running()) == len(NODES), running)
    kubelet.train_seconds = 0.3
    store.create_job(submitted_job("heir", **ON_THE_HUB))
    api.delete(path_of("v1", "namespaces", name="doomed"))
    path = path_of("v1", "namespaces", name="doomed")
    until(program, lambda: is_gone(api, path), lambda: api.get(path)["status"], END_SECONDS)
    heir: Callable[[], QLoRAJob] = lambda: store.read_job("team-a", "heir")  # noqa: E731
    until(program, lambda: succeeded(heir()), lambda: heir().status.summary)


def test_the_resource_is_deleted_with_jobs_in_it_and_comes_back(
    plane: ControlPlane, program: Program, kubelet: PaperKubelet
) -> None:
    api, store = plane.api(), KubernetesStore(plane.api())
    kubelet.train_seconds = 600.0
    for name in ("runs", "runs-too", "waits"):
        store.create_job(submitted_job(name, **ON_THE_HUB))

    def running() -> list[str]:
        jobs = (store.read_job("team-a", name) for name in ("runs", "runs-too", "waits"))
        return [job.metadata.name for job in jobs if job.status.is_true(ConditionType.RUNNING)]

    until(program, lambda: len(running()) == len(NODES), running)
    kubelet.train_seconds = 0.3
    name = "qlorajobs.qlora.dev"
    [document] = [each for each in crds() if each["metadata"]["name"] == name]
    path = f"{CRD_PATH}/{name}"
    api.delete(path)
    left: Callable[[], object] = lambda: api.get(path_of(API_VERSION, "qlorajobs"))["items"]  # noqa: E731
    until(program, lambda: is_gone(api, path), left, END_SECONDS)
    process = program.process

    def at_work() -> list[str]:
        """Pods with a GPU; ended ones are left for the cluster's garbage collector, which may not know the CRD yet."""
        pods = api.get(path_of("v1", "pods", "team-a"))["items"]
        trainers = [pod for pod in pods if "-train-" in pod["metadata"]["name"]]
        return [pod["metadata"]["name"] for pod in trainers if pod["status"]["phase"] in ("Pending", "Running")]

    until(program, lambda: not at_work(), at_work)
    apply_crd(api, document)
    store.create_job(submitted_job("again", **ON_THE_HUB))
    again: Callable[[], QLoRAJob] = lambda: store.read_job("team-a", "again")  # noqa: E731
    until(program, lambda: succeeded(again()), lambda: again().status.summary)
    assert program.process is process, "the controller did not live through it"


def crds() -> Iterator[Json]:
    import yaml

    for file in sorted(CRDS.glob("*.yaml")):
        yield from yaml.safe_load_all(file.read_text())
