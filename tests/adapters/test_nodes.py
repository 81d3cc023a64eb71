"""GPU classes as nodes have them: how many, and as fast as which card."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.nodes import Node, count_gpus, gpus_held, parse_gpu_classes, read_node
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.settings import Settings
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import GIB, GpuClass, find_card, gpu_class, priced


def node(name: str, product: str, *, gpus: int = 1, usable: bool = True) -> Node:
    return Node(name=name, gpu_class="48Gi", gpus=gpus, product=product, usable=usable)


def only(classes: tuple[GpuClass, ...]) -> GpuClass:
    [found] = classes
    return found


def test_a_class_is_as_fast_as_the_slowest_card_that_its_nodes_name() -> None:
    found = only(count_gpus([node("a", "NVIDIA-L40S", gpus=8), node("b", "NVIDIA-RTX-A6000")], {}, {}))
    assert (found.name, found.capacity, found.card) == ("48Gi", 9, find_card("RTX A6000"))


def test_where_a_node_does_not_name_its_card_it_may_be_the_slowest_of_the_class() -> None:
    found = only(count_gpus([node("a", "NVIDIA-L40S"), node("b", "")], {}, {}))
    assert found.card == gpu_class("48Gi", 1).card == find_card("L20")


def test_what_an_autoscaler_may_bring_is_not_known_by_name() -> None:
    found = only(count_gpus([node("a", "NVIDIA-L40S")], {}, {"48Gi": 4}))
    assert (found.capacity, found.card) == (4, find_card("L20"))
    assert only(count_gpus([node("a", "NVIDIA-L40S", gpus=4)], {}, {"48Gi": 4})).card == find_card("L40S")


def test_a_node_that_cannot_take_pods_counts_what_is_held_there() -> None:
    assert count_gpus([node("a", "NVIDIA-L40S", usable=False)], {}, {}) == ()
    assert only(count_gpus([node("a", "NVIDIA-L40S", usable=False)], {"a": 1}, {})).capacity == 1


def test_a_class_has_the_least_host_memory_that_any_of_its_nodes_has_for_each_gpu() -> None:
    one = replace(node("one", ""), memory_bytes=64 * GIB)
    four, silent = replace(node("four", "", gpus=4), memory_bytes=96 * GIB), node("silent", "")
    for nodes, expected in (([one, four], 24 * GIB), ([one, silent], 64 * GIB), ([silent], None)):
        assert only(count_gpus(nodes, {}, {})).host_bytes == expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"memory": "32Gi"}, 32 * GIB),
        ({"memory": "1024"}, 1024),
        ({"memory": "much"}, None),
        ({"memory": "NaN"}, None),
        ({"memory": "Infinity"}, None),
        ({"memory": "1e999999"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_a_node_tells_of_its_memory_is_read_and_what_it_does_not_is_not_known(
    told: Json | None, expected: int | None
) -> None:
    item: Json = {"metadata": {"name": "n"}, "status": {"allocatable": told}}
    assert read_node(item, POLICY).memory_bytes == expected


POLICY = PodPolicy(trainer_image="t", tracking_uri="http://m")
A10G = {"nvidia.com/gpu.product": "NVIDIA-A10G", "nvidia.com/gpu.memory": "23028", "nvidia.com/gpu.count": "1"}


def of_the_api(*, gpus: int = 1, spec: Json | None = None, ready: bool = True, **labels: str) -> Json:
    status = {
        "conditions": [{"type": "Ready", "status": str(ready)}],
        "allocatable": {"nvidia.com/gpu": str(gpus)},
    }
    named = {f"nvidia.com/{key.replace('_', '.')}": value for key, value in labels.items()}
    return {"metadata": {"name": "n", "labels": {**A10G, **named}}, "spec": spec or {}, "status": status}


def someones_pod(*, gpus: int, node: str = "n", phase: str = "Running", **labels: str) -> Json:
    container = {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}} if gpus else {}
    spec = {"nodeName": node, "containers": [{}, container]}
    return {"metadata": {"labels": labels}, "spec": spec, "status": {"phase": phase}}


SHARED = {
    "time-slicing": {"gpu_replicas": "4"},
    "time-slicing by the product's name": {"gpu_product": "NVIDIA-A10G-SHARED"},
    "slices": {"gpu_product": "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"},
}


@pytest.mark.parametrize("labels", SHARED.values(), ids=SHARED)
def test_a_card_that_is_handed_out_in_parts_does_not_count_and_says_why(labels: dict[str, str]) -> None:
    assert count_gpus([read_node(of_the_api(), POLICY)], {}, {}) != ()
    found = read_node(of_the_api(gpus=4, **labels), POLICY)
    assert count_gpus([found], {}, {}) == ()
    assert found.unfit


@pytest.mark.parametrize("labels", [
    {"gpu_memory": "15360", "gpu_product": "Tesla-T4"},
    {"gpu_memory": "15360", "gpu_product": "Tesla-T4", "gpu_compute_major": "7"},
    {"gpu_memory": "32768", "gpu_product": "Tesla-V100-SXM2-32GB"},
    {"gpu_memory": "24220", "gpu_product": "Quadro-RTX-6000", "gpu_compute_major": "7"},
])  # fmt: skip
def test_a_card_without_bfloat16_does_not_count_and_says_why(labels: dict[str, str]) -> None:
    found = read_node(of_the_api(**labels), POLICY)
    assert count_gpus([found], {}, {}) == ()
    assert labels["gpu_product"] in found.unfit
    assert "bfloat16" in found.unfit


def test_slices_that_are_asked_for_as_slices_count() -> None:
    policy = PodPolicy(trainer_image="t", tracking_uri="http://m", gpu_mode="mig")
    assert read_node(of_the_api(gpu_product="NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"), policy).unfit == ""


AWAY = {
    "cordoned": of_the_api(spec={"unschedulable": True}),
    "not ready": of_the_api(ready=False),
    "tainted": of_the_api(spec={"taints": [{"key": "team", "value": "other", "effect": "NoSchedule"}]}),
    "draining": of_the_api(spec={"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}),
}


@pytest.mark.parametrize("item", AWAY.values(), ids=AWAY)
def test_a_node_that_takes_no_pods_has_no_free_gpus(item: Json) -> None:
    assert count_gpus([read_node(item, POLICY)], {}, {}) == ()


def test_gpus_that_pods_of_others_ask_for_are_taken() -> None:
    nodes = [node("a", "NVIDIA-L40S", gpus=8)]
    assert only(count_gpus(nodes, {"a": 2}, {}, {"a": 5})).capacity == 3
    assert only(count_gpus(nodes, {"a": 2}, {}, {"a": 8})).capacity == 2, "what is ours stays on the books"
    assert count_gpus(nodes, {}, {}, {"a": 8}) == ()


def test_what_a_pod_of_others_takes_is_what_it_asks_for_while_it_is_there() -> None:
    assert gpus_held(someones_pod(gpus=2), POLICY) == 2
    assert gpus_held(someones_pod(gpus=2, phase="Succeeded"), POLICY) == 0
    assert gpus_held(someones_pod(gpus=2, node=""), POLICY) == 0
    assert gpus_held(someones_pod(gpus=0), POLICY) == 0
    dra = PodPolicy(trainer_image="t", tracking_uri="http://m", gpu_mode="dra")
    claiming = someones_pod(gpus=0)
    claiming["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimName": "theirs"}]
    assert gpus_held(claiming, dra) == 1


def test_prices_come_from_the_setting_and_reach_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_GPU_PRICES", "24Gi=0.5,48Gi=0.80")
    prices = Settings().policy().gpu_prices
    found = priced([gpu_class("24Gi", 1), gpu_class("48Gi", 1), gpu_class("80Gi", 1)], prices)
    assert [each.dollars_per_hour for each in found] == [0.5, 0.8, None]


@pytest.mark.parametrize("text", ["24Gi", "24Gi=", "24Gi=free", "cpu=1", "24Gi=-1"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Settings(gpu_prices=text)


def test_nodes_of_a_defined_class_count_in_it_and_one_that_is_too_small_says_why() -> None:
    table = gpu_table('{"23Gi": {"usableMiB": 22016, "cards": ["NVIDIA-L4"], "dollarsPerHour": 0.4}}')
    policy = PodPolicy(trainer_image="t", tracking_uri="http://m", gpu_table=table)
    read = [read_node(of_the_api(gpus=4), policy), read_node(of_the_api(gpu_product="NVIDIA-L4"), policy)]
    found = count_gpus(read, {}, {}, table=table)
    assert [(each.name, each.capacity, each.dollars_per_hour) for each in found] == [
        ("23Gi", 1, 0.4),
        ("24Gi", 4, None),
    ]
    assert (found[0].card, found[0].card_known) == (find_card("L4"), True)
    assert [each.dollars_per_hour for each in priced(found, "23Gi=0.5")] == [0.5, None]
    assert parse_gpu_classes("23Gi=4", table) == {"23Gi": 4}
    small = read_node(of_the_api(gpu_product="NVIDIA-L4", gpu_memory="20000"), policy)
    assert count_gpus([small], {}, {}, table=table) == ()
    assert "class 23Gi" in small.unfit
