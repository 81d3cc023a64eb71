"""GPU slots from the setting; what NVML reports is taken on machines with cards only."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.adapters.local import slots
from orchestrator.adapters.local.slots import Card, find_slots
from orchestrator.errors import InvalidObject
from orchestrator.sizing.gpu_table import gpu_table

HAS_DRIVER = Path("/proc/driver/nvidia").exists()
without_cards = pytest.mark.skipif(HAS_DRIVER, reason="this machine has NVIDIA cards")
with_cards = pytest.mark.skipif(not HAS_DRIVER, reason="this machine has no NVIDIA card")


def memory_bytes() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return int(line.split()[1]) * 1024


@without_cards
def test_a_machine_without_cards_has_one_cpu_slot_of_most_of_its_memory() -> None:
    found = find_slots("")
    assert [(known.name, known.capacity, known.cpu) for known in found.classes] == [("cpu", 1, True)]
    assert found.classes[0].usable_bytes == int(memory_bytes() * 0.8)
    assert [slot.device for slot in found.by_class["cpu"]] == [None]


@without_cards
def test_classes_without_cards_stand_for_cards_in_trials() -> None:
    found = find_slots("24Gi=2,48Gi=1")
    assert [(known.name, known.capacity) for known in found.classes] == [("24Gi", 2), ("48Gi", 1)]
    names = [slot.name for known in found.by_class.values() for slot in known]
    assert len(names) == len(set(names)) == 3
    assert all(slot.device is None for known in found.by_class.values() for slot in known)


def test_cpu_slots_share_the_memory() -> None:
    found = find_slots("cpu=4")
    assert found.classes[0].capacity == 4
    assert found.classes[0].usable_bytes * 4 <= memory_bytes()


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidObject, match=r"7Gi.*24Gi.*cpu"):
        find_slots("7Gi=1")


@with_cards
def test_every_card_is_a_slot_that_is_pinned_to_it() -> None:
    found = find_slots("")
    devices = [slot.device for known in found.by_class.values() for slot in known]
    assert devices
    assert all(device is not None and device.startswith("GPU-") for device in devices)
    assert sum(known.capacity for known in found.classes) == len(devices)


@with_cards
def test_more_cards_than_there_are_cannot_be_had() -> None:
    name = find_slots("").classes[0].name
    with pytest.raises(InvalidObject, match="1000 cards"):
        find_slots(f"{name}=1000")


@pytest.mark.parametrize(
    ("visible", "left"),
    [("0", ["GPU-a"]), ("1,0", ["GPU-a", "GPU-b"]), ("GPU-b", ["GPU-b"]), ("", []), (None, ["GPU-a", "GPU-b"])],
)
def test_only_visible_cards_count(monkeypatch: pytest.MonkeyPatch, visible: str | None, left: list[str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards = [
        Card(uuid="GPU-a", total_mib=23_034, name="NVIDIA A10G", compute_capability=8),
        Card(uuid="GPU-b", total_mib=23_034, name="NVIDIA A10G", compute_capability=8),
    ]
    assert [card.uuid for card in slots.visible(cards)] == left


UNFIT = {
    "has no bfloat16": Card(uuid="GPU-t", total_mib=15_360, name="Tesla T4", compute_capability=7),
    "6144 MiB are too little": Card(
        uuid="GPU-s", total_mib=6_144, name="NVIDIA GeForce RTX 3050", compute_capability=8
    ),
    "does not tell a memory of its own": Card(uuid="GPU-u", total_mib=0, name="NVIDIA GB10", compute_capability=12),
}


@pytest.mark.parametrize(("why", "card"), UNFIT.items(), ids=UNFIT)
def test_a_card_on_which_no_job_trains_is_left_out_in_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str, card: Card
) -> None:
    good = Card(uuid="GPU-g", total_mib=32_607, name="NVIDIA GeForce RTX 5090", compute_capability=12)
    monkeypatch.setattr(slots, "_find_cards", lambda: [card, good])
    found = find_slots("")
    assert {name: [slot.device for slot in each] for name, each in found.by_class.items()} == {"32Gi": ["GPU-g"]}
    [told] = caplog.messages
    assert card.name in told
    assert why in told


def test_a_card_is_a_slot_of_the_defined_class_that_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = Card(uuid="GPU-s", total_mib=20_000, name="NVIDIA L4", compute_capability=8)
    shared = Card(uuid="GPU-u", total_mib=0, name="NVIDIA GB10", compute_capability=12)
    named = Card(uuid="GPU-n", total_mib=23_034, name="NVIDIA L4", compute_capability=8)
    other = Card(uuid="GPU-o", total_mib=23_028, name="NVIDIA A10G", compute_capability=8)
    monkeypatch.setattr(slots, "_find_cards", lambda: [small, shared, named, other])
    l4s, gb10s = '{"usableMiB": 22016, "cards": ["NVIDIA-L4"]}', '{"usableMiB": 98304, "cards": ["NVIDIA-GB10"]}'
    table = gpu_table(f'{{"23Gi": {l4s}, "128Gi": {gb10s}}}')
    found = find_slots("", table)
    by_class = {name: [slot.device for slot in each] for name, each in found.by_class.items()}
    assert by_class == {"128Gi": ["GPU-u"], "23Gi": ["GPU-n"], "24Gi": ["GPU-o"]}
    assert "NVIDIA L4 has 20000 MiB, and class 23Gi, which names it, asks for 22938 MiB" in caplog.text
