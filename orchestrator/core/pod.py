"""The pod of a stage: what a task needs from a cluster, as a manifest. Pure: same task and policy, same pod.

The runtime on Kubernetes calls `pod` and sends the outcome; `node_class` reads the same labels the other way round,
to count what a cluster has. Rules:

- One GPU of the class that the controller chose, no more: a pod is kept off smaller cards, which it would not fit, and
  off larger ones, whose capacity is in other books.
- Restricted Pod Security; no service account token; nothing is writable but volumes.
- The image's main process is the trainer. Ray's agent beside it is a native sidecar: once its image is there it may
  fail, be patched or find no head, and what it needs from its surroundings is optional.
- The operator's template adds to a pod and never overrides what is decided here.
- `pvc://claim/path` is found by the trainer at CLAIMS_PATH, where the claims that a task names are mounted; those that
  it only reads from are mounted read-only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit

from orchestrator.api.base import API_VERSION
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import ModelFacts
from orchestrator.api.task import (
    AGENT_SOCKET_VARIABLE,
    TASK_VARIABLE,
    TERMINATION_LOG_VARIABLE,
    TRACKING_URI_VARIABLE,
    StageTask,
)
from orchestrator.core.facts import STAGES_ON_GPU
from orchestrator.core.gpus import GIB, MIB, classify, memory_range_mib
from orchestrator.core.linears import linears
from orchestrator.core.sizing import OPTIMIZER_BYTES, adapter_parameters
from orchestrator.core.timeline import BF16_BYTES
from orchestrator.errors import InvalidObject

Manifest = dict[str, object]
Term = list[Manifest]
"""Match expressions of which a node must meet all."""

JOB_LABEL, JOB_UID_LABEL, STAGE_LABEL = "qlora.dev/job", "qlora.dev/job-uid", "qlora.dev/stage"
ATTEMPT_LABEL, QUEUE_LABEL = "qlora.dev/attempt", "qlora.dev/queue"
MANAGED_BY_LABEL, MANAGER = "app.kubernetes.io/managed-by", "qlora-orchestrator"

TRAINER, AGENT = "trainer", "ray-agent"
USER_ID = 65532
TERMINATION_LOG = "/dev/termination-log"
SCRATCH_PATH, SOCKET_FOLDER, CACHE_PATH = "/tmp", "/var/run/qlora", "/var/cache/qlora"  # noqa: S108  volumes
AGENT_SOCKET = f"{SOCKET_FOLDER}/agent.sock"
CLAIMS_PATH = "/var/lib/qlora/pvc"
OWN_PATHS = (SCRATCH_PATH, SOCKET_FOLDER, CACHE_PATH, CLAIMS_PATH, TERMINATION_LOG)
"""Where nothing else may be mounted, nor above."""
RAY_TOKEN_FOLDER, RAY_TOKEN_FILE = "/etc/qlora/ray", "token"
RESERVED_VOLUMES = ("scratch", "agent", "agent-scratch", "agent-token", "model-cache")
CLAIM_VOLUME = "claim-"
GPU_CLAIM = "gpu"

LIMIT_FACTOR = 2
"""What a stage may take over what it is expected to take, of memory and of scratch space."""
SCRATCH_BYTES = 2 * GIB
"""Of the files a stage makes for itself; a model that is fetched anew comes on top."""

SPOT_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "karpenter.sh/capacity-type": "spot",
        "eks.amazonaws.com/capacityType": "SPOT",
        "cloud.google.com/gke-spot": "true",
        "kubernetes.azure.com/scalesetpriority": "spot",
    }
)
GPU_TAINTS = ("nvidia.com/gpu",)
SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")

KARPENTER_CARD, KARPENTER_MEMORY = "karpenter.k8s.aws/instance-gpu-name", "karpenter.k8s.aws/instance-gpu-memory"
A100, A100_BORDER_MIB = "40Gi or 80Gi", 65_536
"""Karpenter calls both A100s by one name; its figure of their memory is marketing's, but tells which."""
CARD_LABELS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cloud.google.com/gke-accelerator": {
            "nvidia-tesla-t4": "16Gi",
            "nvidia-l4": "24Gi",
            "nvidia-tesla-a100": "40Gi",
            "nvidia-a100-80gb": "80Gi",
            "nvidia-h100-80gb": "80Gi",
            "nvidia-h100-mega-80gb": "80Gi",
            "nvidia-h200-141gb": "141Gi",
            "nvidia-b200": "180Gi",
        },
        "k8s.amazonaws.com/accelerator": {
            "nvidia-tesla-t4": "16Gi",
            "nvidia-a10g": "24Gi",
            "nvidia-l4": "24Gi",
            "nvidia-l40s": "48Gi",
            "nvidia-h100": "80Gi",
            "nvidia-h200": "141Gi",
            "nvidia-b200": "180Gi",
        },
        KARPENTER_CARD: {
            "t4": "16Gi",
            "a10g": "24Gi",
            "l4": "24Gi",
            "a100": A100,
            "l40s": "48Gi",
            "h100": "80Gi",
            "h200": "141Gi",
            "b200": "180Gi",
        },
    }
)
"""Cards by what autoscalers know of nodes that do not exist yet, and so have no label of GPU Feature Discovery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate:
    """What an operator may add to every pod: Kubernetes' own fields, as they are."""

    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    node_selector: Mapping[str, str] = field(default_factory=dict[str, str])
    tolerations: Sequence[Manifest] = ()
    topology_spread_constraints: Sequence[Manifest] = ()
    env: Sequence[Manifest] = ()
    env_from: Sequence[Manifest] = ()
    volumes: Sequence[Manifest] = ()
    volume_mounts: Sequence[Manifest] = ()
    image_pull_secrets: Sequence[Manifest] = ()
    priority_class_name: str = ""
    runtime_class_name: str = ""
    scheduler_name: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidObject for what would take the place of something that is decided here."""
        for volume in self.volumes:
            name = str(volume.get("name", ""))
            if name in RESERVED_VOLUMES or name.startswith(CLAIM_VOLUME):
                raise InvalidObject(f"the pod template's volume {name!r} has a name that is taken; give it another")
        for mount in self.volume_mounts:
            path = f"{str(mount.get('mountPath', '')).rstrip('/')}/"
            taken = next((own for own in OWN_PATHS if f"{own}/".startswith(path)), None)
            if taken is not None:
                raise InvalidObject(f"the pod template mounts {path} over {taken}, which is taken; choose another path")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPolicy:
    """The settings that pods depend on."""

    trainer_image: str
    controller_image: str = ""
    """The agent's."""
    tracking_uri: str
    gpu_resource: str = "nvidia.com/gpu"
    gpu_mode: Literal["device-plugin", "mig", "dra"] = "device-plugin"
    ray_address: str = ""
    """`host:port` of Ray's head; empty means no agent."""
    ray_auth_secret: str = ""
    ray_node_port: int = 6380
    model_cache: str = ""
    """`pvc://claim` or `hostpath:///path`; empty means that models are fetched into scratch space."""
    train_memory_bytes: int = 4 * GIB
    """Host memory of a train stage on top of what its model and plan ask for."""
    cpu_stage_memory_bytes: int = 2 * GIB
    template: PodTemplate = PodTemplate()


def pod(task: StageTask, gpu_class: str | None, policy: PodPolicy) -> Manifest:
    """The pod of a stage, on a GPU of the class if there is one."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(task, policy.template),
        "spec": _spec(task, gpu_class, policy),
    }


def pod_name(job: str, stage: str, attempt: int) -> str:
    """The one name that an attempt's pod may have."""
    return f"{job}-{stage}-{attempt}"


def claim_template(namespace: str, gpu_class: str) -> Manifest:
    """Dynamic resource allocation: what a claim for one GPU of the class asks for."""
    lower, upper = memory_range_mib(gpu_class)
    memory = 'device.capacity["gpu.nvidia.com"].memory'
    bounds = [f'{memory}.compareTo(quantity("{lower}Mi")) >= 0']
    bounds += [f'{memory}.compareTo(quantity("{upper}Mi")) < 0'] if upper else []
    wanted: Manifest = {
        "deviceClassName": "gpu.nvidia.com",
        "selectors": [{"cel": {"expression": " && ".join(bounds)}}],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {
            "name": claim_template_name(gpu_class),
            "namespace": namespace,
            "labels": {MANAGED_BY_LABEL: MANAGER},
        },
        "spec": {"spec": {"devices": {"requests": [{"name": GPU_CLAIM, "exactly": wanted}]}}},
    }


def claim_template_name(gpu_class: str) -> str:
    """One in every namespace that has jobs on the class."""
    return f"qlora-{gpu_class.lower()}"


def node_class(labels: Mapping[str, str], gpu_resource: str) -> str | None:
    """The class of a node's cards: by their measured memory or, before that is known, by what clouds call them."""
    memory = labels.get(f"{gpu_resource}.memory", "")
    if memory.isdecimal():
        return classify(int(memory))
    for label, cards in CARD_LABELS.items():
        found = cards.get(labels.get(label, ""))
        if found is not None:
            return _which_a100(labels) if found == A100 else found
    return None


def takes_pods(labels: Mapping[str, str], taints: Sequence[Mapping[str, str]], template: PodTemplate) -> bool:
    """Whether a node may take a train pod, as far as selector and tolerations go."""
    tolerations = [*_tolerate(GPU_TAINTS + SPOT_TAINTS), *template.tolerations]
    return template.node_selector.items() <= labels.items() and all(
        taint.get("effect") == "PreferNoSchedule" or any(_tolerates(each, taint) for each in tolerations)
        for taint in taints
    )


def _tolerates(toleration: Manifest, taint: Mapping[str, str]) -> bool:
    """As the scheduler reads them: no key is all keys, no effect is all effects."""
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")


def _which_a100(labels: Mapping[str, str]) -> str:
    memory = labels.get(KARPENTER_MEMORY, "0")
    return "80Gi" if memory.isdecimal() and int(memory) > A100_BORDER_MIB else "40Gi"


# --- metadata ---------------------------------------------------------------------------------------------------


def _metadata(task: StageTask, template: PodTemplate) -> Manifest:
    owner = {
        "apiVersion": API_VERSION,
        "kind": "QLoRAJob",
        "name": task.job,
        "uid": task.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata: Manifest = {
        "name": pod_name(task.job, task.stage, task.attempt),
        "namespace": task.namespace,
        "labels": {**template.labels, **_labels(task)},
        "ownerReferences": [owner],
    }
    if template.annotations:
        metadata["annotations"] = dict(template.annotations)
    return metadata


def _labels(task: StageTask) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "qlora-trainer",
        "app.kubernetes.io/component": TRAINER,
        "app.kubernetes.io/part-of": MANAGER,
        MANAGED_BY_LABEL: MANAGER,
        JOB_LABEL: task.job,
        JOB_UID_LABEL: task.uid,
        STAGE_LABEL: task.stage,
        ATTEMPT_LABEL: str(task.attempt),
        QUEUE_LABEL: task.spec.queue,
    }


# --- spec -------------------------------------------------------------------------------------------------------


def _spec(task: StageTask, gpu_class: str | None, policy: PodPolicy) -> Manifest:
    template = policy.template
    with_agent = _has_agent(task, policy)
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": task.grace_seconds,
        "securityContext": _pod_security(),
        "containers": [_trainer(task, policy, gpu_class)],
        "volumes": list(_volumes(task, policy)),
        "tolerations": [*_tolerations(task, gpu_class), *template.tolerations],
        "affinity": {"nodeAffinity": _node_affinity(task, gpu_class, policy)},
    }
    if with_agent:
        spec["initContainers"] = [_agent(task, policy)]
    if gpu_class is not None and policy.gpu_mode == "dra":
        spec["resourceClaims"] = [
            {"name": GPU_CLAIM, "resourceClaimTemplateName": claim_template_name(gpu_class)},
        ]
    added: Manifest = {
        "nodeSelector": dict(template.node_selector),
        "topologySpreadConstraints": list(template.topology_spread_constraints),
        "imagePullSecrets": list(template.image_pull_secrets),
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name if gpu_class is not None else "",
        "schedulerName": template.scheduler_name,
    }
    return spec | {key: value for key, value in added.items() if value}


def _has_agent(task: StageTask, policy: PodPolicy) -> bool:
    return bool(policy.ray_address) and task.stage in STAGES_ON_GPU


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


# --- the trainer's container ------------------------------------------------------------------------------------


def _trainer(task: StageTask, policy: PodPolicy, gpu_class: str | None) -> Manifest:
    template = policy.template
    container: Manifest = {
        "name": TRAINER,
        "image": policy.trainer_image,
        "command": ["python", "-m", "qlora_trainer"],
        "args": [task.stage],
        "env": list(_trainer_env(task, policy)),
        "resources": _resources(task, policy, gpu_class),
        "securityContext": _container_security(),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "volumeMounts": [*_mounts(task, policy), *template.volume_mounts],
    }
    if template.env_from:
        container["envFrom"] = list(template.env_from)
    return container


def _trainer_env(task: StageTask, policy: PodPolicy) -> Iterator[Manifest]:
    own = dict(_environment(task, policy))
    yield from (variable for variable in policy.template.env if variable.get("name") not in own)
    for name, value in own.items():
        yield {"name": name, "value": value.replace("$", "$$")}  # Kubernetes expands $(NAME), and makes $ of $$


def _environment(task: StageTask, policy: PodPolicy) -> Iterator[tuple[str, str]]:
    yield "HOME", SCRATCH_PATH
    yield TASK_VARIABLE, task.model_dump_json(by_alias=True)  # with nulls: some are choices
    yield TERMINATION_LOG_VARIABLE, TERMINATION_LOG
    yield TRACKING_URI_VARIABLE, policy.tracking_uri
    yield "OMP_NUM_THREADS", str(task.threads)  # not what the node has: the order of sums depends on it
    if policy.model_cache:
        yield "HF_HOME", f"{CACHE_PATH}/huggingface"
        yield "QLORA_MODEL_CACHE", f"{CACHE_PATH}/models"
    if task.stage in STAGES_ON_GPU:
        yield "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    if _has_agent(task, policy):
        yield AGENT_SOCKET_VARIABLE, AGENT_SOCKET


def _resources(task: StageTask, policy: PodPolicy, gpu_class: str | None) -> Manifest:
    memory, scratch = _memory_bytes(task, policy), _scratch_bytes(task, policy)
    requests = {
        "cpu": str(task.threads) if gpu_class is not None else "1",
        "memory": _mebibytes(memory),
        "ephemeral-storage": _mebibytes(scratch),
    }
    limits = {
        "memory": _mebibytes(LIMIT_FACTOR * memory),
        "ephemeral-storage": _mebibytes(LIMIT_FACTOR * scratch),
    }
    if gpu_class is None:
        return {"requests": requests, "limits": limits}
    if policy.gpu_mode == "dra":
        return {"requests": requests, "limits": limits, "claims": [{"name": GPU_CLAIM}]}
    return {"requests": requests, "limits": limits | {policy.gpu_resource: "1"}}


def _memory_bytes(task: StageTask, policy: PodPolicy) -> int:
    """Host memory: the process, one matrix on its way to the card, paged optimizer state, what the plan moves out."""
    if task.stage not in STAGES_ON_GPU or task.prepared is None or task.plan is None:
        return policy.cpu_stage_memory_bytes
    facts, spec = task.prepared.model, task.spec
    largest = max(facts.vocab_size * facts.hidden_size, *(linear.parameters for linear in linears(facts)))
    paged = spec.training.optimizer.startswith("paged_")
    state = adapter_parameters(spec.adapter, facts) * OPTIMIZER_BYTES[spec.training.optimizer] if paged else 0
    tokens = task.plan.micro_batch_size * spec.training.sequence_length
    return policy.train_memory_bytes + int(
        2 * largest * BF16_BYTES + state + _offloaded_bytes(task.plan, facts, tokens)
    )


def _offloaded_bytes(plan: MemoryPlan, facts: ModelFacts, tokens: int) -> int:
    activations = plan.recompute_layers * tokens * facts.hidden_size * BF16_BYTES
    embeddings = facts.vocab_size * facts.hidden_size * BF16_BYTES
    return ("activations" in plan.offload) * activations + ("embeddings" in plan.offload) * embeddings


def _scratch_bytes(task: StageTask, policy: PodPolicy) -> int:
    """Scratch space: a model that is neither mounted nor cached is fetched into it by the stage that needs weights."""
    fetched = task.spec.model.source.startswith(("hf://", "s3://")) and not policy.model_cache
    if not fetched or task.stage not in STAGES_ON_GPU or task.prepared is None:
        return SCRATCH_BYTES
    return SCRATCH_BYTES + _parameters(task.prepared.model) * BF16_BYTES


def _parameters(facts: ModelFacts) -> int:
    tables = (1 if facts.tied_embeddings else 2) * facts.vocab_size * facts.hidden_size
    return tables + facts.num_layers * sum(linear.parameters for linear in linears(facts))


def _mebibytes(count: int) -> str:
    return f"{-(-count // MIB)}Mi"


# --- volumes ----------------------------------------------------------------------------------------------------


def _claims(task: StageTask) -> dict[str, bool]:
    """Persistent volume claims that the task's URIs name, in order, and whether the stage writes to them."""
    spec = task.spec
    uris = [task.store_uri, spec.model.source, spec.dataset.source, spec.dataset.eval_source or ""]
    claims: dict[str, bool] = {}
    for uri in uris:
        parts = urlsplit(uri)
        if parts.scheme == "pvc":
            claims[parts.netloc] = claims.get(parts.netloc, False) or uri is task.store_uri
    return claims


def _volumes(task: StageTask, policy: PodPolicy) -> Iterator[Manifest]:
    scratch = LIMIT_FACTOR * _scratch_bytes(task, policy)
    yield {"name": "scratch", "emptyDir": {"sizeLimit": _mebibytes(scratch)}}
    for number, claim in enumerate(_claims(task)):
        yield {"name": f"{CLAIM_VOLUME}{number}", "persistentVolumeClaim": {"claimName": claim}}
    if policy.model_cache:
        yield {"name": "model-cache", **_cache_source(policy.model_cache)}
    if _has_agent(task, policy):
        yield {"name": "agent", "emptyDir": {"sizeLimit": "1Mi"}}
        yield {"name": "agent-scratch", "emptyDir": {"sizeLimit": "1Gi"}}
        if policy.ray_auth_secret:
            secret = {"secretName": policy.ray_auth_secret, "defaultMode": 0o440, "optional": True}
            yield {"name": "agent-token", "secret": secret}
    yield from policy.template.volumes


def _cache_source(model_cache: str) -> Manifest:
    parts = urlsplit(model_cache)
    if parts.scheme == "pvc":
        return {"persistentVolumeClaim": {"claimName": parts.netloc}}
    return {"hostPath": {"path": parts.path, "type": "DirectoryOrCreate"}}


def _mounts(task: StageTask, policy: PodPolicy) -> Iterator[Manifest]:
    yield {"name": "scratch", "mountPath": SCRATCH_PATH}
    for number, (claim, writes) in enumerate(_claims(task).items()):
        mount: Manifest = {"name": f"{CLAIM_VOLUME}{number}", "mountPath": f"{CLAIMS_PATH}/{claim}"}
        yield mount if writes else mount | {"readOnly": True}
    if policy.model_cache:
        yield {"name": "model-cache", "mountPath": CACHE_PATH}
    if _has_agent(task, policy):
        yield {"name": "agent", "mountPath": SOCKET_FOLDER}


# --- Ray's agent ------------------------------------------------------------------------------------------------


def _agent(task: StageTask, policy: PodPolicy) -> Manifest:
    stage = f"{task.namespace}/{pod_name(task.job, task.stage, task.attempt)}"
    env: list[Manifest] = [
        {"name": "HOME", "value": SCRATCH_PATH},
        {"name": "QLORA_RAY_ADDRESS", "value": policy.ray_address},
        {"name": "QLORA_RAY_STAGE", "value": stage},
        {"name": "QLORA_RAY_NODE_PORT", "value": str(policy.ray_node_port)},
        {"name": "QLORA_RAY_NODE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": AGENT_SOCKET_VARIABLE, "value": AGENT_SOCKET},
    ]
    mounts: list[Manifest] = [
        {"name": "agent", "mountPath": SOCKET_FOLDER},
        {"name": "agent-scratch", "mountPath": SCRATCH_PATH},
    ]
    if policy.ray_auth_secret:
        env.append({"name": "RAY_AUTH_MODE", "value": "token"})
        env.append({"name": "RAY_AUTH_TOKEN_PATH", "value": f"{RAY_TOKEN_FOLDER}/{RAY_TOKEN_FILE}"})
        mounts.append({"name": "agent-token", "mountPath": RAY_TOKEN_FOLDER, "readOnly": True})
    return {
        "name": AGENT,
        "image": policy.controller_image,
        "command": ["python", "-m", "orchestrator.adapters.ray_fabric.agent"],
        "restartPolicy": "Always",
        "env": env,
        "resources": {
            "requests": {"cpu": "50m", "memory": "384Mi", "ephemeral-storage": "128Mi"},
            "limits": {"memory": "1Gi", "ephemeral-storage": "1Gi"},
        },
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }


# --- nodes ------------------------------------------------------------------------------------------------------


def _tolerations(task: StageTask, gpu_class: str | None) -> list[Manifest]:
    on_gpu = GPU_TAINTS if gpu_class is not None else ()
    on_spot = SPOT_TAINTS if task.spec.resources.spot != "forbidden" else ()
    return _tolerate(on_gpu + on_spot)


def _tolerate(keys: Sequence[str]) -> list[Manifest]:
    return [Manifest(key=key, operator="Exists", effect="NoSchedule") for key in keys]


def _node_affinity(task: StageTask, gpu_class: str | None, policy: PodPolicy) -> Manifest:
    """Required: the class and the spec's word on spot. Preferred by stages without a GPU: nodes without one."""
    affinity: Manifest = {}
    cards: list[Term] = [[]]
    spots: list[Term] = [[]]
    if gpu_class is None:
        no_gpu = {"matchExpressions": [{"key": f"{policy.gpu_resource}.memory", "operator": "DoesNotExist"}]}
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [{"weight": 100, "preference": no_gpu}]
    elif policy.gpu_mode != "dra":
        cards = list(_class_terms(gpu_class, policy.gpu_resource))
    if gpu_class is not None or task.spec.resources.spot == "forbidden":
        spots = list(_spot_terms(task))
    terms = [[*card, *spot] for card in cards for spot in spots]
    if all(terms):
        required = {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = required
    return affinity


def _class_terms(gpu_class: str, gpu_resource: str) -> Iterator[Term]:
    """Ways in which a node may say that its cards are of the class; one is enough."""
    lower, upper = memory_range_mib(gpu_class)
    yield _between(f"{gpu_resource}.memory", lower, upper)
    if gpu_resource != "nvidia.com/gpu":
        return
    unmeasured: Manifest = {"key": f"{gpu_resource}.memory", "operator": "DoesNotExist"}
    for label, cards in CARD_LABELS.items():
        names = sorted(name for name, known in cards.items() if known == gpu_class)
        if names:
            yield [{"key": label, "operator": "In", "values": names}, unmeasured]
    if gpu_class in ("40Gi", "80Gi"):
        border = (1, A100_BORDER_MIB) if gpu_class == "40Gi" else (A100_BORDER_MIB, None)
        a100: Manifest = {"key": KARPENTER_CARD, "operator": "In", "values": ["a100"]}
        yield [a100, *_between(KARPENTER_MEMORY, *border), unmeasured]


def _between(label: str, lower: int, upper: int | None) -> Term:
    """From `lower` on, below `upper`."""
    bounds: list[Manifest] = [{"key": label, "operator": "Gt", "values": [str(lower - 1)]}]
    if upper is not None:
        bounds.append({"key": label, "operator": "Lt", "values": [str(upper)]})
    return bounds


def _spot_terms(task: StageTask) -> Iterator[Term]:
    """Ways to have the spec's word on spot kept; one is enough."""
    match task.spec.resources.spot:
        case "allowed":
            yield []
        case "forbidden":
            yield [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS.items()]
        case "required":
            for key, value in SPOT_LABELS.items():
                yield [{"key": key, "operator": "In", "values": [value]}]
