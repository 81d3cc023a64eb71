"""Which GPUs the nodes have: the classes that jobs are sized for, and which nodes are about to go.

Rules:

- A GPU counts where a train pod could be put now: the node is ready, is not about to be taken away, and has no taint
  that the pods do not tolerate. A GPU that one of our pods holds counts as long as it is held, whatever becomes of its
  node: the books have it on both sides.
- What an autoscaler can bring up counts as if it were there (`GPU_CLASSES`): a pod that waits is what brings it up.
- GPUs that pods of others ask for are taken (`others`), as far as the controller may see those pods. Where it may not,
  the scheduler leaves a pod of ours pending, which ends as UNSCHEDULABLE: the job goes on elsewhere.
- A card that is handed out in parts (time-slicing, MPS, MIG) is no card of its class, and does not count; nor does one
  without bfloat16, on which no job trains. Why is on the node (`unfit`). Slices that an operator asks for by their own
  resource are another matter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from kubernetes.utils.quantity import (  # pyright: ignore[reportMissingTypeStubs]  untyped upstream
    parse_quantity,  # pyright: ignore[reportUnknownVariableType]
)

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.node_placement import CAPABILITY_LABEL, SPOT_LABELS, node_class, takes_pods
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.api.data_sheets import NO_BFLOAT16, lacks_bfloat16
from orchestrator.errors import InvalidObject
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable
from orchestrator.sizing.hardware import GpuClass

NODES = "nodes"
PAGE_NODES = 500
LARGEST_QUANTITY = (1 << 63) - 1
"""What the API knows no larger quantity than."""
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
LEAVING_TAINTS = frozenset(
    {
        OUT_OF_SERVICE,
        "node.cloudprovider.kubernetes.io/shutdown",
        "ToBeDeletedByClusterAutoscaler",
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",
        "cloud.google.com/impending-node-termination",
        "aws-node-termination-handler/spot-itn",
        "aws-node-termination-handler/scheduled-maintenance",
        "aws-node-termination-handler/asg-lifecycle-termination",
    }
)
"""Put on nodes that are being taken away, by autoscalers and by those who hear of a spot machine's end."""
SHARING_LABELS = ("cloud.google.com/gke-max-shared-clients-per-gpu",)
"""By which clouds say how often they hand out each card, besides GPU Feature Discovery's own label."""
PARTITION_LABEL = "cloud.google.com/gke-gpu-partition-size"
READINESS_TAINTS = frozenset({"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"})
"""They follow the condition, which is looked at itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What matters of a node."""

    name: str
    gpu_class: str | None
    gpus: int
    product: str
    """What GPU Feature Discovery calls the card; empty where nobody says."""
    usable: bool
    """Whether a train pod could be put there."""
    ready: bool = True
    """Whether its kubelet says that it is well; one that nobody hears of is not."""
    spot: bool = False
    """Whether its machine may be taken away at any time, by the label that its cloud gives it."""
    leaving: str = ""
    """Why it is about to go, in words; empty if nothing is known."""
    unfit: str = ""
    """Why no job trains on its GPUs, in words; empty where one may."""
    out_of_service: bool = False
    """Whether an operator vouches for it that nothing runs there any more."""
    memory_bytes: int | None = None
    """What its pods may have of its memory together; none where it does not tell."""


def read_node(item: Json, policy: PodPolicy) -> Node:
    """A node of the API."""
    meta: Json = item["metadata"]
    spec: Json = item.get("spec", {})
    status: Json = item.get("status", {})
    labels: dict[str, str] = meta.get("labels") or {}
    taints: list[dict[str, str]] = spec.get("taints") or []
    leaving = _leaving(meta, taints)
    unfit = _no_bfloat16(labels, policy) or _not_whole(labels, policy) or _too_small(labels, policy)
    ready = _is_ready(status)
    usable = (
        ready
        and not unfit
        and not spec.get("unschedulable", False)
        and not leaving
        and takes_pods(labels, [taint for taint in taints if taint["key"] not in READINESS_TAINTS], policy.template)
    )
    return Node(
        name=meta["name"],
        gpu_class=node_class(labels, policy.gpu_resource, policy.gpu_table),
        gpus=_gpus(status, labels, policy),
        product=labels.get(f"{policy.gpu_resource}.product", ""),
        usable=usable,
        ready=ready,
        spot=any(labels.get(key) == value for key, value in SPOT_LABELS.items()),
        leaving=leaving,
        unfit=unfit,
        out_of_service=any(taint["key"] == OUT_OF_SERVICE for taint in taints),
        memory_bytes=_memory_bytes(status),
    )


def count_gpus(
    nodes: Iterable[Node],
    held: Mapping[str, int],
    reachable: Mapping[str, int],
    others: Mapping[str, int] = MappingProxyType({}),
    *,
    table: GpuTable = BUILT_IN,
) -> tuple[GpuClass, ...]:
    """The classes that there are, small ones first.

    `held`: GPUs of ours by node; `reachable`: what an autoscaler may bring up; `others`: GPUs of other people's pods.
    """
    counts: Counter[str] = Counter()
    on_spot: Counter[str] = Counter()
    products: defaultdict[str, set[str]] = defaultdict(set)
    host_bytes: defaultdict[str, list[int]] = defaultdict(list)
    for node in nodes:
        if node.gpu_class is not None:
            ours = min(node.gpus, held.get(node.name, 0))
            gpus = max(ours, node.gpus - others.get(node.name, 0)) if node.usable else ours
            counts[node.gpu_class] += gpus
            on_spot[node.gpu_class] += gpus if node.spot else 0
            products[node.gpu_class].add(node.product)
            if node.memory_bytes is not None and node.gpus:
                host_bytes[node.gpu_class].append(node.memory_bytes // node.gpus)
    for name, count in reachable.items():
        if count > counts[name]:
            counts[name] = count
            products[name].add("")  # which card an autoscaler will bring is not known
    present = (table.gpu_class(name, counts[name], products[name]) for name in table.names if counts[name] > 0)
    # Nor is it known whether on a spot machine.
    return tuple(
        replace(
            each,
            spot=None if each.name in reachable else on_spot[each.name],
            host_bytes=min(host_bytes[each.name], default=None),
        )
        for each in present
    )


def parse_gpu_classes(text: str, table: GpuTable = BUILT_IN) -> Mapping[str, int]:
    """`24Gi=4,48Gi=2`. Raises InvalidObject for a class that no card is in."""
    counts = {name: int(count) for name, _, count in (entry.partition("=") for entry in text.split(",") if entry)}
    for name in counts:
        if name not in table.names:
            known = ", ".join(table.names)
            raise InvalidObject(f"QLORA_GPU_CLASSES names the GPU class {name}, which is none of: {known}")
    return counts


def list_gpu_classes(api: KubeApi, table: GpuTable = BUILT_IN) -> Sequence[GpuClass]:
    """What the nodes have now, for a client that sizes a job; of the operator's settings it knows what it is told."""
    policy = PodPolicy(trainer_image="", tracking_uri="", gpu_table=table)
    nodes: list[Node] = []
    token = ""
    while True:
        query: dict[str, str | int] = {"limit": PAGE_NODES, **({"continue": token} if token else {})}
        page = api.get(path_of("v1", NODES), **query)
        nodes += [read_node(item, policy) for item in page["items"]]
        if not (token := page["metadata"].get("continue", "")):
            return count_gpus(nodes, {}, {}, table=table)


def gpus_held(item: Json, policy: PodPolicy) -> int:
    """The GPUs that a pod keeps from others: those that it asks for, from when a node takes it until it has ended."""
    spec: Json = item.get("spec", {})
    status: Json = item.get("status", {})
    if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
        return 0
    if policy.gpu_mode == "dra":
        claims: list[Json] = spec.get("resourceClaims") or []
        return len(claims)
    containers: list[Json] = spec.get("containers") or []
    before: list[Json] = spec.get("initContainers") or []
    together = sum(_asked(container, policy) for container in containers)
    first = max((_asked(container, policy) for container in before), default=0)
    return max(together, first)


def _asked(container: Json, policy: PodPolicy) -> int:
    resources: Json = container.get("resources") or {}
    limits: Json = resources.get("limits") or {}
    text = str(limits.get(policy.gpu_resource, "0"))
    return int(text) if text.isdecimal() else 0


def _not_whole(labels: Mapping[str, str], policy: PodPolicy) -> str:
    """Why a node's GPUs are parts of cards; empty where they are whole, or where parts are what is asked for."""
    if policy.gpu_mode == "mig":
        return ""
    product = labels.get(f"{policy.gpu_resource}.product", "")
    shares = {name: labels.get(name, "1") for name in (f"{policy.gpu_resource}.replicas", *SHARING_LABELS)}
    if product.endswith("-SHARED") or any(text.isdecimal() and int(text) > 1 for text in shares.values()):
        return "each card is handed out several times (time-slicing or MPS)"
    if "-MIG-" in product or PARTITION_LABEL in labels:
        return "cards are handed out in MIG slices; ask for those by their own resource (QLORA_GPU_MODE=mig)"
    return ""


def _no_bfloat16(labels: Mapping[str, str], policy: PodPolicy) -> str:
    """Why a node's GPUs cannot compute a job; empty where they can, or where nobody says what they are."""
    product, capability = labels.get(f"{policy.gpu_resource}.product", ""), labels.get(CAPABILITY_LABEL, "")
    if not lacks_bfloat16(product, int(capability) if capability.isdecimal() else None):
        return ""
    return f"{product or 'the card'} {NO_BFLOAT16}"


def _too_small(labels: Mapping[str, str], policy: PodPolicy) -> str:
    """Why a node's GPUs are not in the class that names them; empty where they are, or no class does."""
    memory = labels.get(f"{policy.gpu_resource}.memory", "")
    product = labels.get(f"{policy.gpu_resource}.product", "")
    return policy.gpu_table.too_small(product, int(memory) if memory.isdecimal() else 0)


def _is_ready(status: Json) -> bool:
    conditions: list[Json] = status.get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _leaving(meta: Json, taints: Iterable[Mapping[str, str]]) -> str:
    if meta.get("deletionTimestamp"):
        return f"node {meta['name']} is being deleted"
    found = next((taint["key"] for taint in taints if taint["key"] in LEAVING_TAINTS), None)
    return f"node {meta['name']} is being taken away: {found}" if found else ""


def _memory_bytes(status: Json) -> int | None:
    allocatable: Json = status.get("allocatable") or {}
    try:
        count = parse_quantity(str(allocatable["memory"]))
        return int(count) if 0 <= count <= LARGEST_QUANTITY else None
    except (KeyError, ValueError, ArithmeticError):  # a node of another maker: what it does not tell is not known
        return None


def _gpus(status: Json, labels: Mapping[str, str], policy: PodPolicy) -> int:
    """How many there are; with dynamic allocation no resource says so, but GPU Feature Discovery does."""
    if policy.gpu_mode == "dra":
        text = labels.get(f"{policy.gpu_resource}.count", "0")
    else:
        allocatable: Json = status.get("allocatable") or {}
        text = str(allocatable.get(policy.gpu_resource, "0"))
    return int(text) if text.isdecimal() else 0
