"""A stage's requests and limits: host memory, scratch space, and the claim on a GPU.

Requests are what the stage is expected to take; limits are LIMIT_FACTOR times that.
"""

from __future__ import annotations

from orchestrator.adapters.kubernetes.pod_policy import Manifest, PodPolicy
from orchestrator.api import trainer_facts
from orchestrator.api.job import WHOLE_MODEL_FORMATS
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.stage_name import STAGES_ON_GPU
from orchestrator.api.task import StageTask
from orchestrator.sizing.footprint import adapter_parameters, offloaded_host_bytes, streamed_host_bytes
from orchestrator.sizing.hardware import GIB, MIB
from orchestrator.sizing.memory.linear_layers import linears
from orchestrator.sizing.memory.timeline import BF16_BYTES

GPU_CLAIM = "gpu"

LIMIT_FACTOR = 2
"""What a stage may take over what it is expected to take, of memory and of scratch space."""
RAY_BYTES = GIB // 2
"""Of a prepare stage with several workers: Ray's own processes."""
PREPARE_WORKER_BYTES = GIB // 2
"""A worker of prepare and the process that renders for it."""
EXPORT_BYTES = 2 * GIB
"""A publish stage that writes the model in other formats: the libraries that know models, and rows on their way."""
SCRATCH_BYTES = 2 * GIB
"""Scratch space for the files a stage makes for itself; a model that is fetched anew comes on top."""


def resources(task: StageTask, policy: PodPolicy, gpu_class: str | None) -> Manifest:
    """The `resources` of the trainer's container."""
    memory = int(task.host_memory_factor * _memory_bytes(task, policy))
    scratch = scratch_bytes(task, policy)
    requests = {
        "cpu": str(task.threads if gpu_class is not None else _prepare_workers(task, policy)),
        "memory": mebibytes(memory),
        "ephemeral-storage": mebibytes(scratch),
    }
    limits = {
        "memory": mebibytes(LIMIT_FACTOR * memory),
        "ephemeral-storage": mebibytes(LIMIT_FACTOR * scratch),
    }
    if gpu_class is None:
        return {"requests": requests, "limits": limits}
    if policy.gpu_mode == "dra":
        return {"requests": requests, "limits": limits, "claims": [{"name": GPU_CLAIM}]}
    return {"requests": requests, "limits": limits | {policy.gpu_resource: "1"}}


def _memory_bytes(task: StageTask, policy: PodPolicy) -> int:
    """Host memory: the process, one matrix on its way to the card, paged optimizer state, what the plan moves out."""
    if task.stage not in STAGES_ON_GPU or task.prepared is None or task.plan is None:
        exports = EXPORT_BYTES if _exports(task) else 0
        return policy.cpu_stage_memory_bytes + exports + _prepare_workers_bytes(_prepare_workers(task, policy))
    facts, spec = task.prepared.model, task.spec
    largest = max(
        facts.vocab_size * facts.hidden_size, facts.layer_inputs, *(linear.parameters for linear in linears(facts))
    )
    paged = spec.training.optimizer.startswith("paged_")
    state = (
        adapter_parameters(spec.adapter, facts) * trainer_facts.OPTIMIZER_BYTES[spec.training.optimizer] if paged else 0
    )
    tokens = task.plan.micro_batch_size * spec.training.sequence_length
    offloaded = _offloaded_bytes(task.plan, facts, tokens) + offloaded_host_bytes(spec, facts, task.plan)
    return policy.train_memory_bytes + int(2 * largest * BF16_BYTES + state + offloaded)


def _prepare_workers(task: StageTask, policy: PodPolicy) -> int:
    """Ray workers in the pod; those of a Ray cluster that the operator names are elsewhere."""
    return task.spec.prepare.parallelism if task.stage == "prepare" and not policy.names_ray_cluster else 1


def _prepare_workers_bytes(workers: int) -> int:
    return RAY_BYTES + workers * PREPARE_WORKER_BYTES if workers > 1 else 0


def _offloaded_bytes(plan: MemoryPlan, facts: ModelFacts, tokens: int) -> int:
    activations = plan.recompute_layers * tokens * facts.hidden_size * BF16_BYTES
    embeddings = facts.vocab_size * facts.hidden_size * BF16_BYTES
    moved = ("activations" in plan.offload) * activations + ("embeddings" in plan.offload) * embeddings
    return moved + streamed_host_bytes(plan, facts) + facts.layer_inputs * BF16_BYTES


def scratch_bytes(task: StageTask, policy: PodPolicy) -> int:
    """Scratch space: a model that is neither mounted nor cached is fetched into it by the stage that needs weights.

    What it is written to in other formats goes through it, too, a file at a time, unless the store is mounted.
    """
    exports = _exports(task) and not WHOLE_MODEL_FORMATS.isdisjoint(task.spec.publish.formats)
    if task.prepared is None or (task.stage not in STAGES_ON_GPU and not exports):
        return SCRATCH_BYTES
    fetched = task.spec.model.source.startswith(("hf://", "s3://")) and not policy.model_cache
    sent = exports and not task.store_uri.startswith("pvc://")
    return SCRATCH_BYTES + (fetched + sent) * _parameters(task.prepared.model) * BF16_BYTES


def _exports(task: StageTask) -> bool:
    """Whether the stage writes other formats than the adapter's."""
    return task.stage == "publish" and bool(task.spec.publish.formats)


def _parameters(facts: ModelFacts) -> int:
    tables = (1 if facts.tied_embeddings else 2) * facts.vocab_size * facts.hidden_size
    return tables + facts.layer_inputs + facts.num_layers * sum(linear.parameters for linear in linears(facts))


def mebibytes(count: int) -> str:
    """Bytes as a Kubernetes quantity, rounded up to whole MiB."""
    return f"{-(-count // MIB)}Mi"
