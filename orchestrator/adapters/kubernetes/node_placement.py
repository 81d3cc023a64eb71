"""Which nodes a stage may run on, and which class a node's cards are of: the same labels, read both ways.

One GPU of the class that the controller chose, no more: a pod is kept off smaller cards, which it would not fit, and
off larger ones, whose capacity is in other books.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from orchestrator.adapters.kubernetes.pod_policy import Manifest, PodPolicy, PodTemplate
from orchestrator.api.data_sheets import BFLOAT16_CAPABILITY
from orchestrator.api.task import StageTask
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable
from orchestrator.sizing.hardware import memory_range_mib

Term = list[Manifest]
"""Match expressions of which a node must meet all."""

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

CAPABILITY_LABEL = "nvidia.com/gpu.compute.major"
"""GPU Feature Discovery's, of whole cards and of slices alike."""
KARPENTER_CARD, KARPENTER_MEMORY = "karpenter.k8s.aws/instance-gpu-name", "karpenter.k8s.aws/instance-gpu-memory"
KARPENTER_A100 = "a100"
A100, A100_BOUNDARY_MIB = "40Gi or 80Gi", 65_536
"""Karpenter calls both A100s by one name; its figure of their memory is marketing's, but tells which."""
CARD_LABELS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cloud.google.com/gke-accelerator": {
            "nvidia-l4": "24Gi",
            "nvidia-tesla-a100": "40Gi",
            "nvidia-a100-80gb": "80Gi",
            "nvidia-rtx-pro-6000": "96Gi",
            "nvidia-h100-80gb": "80Gi",
            "nvidia-h100-mega-80gb": "80Gi",
            "nvidia-h200-141gb": "141Gi",
            "nvidia-b200": "180Gi",
            "nvidia-b300": "288Gi",
        },
        "k8s.amazonaws.com/accelerator": {
            "nvidia-a10g": "24Gi",
            "nvidia-l4": "24Gi",
            "nvidia-l40s": "48Gi",
            "nvidia-h100": "80Gi",
            "nvidia-h200": "141Gi",
            "nvidia-b200": "180Gi",
        },
        KARPENTER_CARD: {
            "a10g": "24Gi",
            "l4": "24Gi",
            KARPENTER_A100: A100,
            "l40s": "48Gi",
            "h100": "80Gi",
            "h200": "141Gi",
            "b200": "180Gi",
        },
    }
)
"""Cards by what autoscalers know of nodes that do not exist yet, and so have no label of GPU Feature Discovery."""


def node_class(labels: Mapping[str, str], gpu_resource: str, table: GpuTable = BUILT_IN) -> str | None:
    """The class of a node's cards: by their name where a class names them, or by their measured memory or, before that
    is known, by what clouds call them."""
    memory, product = labels.get(f"{gpu_resource}.memory", ""), labels.get(f"{gpu_resource}.product", "")
    if memory.isdecimal() or product in table.by_card:
        return table.classify(product, int(memory) if memory.isdecimal() else 0)
    for label, cards in CARD_LABELS.items():
        name = labels.get(label, "")
        found = table.by_card.get(name, cards[name]) if name in cards else None
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
    return "80Gi" if memory.isdecimal() and int(memory) > A100_BOUNDARY_MIB else "40Gi"


# --- nodes ------------------------------------------------------------------------------------------------------


def tolerations(task: StageTask, gpu_class: str | None) -> list[Manifest]:
    """The taints of GPU and spot nodes that the stage's pod accepts."""
    on_gpu = GPU_TAINTS if gpu_class is not None else ()
    on_spot = SPOT_TAINTS if task.spec.resources.spot != "forbidden" else ()
    return _tolerate(on_gpu + on_spot)


def _tolerate(keys: Sequence[str]) -> list[Manifest]:
    return [Manifest(key=key, operator="Exists", effect="NoSchedule") for key in keys]


def node_affinity(task: StageTask, gpu_class: str | None, policy: PodPolicy) -> Manifest:
    """Required: the class, the spec's word on spot, no node to avoid. Stages without a GPU prefer nodes without one."""
    affinity: Manifest = {}
    cards: list[Term] = [[]]
    spots: list[Term] = [[]]
    if gpu_class is None:
        no_gpu = {"matchExpressions": [{"key": f"{policy.gpu_resource}.memory", "operator": "DoesNotExist"}]}
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [{"weight": 100, "preference": no_gpu}]
    elif policy.gpu_mode != "dra":
        cards = list(_class_terms(gpu_class, policy.gpu_resource, policy.gpu_table))
    if gpu_class is not None or task.spec.resources.spot == "forbidden":
        spots = list(_spot_terms(task))
    terms = [[*card, *spot] for card in cards for spot in spots]
    avoided: Term = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in task.avoid_nodes]
    if all(terms) or avoided:
        fields: Manifest = {"matchFields": avoided} if avoided else {}
        required = {"nodeSelectorTerms": [({"matchExpressions": term} if term else {}) | fields for term in terms]}
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = required
    return affinity


def _class_terms(gpu_class: str, gpu_resource: str, table: GpuTable) -> Iterator[Term]:
    """Ways in which a node may say that its cards are of the class; one is enough."""
    product, memory = f"{gpu_resource}.product", f"{gpu_resource}.memory"
    own = table.cards_of(gpu_class)
    of_others = sorted(table.by_card.keys() - set(own))
    elsewhere: Term = [{"key": product, "operator": "NotIn", "values": of_others}] if of_others else []
    whole: Manifest = {
        "key": f"{gpu_resource}.sharing-strategy",
        "operator": "NotIn",
        "values": ["mps", "time-slicing"],
    }
    older = [str(major) for major in range(1, BFLOAT16_CAPABILITY)]
    bfloat16: Manifest = {"key": CAPABILITY_LABEL, "operator": "NotIn", "values": older}
    unmeasured: Manifest = {"key": memory, "operator": "DoesNotExist"}
    if own:
        named: Manifest = {"key": product, "operator": "In", "values": sorted(own)}
        yield [named, *_between(memory, table.least_mib(gpu_class), None), whole, bfloat16]
        yield [named, unmeasured, whole, bfloat16]
    else:
        yield [*_between(memory, *memory_range_mib(gpu_class)), *elsewhere, whole, bfloat16]
    if gpu_resource != "nvidia.com/gpu":
        return
    for label, cards in CARD_LABELS.items():
        names = sorted(name for name, known in cards.items() if table.by_card.get(name, known) == gpu_class)
        if names:
            yield [{"key": label, "operator": "In", "values": names}, unmeasured, *elsewhere]
    if gpu_class in ("40Gi", "80Gi") and KARPENTER_A100 not in table.by_card:
        bounds = (1, A100_BOUNDARY_MIB) if gpu_class == "40Gi" else (A100_BOUNDARY_MIB, None)
        a100: Manifest = {"key": KARPENTER_CARD, "operator": "In", "values": [KARPENTER_A100]}
        yield [a100, *_between(KARPENTER_MEMORY, *bounds), unmeasured, *elsewhere]


def _between(label: str, lower: int, upper: int | None) -> Term:
    """The label is a number from `lower` on and below `upper`."""
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
