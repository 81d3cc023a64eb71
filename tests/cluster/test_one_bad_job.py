"""One bad job on a real API server, of every kind that once stopped, starved or moved the others.

The controller's program is the real one, pods are played by a kubelet on paper. What a stage of the bad job says is the
text of its termination message, as whoever pushed the model, or runs code in the pod, has it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import JOB_UID_LABEL
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import MAX_CHAT_TEMPLATE_BYTES, ModelSource, QLoRAJob, ResourcesSpec
from orchestrator.api.reasons import ConditionType
from orchestrator.api.results import StageResult
from orchestrator.errors import OrchestratorError
from tests.builders import ON_THE_HUB, prepare_result, submitted_job, train_result
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controller_program import Program
from tests.cluster.kubelet import PaperKubelet
from tests.cluster.resources import add_gpu_node, clear, clear_all
from tests.cluster.test_controller import is_over

JOBS = path_of(API_VERSION, "qlorajobs", "team-b")
POLICIES = "/apis/admissionregistration.k8s.io/v1"
WAIT_SECONDS = 90.0
"""On a busy machine; what was held up was held up for ever."""
WATCHED_SECONDS = 6.0
"""Of rounds every half second, in the first of which the harm was done."""
ENDLESS_SECONDS = 1e6
Programs = Callable[..., Program]
MIB = 1 << 20
WAVES, WARM_WAVES, JOBS_A_WAVE = 5, 2, 60


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster with one GPU and nothing else."""
    api = cluster.api()
    clear_all(api)
    add_gpu_node(api, "gpu-1", 24_564)
    yield api
    clear(api)
    api.close()


@pytest.fixture
def started(cluster: ControlPlane, new_database: Path, tmp_path: Path) -> Iterator[Programs]:
    """Starts the controller, with further settings."""
    programs: list[Program] = []

    def start(**settings: str) -> Program:
        shutil.copyfile(new_database, tmp_path / "mlflow.db")
        program = Program(cluster.kubeconfig_for(cluster.token, name="controller"), tmp_path, settings)
        programs.append(program)
        program.keep_running()
        return program

    yield start
    for program in programs:
        program.kill()


class Kubelet(PaperKubelet):
    """Plays every pod, those of bad jobs as they want it."""

    def __init__(self, api: KubeApi, train_seconds: float = 0.3) -> None:
        super().__init__(api, "gpu-1", train_seconds=train_seconds)
        self.messages: dict[tuple[str, str], str] = {}
        """What a stage says in the end, by its job's uid and its name."""
        self.never_start: set[str] = set()
        self.never_end: set[str] = set()
        """Uids of jobs whose stages do not."""

    def _play(self, item: Json) -> None:
        uid = item["metadata"]["labels"][JOB_UID_LABEL]
        begun = (seen := self._seen.get(item["metadata"]["uid"])) is not None and seen.started_at is not None
        stays = uid in self.never_start or (uid in self.never_end and begun)
        if not stays or "deletionTimestamp" in item["metadata"]:
            super()._play(item)

    def _result(self, stage: str, job: str) -> str:
        said = super()._result(stage, job)
        return self.messages.get((job, stage), said)


class Scene:
    """A controller, a kubelet, and what there is to ask about jobs."""

    def __init__(self, api: KubeApi, program: Program) -> None:
        self.store, self.program = KubernetesStore(api), program

    def submit(self, name: str, namespace: str = "team-a", **spec: Any) -> QLoRAJob:
        return self.store.create_job(submitted_job(name, namespace, **{**ON_THE_HUB, **spec}))

    def read(self, job: QLoRAJob) -> QLoRAJob:
        return self.store.read_job(job.metadata.namespace, job.metadata.name)

    def wait(self, what: str, done: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            self.program.keep_running()
            assert time.monotonic() < deadline, f"never: {what}\n{self.program.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def finishes(self, name: str, **spec: Any) -> None:
        """A healthy job does."""
        job = self.submit(name, **spec)
        self.wait(f"{name} succeeds", lambda: is_over(self.read(job)))
        assert {attempt.exit_code for attempt in self.read(job).status.attempts} == {0}

    def trains(self, name: str, **spec: Any) -> QLoRAJob:
        """A job that holds the GPU."""
        job = self.submit(name, **spec)
        self.wait(f"{name} trains", lambda: self.is_training(job))
        return job

    def is_training(self, job: QLoRAJob) -> bool:
        attempt = self.read(job).status.active_attempt
        return attempt is not None and attempt.stage == "train" and attempt.start_time is not None

    def stays(self, job: QLoRAJob) -> None:
        """Nobody asks it to make way."""
        deadline = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < deadline:
            status = self.read(job).status
            assert status.attempts_total == 2, f"{status.summary}; {dict(status.evictions)}"
            assert status.attempts[-1].stop_time is None, status.attempts[-1].stop_reason
            time.sleep(0.1)

    def has_finished(self, job: QLoRAJob) -> bool:
        return self.read(job).status.is_true(ConditionType.FINISHED)

    def is_told_of(self, job: QLoRAJob, kind: ConditionType) -> bool:
        status = self.read(job).status
        return status.is_true(ConditionType.FINISHED) or status.condition(kind) is not None


def wire(result: StageResult) -> Json:
    return json.loads(result.model_dump_json(by_alias=True, exclude_none=True))


def prepared_as(**fields: object) -> str:
    """Prepare's result, with these figures in the place of its own."""
    said = wire(StageResult(prepare=prepare_result()))
    said["prepare"] |= {name: value for name, value in fields.items() if name in said["prepare"]}
    said["prepare"]["model"] |= {name: value for name, value in fields.items() if name not in said["prepare"]}
    return json.dumps(said)


SHAPES: Mapping[str, Mapping[str, object]] = {
    "1,500 layers": {"numLayers": 1500},
    "a width of 400 digits": {"hiddenSize": 10**400},
    "a mixture without its fields": {"modelType": "olmoe"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_model_that_cannot_be_sized_stops_nobody_and_not_after_a_restart(
    api: KubeApi, started: Programs, shape: Mapping[str, object]
) -> None:
    program = started()
    scene = Scene(api, program)
    with Kubelet(api) as kubelet:
        bad = scene.submit("bad", "team-b", priority=1_000_000)
        kubelet.messages[bad.metadata.uid, "prepare"] = prepared_as(**shape)
        scene.wait("the bad job is prepared", lambda: scene.read(bad).status.attempts_total)
        scene.finishes("beside")
        program.kill()
        scene.finishes("after-a-restart")
    assert "this round failed" not in program.log.read_text()


def test_steps_that_no_server_stores_move_nobody(api: KubeApi, started: Programs) -> None:
    """As many as 1e30 epochs come to."""
    scene = Scene(api, started())
    with Kubelet(api, ENDLESS_SECONDS) as kubelet:
        victim = scene.trains("victim")
        bad = scene.submit("bad", "team-b", priority=100)
        kubelet.messages[bad.metadata.uid, "prepare"] = prepared_as(steps=10**31)
        scene.wait("the bad job is prepared", lambda: scene.read(bad).status.attempts_total)
        scene.stays(victim)


def test_a_job_whose_status_the_server_refuses_moves_nobody(api: KubeApi, started: Programs) -> None:
    """By an operator's policy, which stands for whatever no schema of ours says."""
    scene = Scene(api, started())
    with Kubelet(api, ENDLESS_SECONDS), statuses_refused(api, "has(object.status.prepared)"):
        victim = scene.trains("victim")
        bad = scene.submit("bad", "team-b", priority=100)
        scene.wait("the bad job has a stage", lambda: scene.read(bad).status.attempts_total)
        scene.stays(victim)
        scene.wait("the bad job has ended", lambda: scene.has_finished(bad))


@contextlib.contextmanager
def statuses_refused(api: KubeApi, where: str) -> Iterator[None]:
    """Of jobs in team-b, with 422."""
    rule = {
        "apiGroups": ["qlora.dev"],
        "apiVersions": ["*"],
        "operations": ["UPDATE"],
        "resources": ["qlorajobs/status"],
    }
    spec: Json = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": f"!({where})", "reason": "Invalid", "message": "no such status"}],
    }
    policies, bindings = f"{POLICIES}/validatingadmissionpolicies", f"{POLICIES}/validatingadmissionpolicybindings"
    named: Json = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": "statuses"}}
    only = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team-b"}}}
    bound = {"policyName": "statuses", "validationActions": ["Deny"], "matchResources": only}
    api.create(policies, {**named, "kind": "ValidatingAdmissionPolicy", "spec": spec})
    api.create(bindings, {**named, "kind": "ValidatingAdmissionPolicyBinding", "spec": bound})
    try:
        yield
    finally:
        api.delete(f"{bindings}/statuses")
        api.delete(f"{policies}/statuses")


def test_a_job_that_only_a_spot_machine_may_take_moves_nobody_where_there_is_none(
    api: KubeApi, started: Programs
) -> None:
    scene = Scene(api, started())
    with Kubelet(api, ENDLESS_SECONDS):
        victim = scene.trains("victim")
        bad = scene.submit("bad", "team-b", priority=100, resources=ResourcesSpec(spot="required"))
        scene.wait("the bad job is told to wait", lambda: scene.is_told_of(bad, ConditionType.ADMITTED))
        scene.stays(victim)


def test_a_loss_that_is_no_number_ends_its_job_and_frees_the_gpu(api: KubeApi, started: Programs) -> None:
    scene = Scene(api, started())
    with Kubelet(api) as kubelet:
        bad = scene.submit("bad", "team-b", priority=100)
        said = wire(train_result(120))
        said["train"]["trainLoss"] = math.nan
        kubelet.messages[bad.metadata.uid, "train"] = json.dumps(said)
        scene.wait("the bad job trains", lambda: scene.read(bad).status.attempts_total > 1)
        scene.finishes("beside")
        scene.wait("the bad job has ended", lambda: scene.has_finished(bad))


# --- slots of prepare ----------------------------------------------------------------------------------------------

SLOTS = {"QLORA_CPU_STAGES_LIMIT": "2", "QLORA_CPU_START_SECONDS": "2"}


def test_sources_that_cannot_be_split_hold_no_slot(api: KubeApi, started: Programs) -> None:
    scene = Scene(api, started())
    taken = 0
    for number in range(64):
        job = submitted_job(f"bad-{number}", "team-b", priority=100, **ON_THE_HUB)
        body = job.model_dump(mode="json", by_alias=True, exclude_none=True)
        body["spec"]["model"]["source"] = "s3://[a/b"
        with contextlib.suppress(OrchestratorError):
            api.create(JOBS, {**body, "apiVersion": API_VERSION, "kind": "QLoRAJob"})
            taken += 1
    with Kubelet(api):
        scene.finishes("beside")
    assert taken == 0, "the server refuses them, so nothing of them is ever tried"


def test_stages_that_cannot_start_leave_the_slots_to_others(api: KubeApi, started: Programs) -> None:
    """Their claim does not exist, say."""
    scene = Scene(api, started(**SLOTS))
    with Kubelet(api) as kubelet:
        for number in range(4):
            kubelet.never_start.add(scene.submit(f"bad-{number}", "team-b", priority=100).metadata.uid)
        scene.wait("they hold the slots", lambda: len(pods_in(api, "team-b")) >= 2)
        scene.finishes("beside")


def test_a_prepare_that_never_ends_is_ended_and_leaves_its_slot(api: KubeApi, started: Programs) -> None:
    """A template that is rendered for ever, say."""
    scene = Scene(api, started(**SLOTS, QLORA_PREPARE_DEADLINE_SECONDS="3"))
    with Kubelet(api) as kubelet:
        bad = [scene.submit(f"bad-{number}", "team-b", priority=100) for number in range(2)]
        kubelet.never_end.update(job.metadata.uid for job in bad)
        scene.wait("they hold the slots", lambda: len(pods_in(api, "team-b")) == 2)
        scene.finishes("beside")
        scene.wait("both have ended", lambda: all(scene.has_finished(job) for job in bad))
    assert all("QLORA_PREPARE_DEADLINE_SECONDS" in scene.read(job).status.summary for job in bad)


def pods_in(api: KubeApi, namespace: str) -> list[Json]:
    return api.get(path_of("v1", "pods", namespace))["items"]


# --- what the server takes and no model of ours does ----------------------------------------------------------------

METADATA: Mapping[str, Json] = {
    "an annotation of 3,000 characters": {"annotations": {"qlora.dev/note": "x" * 3000}},
    "70 labels": {"labels": {f"label-{number}": "x" for number in range(70)}},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_of_any_size_neither_gives_a_gpu_twice_nor_keeps_a_job_from_being_stopped(
    api: KubeApi, started: Programs, metadata: Json
) -> None:
    program = started()
    scene = Scene(api, program)
    with Kubelet(api, ENDLESS_SECONDS):
        bad = scene.trains("bad", namespace="team-b")
        path = f"{JOBS}/bad"
        api.patch(path, {"metadata": metadata})
        program.kill()  # the next one has never seen it otherwise
        other = scene.submit("other")
        scene.wait("the other is told to wait", lambda: scene.is_told_of(other, ConditionType.ADMITTED))
        deadline = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < deadline:
            assert len(running_on_gpus(api)) == 1, "the GPU is given twice"
            time.sleep(0.1)
        api.patch(path, {"spec": {"suspend": True}})
        scene.wait("the bad job is stopped and the other trains", lambda: scene.is_training(other))
    assert [attempt.stage for attempt in scene.read(bad).status.attempts] == ["prepare", "train"]


def running_on_gpus(api: KubeApi) -> list[str]:
    """Train pods that have not ended."""
    return [
        item["metadata"]["name"]
        for namespace in ("team-a", "team-b")
        for item in pods_in(api, namespace)
        if "-train-" in item["metadata"]["name"] and item["status"]["phase"] not in ("Succeeded", "Failed")
    ]


# --- others' queues, memory ------------------------------------------------------------------------------------------


def test_a_job_in_another_teams_queue_moves_nobody_whatever_its_priority(api: KubeApi, started: Programs) -> None:
    scene = Scene(api, started())
    spec = {"namespaces": ["team-a"], "quotas": [{"gpuClass": "24Gi", "nominal": 1}]}
    queue: Json = {"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": "theirs"}, "spec": spec}
    api.create(path_of(API_VERSION, "qloraqueues"), queue)
    with Kubelet(api, ENDLESS_SECONDS):
        victim = scene.trains("victim", queue="theirs")
        bad = scene.submit("bad", "team-b", queue="theirs", priority=1_000_000)
        scene.wait("the bad job is told to wait", lambda: scene.is_told_of(bad, ConditionType.PREPARED))
        scene.stays(victim)


@pytest.mark.timeout(1200)
def test_the_controller_keeps_nothing_of_large_jobs_that_were_deleted(
    api: KubeApi, started: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a template of its own, as large as one may be, and is suspended."""
    program = started()
    scene, sizes = Scene(api, program), list[float]()
    for wave in range(WAVES):
        jobs: list[QLoRAJob] = []
        for number in range(JOBS_A_WAVE):
            head = f"{{{{ x }}}}{wave}-{number:04}"
            template = head + "t" * (MAX_CHAT_TEMPLATE_BYTES - len(head))
            source = ModelSource(source="hf://acme/tiny", chat_template=template)
            jobs.append(scene.submit(f"large-{wave}-{number}", "team-b", model=source, suspend=True))
        scene.wait(
            "all are told of", lambda jobs=jobs: all(scene.is_told_of(job, ConditionType.PREPARED) for job in jobs)
        )
        for job in jobs:
            scene.store.delete_job("team-b", job.metadata.name)
        scene.wait("all are gone", lambda: not api.get(JOBS)["items"])
        assert program.process is not None
        sizes.append(psutil.Process(program.process.pid).memory_info().rss / MIB)
    with capsys.disabled():
        print(f"\n{JOBS_A_WAVE} jobs a wave of {MAX_CHAT_TEMPLATE_BYTES} B each: {[round(size) for size in sizes]} MiB")
    # What is kept of jobs is kept of each wave's; what the process takes once more is its allocator's.
    grown = [after - before for before, after in pairwise(sizes[WARM_WAVES - 1 :])]
    assert min(grown) < JOBS_A_WAVE * MAX_CHAT_TEMPLATE_BYTES / MIB
