"""The pod of a stage: what a task needs from a cluster, as a manifest. Pure: same task and policy, same pod.

Where it may run is in `node_placement`, what it may take in `resources`. Rules:

- Restricted Pod Security; no service account token; nothing is writable but volumes.
- The image's main process is the trainer. Ray's agent beside it is a native sidecar: once its image is there it may
  fail, be patched or find no head, and what it needs from its surroundings is optional.
- Whoever moves pods for a cluster's own convenience (Karpenter, cluster-autoscaler) is asked to let them end first.
- The operator's template adds to a pod and never overrides what is decided here.
- `pvc://claim/path` is found by the trainer at CLAIMS_PATH, where the claims that a task names are mounted; those that
  it only reads from are mounted read-only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

from orchestrator.adapters.kubernetes.node_placement import node_affinity, tolerations
from orchestrator.adapters.kubernetes.pod_policy import (
    CACHE_PATH,
    CLAIM_VOLUME,
    CLAIMS_PATH,
    SCRATCH_PATH,
    SOCKET_FOLDER,
    TERMINATION_LOG,
    Manifest,
    PodPolicy,
    PodTemplate,
)
from orchestrator.adapters.kubernetes.resources import GPU_CLAIM, LIMIT_FACTOR, mebibytes, resources, scratch_bytes
from orchestrator.api.base import API_VERSION
from orchestrator.api.data_sheets import BFLOAT16_CAPABILITY
from orchestrator.api.stage_name import STAGES_ON_GPU
from orchestrator.api.task import (
    AGENT_SOCKET_VARIABLE,
    TERMINATION_LOG_VARIABLE,
    TRACKING_URI_VARIABLE,
    StageTask,
    task_variables,
)
from orchestrator.errors import PermanentError
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable
from orchestrator.sizing.hardware import memory_range_mib

JOB_LABEL, JOB_UID_LABEL, STAGE_LABEL = "qlora.dev/job", "qlora.dev/job-uid", "qlora.dev/stage"
ATTEMPT_LABEL, QUEUE_LABEL, GPU_CLASS_LABEL = "qlora.dev/attempt", "qlora.dev/queue", "qlora.dev/gpu-class"
MANAGED_BY_LABEL, MANAGER = "app.kubernetes.io/managed-by", "qlora-orchestrator"

TRAINER, AGENT = "trainer", "ray-agent"
USER_ID = 65532
LET_IT_END = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "descheduler.alpha.kubernetes.io/prefer-no-eviction": "true",
}
FOR_THE_POD = {"host_memory_factor", "avoid_nodes"}
"""What a task says of its pod, and no trainer needs to know."""
AGENT_SOCKET = f"{SOCKET_FOLDER}/agent.sock"
RAY_TOKEN_FOLDER, RAY_TOKEN_FILE = "/etc/qlora/ray", "token"


def pod(task: StageTask, gpu_class: str | None, policy: PodPolicy) -> Manifest:
    """The pod of a stage, on a GPU of the class if there is one.

    Raises PermanentError for a class that is none: a status may name one that somebody else wrote.
    """
    if gpu_class is not None and gpu_class not in policy.gpu_table.names:
        raise PermanentError(
            f"the status names the GPU class {gpu_class}, and there are {', '.join(policy.gpu_table.names)} alone"
        )
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(task, gpu_class, policy.template),
        "spec": _spec(task, gpu_class, policy),
    }


def claim_template(namespace: str, gpu_class: str, table: GpuTable = BUILT_IN) -> Manifest:
    """Dynamic resource allocation: what a claim for one GPU of the class asks for."""
    own = table.cards_of(gpu_class)
    lower, upper = (table.least_mib(gpu_class), None) if own else memory_range_mib(gpu_class)
    memory = 'device.capacity["gpu.nvidia.com"].memory'
    bounds = [f'{memory}.compareTo(quantity("{lower}Mi")) >= 0']
    bounds += [f'{memory}.compareTo(quantity("{upper}Mi")) < 0'] if upper else []
    capability = 'device.attributes["gpu.nvidia.com"].cudaComputeCapability'
    bounds += [f'{capability}.compareTo(semver("{BFLOAT16_CAPABILITY}.0.0")) >= 0']
    if table.by_card:
        product = 'device.attributes["gpu.nvidia.com"].productName.replace(" ", "-")'
        named = f"{product} in {json.dumps(sorted(own or table.by_card))}"
        bounds += [named if own else f"!({named})"]
    wanted: Manifest = {
        "deviceClassName": "gpu.nvidia.com",
        "selectors": [{"cel": {"expression": " && ".join(bounds)}}],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {
            "name": claim_template_name(gpu_class, table),
            "namespace": namespace,
            "labels": {MANAGED_BY_LABEL: MANAGER},
        },
        "spec": {"spec": {"devices": {"requests": [{"name": GPU_CLAIM, "exactly": wanted}]}}},
    }


def claim_template_name(gpu_class: str, table: GpuTable = BUILT_IN) -> str:
    """One in every namespace that has jobs on the class; its spec cannot change, so another table has another."""
    return "-".join(filter(None, ("qlora", gpu_class.lower(), table.digest)))


# --- metadata ---------------------------------------------------------------------------------------------------


def _metadata(task: StageTask, gpu_class: str | None, template: PodTemplate) -> Manifest:
    owner = {
        "apiVersion": API_VERSION,
        "kind": "QLoRAJob",
        "name": task.job,
        "uid": task.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    of_class = {GPU_CLASS_LABEL: gpu_class} if gpu_class is not None else {}
    return {
        "name": task.stage_name,
        "namespace": task.namespace,
        "labels": {**template.labels, **_labels(task), **of_class},
        "annotations": {**template.annotations, **LET_IT_END},
        "ownerReferences": [owner],
    }


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
        "tolerations": [*tolerations(task, gpu_class), *template.tolerations],
        "affinity": {"nodeAffinity": node_affinity(task, gpu_class, policy)},
    }
    if with_agent:
        spec["initContainers"] = [_agent(task, policy)]
    if gpu_class is not None and policy.gpu_mode == "dra":
        spec["resourceClaims"] = [
            {"name": GPU_CLAIM, "resourceClaimTemplateName": claim_template_name(gpu_class, policy.gpu_table)},
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
    return bool(policy.ray_address_for(task.namespace)) and task.stage in STAGES_ON_GPU


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
        "resources": resources(task, policy, gpu_class),
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
    told = task.model_copy(update={"grace_seconds": min(task.grace_seconds, policy.short_grace_seconds)})
    text = told.model_dump_json(by_alias=True, exclude=FOR_THE_POD)  # with nulls: some are choices
    yield from task_variables(text).items()
    yield TERMINATION_LOG_VARIABLE, TERMINATION_LOG
    yield TRACKING_URI_VARIABLE, policy.tracking_uri
    yield "OMP_NUM_THREADS", str(task.threads)  # not what the node has: the order of sums depends on it
    if policy.model_cache:
        yield "HF_HOME", f"{CACHE_PATH}/huggingface"
        yield "QLORA_MODEL_CACHE", f"{CACHE_PATH}/models"
        yield "QLORA_MODEL_CACHE_GIB", f"{policy.model_cache_gib:g}"
        yield "QLORA_MODEL_CACHE_WAIT_SECONDS", f"{policy.model_cache_wait_seconds:g}"
    if task.stage in STAGES_ON_GPU:
        yield "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    if _has_agent(task, policy):
        yield AGENT_SOCKET_VARIABLE, AGENT_SOCKET


# --- volumes ----------------------------------------------------------------------------------------------------


def _claims(task: StageTask) -> dict[str, bool]:
    """Persistent volume claims that the task's URIs name, in order, and whether the stage writes to them."""
    spec = task.spec
    uris = [task.store_uri, spec.model.source, spec.dataset.source, spec.dataset.eval_source or ""]
    uris.append(spec.adapter.start_uri or "")
    uris.append(task.starting_job.adapter_uri if task.starting_job is not None else "")
    claims: dict[str, bool] = {}
    for uri in uris:
        parts = urlsplit(uri)
        if parts.scheme == "pvc":
            claims[parts.netloc] = claims.get(parts.netloc, False) or uri is task.store_uri
    return claims


def _volumes(task: StageTask, policy: PodPolicy) -> Iterator[Manifest]:
    scratch = LIMIT_FACTOR * scratch_bytes(task, policy)
    yield {"name": "scratch", "emptyDir": {"sizeLimit": mebibytes(scratch)}}
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
    stage = f"{task.namespace}/{task.stage_name}"
    env: list[Manifest] = [
        {"name": "HOME", "value": SCRATCH_PATH},
        {"name": "QLORA_RAY_ADDRESS", "value": policy.ray_address_for(task.namespace)},
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
