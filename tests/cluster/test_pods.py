"""Stages as pods on a real API server; the tests play scheduler and kubelet, by writing to nodes and pod statuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.nodes import list_gpu_classes
from orchestrator.adapters.kubernetes.pod_manifest import claim_template_name
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy, PodTemplate
from orchestrator.adapters.kubernetes.pods import KubernetesPods, RuntimeBounds
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import Attempt, DatasetSource, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.results import ProgressReport
from orchestrator.api.task import StageTask
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound, OrchestratorError, TransientError
from orchestrator.sizing.gpu_table import gpu_table
from tests.builders import submitted_job, train_result
from tests.cluster.control_plane import ControlPlane
from tests.cluster.resources import clear
from tests.cluster.runtimes import Runtimes, started_runtimes

NAMESPACE, RESTRICTED, NARROW = "team-a", "restricted", "narrow"
POLICY = PodPolicy(trainer_image="trainer:1", controller_image="controller:1", tracking_uri="http://mlflow:5000")
WITH_AGENT = replace(POLICY, ray_address="ray:6379", ray_auth_secret="ray-token")
BOUNDS = RuntimeBounds(acknowledge_seconds=0.5, stranded_seconds=0.0, ended_pods_limit=2)
IMPATIENT = replace(BOUNDS, unschedulable_seconds=0.0, start_failure_seconds=0.0)
NAME, KEY = "medical-train-2", "team-a/medical-train-2"
PATH = path_of("v1", "pods", NAMESPACE, NAME)
WAIT_SECONDS = 15.0
UID = "8f2d2f0e-0000-4000-8000-000000000001"
NODE = "gpu-1"


class Channel:
    """An agent channel that remembers what it was asked for, and says what it is told to."""

    def __init__(self) -> None:
        self.acknowledges = True
        self.preempted: list[tuple[str, float]] = []
        self.reports: dict[str, ProgressReport] = {}

    def progress(self) -> Mapping[str, ProgressReport]:
        return self.reports

    def request_checkpoint(self, key: str) -> None:
        raise AssertionError(f"nobody asks for a checkpoint of {key}")

    def preempt(self, key: str, deadline_seconds: float) -> bool:
        self.preempted.append((key, deadline_seconds))
        return self.acknowledges


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A connection to a cluster without pods and nodes."""
    api = cluster.api()
    clear(api)
    for path in (path_of("v1", "pods"), path_of("v1", "nodes")):
        for item in api.get(path)["items"]:
            meta = item["metadata"]
            where = path_of("v1", path.rpartition("/")[2], meta.get("namespace", ""), meta["name"])
            try:
                api.delete(where, {"gracePeriodSeconds": 0})
            except NotFound:
                continue
    yield api
    api.close()


@pytest.fixture
def runtimes(cluster: ControlPlane, api: KubeApi) -> Iterator[Runtimes]:
    """Starts runtimes, each with a connection of its own."""
    with started_runtimes(cluster, POLICY, BOUNDS) as start:
        yield start


@pytest.fixture
def pods(runtimes: Runtimes) -> KubernetesPods:
    """One of them."""
    return runtimes()


# --- the world --------------------


def make_task(
    attempt: int = 2, stage: str = "train", *, uid: str = UID, namespace: str = NAMESPACE, **spec: object
) -> StageTask:
    return StageTask(
        stage=stage,
        namespace=namespace,
        job="medical",
        uid=uid,
        attempt=attempt,
        spec=submitted_job(**spec).spec,
        store_uri="pvc://store/medical",
    )


def add_namespace(api: KubeApi, name: str, **labels: str) -> None:
    try:
        api.create(path_of("v1", "namespaces"), {"metadata": {"name": name, "labels": labels}})
    except AlreadyExists:
        return


def add_node(
    api: KubeApi, name: str = NODE, memory_mib: int = 24_564, gpus: int = 1, ready: bool = True, **spec: object
) -> None:
    api.create(
        path_of("v1", "nodes"), {"metadata": {"name": name, "labels": {"nvidia.com/gpu.memory": str(memory_mib)}}}
    )
    allocatable = {"nvidia.com/gpu": str(gpus), "cpu": "8"}
    conditions = [{"type": "Ready", "status": str(ready)}]
    status = {"allocatable": allocatable, "capacity": allocatable, "conditions": conditions}
    api.patch(f"{path_of('v1', 'nodes', name=name)}/status", {"status": status}, STRATEGIC_PATCH)
    if spec:
        change_node(api, name, **spec)


def change_node(api: KubeApi, name: str = NODE, **spec: object) -> None:
    api.patch(path_of("v1", "nodes", name=name), {"spec": spec}, STRATEGIC_PATCH)


def set_ready(api: KubeApi, status: str, name: str = NODE) -> None:
    """The node controller's part: "Unknown" once nobody hears of the kubelet."""
    conditions = [{"type": "Ready", "status": status}]
    api.patch(f"{path_of('v1', 'nodes', name=name)}/status", {"status": {"conditions": conditions}}, STRATEGIC_PATCH)


def bind(api: KubeApi, node: str = NODE, path: str = PATH) -> None:
    """The scheduler's part."""
    name = path.rpartition("/")[2]
    target = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name},
        "target": {"kind": "Node", "name": node},
    }
    api.create(f"{path}/binding", target)


def report(api: KubeApi, state: Json, *, phase: str = "Running", path: str = PATH, **status: object) -> None:
    """The kubelet's part."""
    container = {"name": "trainer", "image": "t", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    listed = [container] if state else []
    api.patch(f"{path}/status", {"status": {"phase": phase, "containerStatuses": listed, **status}}, STRATEGIC_PATCH)


def running() -> Json:
    return {"running": {"startedAt": now()}}


def ended(code: int, message: str = "", **more: object) -> Json:
    return {"terminated": {"exitCode": code, "startedAt": now(), "finishedAt": now(), "message": message, **more}}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def exists(api: KubeApi, path: str = PATH) -> bool:
    try:
        api.get(path)
    except NotFound:
        return False
    return True


def until(pods: KubernetesPods, done: Callable[[StageFact], object], key: str = KEY) -> StageFact:
    """The stage's fact once it is as wanted."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (fact := pods.observe().get(key)) is None or not done(fact):
        assert time.monotonic() < deadline, f"it did not come in time: {fact}"
        time.sleep(0.02)
    return fact


def eventually(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)


def is_running(fact: StageFact) -> bool:
    return fact.phase is StagePhase.RUNNING


def is_ended(fact: StageFact) -> bool:
    return fact.phase is StagePhase.EXITED


def message(fact: StageFact) -> str:
    assert fact.result is not None
    assert fact.result.failure is not None
    assert fact.result.failure.reason is fact.disruption
    return fact.result.failure.message


def run_on_node(api: KubeApi, pods: KubernetesPods, task: StageTask | None = None) -> None:
    """A stage that runs on a node."""
    add_node(api)
    pods.ensure(task or make_task(), "24Gi")
    bind(api)
    report(api, running())
    until(pods, is_running)


# --- creating --------------------


def test_a_stage_is_one_pod_however_often_it_is_asked_for(api: KubeApi, pods: KubernetesPods) -> None:
    pods.ensure(make_task(), "24Gi")
    first = api.get(PATH)
    assert pods.observe()[KEY] == StageFact(
        namespace=NAMESPACE, name=NAME, phase=StagePhase.PENDING, uid=UID, stage_uid=first["metadata"]["uid"]
    )
    pods.ensure(make_task(), "24Gi")
    assert api.get(PATH)["metadata"]["uid"] == first["metadata"]["uid"]
    assert first["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert first["metadata"]["ownerReferences"][0]["uid"] == UID
    assert "finalizers" not in first["metadata"]


def test_the_pods_of_all_stages_are_let_into_a_restricted_namespace(api: KubeApi, runtimes: Runtimes) -> None:
    level = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    add_namespace(api, RESTRICTED, **level)
    pods = runtimes(WITH_AGENT)
    for number, stage in enumerate(("prepare", "train", "publish"), start=1):
        task = make_task(number, stage, namespace=RESTRICTED, dataset=DatasetSource(source="pvc://data/$(HOME).jsonl"))
        pods.ensure(task, "24Gi" if stage == "train" else None)
        made = api.get(path_of("v1", "pods", RESTRICTED, f"medical-{stage}-{number}"))
        [sent] = [v["value"] for v in made["spec"]["containers"][0]["env"] if v["name"] == "QLORA_TASK"]
        arrived = StageTask.model_validate_json(sent.replace("$$", "$"))
        assert arrived == task.model_copy(update={"grace_seconds": POLICY.short_grace_seconds})


def test_a_pod_that_the_server_refuses_is_a_stage_that_could_not_start(api: KubeApi, runtimes: Runtimes) -> None:
    add_namespace(api, RESTRICTED, **{"pod-security.kubernetes.io/enforce": "restricted"})
    pods = runtimes(replace(POLICY, model_cache="hostpath:///srv/models"))
    pods.ensure(make_task(namespace=RESTRICTED), "24Gi")
    fact = pods.observe()[f"{RESTRICTED}/{NAME}"]
    assert (fact.phase, fact.exit_code, fact.disruption) == (StagePhase.EXITED, None, Reason.ADMISSION_REFUSED)
    assert "hostPath" in message(fact)
    pods.delete(RESTRICTED, NAME)
    assert pods.observe() == {}


def test_a_full_quota_sends_the_job_back_to_the_queue(api: KubeApi, pods: KubernetesPods) -> None:
    add_namespace(api, NARROW)
    quota, none = path_of("v1", "resourcequotas", NARROW), {"pods": "0"}
    api.create(quota, {"metadata": {"name": "none"}, "spec": {"hard": none}})
    api.patch(f"{quota}/none/status", {"status": {"hard": none, "used": none}}, STRATEGIC_PATCH)
    try:
        eventually(lambda: _refused(pods))
        fact = pods.observe()[f"{NARROW}/{NAME}"]
        assert fact.disruption is Reason.QUOTA_EXCEEDED
        assert "exceeded quota" in message(fact)
    finally:
        api.delete(f"{quota}/none")


def _refused(pods: KubernetesPods) -> bool:
    """The quota's view is kept by a watch of the server's own."""
    pods.delete(NARROW, NAME)
    pods.ensure(make_task(namespace=NARROW), "24Gi")
    return pods.observe()[f"{NARROW}/{NAME}"].disruption is Reason.QUOTA_EXCEEDED


def test_another_jobs_pod_of_the_name_is_left_and_told_of(api: KubeApi, runtimes: Runtimes) -> None:
    runtimes().ensure(make_task(uid="of-an-older-job"), "24Gi")
    pods = runtimes()
    assert pods.observe()[KEY].uid == "of-an-older-job"
    pods.ensure(make_task(), "24Gi")
    fact = pods.observe()[KEY]
    assert (fact.phase, fact.disruption, fact.uid) == (StagePhase.EXITED, Reason.NAME_TAKEN, UID)
    assert 'metadata.labels.qlora.dev/job-uid is "of-an-older-job"' in message(fact)
    pods.delete(NAMESPACE, NAME, recorded=True)
    assert pods.observe()[KEY].uid == "of-an-older-job"


def test_a_pod_that_is_being_deleted_is_no_start(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    api.delete(PATH, {"gracePeriodSeconds": 30})
    with pytest.raises(TransientError, match="being deleted"):
        pods.ensure(make_task(), "24Gi")


def test_the_claim_of_dynamic_allocation_is_one_that_the_server_understands(api: KubeApi, runtimes: Runtimes) -> None:
    pods = runtimes(replace(POLICY, gpu_mode="dra"))
    for attempt in (2, 3):
        pods.ensure(make_task(attempt), "24Gi")
    assert pods.observe()[KEY].disruption is None
    template = api.get(path_of("resource.k8s.io/v1", "resourceclaimtemplates", NAMESPACE, "qlora-24gi"))
    assert template["spec"]["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] == "gpu.nvidia.com"
    [claim] = api.get(PATH)["spec"]["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == "qlora-24gi"
    table = gpu_table('{"23Gi": {"usableMiB": 22016, "cards": ["NVIDIA-L4"]}}')
    pods = runtimes(replace(POLICY, gpu_mode="dra", gpu_table=table))
    for attempt, name in ((4, "23Gi"), (5, "24Gi")):
        pods.ensure(make_task(attempt), name)
        its_name = claim_template_name(name, table)
        made = api.get(path_of("resource.k8s.io/v1", "resourceclaimtemplates", NAMESPACE, its_name))
        [selector] = made["spec"]["spec"]["devices"]["requests"][0]["exactly"]["selectors"]
        assert "productName" in selector["cel"]["expression"]


# --- life and end --------------------


def test_a_pods_life_is_its_stages(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    assert pods.observe()[KEY].start_time is not None
    result = train_result(120)
    report(api, ended(0, result.model_dump_json(by_alias=True, exclude_none=True)), phase="Succeeded")
    fact = until(pods, is_ended)
    assert (fact.exit_code, fact.result, fact.disruption) == (0, result, None)
    assert fact.finish_time is not None
    pods.delete(NAMESPACE, NAME)
    assert KEY not in pods.observe()
    assert api.get(PATH)["status"]["phase"] == "Succeeded"


EVICTED = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]}
ENDS: dict[str, tuple[Json, Json, int | None, Reason | None]] = {
    "a verdict of its own": (ended(80, "no json"), {}, 80, None),
    "a checkpoint on request": (ended(85), {}, 85, None),
    "killed by whoever": (ended(137), {}, 137, None),
    "the kernel took its memory": (ended(137, reason="OOMKilled"), {}, 137, Reason.HOST_OUT_OF_MEMORY),
    "evicted by the API": (ended(137), EVICTED, 137, Reason.DISRUPTED),
    "an error of its own while it was evicted": (ended(83), EVICTED, 83, None),
    "a success while it was evicted": (ended(0), EVICTED, 0, None),
    "nobody knows its exit code": (ended(137, reason="ContainerStatusUnknown"), {}, None, Reason.DISRUPTED),
    "the runtime could not start it": (ended(128, reason="StartError"), {}, None, Reason.START_FAILED),
    "the node was short of memory": ({}, {**EVICTED, "reason": "Evicted"}, None, Reason.DISRUPTED),
    "it overran its own scratch space": ({}, {"reason": "Evicted", "message": "emptyDir"}, None, Reason.KILLED),
    "the kubelet did not admit it": ({}, {"reason": "UnexpectedAdmissionError"}, None, Reason.DISRUPTED),
}


@pytest.mark.parametrize(("state", "status", "code", "disruption"), ENDS.values(), ids=ENDS)
def test_an_end_says_who_brought_it_about(
    api: KubeApi, pods: KubernetesPods, state: Json, status: Json, code: int | None, disruption: Reason | None
) -> None:
    pods.ensure(make_task(), "24Gi")
    report(api, state, phase="Failed", **status)
    fact = until(pods, is_ended)
    assert (fact.exit_code, fact.disruption) == (code, disruption)
    if disruption is not None:
        assert message(fact)


def test_the_last_words_of_a_pod_that_is_deleted_are_kept(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    api.delete(PATH, {"gracePeriodSeconds": 30})
    fact = until(pods, lambda fact: fact.disruption)
    assert (fact.phase, fact.disruption) == (StagePhase.RUNNING, Reason.DISRUPTED)
    checkpoint = train_result(60, complete=False)
    report(api, ended(85, checkpoint.model_dump_json(by_alias=True, exclude_none=True)), phase="Failed")
    api.delete(PATH, {"gracePeriodSeconds": 0})
    assert not exists(api)
    pods.refresh()  # the view lacks the pod from here on
    fact = pods.observe()[KEY]
    assert fact.result is not None
    assert (fact.exit_code, fact.disruption, fact.result.train) == (85, Reason.DISRUPTED, checkpoint.train)
    pods.delete(NAMESPACE, NAME)
    assert KEY not in pods.observe()


def test_a_pod_that_is_gone_without_an_end_is_absent(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    api.delete(PATH, {"gracePeriodSeconds": 0})
    eventually(lambda: KEY not in pods.observe())


def test_progress_comes_from_the_agents(api: KubeApi, pods: KubernetesPods) -> None:
    channel = pods.channel = Channel()
    channel.reports[KEY] = ProgressReport(stage="train", step=7, steps=120, time=datetime.now(UTC))
    pods.ensure(make_task(), "24Gi")
    assert pods.observe()[KEY].progress is None
    report(api, running())
    assert until(pods, is_running).progress == channel.reports[KEY]


# --- stopping --------------------


def test_to_stop_without_an_agent_is_to_delete_once_with_grace(api: KubeApi, pods: KubernetesPods) -> None:
    pods.channel = Channel()
    run_on_node(api, pods)
    pods.stop(NAMESPACE, NAME, 45, Reason.PREEMPTED)
    first = api.get(PATH)["metadata"]
    assert first["deletionGracePeriodSeconds"] == 45
    for _ in range(3):
        pods.stop(NAMESPACE, NAME, 20, Reason.PREEMPTED)
    assert api.get(PATH)["metadata"]["resourceVersion"] == first["resourceVersion"], "it was not touched again"
    assert pods.channel.preempted == []


def test_an_agent_that_heard_spares_the_signal_until_the_time_is_over(api: KubeApi, runtimes: Runtimes) -> None:
    pods = runtimes(WITH_AGENT)
    channel = pods.channel = Channel()
    run_on_node(api, pods)
    pods.stop(NAMESPACE, NAME, 1, Reason.PREEMPTED)
    assert channel.preempted == [(KEY, 1)]
    assert "deletionTimestamp" not in api.get(PATH)["metadata"]
    time.sleep(1.1)
    pods.stop(NAMESPACE, NAME, 1, Reason.PREEMPTED)
    assert api.get(PATH)["metadata"]["deletionGracePeriodSeconds"] == 1


def test_a_trainer_whose_machine_goes_is_told_to_hurry_and_keeps_its_pod_for_the_whole_grace_period(
    api: KubeApi, runtimes: Runtimes
) -> None:
    pods = runtimes(WITH_AGENT, replace(BOUNDS, short_grace_seconds=1))
    channel = pods.channel = Channel()
    run_on_node(api, pods)
    pods.stop(NAMESPACE, NAME, 45, Reason.DISRUPTED)
    assert channel.preempted == [(KEY, 1)]
    time.sleep(1.1)
    pods.stop(NAMESPACE, NAME, 45, Reason.DISRUPTED)
    assert "deletionTimestamp" not in api.get(PATH)["metadata"]


def test_a_pod_whose_class_is_still_to_come_is_waited_for_as_long_as_that_takes(
    api: KubeApi, runtimes: Runtimes
) -> None:
    pods = runtimes(bounds=replace(IMPATIENT, gpu_classes="24Gi=1", scale_up_seconds=600.0))
    pods.ensure(make_task(), "24Gi")
    assert until(pods, lambda _: True).phase is StagePhase.PENDING
    add_node(api)
    assert until(pods, is_ended).disruption is Reason.UNSCHEDULABLE, "the node is there, and does not take it"


def test_an_agent_that_nobody_hears_of_is_not_waited_for(api: KubeApi, runtimes: Runtimes) -> None:
    pods = runtimes(WITH_AGENT)
    channel = pods.channel = Channel()
    channel.acknowledges = False
    run_on_node(api, pods)
    pods.stop(NAMESPACE, NAME, 45, Reason.PREEMPTED)
    assert "deletionTimestamp" not in api.get(PATH)["metadata"]
    time.sleep(0.6)
    pods.stop(NAMESPACE, NAME, 45, Reason.PREEMPTED)
    assert 35 < api.get(PATH)["metadata"]["deletionGracePeriodSeconds"] < 45, "what was waited for is taken off"


def test_a_pod_that_waits_for_a_node_is_stopped_at_once(api: KubeApi, runtimes: Runtimes) -> None:
    pods = runtimes(WITH_AGENT)
    pods.channel = Channel()
    pods.ensure(make_task(), "24Gi")
    pods.stop(NAMESPACE, NAME, 45, Reason.CANCELLED)
    assert not exists(api)
    eventually(lambda: KEY not in pods.observe())


def test_a_pod_that_took_anothers_place_is_not_stopped_for_it(api: KubeApi, runtimes: Runtimes) -> None:
    pods = runtimes()
    pods.ensure(make_task(), "24Gi")
    pods.close()  # its view stays as it is from here on
    api.delete(PATH, {"gracePeriodSeconds": 0})
    runtimes().ensure(make_task(uid="of-a-newer-job"), "24Gi")
    with pytest.raises(Conflict):
        pods.stop(NAMESPACE, NAME, 45, Reason.CANCELLED)
    assert exists(api)


@pytest.mark.parametrize("reason", ["gone", "out of service"])
def test_a_pod_is_forced_out_only_where_nothing_of_it_can_be_running(
    api: KubeApi, pods: KubernetesPods, reason: str
) -> None:
    run_on_node(api, pods)
    api.delete(PATH, {"gracePeriodSeconds": 1})
    until(pods, lambda fact: fact.disruption)
    change_node(api, taints=[{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}])
    overdue_at = time.monotonic() + 2.5
    while time.monotonic() < overdue_at:
        pods.stop(NAMESPACE, NAME, 45, Reason.DISRUPTED)
        time.sleep(0.1)
    assert exists(api), "a node that does not answer may still be training"
    if reason == "gone":
        api.delete(path_of("v1", "nodes", name=NODE))
    else:
        change_node(api, taints=[{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}])
    eventually(lambda: pods.stop(NAMESPACE, NAME, 45, Reason.DISRUPTED) is None and not exists(api))
    eventually(lambda: KEY not in pods.observe())


@pytest.mark.parametrize("forced", [False, True])
def test_a_pod_on_a_node_that_does_not_answer_is_given_up_and_its_gpu_is_nobodys_until_the_pod_is_gone(
    api: KubeApi, runtimes: Runtimes, forced: bool
) -> None:
    pods = runtimes(bounds=replace(BOUNDS, stranded_seconds=0.5, force_delete_unreachable=forced))
    run_on_node(api, pods)
    api.delete(PATH, {"gracePeriodSeconds": 1})
    assert until(pods, lambda fact: fact.disruption).phase is StagePhase.RUNNING
    assert counts(pods) == {"24Gi": 1}
    set_ready(api, "Unknown")
    fact = until(pods, is_ended)
    assert (fact.exit_code, fact.disruption) == (None, Reason.LOST)
    assert "gpu-1 does not answer" in message(fact)
    assert counts(pods) == {}
    pods.delete(NAMESPACE, NAME)
    assert KEY not in pods.observe()
    assert exists(api) is not forced
    if forced:
        return
    set_ready(api, "True")
    add_node(api, "gpu-2", memory_mib=49_140)  # once this is seen, so is that the other is back
    eventually(lambda: "48Gi" in counts(pods))
    assert counts(pods) == {"48Gi": 1}, "its trainer may still be running there"
    leader = runtimes()
    back = until(leader, is_running)
    assert (back.gpus, counts(leader)) == (1, {"24Gi": 1, "48Gi": 1}), (
        "the core takes it for held: no attempt is active"
    )
    report(api, ended(84), phase="Failed")
    eventually(lambda: counts(pods) == {"24Gi": 1, "48Gi": 1})


@pytest.fixture
def wanted(cluster: ControlPlane, api: KubeApi) -> Iterator[tuple[KubernetesStore, QLoRAJob]]:
    """A job on the server whose active attempt wants the stage NAME, and the store that wrote it."""
    store = KubernetesStore(cluster.api())
    job = store.create_job(submitted_job())
    try:
        active = Attempt(stage="train", number=2, created_time=datetime.now(UTC))
        yield store, store.update_status(job, QLoRAJobStatus(attempts=(active,), attempts_total=2))
    finally:
        path = path_of(API_VERSION, "qlorajobs", NAMESPACE, "medical")
        api.patch(path, {"metadata": {"finalizers": None}})
        api.delete(path)


def test_what_is_seen_to_be_on_record_is_forgotten_without_asking_the_server_once_more(
    wanted: tuple[KubernetesStore, QLoRAJob], api: KubeApi, pods: KubernetesPods
) -> None:
    _, job = wanted
    run_on_node(api, pods, make_task(uid=job.metadata.uid))
    report(api, ended(85, ""), phase="Failed")
    until(pods, is_ended)
    with pytest.raises(Conflict, match="active attempt"):
        pods.delete(NAMESPACE, NAME)
    assert KEY in pods.observe()
    pods.delete(NAMESPACE, NAME, recorded=True)
    assert KEY not in pods.observe()


def test_a_leftover_is_ended_only_if_the_job_on_the_server_does_not_want_it(
    wanted: tuple[KubernetesStore, QLoRAJob], api: KubeApi, pods: KubernetesPods
) -> None:
    store, job = wanted
    pods.ensure(make_task(uid=job.metadata.uid), "24Gi")
    for call in (lambda: pods.stop(NAMESPACE, NAME, 45, Reason.FENCED), lambda: pods.delete(NAMESPACE, NAME)):
        with pytest.raises(Conflict, match="active attempt"):
            call()
    assert exists(api)
    over = job.status.attempts[0].model_copy(update={"finish_time": datetime.now(UTC), "reason": Reason.LOST})
    store.update_status(job, QLoRAJobStatus(attempts=(over,), attempts_total=2))
    pods.stop(NAMESPACE, NAME, 45, Reason.FENCED)
    assert not exists(api)


# --- what does not start --------------------


def test_a_pod_that_no_node_takes_is_given_up_and_deleted_when_it_is_forgotten(
    api: KubeApi, runtimes: Runtimes
) -> None:
    patient, pods = runtimes(), runtimes(bounds=IMPATIENT)
    pods.ensure(make_task(), "24Gi")
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    report(api, {}, phase="Pending", conditions=[unschedulable])
    fact = until(pods, lambda fact: fact.result and "0/3 nodes" in message(fact))
    assert (fact.phase, fact.exit_code, fact.disruption) == (StagePhase.EXITED, None, Reason.UNSCHEDULABLE)
    assert until(patient, lambda _: True).phase is StagePhase.PENDING
    patient.delete(NAMESPACE, NAME)
    assert exists(api), "what may still start is not deleted"
    pods.delete(NAMESPACE, NAME)
    assert not exists(api)


@pytest.mark.parametrize("missing", ["trainer", "agent"])
def test_an_image_that_cannot_be_pulled_is_a_failed_start(api: KubeApi, runtimes: Runtimes, missing: str) -> None:
    pods = runtimes(WITH_AGENT, replace(IMPATIENT, unschedulable_seconds=900.0))
    pods.ensure(make_task(), "24Gi")
    bind(api)
    no_image = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    initializing = {"waiting": {"reason": "PodInitializing"}}
    report(api, initializing, phase="Pending", conditions=[{"type": "PodScheduled", "status": "True"}])
    assert until(pods, lambda _: True).phase is StagePhase.PENDING, "what is under way is waited for"
    if missing == "trainer":
        report(api, no_image, phase="Pending")
    else:
        agent = {"name": "ray-agent", "image": "c", "imageID": "", "ready": False, "restartCount": 0, "state": no_image}
        report(api, initializing, phase="Pending", initContainerStatuses=[agent])
    fact = until(pods, is_ended)
    assert (fact.exit_code, fact.disruption) == (None, Reason.IMAGE_UNAVAILABLE)
    assert "no such image" in message(fact)
    pods.delete(NAMESPACE, NAME)
    assert api.get(PATH)["metadata"]["deletionGracePeriodSeconds"] == 1
    pods.delete(NAMESPACE, NAME)
    assert exists(api), "the kubelet has not let it go yet"


# --- nodes --------------------


def test_a_node_that_is_about_to_go_disrupts_what_runs_on_it(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    change_node(api, taints=[{"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}])
    fact = until(pods, lambda fact: fact.disruption)
    assert (fact.phase, fact.disruption) == (StagePhase.RUNNING, Reason.DISRUPTED)
    assert "gpu-1" in message(fact)


def counts(pods: KubernetesPods) -> dict[str, int]:
    return {known.name: known.capacity for known in pods.gpu_classes()}


def test_gpus_are_counted_by_what_their_memory_is(api: KubeApi, runtimes: Runtimes) -> None:
    for name, memory_mib, gpus in (
        ("a", 24_564, 1),
        ("b", 23_028, 8),
        ("c", 46_068, 1),
        ("d", 49_140, 1),
        ("e", 81_559, 2),
    ):
        add_node(api, name, memory_mib, gpus)
    add_node(api, "no-gpu", gpus=0)
    add_node(api, "tiny", memory_mib=4096)
    add_node(api, "not-ready", ready=False)
    add_node(api, "cordoned", unschedulable=True)
    add_node(api, "others", taints=[{"key": "dedicated", "value": "serving", "effect": "NoSchedule"}])
    add_node(api, "tainted", taints=[{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}])
    expected = {"24Gi": 10, "48Gi": 2, "80Gi": 2}
    assert counts(runtimes()) == expected
    assert {known.name: known.capacity for known in list_gpu_classes(api)} == expected
    assert counts(runtimes(bounds=replace(BOUNDS, gpu_classes="24Gi=4,80Gi=4,16Gi=1"))) == {
        **expected,
        "16Gi": 1,
        "80Gi": 4,
    }
    serving = PodTemplate(tolerations=[{"key": "dedicated", "operator": "Exists"}])
    assert counts(runtimes(replace(POLICY, template=serving))) == {**expected, "24Gi": 11}
    assert counts(runtimes(replace(POLICY, template=PodTemplate(node_selector={"pool": "train"})))) == {}


def test_a_gpu_that_is_held_counts_even_where_no_other_pod_could_go(api: KubeApi, pods: KubernetesPods) -> None:
    run_on_node(api, pods)
    change_node(api, unschedulable=True)
    add_node(api, "other", unschedulable=True)
    time.sleep(0.5)  # the view may come to know of both
    pods.refresh()
    assert counts(pods) == {"24Gi": 1}
    report(api, ended(0), phase="Succeeded")
    until(pods, is_ended)
    assert counts(pods) == {}


def test_a_class_that_no_card_is_in_is_refused(api: KubeApi) -> None:
    with pytest.raises(InvalidObject, match="cpu"):
        KubernetesPods(api, Changes(), POLICY, replace(BOUNDS, gpu_classes="cpu=1"))


# --- what stays --------------------


def test_ended_pods_stay_in_a_bounded_number(api: KubeApi, pods: KubernetesPods) -> None:
    for attempt, stage in enumerate(("prepare", "train", "train", "train", "publish"), start=1):
        name = f"medical-{stage}-{attempt}"
        pods.ensure(make_task(attempt, stage), "24Gi" if stage == "train" else None)
        report(api, ended(81), phase="Failed", path=path_of("v1", "pods", NAMESPACE, name))
        until(pods, is_ended, f"{NAMESPACE}/{name}")
        pods.delete(NAMESPACE, name)
    names = [item["metadata"]["name"] for item in api.get(path_of("v1", "pods", NAMESPACE))["items"]]
    assert sorted(names) == ["medical-publish-5", "medical-train-4"]
    assert pods.observe() == {}


def test_another_leader_sees_what_ended_and_was_not_forgotten_by_it(api: KubeApi, runtimes: Runtimes) -> None:
    first = runtimes()
    first.ensure(make_task(), "24Gi")
    report(api, ended(85), phase="Failed")
    until(first, is_ended)
    first.delete(NAMESPACE, NAME)
    second = runtimes()
    assert second.observe()[KEY].exit_code == 85
    second.delete(NAMESPACE, NAME)
    assert second.observe() == {}


def test_errors_of_the_server_are_not_taken_for_an_answer(cluster: ControlPlane, api: KubeApi) -> None:
    stranger = KubeApi(kubeconfig=str(cluster.kubeconfig_for("no-such-token", name="stranger")))
    with pytest.raises(OrchestratorError, match="Unauthorized"):
        KubernetesPods(stranger, Changes(), POLICY, BOUNDS).start()
