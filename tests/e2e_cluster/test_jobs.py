"""Real jobs on the cluster: the chart is installed, `kubectl apply` hands a job in, MLflow has the adapter.

Two long jobs are the same but for their stores and their luck: `undisturbed` keeps its things on a claim; `disturbed`,
on S3, goes through all that a cluster does to a job. In the end MLflow has the same bytes of both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.reasons import Reason, Recovery
from tests.e2e_cluster.daemons import wait_until
from tests.e2e_cluster.lab import Lab
from tests.e2e_cluster.service import (
    BUCKET,
    RECEIVER,
    RECEIVER_ADDRESS,
    SYSTEM,
    TEAM,
    WEBHOOK,
    WEIGHTS,
    add_gpu,
    drain,
    evict,
    finished,
    install,
    job,
    kill_controllers,
    logged_steps,
    make_volumes,
    mlflow_answer,
    mlflow_runs,
    queue,
    reason_of,
    registered_weights,
    status_of,
    steps_done,
    succeeded,
    until,
    wait_for_training,
    webhook_secret,
)
from tests.webhook_receiver import receiving

STEPS = 14
"""Enough for four train stages that each do a step before something happens to them."""
EVENT_SECONDS = 30
WEBHOOK_SECONDS = 120
pytestmark = pytest.mark.timeout(2400)  # each wait within has a bound of its own
CONTROLLERS = ("--namespace", SYSTEM, "--selector=app.kubernetes.io/component=controller")


@pytest.fixture(scope="module")
def volumes(lab: Lab) -> Path:
    """Folders behind the persistent volumes."""
    model = os.environ.get("QLORA_TEST_MODEL")
    if model is None:
        message = "set QLORA_TEST_MODEL to the folder that `make demo` made"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return make_volumes(lab, Path(model))


@pytest.fixture(scope="module")
def installed(lab: Lab, volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The chart, installed, and one GPU; node-2 gets another when a test needs it."""
    add_gpu(lab, "node-1")
    install(lab, volumes, tmp_path_factory.mktemp("values") / "values.yaml")
    yield
    for namespace in (SYSTEM, TEAM):
        lab.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, installed: None) -> dict[str, Any]:
    """The status of a job that nobody disturbed."""
    lab.apply(job("undisturbed", STEPS, store={"uri": "pvc://store/undisturbed"}), namespace=TEAM)
    return succeeded(lab, "undisturbed")


def test_a_job_goes_from_apply_to_the_registry(lab: Lab, volumes: Path, undisturbed: dict[str, Any]) -> None:
    status = undisturbed
    assert stages_of(status) == ["prepare", "train", "publish"]
    folder = volumes / "store" / status["adapterUri"].removeprefix("pvc://store/")
    assert digest(folder / WEIGHTS) == status["adapterDigest"]
    assert sha256(registered_weights(lab, "undisturbed")) == status["adapterDigest"]
    wait_until_finished(lab, status["mlflow"]["runId"])
    version = mlflow_answer(lab, "model-versions/get?name=undisturbed&version=1")["model_version"]
    assert (version["run_id"], version["status"]) == (status["mlflow"]["runId"], "READY")
    # The event is sent after the status is written, and may come a moment later.
    wait_until("the event of its success", lambda: "Succeeded" in events_of(lab, "undisturbed"), EVENT_SECONDS)


def test_pods_of_stages_are_restricted_and_know_no_account(lab: Lab, undisturbed: dict[str, Any]) -> None:
    pods = lab.get("pods", f"--namespace={TEAM}", "--selector=qlora.dev/job=undisturbed")["items"]
    assert {pod["metadata"]["labels"]["qlora.dev/stage"] for pod in pods} == {"prepare", "train", "publish"}
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounts


@pytest.fixture(scope="module")
def broken(lab: Lab, installed: None) -> dict[str, Any]:
    """The status of a job whose data are not there, of whose end a webhook is to be told that nobody listens at yet."""
    lab.apply(webhook_secret(), namespace=TEAM)
    told = {"name": WEBHOOK, "url": RECEIVER, "events": ["job.failed"]}
    document = job("broken", STEPS, notifications=[told])
    document["spec"]["dataset"] = {"source": "pvc://data/absent.jsonl", "format": "messages"}
    lab.apply(document, namespace=TEAM)
    return finished(lab, "broken")


def test_kubectl_wait_returns_for_a_job_that_fails(broken: dict[str, Any]) -> None:
    assert reason_of(broken, "Finished") == "UserError"
    assert "absent.jsonl" in broken["summary"]


def test_a_receiver_that_was_down_hears_of_the_end_once_it_is_up(lab: Lab, broken: dict[str, Any]) -> None:
    def outstanding() -> list[dict[str, Any]]:
        return status_of(lab, "broken").get("notifications", {}).get("outstanding", [])

    wait_until("a try that nobody answered", lambda: "cannot be reached" in str(outstanding()), WEBHOOK_SECONDS)
    with receiving(address=RECEIVER_ADDRESS) as receiver:
        wait_until("the receiver is told", lambda: receiver.events("broken") == ["job.failed"], WEBHOOK_SECONDS)
        wait_until("nothing is outstanding", lambda: not outstanding(), WEBHOOK_SECONDS)
    (_, body), *others = receiver.told
    assert others == []
    assert (body["data"]["namespace"], body["data"]["reason"]) == (TEAM, "UserError")


def test_a_job_that_all_happens_to_ends_with_the_same_adapter(lab: Lab, undisturbed: dict[str, Any]) -> None:
    lab.apply(queue("urgent", hold=True), job("urgent", 1, priority=100, queue="urgent"), namespace=TEAM)
    until(lab, "urgent", "it is prepared", lambda: reason_of(status_of(lab, "urgent"), "Prepared") is not None)
    lab.apply(job("disturbed", STEPS), namespace=TEAM)
    pods = [wait_for_training(lab, "disturbed", 1)]
    first_steps = [steps_done(lab, pods[0])[0]]
    for number, disturb in enumerate((urgent_comes, evict, node_is_drained), start=2):
        disturb(lab, pods[-1])
        pods.append(wait_for_training(lab, "disturbed", number))
        first_steps.append(steps_done(lab, pods[-1])[0])
    assert first_steps == sorted({1, *first_steps}), "each stage goes on where the one before it was stopped"
    assert lab.get(f"pod/{pods[-1]}", f"--namespace={TEAM}")["spec"]["nodeName"] == "node-2"
    killed = kill_controllers()
    assert min(killed.values()) >= 1, killed
    status = succeeded(lab, "disturbed")

    assert status["evictions"] == {"Preempted": 1, "Disrupted": 2}
    assert stages_of(status) == ["prepare", *["train"] * 4, "publish"]
    assert reason_of(succeeded(lab, "urgent"), "Evicted") is None
    weights = lab.buckets / BUCKET / status["adapterUri"].removeprefix(f"s3://{BUCKET}/") / WEIGHTS
    assert digest(weights) == status["adapterDigest"] == undisturbed["adapterDigest"]
    assert registered_weights(lab, "disturbed") == registered_weights(lab, "undisturbed")
    (run,) = mlflow_runs(lab, "disturbed")
    wait_until_finished(lab, run["info"]["run_id"])
    assert logged_steps(lab, run["info"]["run_id"], "train/loss") == list(range(1, STEPS + 1))
    restarts = [
        container["restartCount"]
        for pod in lab.get("pods", *CONTROLLERS)["items"]
        for kind in ("containerStatuses", "initContainerStatuses")
        for container in pod["status"].get(kind, [])
    ]
    assert sum(restarts) >= sum(killed.values())
    lab.kubectl("uncordon", "node-1")


def wait_until_finished(lab: Lab, run_id: str) -> None:
    """A run gets its end after the job has its own."""

    def status() -> str:
        return mlflow_answer(lab, f"runs/get?run_id={run_id}")["run"]["info"]["status"]

    wait_until("MLflow has the run's end", lambda: status() == "FINISHED", EVENT_SECONDS)


def stages_of(status: dict[str, Any]) -> list[str]:
    """The stages, but for those on the CPU that the surroundings ended: a machine that is busy answers late."""
    return [a["stage"] for a in status["attempts"] if a["stage"] == "train" or not came_to_nothing(a)]


def came_to_nothing(attempt: dict[str, Any]) -> bool:
    return "reason" in attempt and Reason(attempt["reason"]).recovery is Recovery.WAIT


def urgent_comes(lab: Lab, _: str) -> None:
    lab.apply(queue("urgent", hold=False))  # one GPU for two jobs


def node_is_drained(lab: Lab, _: str) -> None:
    add_gpu(lab, "node-2")
    drain(lab, "node-1")


def events_of(lab: Lab, name: str) -> str:
    return lab.kubectl("get", "events", f"--namespace={TEAM}", f"--field-selector=involvedObject.name={name}")


def digest(file: Path) -> str:
    return sha256(file.read_bytes())


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
