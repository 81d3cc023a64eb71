"""Hundreds of poison objects on a real API server, beside a healthy job: it succeeds in about its usual time.

What the server takes of mutated specs, of statuses that the schema allows, of labels, annotations and finalizers; and
pods in the name of the service. `QLORA_POISON` says how many jobs. A controller that is killed and started again meets
the same objects.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import (
    ATTEMPT_LABEL,
    JOB_LABEL,
    JOB_UID_LABEL,
    MANAGED_BY_LABEL,
    MANAGER,
    STAGE_LABEL,
)
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import MAX_CHAT_TEMPLATE_BYTES, ModelSource
from orchestrator.errors import OrchestratorError
from tests.builders import ON_THE_HUB, submitted_job
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controller_program import Program
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import add_gpu_node, clear, clear_all
from tests.cluster.test_controller import is_over
from tests.strangers.test_decide import a_status
from tests.strangers.test_fuzz import JOB, SEED, mutated

POISON = int(os.environ.get("QLORA_POISON", "200"))
JOBS = path_of(API_VERSION, "qlorajobs", "team-b")
WRITERS = 4
FINISH_SECONDS = 240.0
SETTINGS = {"QLORA_CPU_STAGES_LIMIT": "1000"}
"""Who gets the slots of prepare and publish is another test's business."""
MOST_SECONDS = 60.0
"""On a busy machine; whatever is held up by poison is held up for minutes, or for ever."""


def poison_of(dice: random.Random, number: int) -> tuple[Json, Json | None]:
    """A job, and the status that somebody with rights to it writes."""
    body: Json = submitted_job(f"poison-{number}", "team-b", priority=-1, **ON_THE_HUB).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    body.pop("status")
    body["spec"]["suspend"] = dice.random() < 0.8  # a kubelet on paper plays pods one after the other
    meta: Json = {"name": f"poison-{number}", "namespace": "team-b"}
    match dice.randrange(6):
        case 0:
            body = {**mutated(dice, JOB), "apiVersion": API_VERSION, "kind": "QLoRAJob"}
        case 1:
            head = "{{ x }}"
            template = head + f"{number:08}" + "\u202e" * ((MAX_CHAT_TEMPLATE_BYTES - 100) // 3)
            body["spec"]["model"] = ModelSource(source="hf://owner/model", chat_template=template).to_wire()
        case 2:
            meta["annotations"] = {f"qlora.dev/{n}": "\u2028" * 20_000 for n in range(4)}
            meta["labels"] = {f"l{n}": "x" * 63 for n in range(300)}
        case 3:
            meta["finalizers"] = ["foreign.example/held"]
        case _:
            pass
    return {**body, "metadata": meta}, a_status(dice).to_wire() if dice.random() < 0.7 else None


def write_poison(api: KubeApi, item: tuple[Json, Json | None]) -> str:
    """Create it as far as the server lets one; what it was."""
    body, status = item
    name = body["metadata"]["name"]
    try:
        created = api.create(JOBS, body)
    except OrchestratorError:
        return "refused"
    if status is not None:
        with contextlib.suppress(OrchestratorError):
            api.replace(f"{JOBS}/{name}/status", {**created, "status": status})
    if "finalizers" in body["metadata"]:
        with contextlib.suppress(OrchestratorError):
            api.delete(f"{JOBS}/{name}")
        return "held"
    return "with status" if status is not None else "taken"


def pods_of_strangers(api: KubeApi, dice: random.Random) -> None:
    """Pods that say that they are the service's, with odd words and odd times."""
    for number in range(20):
        name = f"poison-{number}-train-1"
        labels = {
            MANAGED_BY_LABEL: MANAGER,
            JOB_LABEL: f"poison-{number}",
            JOB_UID_LABEL: "someone",
            STAGE_LABEL: "train",
            ATTEMPT_LABEL: dice.choice(["1", "0", "9" * 60]),
        }
        spec = {"containers": [{"name": "trainer", "image": "i"}], "nodeName": "gpu-1"}
        path = path_of("v1", "pods", "team-b")
        with contextlib.suppress(OrchestratorError):
            api.create(path, {"metadata": {"name": name, "labels": labels}, "spec": spec})
            ended: Json = {
                "exitCode": dice.choice([0, 2**31 - 1]),
                "startedAt": "0001-01-01T00:00:00+14:00",
                "finishedAt": "9999-12-31T23:59:59Z",
                "message": dice.choice(["[" * 100_000, "\u202e" * 10_000, '{"train": {"step": 9e99}}']),
            }
            container = {"name": "trainer", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
            status = {"containerStatuses": [{**container, "state": {"terminated": ended}}]}
            api.patch(f"{path}/{name}/status", {"status": status}, STRATEGIC_PATCH)


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster with two GPUs and nothing else."""
    api = cluster.api()
    clear_all(api)
    for name in ("gpu-1", "gpu-2"):
        add_gpu_node(api, name, 24_564)
    yield api
    clear(api)
    api.close()


def seconds_to_finish(program: Program, store: KubernetesStore, name: str) -> float:
    """How long a healthy job takes."""
    began = time.monotonic()
    store.create_job(submitted_job(name, priority=1_000_000, **ON_THE_HUB))
    while not is_over(job := store.read_job("team-a", name)):
        program.keep_running()
        if time.monotonic() - began > FINISH_SECONDS:
            raise AssertionError(f"not finished: {job.status.summary}\n{program.log.read_text()[-4000:]}")
        time.sleep(0.1)
    assert {attempt.exit_code for attempt in job.status.attempts} == {0}
    return time.monotonic() - began


@pytest.mark.timeout(3600)
def test_a_healthy_job_succeeds_beside_poison_and_again_after_a_restart(
    api: KubeApi, cluster: ControlPlane, new_database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(new_database, tmp_path / "mlflow.db")
    program = Program(cluster.kubeconfig_for(cluster.token, name="controller"), tmp_path, SETTINGS)
    store, dice = KubernetesStore(api), random.Random(SEED)
    try:
        with PaperKubelet(api, "gpu-1"):
            seconds_to_finish(program, store, "first")  # which also waits for the program
            alone = seconds_to_finish(program, store, "alone")
            items = [poison_of(dice, number) for number in range(POISON)]
            with ThreadPoolExecutor(WRITERS) as pool:
                kinds = Counter(pool.map(lambda item: write_poison(api, item), items))
            pods_of_strangers(api, dice)
            beside = seconds_to_finish(program, store, "beside")
            program.kill()
            program.keep_running()
            seconds_to_finish(program, store, "after-restart")
            again = seconds_to_finish(program, store, "again")
    finally:
        program.kill()
    log = program.log.read_text()
    with capsys.disabled():
        print(f"\n{dict(kinds)}; alone {alone:.1f} s, beside them {beside:.1f} s, after a restart {again:.1f} s")
    assert kinds["with status"] > POISON / 4
    assert kinds["held"] > POISON / 20
    assert "this round failed" not in log
    assert max(beside, again) < alone + MOST_SECONDS
