"""The resource definitions on a real API server: the models' verdicts and defaults, and what users see."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import IMMUTABLE_SPEC_FIELDS, QLoRAJob, QLoRAJobSpec
from orchestrator.api.queue import QLoRAQueue
from orchestrator.errors import InvalidObject, OrchestratorError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.resources import CRD_PATH, clear

JOBS, QUEUES = path_of(API_VERSION, "qlorajobs", "team-a"), path_of(API_VERSION, "qloraqueues")
SPEC: dict[str, Any] = {"model": {"source": "hf://owner/model"}, "dataset": {"source": "s3://bucket/train.jsonl"}}

# One table of cases for both: (path in the spec, value, whether it is valid). `ABSENT` takes the field away.
ABSENT = object()
JOB_CASES: list[tuple[str, object, bool]] = [
    ("model", ABSENT, False),
    ("dataset", ABSENT, False),
    ("model.source", ABSENT, False),
    ("model.source", "hf://a/b", True),
    ("model.source", "pvc://claim/path", True),
    ("model.source", "https://host/model", False),
    ("model.source", "hf://with space", False),
    ("model.source", "hf://" + "a" * 1020, False),
    ("model.source", 7, False),
    ("model.revision", "", False),
    ("model.revision", "r" * 128, True),
    ("model.revision", "r" * 129, False),
    ("model.chatTemplate", "{{ messages }}", True),
    ("model.chatTemplate", "", False),
    ("dataset.format", "alpaca", True),
    ("dataset.format", "parquet", False),
    ("dataset.trainOn", "completion", True),
    ("dataset.trainOn", "user", False),
    ("dataset.tooLong", "drop", True),
    ("dataset.tooLong", "ignore", False),
    ("dataset.split", "train[:10]", False),
    ("dataset.evalFraction", "0.5", True),
    ("dataset.evalFraction", "0.51", False),
    ("dataset.evalFraction", "-0.1", False),
    ("dataset.evalFraction", 0.1, False),
    ("dataset.evalFraction", "1e-2", True),
    ("dataset.evalFraction", ".1", False),
    ("dataset", {"source": "s3://b/t", "evalSource": "s3://b/e"}, True),
    ("dataset", {"source": "s3://b/t", "evalSource": "s3://b/e", "evalFraction": "0.00"}, True),
    ("dataset", {"source": "s3://b/t", "evalSource": "s3://b/e", "evalFraction": "0.1"}, False),
    ("dataset", {"source": "hf://a/b", "config": "main", "evalSource": "hf://a/b", "evalSplit": "test"}, True),
    ("dataset", {"source": "hf://a/b", "evalSplit": "test"}, False),
    ("adapter.rank", 1, True),
    ("adapter.rank", 0, False),
    ("adapter.rank", 512, True),
    ("adapter.rank", 513, False),
    ("adapter.alpha", 4097, False),
    ("adapter.dropout", "0.99", True),
    ("adapter.dropout", "1", False),
    ("adapter.dropout", "1.0e0", False),
    ("adapter.targetModules", "all-linear", True),
    ("adapter.targetModules", "all", False),
    ("adapter.targetModules", ["q_proj", "v_proj"], True),
    ("adapter.targetModules", [], False),
    ("adapter.targetModules", ["q_proj"] * 64, True),
    ("adapter.targetModules", ["q_proj"] * 65, False),
    ("adapter.useDora", True, True),
    ("adapter.useDora", "yes please", False),
    ("dataset.format", "preference", False),  # without the objective that takes it
    ("training.objective.type", "dpo", False),
    ("training.objective.type", "ppo", False),
    ("training.objective.beta", "0.10", True),
    ("training.objective.beta", "0.2", False),
    ("training.objective.labelSmoothing", "0.1", False),
    ("training.epochs", "0.5", True),
    ("training.epochs", "0", False),
    ("training.epochs", "0.0", False),
    ("training.maxSteps", 1, True),
    ("training.maxSteps", 0, False),
    ("training.sequenceLength", 15, False),
    ("training.sequenceLength", 1_048_576, True),
    ("training.sequenceLength", 1_048_577, False),
    ("training.globalBatchSize", 65_537, False),
    ("training.learningRate", "2e-4", True),
    ("training.learningRate", "0", False),
    ("training.learningRate", "2e-400", False),
    ("training.scheduler", "cosine", True),
    ("training.scheduler", "polynomial", False),
    ("training.warmupRatio", "0", True),
    ("training.warmupRatio", "1", False),
    ("training.maxGradNorm", "0", False),
    ("training.adamBeta1", "1", False),
    ("training.adamBeta2", "0.99999", True),
    ("training.adamBeta2", "1.5", False),
    ("training.adamEpsilon", "0", False),
    ("training.loraPlusRatio", "16", True),
    ("training.loraPlusRatio", "0", False),
    ("training.optimizer", "paged_adamw_8bit", True),
    ("training.optimizer", "sgd", False),
    ("training.seed", 2**31 - 1, True),
    ("training.seed", 2**31, False),
    ("training.seed", -1, False),
    ("resources.vram", "48Gi", True),
    ("resources.vram", "23.5Gi", True),
    ("resources.vram", "48GB", False),
    ("resources.gpuClasses", ["48Gi", "80Gi"], True),
    ("resources.gpuClasses", ["48Gi"] * 17, False),
    ("resources.gpuClasses", ["no spaces"], False),
    ("resources.spot", "required", True),
    ("resources.spot", "maybe", False),
    ("queue", "team-a", True),
    ("queue", "Team A", False),
    ("queue", "q" * 64, False),
    ("priority", 1_000_001, False),
    ("priority", -1_000_000, True),
    ("store", {"uri": "s3://bucket/prefix"}, True),
    ("store", {"uri": "hf://bucket/prefix"}, False),
    ("store", {}, False),
    ("checkpoint.everySeconds", 0, False),
    ("checkpoint.keep", 100, True),
    ("checkpoint.keep", 101, False),
    ("evaluation.earlyStoppingPatience", 0, True),
    ("evaluation.everySteps", 0, False),
    ("evaluation.earlyStoppingPatience", 1, True),  # nothing is held out, of which prepare warns
    ("evaluation.mode", "min", True),
    ("evaluation.generation", {}, False),
    ("evaluation.generation.metrics", ["accuracy"], False),
    ("tracking.alias", "champion", True),
    ("tracking.alias", None, True),
    ("tracking.alias", "latest", False),
    ("tracking.alias", "LATEST", False),
    ("tracking.alias", "v12", False),
    ("tracking.alias", "v12b", True),
    ("tracking.alias", "9lives", False),
    ("tracking.registeredModel", "a/b", False),
    ("tracking.experiment", "", False),
    ("backoffLimit", -1, False),
    ("backoffLimit", 100, True),
    ("activeDeadlineSeconds", 0, False),
    ("activeDeadlineSeconds", 86_400, True),
    ("ttlSecondsAfterFinished", 0, True),
    ("suspend", True, True),
]
QUEUE_CASES: list[tuple[str, object, bool]] = [
    ("cohort", "research", True),
    ("cohort", "Research!", False),
    ("weight", 0, False),
    ("quotas", [{"gpuClass": "24Gi", "nominal": 2}, {"gpuClass": "48Gi", "nominal": 0, "borrowingLimit": 1}], True),
    ("quotas", [{"gpuClass": "24Gi", "nominal": 2}, {"gpuClass": "24Gi", "nominal": 1}], False),
    ("quotas", [{"gpuClass": "24Gi"}], False),
    ("quotas", [{"gpuClass": "24Gi", "nominal": -1}], False),
    ("preemption", "Never", True),
    ("preemption", "Always", False),
    ("hold", True, True),
    ("stopPolicy", "HoldAndDrain", True),
    ("stopPolicy", "Drain", False),
    ("queueingStrategy", "StrictFIFO", True),
    ("queueingStrategy", "FIFO", False),
    ("turnSeconds", 300, True),
    ("turnSeconds", 299, False),
    ("turnSeconds", 31_536_001, False),
    ("fairSharing", "PerUser", True),
    ("fairSharing", "PerQueue", False),
    ("perUser", {"running": 1, "waiting": 1_000_000}, True),
    ("perUser.running", 0, False),
    ("perUser.waiting", 1_000_001, False),
    ("budget", {"gpuHours": 0}, True),
    ("budget", {"dollars": 100, "whenSpent": "Warn"}, True),
    ("budget", {}, False),
    ("budget", {"whenSpent": "Hold"}, False),
    ("budget", {"gpuHours": -1}, False),
    ("budget", {"gpuHours": 1, "whenSpent": "Stop"}, False),
]


def changed(spec: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of the spec with one field set."""
    copied = copy.deepcopy(dict(spec))
    *parents, last = path.split(".")
    target = copied
    for parent in parents:
        target = target.setdefault(parent, {})
    if value is ABSENT:
        target.pop(last)
    else:
        target[last] = value
    return copied


def job(spec: Mapping[str, Any], name: str = "case") -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "QLoRAJob", "metadata": {"name": name}, "spec": spec}


def queue(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": "case"}, "spec": spec}


@pytest.fixture(scope="module")
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster without jobs."""
    api = cluster.api()
    clear(api)
    yield api
    clear(api)
    api.close()


def server_takes(api: KubeApi, path: str, document: dict[str, Any]) -> bool:
    """Whether a creation would be carried out."""
    try:
        api.create(f"{path}?dryRun=All&fieldValidation=Strict", document)
    except InvalidObject:
        return False
    return True


def models_take(model: type[QLoRAJob] | type[QLoRAQueue], document: dict[str, Any]) -> bool:
    try:
        model.model_validate_json(json.dumps(document))  # as it is sent
    except ValidationError:
        return False
    return True


def ids(cases: list[tuple[str, object, bool]]) -> list[str]:
    return [f"{path}={str(value)[:30]}" if value is not ABSENT else f"no {path}" for path, value, _ in cases]


@pytest.mark.parametrize(("path", "value", "valid"), JOB_CASES, ids=ids(JOB_CASES))
def test_a_job_gets_the_same_verdict_from_both(api: KubeApi, path: str, value: object, valid: bool) -> None:
    document = job(changed(SPEC, path, value))
    assert models_take(QLoRAJob, document) is valid
    assert server_takes(api, JOBS, document) is valid


@pytest.mark.parametrize(
    ("dataset", "objective", "valid"),
    [
        ({}, {}, True),
        ({}, {"beta": "0.5"}, True),
        ({}, {"beta": "0"}, False),
        ({}, {"labelSmoothing": "0.49"}, True),
        ({}, {"labelSmoothing": "0.5"}, False),
        ({"tooLong": "drop"}, {}, True),
        ({"tooLong": "truncate"}, {}, False),
        ({"trainOn": "completion"}, {}, True),
        ({"trainOn": "all"}, {}, False),
        ({"format": "messages"}, {}, False),
        ({}, {"type": "sft"}, False),
        ({}, {"type": "orpo", "beta": "0.2"}, True),
        ({}, {"type": "orpo", "labelSmoothing": "0.2"}, False),
        ({"format": "messages"}, {"type": "orpo"}, False),
    ],
)
def test_a_job_of_preferences_gets_the_same_verdict_from_both(
    api: KubeApi, dataset: dict[str, Any], objective: dict[str, Any], valid: bool
) -> None:
    data = {**SPEC["dataset"], "format": "preference", **dataset}
    document = job({**SPEC, "dataset": data, "training": {"objective": {"type": "dpo", **objective}}})
    assert models_take(QLoRAJob, document) is valid
    assert server_takes(api, JOBS, document) is valid


@pytest.mark.parametrize(("path", "value", "valid"), QUEUE_CASES, ids=ids(QUEUE_CASES))
def test_a_queue_gets_the_same_verdict_from_both(api: KubeApi, path: str, value: object, valid: bool) -> None:
    document = queue(changed({}, path, value))
    assert models_take(QLoRAQueue, document) is valid
    assert server_takes(api, QUEUES, document) is valid


@pytest.mark.parametrize(("name", "valid"), [("a" * 48, True), ("a" * 49, False), ("a.b", False), ("1a", True)])
def test_a_jobs_name_must_leave_room_for_its_pods(api: KubeApi, name: str, valid: bool) -> None:
    assert models_take(QLoRAJob, job(SPEC, name)) is valid
    assert server_takes(api, JOBS, job(SPEC, name)) is valid


def test_an_unknown_field_is_refused_by_both(api: KubeApi) -> None:
    document = job({**SPEC, "learningRate": "1e-4"})
    assert not models_take(QLoRAJob, document)
    assert not server_takes(api, JOBS, document)


def test_the_server_fills_in_the_models_defaults(api: KubeApi) -> None:
    stored = api.create(f"{JOBS}?dryRun=All", job(SPEC))["spec"]
    assert stored == QLoRAJobSpec.model_validate(SPEC).to_wire()
    partial = {**SPEC, "adapter": {"rank": 8}, "training": {"epochs": "1"}}
    stored = api.create(f"{JOBS}?dryRun=All", job(partial))["spec"]
    assert stored == QLoRAJobSpec.model_validate(partial).to_wire()
    assert api.create(f"{QUEUES}?dryRun=All", {**queue({}), "spec": {}})["spec"]["weight"] == 1


CHANGES = {
    "model": {"source": "hf://owner/other"},
    "dataset": {"source": "s3://bucket/other"},
    "adapter": {"rank": 8},
    "training": {"seed": 7},
    "store": {"uri": "s3://elsewhere/x"},
    "evaluation.metric": "perplexity",
    "evaluation.mode": "max",
    "evaluation.keepBest": True,
    "evaluation.generation": {"prompts": 3},
    "tracking": {"experiment": "other"},
    "publish": {"formats": ["merged"]},
}


@pytest.mark.parametrize("field", IMMUTABLE_SPEC_FIELDS)
def test_what_the_results_depend_on_cannot_be_changed(api: KubeApi, field: str) -> None:
    clear(api)
    api.create(JOBS, job(changed(SPEC, "dataset.evalFraction", "0.1")))
    with pytest.raises(InvalidObject, match=rf"spec\.{field} cannot be changed"):
        api.patch(f"{JOBS}/case", {"spec": changed({}, field, CHANGES[field])})


def test_what_may_be_changed_can_be(api: KubeApi) -> None:
    clear(api)
    api.create(JOBS, job(SPEC))
    changed_job = api.patch(f"{JOBS}/case", {"spec": {"priority": 7, "suspend": True, "queue": "other"}})
    assert changed_job["metadata"]["generation"] == 2


def test_status_is_written_through_its_own_door_alone(api: KubeApi) -> None:
    clear(api)
    forged = api.create(JOBS, {**job(SPEC), "status": {"summary": "done"}})
    assert "status" not in forged
    assert "status" not in api.patch(f"{JOBS}/case", {"status": {"summary": "done"}})
    condition = {"type": "Finished", "status": "True", "reason": "BecauseISaySo"}
    with pytest.raises(InvalidObject, match="reason"):
        api.patch(f"{JOBS}/case/status", {"status": {"conditions": [condition]}})
    assert api.patch(f"{JOBS}/case/status", {"status": {"summary": "done"}})["status"] == {"summary": "done"}


def test_the_table_shows_queue_priority_state_gpu_and_progress(api: KubeApi) -> None:
    clear(api)
    api.create(JOBS, job({**SPEC, "priority": 5}))
    progress = {"stage": "train", "step": 3, "steps": 9, "time": "2026-01-01T00:00:00Z", "etaSeconds": 12.5}
    api.patch(f"{JOBS}/case/status", {"status": {"summary": "Training", "progress": progress}})
    table = table_of(api, f"{JOBS}/case")
    assert {name: table[name] for name in ("Name", "Queue", "Priority", "State", "Step", "Of", "ETA-Seconds")} == {
        "Name": "case",
        "Queue": "default",
        "Priority": 5,
        "State": "Training",
        "Step": 3,
        "Of": 9,
        "ETA-Seconds": 12.5,
    }


def table_of(api: KubeApi, path: str) -> dict[str, Any]:
    """What `kubectl get` prints, as columns and cells."""
    table = api.get_as(path, "application/json;as=Table;g=meta.k8s.io;v=v1")
    names = [column["name"] for column in table["columnDefinitions"]]
    return dict(zip(names, table["rows"][0]["cells"], strict=True))


def test_kubectl_explain_has_something_to_say(api: KubeApi) -> None:
    openapi = api.get("/openapi/v3/apis/qlora.dev/v1alpha1")["components"]["schemas"]
    spec = openapi["dev.qlora.v1alpha1.QLoRAJob"]["properties"]["spec"]["properties"]
    assert openapi["dev.qlora.v1alpha1.QLoRAJob"]["description"] == QLoRAJob.__doc__
    assert "LoRA adapter" in spec["adapter"]["description"]
    assert "LoRA+" in spec["training"]["properties"]["loraPlusRatio"]["description"]


def test_names_are_short_and_in_a_category(api: KubeApi) -> None:
    for plural, short in (("qlorajobs", "qj"), ("qloraqueues", "qq")):
        names = api.get(f"{CRD_PATH}/{plural}.qlora.dev")["spec"]["names"]
        assert (names["shortNames"], names["categories"]) == ([short], ["qlora"])


def test_an_object_of_another_version_is_unknown(api: KubeApi) -> None:
    with pytest.raises(OrchestratorError):
        api.create(JOBS, {**job(SPEC), "apiVersion": "qlora.dev/v1"})
