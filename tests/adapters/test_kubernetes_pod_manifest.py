"""Pods of stages: whole manifests against golden files, and the rules behind them against the cluster's own terms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.adapters.kubernetes.node_placement import (
    CAPABILITY_LABEL,
    CARD_LABELS,
    KARPENTER_CARD,
    KARPENTER_MEMORY,
    SPOT_LABELS,
    node_class,
    takes_pods,
)
from orchestrator.adapters.kubernetes.pod_manifest import claim_template, pod
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy, PodTemplate
from orchestrator.api.data_sheets import DATA_SHEETS
from orchestrator.api.job import DatasetSource, ModelSource, PrepareSpec, PublishSpec, ResourcesSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.task import StageTask
from orchestrator.errors import InvalidObject, PermanentError
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import CLASS_NAMES, GIB, MIB, classify
from tests.builders import LLAMA_3_70B, SMOLLM2_135M, make_spec, prepare_result

GOLDEN = Path(__file__).parent / "golden"
POLICY = PodPolicy(trainer_image="trainer:1", controller_image="controller:1", tracking_uri="http://mlflow:5000")
TEMPLATE = PodTemplate(
    labels={"team": "a", "qlora.dev/job": "another"},
    annotations={"cost-center": "7"},
    node_selector={"pool": "gpu"},
    tolerations=[{"key": "dedicated", "operator": "Equal", "value": "training", "effect": "NoSchedule"}],
    topology_spread_constraints=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    env=[{"name": "HTTPS_PROXY", "value": "http://proxy"}, {"name": "HOME", "value": "/root"}],
    env_from=[{"secretRef": {"name": "hub-token"}}],
    volumes=[{"name": "certificates", "configMap": {"name": "certificates"}}],
    volume_mounts=[{"name": "certificates", "mountPath": "/etc/ssl/own"}],
    image_pull_secrets=[{"name": "registry"}],
    priority_class_name="training",
    runtime_class_name="nvidia",
    scheduler_name="binpacking",
)
Manifest = dict[str, Any]


def make_task(
    stage: str = "train", *, model: ModelFacts = SMOLLM2_135M, plan: MemoryPlan | None = None, **changes: Any
) -> StageTask:
    """The second attempt of a job whose data is on a claim."""
    spec = make_spec().model_copy(
        update={
            "model": ModelSource(source="hf://owner/name"),
            "dataset": DatasetSource(source="pvc://data/train.jsonl", eval_source="pvc://store/held.jsonl"),
            **changes,
        }
    )
    return StageTask(
        stage=stage,
        namespace="team-a",
        job="medical",
        uid="uid-of-medical",
        attempt=2,
        spec=spec,
        store_uri="pvc://store/jobs/team-a/medical",
        plan=(plan or make_plan()) if stage == "train" else None,
        prepared=None if stage == "prepare" else prepare_result(model),
        threads=4,
    )


def make_plan(*offload: str) -> MemoryPlan:
    return MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=10, offload=offload)


def trainer(manifest: Manifest) -> Manifest:
    [container] = manifest["spec"]["containers"]
    return container


def environment(manifest: Manifest) -> dict[str, str]:
    """Names and values as a process sees them: Kubernetes makes one dollar sign of two."""
    listed = trainer(manifest)["env"]
    assert len({variable["name"] for variable in listed}) == len(listed), "no name is there twice"
    return {variable["name"]: variable["value"].replace("$$", "$") for variable in listed}


# --- whole pods --------------------


@pytest.mark.parametrize(
    ("name", "stage", "gpu_class", "policy"),
    [
        ("prepare", "prepare", None, POLICY),
        (
            "train",
            "train",
            "24Gi",
            PodPolicy(
                trainer_image="trainer:1",
                controller_image="controller:1",
                tracking_uri="http://mlflow:5000",
                ray_address="ray:6379",
                ray_auth_secret="ray-token",
                model_cache="pvc://models",
                template=TEMPLATE,
            ),
        ),
    ],
)
def test_a_pod_is_the_golden_one(name: str, stage: str, gpu_class: str | None, policy: PodPolicy) -> None:
    task = make_task(stage)
    made: Manifest = pod(task, gpu_class, policy)
    [variable] = [variable for variable in trainer(made)["env"] if variable["name"] == "QLORA_TASK"]
    assert StageTask.model_validate_json(variable["value"]) == task.model_copy(update={"grace_seconds": 15})
    variable["value"] = "(the task)"
    assert made == yaml.safe_load((GOLDEN / f"{name}-pod.yaml").read_text())


@pytest.mark.parametrize("stage", ["prepare", "train", "publish"])
def test_every_container_keeps_to_the_restricted_standard(stage: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    policy = PodPolicy(trainer_image="t", controller_image="c", tracking_uri="http://m", ray_address="ray:6379")
    spec: Manifest = pod(make_task(stage), "24Gi" if stage == "train" else None, policy)["spec"]  # type: ignore[assignment]
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    allowed = {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    assert len(containers) == (2 if stage == "train" else 1)
    for container in containers:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True
        assert not security["privileged"]
        assert container["resources"]["limits"]["memory"]


# --- what the template may and may not do --------------------


def test_a_class_that_only_a_forged_status_names_is_refused_in_words() -> None:
    with pytest.raises(PermanentError, match=r"the status names the GPU class 7Gi, and there are .*24Gi.* alone"):
        pod(make_task(), "7Gi", POLICY)


def test_the_template_adds_and_never_overrides() -> None:
    made: Manifest = pod(make_task(), "24Gi", PodPolicy(trainer_image="t", tracking_uri="http://m", template=TEMPLATE))
    assert made["metadata"]["labels"]["team"] == "a"
    assert made["metadata"]["labels"]["qlora.dev/job"] == "medical"
    assert environment(made)["HTTPS_PROXY"] == "http://proxy"
    assert environment(made)["HOME"] == "/tmp"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in made["spec"]["tolerations"]
    assert TEMPLATE.tolerations[0] in made["spec"]["tolerations"]


@pytest.mark.parametrize("name", ["scratch", "agent", "model-cache", "claim-0"])
def test_a_template_whose_volume_has_a_taken_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidObject, match=name):
        PodTemplate(volumes=[{"name": name, "emptyDir": {}}])


@pytest.mark.parametrize("path", ["/", "/tmp", "/tmp/", "/var/lib/qlora/pvc", "/var/lib", "/dev", "/var/run/qlora"])
def test_a_template_that_mounts_over_what_is_ours_is_refused(path: str) -> None:
    with pytest.raises(InvalidObject, match="taken"):
        PodTemplate(volume_mounts=[{"name": "v", "mountPath": path}])


def test_a_template_may_mount_elsewhere() -> None:
    assert PodTemplate(volume_mounts=[{"name": "v", "mountPath": "/data"}, {"name": "v", "mountPath": "/tmp/x"}])


def test_the_task_arrives_as_it_was_sent_whatever_it_contains() -> None:
    task = make_task(dataset=DatasetSource(source="file:///$(HOME)/$$x/$y"))
    made: Manifest = pod(task, "24Gi", POLICY)
    raw = next(variable["value"] for variable in trainer(made)["env"] if variable["name"] == "QLORA_TASK")
    assert "$$(HOME)/$$$$x/$$y" in raw
    arrived = StageTask.model_validate_json(environment(made)["QLORA_TASK"])
    assert arrived == task.model_copy(update={"grace_seconds": POLICY.short_grace_seconds})


def test_a_trainer_is_told_of_no_more_time_than_a_machine_that_goes_leaves_it_and_its_pod_keeps_all() -> None:
    def told(grace_seconds: int) -> tuple[int, int]:
        made: Manifest = pod(make_task().model_copy(update={"grace_seconds": grace_seconds}), "24Gi", POLICY)
        arrived = StageTask.model_validate_json(environment(made)["QLORA_TASK"])
        return arrived.grace_seconds, made["spec"]["terminationGracePeriodSeconds"]

    assert told(120) == (15, 120)
    assert told(10) == (10, 10)


# --- claims and caches --------------------


def test_claims_are_mounted_where_the_trainer_looks_and_only_the_store_is_writable() -> None:
    task = make_task(model=SMOLLM2_135M)
    task = task.model_copy(
        update={"spec": task.spec.model_copy(update={"model": ModelSource(source="pvc://models/llama")})}
    )
    made: Manifest = pod(task, "24Gi", POLICY)
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in made["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    mounts = {
        claims[mount["name"]]: (mount["mountPath"], mount.get("readOnly", False))
        for mount in trainer(made)["volumeMounts"]
        if mount["name"] in claims
    }
    assert mounts == {
        "store": ("/var/lib/qlora/pvc/store", False),
        "models": ("/var/lib/qlora/pvc/models", True),
        "data": ("/var/lib/qlora/pvc/data", True),
    }


def test_a_model_cache_on_the_host_is_that_folder() -> None:
    made: Manifest = pod(
        make_task(), "24Gi", PodPolicy(trainer_image="t", tracking_uri="http://m", model_cache="hostpath:///srv/models")
    )
    [volume] = [volume for volume in made["spec"]["volumes"] if volume["name"] == "model-cache"]
    assert volume["hostPath"] == {"path": "/srv/models", "type": "DirectoryOrCreate"}
    assert environment(made)["HF_HOME"] == "/var/cache/qlora/huggingface"


def mebibytes(text: str) -> int:
    assert text.endswith("Mi")
    return int(text.removesuffix("Mi")) * MIB


def test_a_model_that_is_fetched_anew_finds_room_for_its_weights() -> None:
    made: Manifest = pod(make_task(model=LLAMA_3_70B), "80Gi", POLICY)
    limit = mebibytes(trainer(made)["resources"]["limits"]["ephemeral-storage"])
    assert limit > 70_553_706_496 * 2  # Llama 3 70B's published parameters in bf16
    [scratch] = [volume for volume in made["spec"]["volumes"] if volume["name"] == "scratch"]
    assert mebibytes(scratch["emptyDir"]["sizeLimit"]) == limit
    cached = PodPolicy(trainer_image="t", tracking_uri="http://m", model_cache="pvc://models")
    kept: Manifest = pod(make_task(model=LLAMA_3_70B), "80Gi", cached)
    assert mebibytes(trainer(kept)["resources"]["limits"]["ephemeral-storage"]) <= 8 * GIB


def test_what_a_plan_moves_to_the_host_is_asked_for() -> None:
    def request(plan: MemoryPlan) -> int:
        made: Manifest = pod(make_task(model=LLAMA_3_70B, plan=plan), "80Gi", POLICY)
        return mebibytes(trainer(made)["resources"]["requests"]["memory"])

    plain, moved = request(make_plan()), request(make_plan("activations"))
    assert 0 <= moved - plain - 10 * 2048 * 8192 * 2 <= MIB  # ten layers' inputs of 2048 tokens in bf16


def test_layers_that_are_streamed_are_in_the_memory_that_the_pod_asks_for() -> None:
    """In NF4 with double quantization a weight takes 4 bits, 1/64 of a byte and 4 bytes for each 64 x 256."""

    def request(streamed_layers: int) -> int:
        plan = make_plan().model_copy(update={"streamed_layers": streamed_layers})
        made: Manifest = pod(make_task(model=LLAMA_3_70B, plan=plan), "24Gi", POLICY)
        return mebibytes(trainer(made)["resources"]["requests"]["memory"])

    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672
    by_hand = 60 * layer * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    assert request(60) - request(0) == pytest.approx(by_hand, rel=0.001)


def test_more_host_memory_is_asked_for_after_it_ran_out() -> None:
    def request(factor: float) -> int:
        task = make_task(model=LLAMA_3_70B).model_copy(update={"host_memory_factor": factor})
        made: Manifest = pod(task, "80Gi", POLICY)
        return mebibytes(trainer(made)["resources"]["requests"]["memory"])

    assert 0 <= request(2) - 2 * request(1) + MIB <= MIB


@pytest.mark.parametrize(
    ("stage", "workers", "env", "cpus", "more_gib"),
    [
        ("prepare", 1, [], "1", 0),
        ("prepare", 8, [], "8", 4.5),
        ("prepare", 8, [{"name": "RAY_ADDRESS", "value": "ray-head.prepare:6379"}], "1", 0),
        ("publish", 8, [], "1", 0),
    ],
)
def test_prepare_asks_for_a_cpu_and_memory_for_each_worker_in_its_pod(
    stage: str, workers: int, env: list[Manifest], cpus: str, more_gib: float
) -> None:
    policy = PodPolicy(trainer_image="trainer:1", tracking_uri="http://mlflow:5000", template=PodTemplate(env=env))
    made: Manifest = pod(make_task(stage, prepare=PrepareSpec(parallelism=workers)), None, policy)
    resources = trainer(made)["resources"]
    assert resources["requests"]["cpu"] == cpus
    assert mebibytes(resources["requests"]["memory"]) == policy.cpu_stage_memory_bytes + more_gib * GIB
    assert mebibytes(resources["limits"]["memory"]) == 2 * mebibytes(resources["requests"]["memory"])


@pytest.mark.parametrize(
    ("source", "store", "models"),
    [
        ("hf://owner/name", "s3://jobs/a", 2),
        ("hf://owner/name", "pvc://claim/jobs", 1),
        ("pvc://models/base", "s3://jobs/a", 1),
        ("pvc://models/base", "pvc://claim/jobs", 0),
    ],
)
def test_a_publish_that_writes_whole_models_has_memory_and_scratch_space_for_that(
    source: str, store: str, models: int
) -> None:
    policy = PodPolicy(trainer_image="trainer:1", tracking_uri="http://mlflow:5000")

    def requests(*formats: str) -> tuple[int, int]:
        task = make_task("publish", model=LLAMA_3_70B, publish=PublishSpec.model_validate({"formats": formats}))
        spec = task.spec.model_copy(update={"model": ModelSource(source=source)})
        made: Manifest = pod(task.model_copy(update={"store_uri": store, "spec": spec}), None, policy)
        found = trainer(made)["resources"]["requests"]
        return mebibytes(found["memory"]), mebibytes(found["ephemeral-storage"])

    (memory, scratch), (more_memory, more_scratch) = requests(), requests("merged")
    assert more_memory - memory == 2 * GIB
    assert more_scratch - scratch == pytest.approx(models * 2 * 70.55e9, rel=0.001)


def test_nodes_to_avoid_are_kept_off_by_name_in_every_way_that_a_node_may_fit() -> None:
    task = make_task().model_copy(update={"avoid_nodes": ("gpu-7", "gpu-9")})
    made: Manifest = pod(task, "24Gi", POLICY)
    required = made["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    terms = required["nodeSelectorTerms"]
    assert terms
    avoided = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("gpu-7", "gpu-9")]
    assert all(term["matchFields"] == avoided for term in terms)


def test_what_concerns_only_the_pod_is_not_told_to_the_trainer() -> None:
    task = make_task().model_copy(update={"avoid_nodes": ("gpu-7",), "host_memory_factor": 2.0})
    sent = json.loads(environment(pod(task, "24Gi", POLICY))["QLORA_TASK"])
    assert not {"avoidNodes", "hostMemoryFactor"} & sent.keys()


# --- GPUs --------------------


def matches(expression: Manifest, labels: dict[str, str]) -> bool:
    """A requirement of a node selector, by the words of the API's reference."""
    key, values = expression["key"], expression.get("values", [])
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "DoesNotExist":
            return key not in labels
        case "Gt":
            return key in labels and int(labels[key]) > int(values[0])
        case "Lt":
            return key in labels and int(labels[key]) < int(values[0])
    raise AssertionError(expression)


def admits(manifest: Manifest, labels: dict[str, str]) -> bool:
    """Whether the pod may go to a node with these labels."""
    affinity = manifest["spec"]["affinity"]["nodeAffinity"]
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(all(matches(e, labels) for e in term["matchExpressions"]) for term in required["nodeSelectorTerms"])


MEASURED = {name: {"nvidia.com/gpu.memory": str(card.total_mib)} for name, card in DATA_SHEETS.items()}
UNMEASURED = {
    f"{label}={card}": {label: card}
    for label, cards in CARD_LABELS.items()
    for card in cards
    if (label, card) != (KARPENTER_CARD, "a100")
}
A100S = {
    "small": {KARPENTER_CARD: "a100", KARPENTER_MEMORY: "40960"},
    "large": {KARPENTER_CARD: "a100", KARPENTER_MEMORY: "81920"},
}
NODES = {
    **MEASURED,
    **UNMEASURED,
    **A100S,
    "no card": {},
    "a tiny card": {"nvidia.com/gpu.memory": "4096"},
    "a card that is measured and named": {
        "nvidia.com/gpu.memory": "46068",
        "k8s.amazonaws.com/accelerator": "nvidia-l4",
    },
}


@pytest.mark.parametrize("labels", NODES.values(), ids=NODES)
def test_a_pod_goes_to_nodes_of_its_class_and_to_no_others(labels: dict[str, str]) -> None:
    of_class = [name for name in CLASS_NAMES if admits(pod(make_task(), name, POLICY), labels)]
    found = node_class(labels, "nvidia.com/gpu")
    assert of_class == ([found] if found else [])
    if "nvidia.com/gpu.memory" in labels:
        assert found == classify(int(labels["nvidia.com/gpu.memory"]))


DEFINED = gpu_table(
    json.dumps(
        {
            "23Gi": {"usableMiB": 22_016, "cards": ["NVIDIA-L4", "nvidia-l4"]},
            "64Gi": {"usableMiB": 60_000, "cards": ["NVIDIA-A100-SXM4-80GB", "a100"]},
            "128Gi": {"usableMiB": 98_304, "cards": ["NVIDIA-GB10"]},
        }
    )
)
PRODUCT, MEMORY, CLOUD = "nvidia.com/gpu.product", "nvidia.com/gpu.memory", "cloud.google.com/gke-accelerator"
NAMED: dict[str, tuple[dict[str, str], str | None]] = {
    "a card of the class": ({PRODUCT: "NVIDIA-L4", MEMORY: "23034"}, "23Gi"),
    "one as large that it does not name": ({PRODUCT: "NVIDIA-A10G", MEMORY: "23028"}, "24Gi"),
    "one that has not told its name": ({MEMORY: "23034"}, "24Gi"),
    "one that is smaller than its namesakes": ({PRODUCT: "NVIDIA-L4", MEMORY: "22000"}, None),
    "one with its host's memory": ({PRODUCT: "NVIDIA-GB10"}, "128Gi"),
    "one by its cloud's name": ({CLOUD: "nvidia-l4"}, "23Gi"),
    "another by its cloud's name": ({CLOUD: "nvidia-h100-80gb"}, "80Gi"),
    "one whose names are at odds": ({PRODUCT: "NVIDIA-GB10", CLOUD: "nvidia-l4"}, "128Gi"),
    "a name that two classes would have": ({KARPENTER_CARD: "a100", KARPENTER_MEMORY: "40960"}, "64Gi"),
    "its measured namesake": ({PRODUCT: "NVIDIA-A100-SXM4-40GB", MEMORY: "40960", KARPENTER_CARD: "a100"}, "40Gi"),
}


@pytest.mark.parametrize(("labels", "wanted"), [*NAMED.values(), *((each, "") for each in NODES.values())])
def test_a_pod_of_a_defined_class_goes_to_the_cards_that_it_names_alone(
    labels: dict[str, str], wanted: str | None
) -> None:
    policy = replace(POLICY, gpu_table=DEFINED)
    found = node_class(labels, "nvidia.com/gpu", DEFINED)
    assert [name for name in DEFINED.names if admits(pod(make_task(), name, policy), labels)] == (
        [found] if found else []
    )
    assert wanted in (found, "")


def test_dynamic_allocation_claims_devices_of_a_defined_class_by_their_names() -> None:
    def wanted(name: str) -> str:
        template: Manifest = claim_template("team-a", name, DEFINED)
        policy = replace(POLICY, gpu_mode="dra", gpu_table=DEFINED)
        made: Manifest = pod(make_task(), name, policy)
        assert made["spec"]["resourceClaims"][0]["resourceClaimTemplateName"] == template["metadata"]["name"]
        assert template["metadata"]["name"] != claim_template("team-a", "24Gi")["metadata"]["name"]
        [request] = template["spec"]["spec"]["devices"]["requests"]
        return request["exactly"]["selectors"][0]["cel"]["expression"]

    assert 'productName.replace(" ", "-") in ["NVIDIA-L4", "nvidia-l4"]' in wanted("23Gi")
    assert 'quantity("22938Mi")) >= 0' in wanted("23Gi")
    assert '!(device.attributes["gpu.nvidia.com"].productName' in wanted("24Gi")


def test_a_class_that_nobody_defines_any_more_is_refused_in_words() -> None:
    with pytest.raises(PermanentError, match="names the GPU class 23Gi"):
        pod(make_task(), "23Gi", POLICY)


@pytest.mark.parametrize(("major", "goes"), [("7", False), ("8", True), ("12", True)])
def test_a_pod_stays_off_cards_without_bfloat16(major: str, goes: bool) -> None:
    labels = {"nvidia.com/gpu.memory": "32768", CAPABILITY_LABEL: major}
    assert admits(pod(make_task(), "32Gi", POLICY), labels) is goes


def test_the_two_a100s_are_told_apart() -> None:
    assert {name: node_class(labels, "nvidia.com/gpu") for name, labels in A100S.items()} == {
        "small": "40Gi",
        "large": "80Gi",
    }


def test_a_slice_of_a_card_is_a_resource_of_its_own() -> None:
    policy = PodPolicy(
        trainer_image="t", tracking_uri="http://m", gpu_resource="nvidia.com/mig-3g.40gb", gpu_mode="mig"
    )
    made: Manifest = pod(make_task(), "40Gi", policy)
    assert trainer(made)["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == "1"
    assert admits(made, {"nvidia.com/mig-3g.40gb.memory": "40448"})
    assert not admits(made, {"nvidia.com/gpu.memory": "40960"})


def test_dynamic_allocation_claims_a_device_instead() -> None:
    policy = PodPolicy(trainer_image="t", tracking_uri="http://m", gpu_mode="dra")
    made: Manifest = pod(make_task(), "24Gi", policy)
    assert "nvidia.com/gpu" not in trainer(made)["resources"]["limits"]
    assert trainer(made)["resources"]["claims"] == [{"name": "gpu"}]
    template: Manifest = claim_template("team-a", "24Gi")
    assert made["spec"]["resourceClaims"] == [
        {"name": "gpu", "resourceClaimTemplateName": template["metadata"]["name"]}
    ]
    assert admits(made, {})
    [request] = template["spec"]["spec"]["devices"]["requests"]
    [selector] = request["exactly"]["selectors"]
    assert 'quantity("22938Mi")' in selector["cel"]["expression"]  # 22,016 MiB of class 24Gi and the context's 922
    assert 'quantity("32154Mi")' in selector["cel"]["expression"]  # class 32Gi begins there
    assert 'semver("8.0.0")' in selector["cel"]["expression"]  # what is older has no bfloat16


# --- spot --------------------

CARD = {"nvidia.com/gpu.memory": "23034"}
SPOTS = [{label: value} for label, value in SPOT_LABELS.items()]
ON_DEMAND = [{}, {"karpenter.sh/capacity-type": "on-demand"}, {"eks.amazonaws.com/capacityType": "ON_DEMAND"}]


@pytest.mark.parametrize(("word", "spot", "on_demand"), [
    ("allowed", True, True),
    ("forbidden", False, True),
    ("required", True, False),
])  # fmt: skip
def test_the_specs_word_on_spot_is_kept(word: str, spot: bool, on_demand: bool) -> None:
    made: Manifest = pod(make_task(resources=ResourcesSpec(spot=word)), "24Gi", POLICY)
    assert {admits(made, {**CARD, **labels}) for labels in SPOTS} == {spot}
    assert {admits(made, {**CARD, **labels}) for labels in ON_DEMAND} == {on_demand}
    tolerated = {toleration["key"] for toleration in made["spec"]["tolerations"]}
    assert ("cloud.google.com/gke-spot" in tolerated) is spot


def test_a_stage_without_a_gpu_prefers_nodes_without_one() -> None:
    made: Manifest = pod(make_task("prepare"), None, POLICY)
    [preferred] = made["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert admits(made, CARD)
    assert not matches(preferred["preference"]["matchExpressions"][0], CARD)
    assert made["spec"]["tolerations"] == [
        {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists", "effect": "NoSchedule"},
    ]


# --- which nodes count --------------------


def taint(key: str, effect: str = "NoSchedule", value: str = "") -> dict[str, str]:
    return {"key": key, "effect": effect, "value": value}


@pytest.mark.parametrize(
    ("taints", "takes"),
    [
        ([], True),
        ([taint("nvidia.com/gpu", value="present")], True),
        ([taint("nvidia.com/gpu", "NoExecute")], False),
        ([taint("cloud.google.com/gke-spot", value="true")], True),
        ([taint("dedicated", value="training")], True),
        ([taint("dedicated", value="serving")], False),
        ([taint("dedicated", "PreferNoSchedule", "serving")], True),
        ([taint("nvidia.com/gpu"), taint("somebody/else")], False),
    ],
)
def test_a_node_counts_where_its_taints_are_tolerated(taints: list[dict[str, str]], takes: bool) -> None:
    assert takes_pods({"pool": "gpu"}, taints, TEMPLATE) is takes


def test_a_node_that_the_templates_selector_leaves_out_does_not_count() -> None:
    assert not takes_pods({"pool": "cpu"}, [], TEMPLATE)
    assert not takes_pods({}, [], TEMPLATE)
    assert takes_pods({}, [], PodTemplate(tolerations=[{"operator": "Exists"}]))
    assert takes_pods({}, [taint("any")], PodTemplate(tolerations=[{"operator": "Exists"}]))


# --- the agent --------------------


def test_the_agent_is_a_sidecar_of_train_stages_alone() -> None:
    policy = PodPolicy(
        trainer_image="t", controller_image="c:1", tracking_uri="http://m", ray_address="ray:6379", ray_auth_secret="s"
    )
    made: Manifest = pod(make_task(), "24Gi", policy)
    [agent] = made["spec"]["initContainers"]
    assert (agent["name"], agent["image"], agent["restartPolicy"]) == ("ray-agent", "c:1", "Always")
    values = {variable["name"]: variable.get("value") for variable in agent["env"]}
    assert values["QLORA_RAY_STAGE"] == "team-a/medical-train-2"
    assert values["QLORA_RAY_ADDRESS"] == "ray:6379"
    assert values["QLORA_AGENT_SOCKET"] == environment(made)["QLORA_AGENT_SOCKET"] == "/var/run/qlora/agent.sock"
    shared = {mount["name"] for mount in agent["volumeMounts"]} & {m["name"] for m in trainer(made)["volumeMounts"]}
    assert shared == {"agent"}
    [token] = [volume for volume in made["spec"]["volumes"] if volume["name"] == "agent-token"]
    assert token["secret"]["optional"] is True, "a namespace without the token trains all the same"
    for stage in ("prepare", "publish"):
        without: Manifest = pod(make_task(stage), None, policy)
        assert "initContainers" not in without["spec"]
        assert "QLORA_AGENT_SOCKET" not in environment(without)


def test_an_agent_joins_the_head_of_its_own_namespace() -> None:
    addresses = {"team-a": "ray:6379", "team-b": "ray:6400"}
    policy = PodPolicy(trainer_image="t", controller_image="c", tracking_uri="http://m", ray_addresses=addresses)
    assert policy.ray_address_for("team-b") == "ray:6400"
    assert policy.ray_address_for("team-c") == ""
    spec: Any = pod(make_task("train"), "24Gi", policy)["spec"]
    [agent] = spec["initContainers"]
    assert {"name": "QLORA_RAY_ADDRESS", "value": "ray:6379"} in agent["env"]
