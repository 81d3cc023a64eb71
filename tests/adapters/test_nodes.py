"""GPU classes as nodes have them: how many, and as fast as which card."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.adapters.kubernetes.nodes import Node, count_gpus
from orchestrator.settings import Settings
from orchestrator.sizing.hardware import GpuClass, find_card, gpu_class, priced


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
    assert found.card == gpu_class("48Gi", 1).card == find_card("A40")


def test_what_an_autoscaler_may_bring_is_not_known_by_name() -> None:
    found = only(count_gpus([node("a", "NVIDIA-L40S")], {}, {"48Gi": 4}))
    assert (found.capacity, found.card) == (4, find_card("A40"))
    assert only(count_gpus([node("a", "NVIDIA-L40S", gpus=4)], {}, {"48Gi": 4})).card == find_card("L40S")


def test_a_node_that_cannot_take_pods_counts_what_is_held_there() -> None:
    assert count_gpus([node("a", "NVIDIA-L40S", usable=False)], {}, {}) == ()
    assert only(count_gpus([node("a", "NVIDIA-L40S", usable=False)], {"a": 1}, {})).capacity == 1


def test_prices_come_from_the_setting_and_reach_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_GPU_PRICES", "24Gi=0.5,48Gi=0.80")
    prices = Settings().policy().gpu_prices
    found = priced([gpu_class("24Gi", 1), gpu_class("48Gi", 1), gpu_class("80Gi", 1)], prices)
    assert [each.dollars_per_hour for each in found] == [0.5, 0.8, None]


@pytest.mark.parametrize("text", ["24Gi", "24Gi=", "24Gi=free", "cpu=1", "24Gi=-1"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Settings(gpu_prices=text)
