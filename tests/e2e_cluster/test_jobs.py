"""Real jobs on the cluster: the chart is installed, `kubectl apply` hands a job in, MLflow has the adapter.

Everything is real but the cards: nodes say that they have a GPU of 24 GB, and the trainer trains on their CPUs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.cluster.binaries import program
from tests.e2e_cluster.images import CHART, CHECKOUT
from tests.e2e_cluster.lab import NODES, Lab

SYSTEM, TEAM, RELEASE = "qlora-system", "team-e2e", "qlora-orchestrator"
EXAMPLE = CHECKOUT / "examples" / "medical-es"
INSTALL_SECONDS, JOB_SECONDS = 300, 540
MLFLOW_PORT = 5000
SHARED_CLASS, MLFLOW_CLASS = "shared", "mlflow"
VALUES = {
    "image": {"pullPolicy": "IfNotPresent"},
    "controller": {
        "replicas": 2,
        "settings": {
            "TRAINER_THREADS": "1",
            "MINIMUM_RUN_SECONDS": "0",
            "PREEMPTION_COOLDOWN_SECONDS": "0",
            "PROGRESS_INTERVAL_SECONDS": "2",
        },
    },
    "jobs": {"namespaces": [TEAM]},
    "store": {"pvc": {"storageClassName": SHARED_CLASS, "size": "1Gi"}},
    "mlflow": {"storage": {"storageClassName": MLFLOW_CLASS, "size": "1Gi"}},
}


@pytest.fixture(scope="module")
def volumes(lab: Lab) -> Path:
    """Folders behind the persistent volumes; model and data are in one of them."""
    model = os.environ.get("QLORA_TEST_MODEL")
    if model is None:
        message = "set QLORA_TEST_MODEL to the folder that `make demo` made"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = lab.folder / "volumes"
    for name in ("store", "mlflow", "data"):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o777)
    shutil.copytree(model, folder / "data" / "smollm2")
    for file in EXAMPLE.glob("*.jsonl"):
        shutil.copy(file, folder / "data")
    for path in (folder / "data").rglob("*"):  # whoever made the model may have kept it to himself
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def installed(lab: Lab, volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The chart, installed with Helm into namespaces where Pod Security `restricted` is enforced."""
    for namespace in (SYSTEM, TEAM):
        lab.make_namespace(namespace)
    lab.apply(
        volume("store", SHARED_CLASS, volumes / "store", "ReadWriteMany"),
        volume("mlflow", MLFLOW_CLASS, volumes / "mlflow", "ReadWriteOnce"),
        volume("data", "data", volumes / "data", "ReadWriteMany"),
    )
    lab.apply(claim("data", "data"), namespace=TEAM)
    for node in NODES:
        add_gpu(lab, node)
    values = tmp_path_factory.mktemp("values") / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    helm(lab, "install", RELEASE, str(CHART), f"--values={values}", "--wait", f"--timeout={INSTALL_SECONDS}s")
    yield
    for namespace in (SYSTEM, TEAM):
        lab.kubectl("delete", "namespace", namespace, "--wait=false")


def volume(name: str, storage_class: str, path: Path, mode: str) -> dict[str, Any]:
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": [mode], "storageClassName": storage_class}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {**spec, "hostPath": {"path": str(path), "type": "Directory"}},
    }


def claim(name: str, storage_class: str) -> dict[str, Any]:
    wanted = {"requests": {"storage": "1Gi"}}
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": storage_class, "resources": wanted}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def add_gpu(lab: Lab, node: str) -> None:
    """What a device plugin and GPU Feature Discovery would say."""
    lab.kubectl("label", "node", node, "nvidia.com/gpu.memory=24564", "--overwrite")
    gpu = [
        {"op": "add", "path": f"/status/{kind}/nvidia.com~1gpu", "value": "1"} for kind in ("capacity", "allocatable")
    ]
    lab.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(gpu)}")


def helm(lab: Lab, *arguments: str) -> str:
    command = [str(program("helm")), *arguments, f"--namespace={SYSTEM}", f"--kubeconfig={lab.kubeconfig}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS + 60)
    if done.returncode:
        pods = lab.kubectl("get", "pods", "--all-namespaces", "--output=wide")
        events = lab.kubectl("get", "events", "--namespace", SYSTEM, "--sort-by=.lastTimestamp")
        raise AssertionError(f"helm {arguments[0]}: {done.stderr}\n{pods}\n{events[-4000:]}")
    return done.stdout


def job(name: str, steps: int = 6, **spec: Any) -> dict[str, Any]:
    """The example's job, with model and data from a claim."""
    document = yaml.safe_load((EXAMPLE / "job.yaml").read_text())
    document["metadata"]["name"] = name
    document["spec"]["model"]["source"] = "pvc://data/smollm2"
    document["spec"]["dataset"]["source"] = "pvc://data/train.jsonl"
    document["spec"]["dataset"]["evalSource"] = "pvc://data/heldout.jsonl"
    document["spec"]["training"] |= {"maxSteps": steps, "sequenceLength": 256}
    document["spec"]["evaluation"] = {"everySteps": steps}
    document["spec"]["checkpoint"] = {"everySeconds": 3600}
    document["spec"]["tracking"] = {"experiment": TEAM, "registeredModel": name}
    return {**document, "spec": {**document["spec"], **spec}}


def finish(lab: Lab, name: str) -> dict[str, Any]:
    """Wait for a job as a user would; its status."""
    over = "--for=jsonpath={.status.finishTime}"  # well or not
    wait = ["wait", f"qj/{name}", over, f"--timeout={JOB_SECONDS}s", f"--namespace={TEAM}"]
    try:
        lab.kubectl(*wait, seconds=JOB_SECONDS + 30)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{error}\n{story(lab, name)}") from error
    status: dict[str, Any] = lab.get(f"qj/{name}", f"--namespace={TEAM}")["status"]
    assert condition_is(status, "Finished"), story(lab, name)
    return status


def story(lab: Lab, name: str) -> str:
    """What there is to know about a job that did not come through."""
    told = lab.kubectl("describe", f"qj/{name}", f"--namespace={TEAM}")
    pods = lab.kubectl("get", "pods", f"--namespace={TEAM}", "--output=wide")
    logs = lab.kubectl(
        "logs", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=controller", "--tail=30"
    )
    return f"{told[-4000:]}\n{pods}\n{logs[-4000:]}"


def until(what: str, holds: Callable[[], bool], seconds: float = JOB_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


def digest_in_store(volumes: Path, status: dict[str, Any]) -> str:
    """Of the adapter's weights, as they lie on the volume."""
    uri: str = status["adapterUri"]
    path = volumes / "store" / uri.removeprefix("pvc://").partition("/")[2] / "adapter_model.safetensors"
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def mlflow_answer(lab: Lab, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What MLflow's own API says: asked by its pod's address, under the name that it knows itself by."""
    pod = lab.get(f"pod/{RELEASE}-mlflow-0", f"--namespace={SYSTEM}")
    url = f"http://{pod['status']['podIP']}:{MLFLOW_PORT}/api/2.0/mlflow/{path}"
    headers = {"Content-Type": "application/json", "Host": f"{RELEASE}-mlflow.{SYSTEM}.svc:{MLFLOW_PORT}"}
    request = Request(url, json.dumps(body).encode() if body is not None else None, headers)
    with urlopen(request, timeout=30) as got:
        return json.loads(got.read())


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, installed: None) -> dict[str, Any]:
    """The status of a job that nobody disturbed."""
    lab.apply(job("undisturbed"), namespace=TEAM)
    return finish(lab, "undisturbed")


def test_a_job_goes_from_apply_to_the_registry(lab: Lab, volumes: Path, undisturbed: dict[str, Any]) -> None:
    status = undisturbed
    assert [attempt["stage"] for attempt in status["attempts"]] == ["prepare", "train", "publish"]
    assert digest_in_store(volumes, status) == status["adapterDigest"]
    run = mlflow_answer(lab, f"runs/get?run_id={status['mlflow']['runId']}")["run"]
    assert run["info"]["status"] == "FINISHED"
    version = mlflow_answer(lab, "model-versions/get?name=undisturbed&version=1")["model_version"]
    assert (version["run_id"], version["status"]) == (status["mlflow"]["runId"], "READY")
    events = lab.kubectl("get", "events", f"--namespace={TEAM}", "--field-selector=involvedObject.kind=QLoRAJob")
    assert "Succeeded" in events


def test_pods_of_stages_are_restricted_and_know_no_account(lab: Lab, undisturbed: dict[str, Any]) -> None:
    pods = lab.get("pods", f"--namespace={TEAM}", "--selector=qlora.dev/job=undisturbed")["items"]
    assert len(pods) == 3
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounts


def test_an_evicted_job_whose_controller_is_killed_ends_with_the_same_adapter(
    lab: Lab, volumes: Path, undisturbed: dict[str, Any]
) -> None:
    lab.apply(job("moved"), namespace=TEAM)
    until("the first train stage trains", lambda: trains(lab, "moved", attempts=2))
    pod = "moved-train-2"
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": TEAM}}
    path = f"/api/v1/namespaces/{TEAM}/pods/{pod}/eviction"
    lab.kubectl("create", f"--raw={path}", "--filename=-", stdin=json.dumps(eviction))
    until("the second train stage trains", lambda: trains(lab, "moved", attempts=3))
    lab.kubectl(
        "delete", "pods", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=controller", "--force",
        "--grace-period=0",
    )  # fmt: skip
    status = finish(lab, "moved")
    assert status["evictions"] == {"Disrupted": 1}
    assert [attempt["stage"] for attempt in status["attempts"]] == ["prepare", "train", "train", "publish"]
    assert digest_in_store(volumes, status) == status["adapterDigest"] == undisturbed["adapterDigest"]
    runs = mlflow_runs(lab, "moved")
    assert [run["info"]["status"] for run in runs] == ["FINISHED"]


def trains(lab: Lab, name: str, attempts: int) -> bool:
    """Whether the job's so-manieth attempt is at work and has done a step."""
    status = lab.get(f"qj/{name}", f"--namespace={TEAM}").get("status", {})
    if condition_is(status, "Finished"):
        raise AssertionError(f"{name} finished too early: {status['summary']}")
    pod = f"{name}-train-{attempts}"
    if len(status.get("attempts", [])) != attempts:
        return False
    try:
        return "step" in lab.kubectl("logs", f"--namespace={TEAM}", pod, "--container=trainer")
    except AssertionError:
        return False


def condition_is(status: dict[str, Any], kind: str) -> bool:
    return any(each["type"] == kind and each["status"] == "True" for each in status.get("conditions", []))


def mlflow_runs(lab: Lab, name: str) -> list[dict[str, Any]]:
    """The runs of a job."""
    experiment = mlflow_answer(lab, f"experiments/get-by-name?experiment_name={TEAM}")["experiment"]["experiment_id"]
    body = {"experiment_ids": [experiment], "filter": f"tags.`qlora.dev/job` = '{name}'"}
    return mlflow_answer(lab, "runs/search", body).get("runs", [])
