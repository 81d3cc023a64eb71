"""Pods of strangers under the names of stages, on a real API server: nothing of them is believed, and no job hangs.

Who may create pods in a job's namespace may give one any name, label, owner and environment. What tells ours apart is
the uid that the server gave, or that the pod is just what would have been created; the judge of the latter is the
server's own stored form of what was sent.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_logs import PodLogs
from orchestrator.adapters.kubernetes.pod_manifest import pod
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy, PodTemplate
from orchestrator.adapters.kubernetes.pods import KubernetesPods, RuntimeBounds
from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.job import Attempt, DatasetSource, ModelSource, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.results import PublishResult, StageResult
from orchestrator.api.stage_name import StageKind
from orchestrator.api.task import StageTask
from orchestrator.controller.loop import Controller, Ports
from orchestrator.core.decide import decide
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import OrchestratorError
from tests.builders import prepare_result, submitted_job, train_result
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import clear
from tests.cluster.runtimes import Runtimes, started_runtimes
from tests.controller.fakes import FakeNotifier, FakeTracking

NAMESPACE = "team-a"
PODS = path_of("v1", "pods", NAMESPACE)
POLICY = PodPolicy(
    trainer_image="trainer:1",
    controller_image="controller:1",
    tracking_uri="http://mlflow:5000",
    ray_address="ray:6379",
    ray_auth_secret="ray-token",
    template=PodTemplate(labels={"team": "a"}, annotations={"note": "b"}, env=[{"name": "HTTPS_PROXY", "value": "p"}]),
)
BOUNDS = RuntimeBounds(gpu_classes="24Gi=1")
SETTINGS = ClusterSettings(
    namespace="default",
    pod_name="controller-0",
    store_uri="s3://adapters/jobs",
    tracking_uri="http://mlflow:5000",
    trainer_image="trainer:1",
    backoff_base_seconds=0.2,
)
WAIT_SECONDS = 60.0
ON_A_CLAIM = {
    "model": ModelSource(source="pvc://models/tiny"),
    "dataset": DatasetSource(source="pvc://data/tiny.jsonl"),
}
UID = "8f2d2f0e-0000-4000-8000-000000000001"
FAKED: dict[StageKind, StageResult] = {
    "prepare": StageResult(prepare=prepare_result().model_copy(update={"steps": 666})),
    "train": train_result(666),
    "publish": StageResult(publish=PublishResult(registered_model="faked", model_version="6", model_uri="models:/f/6")),
}


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    api = cluster.api()
    clear(api)
    for item in api.get(PODS)["items"]:
        with contextlib.suppress(OrchestratorError):
            api.delete(f"{PODS}/{item['metadata']['name']}", {"gracePeriodSeconds": 0})
    yield api
    api.close()


@pytest.fixture
def runtimes(cluster: ControlPlane, api: KubeApi) -> Iterator[Runtimes]:
    """Starts runtimes; one that is new knows nothing of what another created."""
    with started_runtimes(cluster, POLICY, BOUNDS) as start:
        yield start


def make_task(attempt: int = 2, stage: StageKind = "train", uid: str = UID) -> StageTask:
    spec = submitted_job().spec
    return StageTask(
        stage=stage, namespace=NAMESPACE, job="victim", uid=uid, attempt=attempt, spec=spec, store_uri="pvc://store/v"
    )


def wanted(task: StageTask) -> Json:
    """The manifest as it is sent."""
    return json.loads(json.dumps(pod(task, "24Gi" if task.stage == "train" else None, POLICY)))


def ensured(pods: KubernetesPods, task: StageTask) -> StageFact:
    pods.ensure(task, "24Gi" if task.stage == "train" else None)
    return pods.observe()[f"{NAMESPACE}/{task.stage_name}"]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.002)


def is_refused(fact: StageFact) -> bool:
    return (fact.phase, fact.disruption, fact.exit_code) == (StagePhase.EXITED, Reason.NAME_TAKEN, None)


# --- the whole service --------------------


@contextlib.contextmanager
def service(cluster: ControlPlane) -> Iterator[tuple[Controller, KubernetesStore]]:
    """A controller over the API server, whose rounds the test runs."""
    changes, connections = Changes(), [cluster.api(), cluster.api()]
    store = KubernetesStore(connections[0], changes=changes)
    runtime = KubernetesPods(connections[1], changes, POLICY, BOUNDS)
    runtime.start()
    store.start()
    ports = Ports(store=store, runtime=runtime, tracking=FakeTracking(), notifier=FakeNotifier())
    yield Controller(SETTINGS, ports, decide), store
    runtime.close()
    store.close()
    for connection in connections:
        connection.close()


def rounds(controller: Controller, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not until():
        assert time.monotonic() < deadline, "it did not come in time"
        controller.round()
        time.sleep(0.02)


def forged(job: QLoRAJob, stage: StageKind, attempt: int, *, labelled: bool) -> Json:
    """What who may create pods can make of a stage's pod: its name, labels and owner, and a program of one's own."""
    manifest = wanted(make_task(attempt, stage, job.metadata.uid or ""))
    [trainer] = manifest["spec"]["containers"]
    trainer.update(image="evil:1", command=["sh"], args=["-c", "echo done"])
    if not labelled:
        manifest["metadata"].pop("labels")
    return manifest


def fake_an_end(api: KubeApi, name: str, stage: StageKind) -> None:
    """The stranger's program ends with a result."""
    text = FAKED[stage].model_dump_json(by_alias=True, exclude_none=True)
    state = {"terminated": {"exitCode": 0, "startedAt": "2026-01-01T00:00:00Z", "message": text}}
    container = {"name": "trainer", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    status = {"phase": "Succeeded", "containerStatuses": [container]}
    api.patch(f"{PODS}/{name}/status", {"status": status}, STRATEGIC_PATCH)


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled as ours", "without our labels"])
@pytest.mark.parametrize("ends", [True, False], ids=["a faked result", "a pod that hangs"])
def test_a_job_gets_done_by_its_own_pods_whoever_stands_in_their_names(
    cluster: ControlPlane, api: KubeApi, ends: bool, labelled: bool
) -> None:
    store = KubernetesStore(cluster.api())
    job = store.create_job(submitted_job(name="victim", **ON_A_CLAIM))
    strangers: list[str] = []
    for attempt in (1, 2, 3):
        for stage in ("prepare", "train", "publish"):
            made = api.create(PODS, forged(job, stage, attempt, labelled=labelled))
            strangers.append(made["metadata"]["uid"])
            if ends:
                fake_an_end(api, made["metadata"]["name"], stage)
    with service(cluster) as (controller, seen), Kubelet(cluster.api(), without=strangers) as kubelet:
        rounds(controller, lambda: state_of(seen.get_job(NAMESPACE, "victim").status) is JobState.SUCCEEDED)
        done = seen.get_job(NAMESPACE, "victim").status
    assert done.prepared is not None
    assert done.prepared.steps != 666
    assert done.mlflow.registered_model == job.metadata.uid, "as the paper kubelet's publish says"
    assert kubelet.books.started[job.metadata.uid or ""] == 1
    told = [event for _, event in store.list_events(NAMESPACE, "victim") if event.reason is Reason.NAME_TAKEN]
    assert told, "nothing was said of what stood in the way"


class Kubelet(PaperKubelet):
    """Plays every pod but the strangers', whose programs do as they are told by the test."""

    def __init__(self, api: KubeApi, without: list[str]) -> None:
        super().__init__(api)
        self._without = frozenset(without)

    def _play(self, item: Json) -> None:
        if item["metadata"]["uid"] not in self._without:
            super()._play(item)
        elif "deletionTimestamp" in item["metadata"]:
            self._api.delete(f"{PODS}/{item['metadata']['name']}", {"gracePeriodSeconds": 0})


def test_the_name_of_a_strangers_pod_stays_taken_when_the_pod_is_forgotten(api: KubeApi, runtimes: Runtimes) -> None:
    api.create(PODS, wanted(make_task(7)))
    fake_an_end(api, "victim-train-7", "train")
    pods = runtimes()
    assert pods.observe()[f"{NAMESPACE}/victim-train-7"].phase is StagePhase.EXITED
    pods.delete(NAMESPACE, "victim-train-7")
    assert pods.observe() == {}
    assert pods.taken_names() == {f"{NAMESPACE}/victim-train-7"}


def test_a_strangers_finalizer_is_no_reason_to_delete_the_pod_again_and_again(
    cluster: ControlPlane, api: KubeApi
) -> None:
    manifest = wanted(make_task(7))
    manifest["metadata"]["finalizers"] = ["example.com/for-ever"]
    api.create(PODS, manifest)
    own = cluster.api()
    pods = KubernetesPods(own, Changes(), POLICY, replace(BOUNDS, stranded_seconds=0.0))
    pods.start()
    try:
        for _ in range(40):
            pods.stop(NAMESPACE, "victim-train-7", 1, Reason.FENCED)
            time.sleep(0.05)
        assert own.requests["DELETE", "pods"] <= 2
        assert own.requests["GET", "qlorajobs"] <= 2
    finally:
        pods.close()
        api.patch(f"{PODS}/victim-train-7", {"metadata": {"finalizers": None}})


@pytest.mark.parametrize("stage", ["prepare", "train", "publish"])
def test_what_comes_between_the_record_and_the_creation_costs_an_attempt_and_no_more(
    api: KubeApi, runtimes: Runtimes, stage: StageKind
) -> None:
    task = make_task(2, stage)
    manifest = wanted(task)
    manifest["spec"]["containers"][0]["image"] = "evil:1"
    api.create(PODS, manifest)
    fake_an_end(api, task.stage_name, stage)
    pods = runtimes()
    assert not pods.observe()[f"{NAMESPACE}/{task.stage_name}"].vouched, "before anybody looks"
    fact = ensured(pods, task)
    assert is_refused(fact)
    assert fact.result is not None
    assert fact.result.failure is not None
    assert 'spec.containers[0].image is "evil:1", not "trainer:1"' in fact.result.failure.message
    assert f"{NAMESPACE}/{task.stage_name}" in fact.result.failure.message


# --- what is adopted --------------------


@pytest.mark.parametrize("stage", ["prepare", "train", "publish"])
def test_a_pod_that_a_killed_controller_created_goes_on_under_the_next(
    api: KubeApi, runtimes: Runtimes, stage: StageKind
) -> None:
    task = make_task(2, stage)
    uid = ensured(runtimes(), task).stage_uid
    target = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "b"}, "target": {"kind": "Node", "name": "n"}}
    target["metadata"] = {"name": task.stage_name}
    api.create(f"{PODS}/{task.stage_name}/binding", target)
    second = runtimes()
    assert not second.observe()[f"{NAMESPACE}/{task.stage_name}"].vouched
    fact = ensured(second, task)
    assert (fact.vouched, fact.stage_uid, fact.phase) == (True, uid, StagePhase.PENDING)


def leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of everything in a manifest, whole parts included."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))


def at(manifest: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def changed(value: Any, chance: random.Random) -> Any:
    """Another value of the kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + chance.randint(1, 3)
    if isinstance(value, str):
        return chance.choice([f"{value}x", value[:-1] or "y", "z"])
    if isinstance(value, list):
        return chance.choice([value[:-1], value + value[:1]])
    return {key: part for key, part in value.items() if key != chance.choice(sorted(value))} if value else {"a": "b"}


ADDED: list[tuple[tuple[str | int, ...], Any]] = [
    (("spec", "hostNetwork"), True),
    (("spec", "hostPID"), True),
    (("spec", "serviceAccountName"), "another"),
    (("spec", "activeDeadlineSeconds"), 30),
    (("spec", "hostname"), "other"),
    (("spec", "hostAliases"), [{"ip": "10.0.0.1", "hostnames": ["mlflow"]}]),
    (("spec", "dnsPolicy"), "Default"),
    (("spec", "dnsConfig"), {"nameservers": ["10.0.0.9"]}),
    (("spec", "schedulingGates"), [{"name": "example.com/for-ever"}]),
    (("spec", "schedulerName"), "nobody"),
    (("spec", "shareProcessNamespace"), True),
    (("spec", "readinessGates"), [{"conditionType": "example.com/never"}]),
    (("spec", "containers", 0, "lifecycle"), {"postStart": {"exec": {"command": ["true"]}}}),
    (("spec", "containers", 0, "livenessProbe"), {"exec": {"command": ["false"]}}),
    (("spec", "containers", 0, "workingDir"), "/tmp"),
    (("spec", "containers", 0, "stdin"), True),
    (("spec", "containers", 0, "imagePullPolicy"), "Never"),
    (("spec", "containers", 1), {"name": "second", "image": "evil:1"}),
    (("metadata", "finalizers"), ["example.com/for-ever"]),
    (("metadata", "labels", "extra"), "yes"),
    (("metadata", "annotations", "extra"), "yes"),
]


def mutants(task: StageTask) -> Iterator[tuple[str, Json]]:
    """The wanted pod with each of its fields changed or taken away, and with fields that it does not have."""
    chance = random.Random(1)
    original = wanted(task)
    for path in leaves(original):
        if path[0] in ("apiVersion", "kind") or path in (("metadata",), ("spec",)) or path[1] in ("name", "namespace"):
            continue
        for taken in (False, True):
            manifest = deepcopy(original)
            parent = at(manifest, path[:-1])
            if taken:
                del parent[path[-1]]
            else:
                parent[path[-1]] = changed(parent[path[-1]], chance)
            yield f"{'without ' if taken else ''}{'.'.join(map(str, path))}", manifest
    for path, value in ADDED:
        manifest = deepcopy(original)
        parent = at(manifest, path[:-1])
        if isinstance(parent, list):
            parent.append(value)
        else:
            parent[path[-1]] = value
        yield f"with {'.'.join(map(str, path))}", manifest


def stored(item: Json) -> Json:
    """What the server keeps of a pod besides what it gives to each by itself."""
    meta = item["metadata"]
    kept = {key: meta.get(key) for key in ("labels", "annotations", "ownerReferences", "finalizers")}
    return {"metadata": kept, "spec": {key: value for key, value in item["spec"].items() if key != "nodeName"}}


def test_a_pod_is_adopted_only_if_the_server_stores_it_just_like_ours(api: KubeApi, runtimes: Runtimes) -> None:
    task = make_task()
    path = f"{PODS}/{task.stage_name}"
    pods = runtimes()
    ours = stored(api.create(PODS, wanted(task)))
    api.delete(path, {"gracePeriodSeconds": 0})
    refused = adopted = 0
    for what, manifest in mutants(task):
        try:
            made = api.create(PODS, manifest)
        except OrchestratorError:  # no pod at all
            continue
        fact = ensured(pods, task)
        if stored(made) == ours:
            assert (fact.vouched, fact.stage_uid) == (True, made["metadata"]["uid"]), f"{what}: it is ours"
            adopted += 1
        else:
            assert is_refused(fact), f"{what}: it is not what would have been created"
            refused += 1
        if not fact.stage_uid:
            pods.delete(NAMESPACE, task.stage_name, recorded=True)
        if made["metadata"].get("finalizers"):
            api.patch(path, {"metadata": {"finalizers": None}})
        api.delete(path, {"gracePeriodSeconds": 0})
        wait_until(lambda: f"{NAMESPACE}/{task.stage_name}" not in pods.observe())
    assert refused > 100
    assert adopted > 5, "what is a default may be left out"


def test_a_pod_is_created_and_heard_by_one_request(cluster: ControlPlane, api: KubeApi) -> None:
    """To know ours from others' costs nothing where nobody is in the way."""
    own = cluster.api()
    pods = KubernetesPods(own, Changes(), POLICY, BOUNDS)
    pods.start()
    before = own.requests.copy()
    assert ensured(pods, make_task()).vouched
    fake_an_end(api, "victim-train-2", "train")
    wait_until(lambda: pods.observe()[f"{NAMESPACE}/victim-train-2"].phase is StagePhase.EXITED)
    pods.delete(NAMESPACE, "victim-train-2", recorded=True)
    asked = own.requests - before
    pods.close()
    own.close()
    assert {what: count for what, count in asked.items() if what[0] != "WATCH"} == {("POST", "pods"): 1}


def test_logs_are_those_of_the_pod_that_the_status_names(cluster: ControlPlane, api: KubeApi) -> None:
    store = KubernetesStore(cluster.api())
    job = store.create_job(submitted_job(name="victim"))
    api.create(PODS, forged(job, "train", 2, labelled=True))
    fake_an_end(api, "victim-train-2", "train")
    uid = api.get(f"{PODS}/victim-train-2")["metadata"]["uid"]
    ran = Attempt(
        stage="train", number=2, created_time=datetime.now(UTC), seen_time=datetime.now(UTC), stage_uid="ours"
    )
    job = store.update_status(job, QLoRAJobStatus(attempts=(ran,), attempts_total=2))
    assert PodLogs(api).attempts(NAMESPACE, "victim") == []
    named = ran.model_copy(update={"stage_uid": uid})
    store.update_status(job, QLoRAJobStatus(attempts=(named,), attempts_total=2))
    assert [str(log.name) for log in PodLogs(api).attempts(NAMESPACE, "victim")] == ["victim-train-2"]


# --- GPUs and claims --------------------


def test_gpus_of_a_stranger_that_calls_itself_ours_are_on_the_books(api: KubeApi, runtimes: Runtimes) -> None:
    api.create(path_of("v1", "nodes"), {"metadata": {"name": "big", "labels": {"nvidia.com/gpu.memory": "24564"}}})
    try:
        manifest = wanted(make_task())
        manifest["spec"]["nodeName"] = "big"
        manifest["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "3"
        manifest["spec"]["containers"][0]["resources"]["requests"].pop("nvidia.com/gpu", None)
        api.create(PODS, manifest)
        fact = runtimes().observe()[f"{NAMESPACE}/victim-train-2"]
        assert (fact.gpus, fact.gpu_class, fact.vouched) == (3, "24Gi", False)
    finally:
        api.delete(path_of("v1", "nodes", name="big"))


def test_a_claim_template_of_a_stranger_is_not_used(cluster: ControlPlane, api: KubeApi) -> None:
    policy = replace(POLICY, gpu_mode="dra")
    templates = path_of("resource.k8s.io/v1", "resourceclaimtemplates", "team-b")
    wants_all = {"name": "gpu", "exactly": {"deviceClassName": "gpu.nvidia.com", "allocationMode": "All"}}
    meta = {"name": "qlora-48gi", "namespace": "team-b"}
    spec = {"spec": {"devices": {"requests": [wants_all]}}}
    body = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaimTemplate", "metadata": meta, "spec": spec}
    api.create(templates, body)
    task = make_task().model_copy(update={"namespace": "team-b"})
    runtime = KubernetesPods(cluster.api(), Changes(), policy, BOUNDS)
    runtime.start()
    try:
        runtime.ensure(task, "48Gi")
        assert is_refused(runtime.observe()["team-b/victim-train-2"])
        api.delete(f"{templates}/qlora-48gi")
        runtime.ensure(task, "48Gi")
        assert runtime.observe()["team-b/victim-train-2"].vouched
        assert runtime.observe()["team-b/victim-train-2"].phase is StagePhase.PENDING
    finally:
        runtime.close()
        api.delete(f"{templates}/qlora-48gi")
        with contextlib.suppress(OrchestratorError):
            api.delete(path_of("v1", "pods", "team-b", "victim-train-2"), {"gracePeriodSeconds": 0})
