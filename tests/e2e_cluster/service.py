"""The service on the lab's cluster: how the chart gets there, and what its users and MLflow's see of it.

Everything is real but the cards: nodes say that they have a GPU of 24 GB, and the trainer trains on their CPUs. Jobs
that name no store of their own keep their things on the lab's S3 server, as the chart's `store.type: s3` says; others
name a claim.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml

from tests.cluster.binaries import program
from tests.deploy.tools import packaged_chart
from tests.e2e_cluster.images import CHECKOUT
from tests.e2e_cluster.lab import ADDRESS, S3, S3_ACCESS, S3_REGION, S3_SECRET, Lab
from tests.webhook_receiver import SECRET

SYSTEM, TEAM, RELEASE = "qlora-system", "team-e2e", "qlora-orchestrator"
EXAMPLE = CHECKOUT / "examples" / "medical-es"
INSTALL_SECONDS, JOB_SECONDS = 300, 900
"""Bounds, for a machine that is busy with other things: on two idle cores either takes a tenth of that."""
HELD_OUT_RECORDS = 8
"""How many of the example's are used: evaluating all takes as long as five steps, and a job here evaluates twice."""
POLL_SECONDS = 1.0
"""Less than a step takes; each look starts two programs that take the trainer's processor from it."""
MLFLOW_PORT = 5000
STEP_DONE = re.compile(r"\bstep (\d+) of ")
BUCKET, S3_CREDENTIALS = "adapters", "s3-credentials"
MLFLOW_CLASS = "mlflow"
WEBHOOK, RECEIVER_ADDRESS = "ci", (ADDRESS, 7090)
RECEIVER = f"http://{ADDRESS}:7090/hook"
WEIGHTS = "adapter_model.safetensors"
PROGRAMS = {"controller": "orchestrator.controller.cluster", "ray-head": "orchestrator.adapters.ray_fabric.head"}
"""Container -> the module that its first process runs."""
VALUES = {
    "image": {"pullPolicy": "IfNotPresent"},
    "controller": {
        "replicas": 2,
        "settings": {
            "TRAINER_THREADS": "1",
            "MINIMUM_RUN_SECONDS": "0",
            "PREEMPTION_COOLDOWN_SECONDS": "0",
            "RESTART_COST_SECONDS": "0",
            "STOP_COST_SECONDS": "0",
            "PROGRESS_INTERVAL_SECONDS": "2",
        },
    },
    "jobs": {"namespaces": [TEAM]},
    "store": {
        "type": "s3",
        "allowed": ["pvc://store/undisturbed"],
        "s3": {
            "uri": f"s3://{BUCKET}/jobs",
            "endpointUrl": S3,
            "region": S3_REGION,
            "credentialsSecret": S3_CREDENTIALS,
        },
    },
    "webhooks": {"allowedHosts": [ADDRESS]},
    "mlflow": {"storage": {"storageClassName": MLFLOW_CLASS, "size": "1Gi"}},
}


# --- the chart


def make_volumes(lab: Lab, model: Path) -> Path:
    """Folders behind the persistent volumes; model and data are in one of them. The bucket is there, too."""
    folder = lab.folder / "volumes"
    for name in ("store", "mlflow", "data"):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o777)
    (lab.buckets / BUCKET).mkdir()
    shutil.copytree(model, folder / "data" / "smollm2")
    shutil.copy(EXAMPLE / "train.jsonl", folder / "data")
    held_out = (EXAMPLE / "heldout.jsonl").read_text().splitlines(keepends=True)[:HELD_OUT_RECORDS]
    (folder / "data" / "heldout.jsonl").write_text("".join(held_out))
    for path in (folder / "data").rglob("*"):  # whoever made the model may have kept it to himself
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def install(lab: Lab, volumes: Path, values: Path) -> None:
    """Install the packaged chart with Helm into namespaces where Pod Security `restricted` is enforced."""
    for namespace in (SYSTEM, TEAM):
        lab.make_namespace(namespace)
    lab.apply(
        _volume("store", volumes / "store", "ReadWriteMany"),
        _volume("data", volumes / "data", "ReadWriteMany"),
        _volume(MLFLOW_CLASS, volumes / "mlflow", "ReadWriteOnce"),
    )
    credentials = f"[default]\naws_access_key_id = {S3_ACCESS}\naws_secret_access_key = {S3_SECRET}\n"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": S3_CREDENTIALS}}
    lab.apply(_claim("store"), _claim("data"), {**secret, "stringData": {"credentials": credentials}}, namespace=TEAM)
    values.write_text(yaml.safe_dump(VALUES))
    chart = packaged_chart(values.parent)
    _helm(lab, "install", RELEASE, str(chart), f"--values={values}", "--wait", f"--timeout={INSTALL_SECONDS}s")


def _volume(name: str, path: Path, mode: str) -> dict[str, Any]:
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": [mode], "storageClassName": name}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {**spec, "hostPath": {"path": str(path), "type": "Directory"}},
    }


def _claim(name: str) -> dict[str, Any]:
    wanted = {"requests": {"storage": "1Gi"}}
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": name, "resources": wanted}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def webhook_secret() -> dict[str, Any]:
    """The Secret that the chart's controller reads of a team's webhooks."""
    metadata = {"name": "qlora-webhooks"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {WEBHOOK: SECRET}}


def add_gpu(lab: Lab, node: str) -> None:
    """What a device plugin and GPU Feature Discovery would say."""
    lab.kubectl("label", "node", node, "nvidia.com/gpu.memory=24564", "--overwrite")
    gpu = [
        {"op": "add", "path": f"/status/{kind}/nvidia.com~1gpu", "value": "1"} for kind in ("capacity", "allocatable")
    ]
    lab.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(gpu)}")


def _helm(lab: Lab, *arguments: str) -> str:
    command = [str(program("helm")), *arguments, f"--namespace={SYSTEM}", f"--kubeconfig={lab.kubeconfig}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS + 60)
    if done.returncode:
        pods = lab.kubectl("get", "pods", "--all-namespaces", "--output=wide")
        events = lab.kubectl("get", "events", "--namespace", SYSTEM, "--sort-by=.lastTimestamp")
        component = "--selector=app.kubernetes.io/component=controller"
        logs = lab.kubectl("logs", "--namespace", SYSTEM, component, "--container=controller", "--tail=40")
        raise AssertionError(f"helm {arguments[0]}: {done.stderr}\n{pods}\n{events[-4000:]}\n{logs[-4000:]}")
    return done.stdout


# --- its users


def job(name: str, steps: int, **spec: Any) -> dict[str, Any]:
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


def queue(name: str, *, hold: bool) -> dict[str, Any]:
    """A queue with a GPU of its own."""
    spec = {"hold": hold, "quotas": [{"gpuClass": "24Gi", "nominal": 1}]}
    return {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": name}, "spec": spec}


def finished(lab: Lab, name: str) -> dict[str, Any]:
    """Wait for a job's end, well or not, as a user would; its condition Finished, and its status."""
    wait = ["wait", f"qj/{name}", "--for=condition=Finished", f"--timeout={JOB_SECONDS}s", f"--namespace={TEAM}"]
    try:
        lab.kubectl(*wait, seconds=JOB_SECONDS + 30)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{error}\n{story(lab, name)}") from error
    return status_of(lab, name)


def succeeded(lab: Lab, name: str) -> dict[str, Any]:
    """Wait for a job's success; its status."""
    status = finished(lab, name)
    assert reason_of(status, "Finished") == "Succeeded", story(lab, name)
    return status


def status_of(lab: Lab, name: str) -> dict[str, Any]:
    """What the job's object says."""
    status: dict[str, Any] = lab.get(f"qj/{name}", f"--namespace={TEAM}").get("status", {})
    return status


def reason_of(status: dict[str, Any], kind: str) -> str | None:
    """Why the condition is true; None when it is not."""
    found = [each for each in status.get("conditions", []) if each["type"] == kind and each["status"] == "True"]
    return found[0]["reason"] if found else None


def train_attempts(status: dict[str, Any]) -> int:
    """How many train stages the job has had."""
    return sum(attempt["stage"] == "train" for attempt in status.get("attempts", []))


def wait_for_training(lab: Lab, name: str, count: int) -> str:
    """Wait until the job's so-manieth train stage has done a step; its pod's name."""
    number = 1 + count  # the first attempt prepares
    pod = f"{name}-train-{number}"

    def trains() -> bool:
        status = status_of(lab, name)
        assert reason_of(status, "Finished") is None, f"{name} ended too early: {status['summary']}"
        return train_attempts(status) == count and steps_done(lab, pod) != []

    until(lab, name, f"its train stage {count} trains", trains)
    return pod


def steps_done(lab: Lab, pod: str) -> list[int]:
    """The steps that a train stage's log tells of."""
    try:
        log = lab.kubectl("logs", f"--namespace={TEAM}", pod, "--container=trainer")
    except AssertionError:  # not started yet
        return []
    return [int(step) for step in STEP_DONE.findall(log)]


def until(lab: Lab, name: str, what: str, holds: Callable[[], bool]) -> None:
    """Wait for something about a job."""
    deadline = time.monotonic() + JOB_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {JOB_SECONDS} s\n{story(lab, name)}")
        time.sleep(POLL_SECONDS)


def story(lab: Lab, name: str) -> str:
    """What there is to know about a job that did not come through."""
    told = lab.kubectl("describe", f"qj/{name}", f"--namespace={TEAM}")
    pods = lab.kubectl("get", "pods", "--all-namespaces", "--output=wide")
    logs = lab.kubectl(
        "logs", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=controller", "--tail=30"
    )
    return f"{told[-4000:]}\n{pods}\n{logs[-4000:]}"


# --- what disturbs them


def evict(lab: Lab, pod: str) -> None:
    """Evict a pod as an administrator or an autoscaler does, through the API."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": TEAM}}
    path = f"/api/v1/namespaces/{TEAM}/pods/{pod}/eviction"
    lab.kubectl("create", f"--raw={path}", "--filename=-", stdin=json.dumps(eviction))


def drain(lab: Lab, node: str) -> None:
    """Whatever runs there goes elsewhere: jobs, and of the service itself what is there."""
    options = ("--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={INSTALL_SECONDS}s")
    lab.kubectl("drain", node, *options, seconds=INSTALL_SECONDS + 30)


def kill_controllers() -> dict[str, int]:
    """SIGKILL for every controller and every Ray head, at once; how many of each there were."""
    found: dict[str, list[int]] = {name: [] for name in PROGRAMS}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        for name, module in PROGRAMS.items():
            if words[1:3] == ["-m", module]:
                found[name].append(int(folder.name))
    for pid in (pid for pids in found.values() for pid in pids):
        os.kill(pid, signal.SIGKILL)
    return {name: len(pids) for name, pids in found.items()}


# --- MLflow


def mlflow_bytes(lab: Lab, path: str, body: dict[str, Any] | None = None) -> bytes:
    """What MLflow's own API says: asked by its pod's address, under the name that it knows itself by."""
    pod = lab.get(f"pod/{RELEASE}-mlflow-0", f"--namespace={SYSTEM}")
    url = f"http://{pod['status']['podIP']}:{MLFLOW_PORT}/api/2.0/{path}"
    headers = {"Content-Type": "application/json", "Host": f"{RELEASE}-mlflow.{SYSTEM}.svc:{MLFLOW_PORT}"}
    request = Request(url, json.dumps(body).encode() if body is not None else None, headers)
    with urlopen(request, timeout=60) as got:
        return got.read()


def mlflow_answer(lab: Lab, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same, of an answer in JSON."""
    return json.loads(mlflow_bytes(lab, f"mlflow/{path}", body))


def mlflow_runs(lab: Lab, name: str) -> list[dict[str, Any]]:
    """The runs of a job."""
    experiment = mlflow_answer(lab, f"experiments/get-by-name?experiment_name={TEAM}")["experiment"]["experiment_id"]
    body = {"experiment_ids": [experiment], "filter": f"tags.`qlora.dev/job` = '{name}'"}
    return mlflow_answer(lab, "runs/search", body).get("runs", [])


def logged_steps(lab: Lab, run_id: str, metric: str) -> list[int]:
    """The steps for which a run has the metric; one that was logged twice is there twice."""
    answer = mlflow_answer(lab, f"metrics/get-history?run_id={run_id}&metric_key={metric}&max_results=1000")
    return sorted(int(point["step"]) for point in answer["metrics"])


def registered_weights(lab: Lab, name: str) -> bytes:
    """The adapter's weights as the registry gives them to whoever downloads version 1."""
    uri: str = mlflow_answer(lab, f"model-versions/get-download-uri?name={name}&version=1")["artifact_uri"]
    if uri.startswith("models:/"):  # the version points to a logged model
        model = mlflow_answer(lab, f"logged-models/{uri.removeprefix('models:/')}")["model"]
        uri = model["info"]["artifact_uri"]
    folder = uri.removeprefix("mlflow-artifacts:").lstrip("/")
    return mlflow_bytes(lab, f"mlflow-artifacts/artifacts/{folder}/artifacts/adapter/{WEIGHTS}")
