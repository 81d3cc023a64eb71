"""The GPU slots of this machine: which cards there are, by class; the only file that asks NVML.

`QLORA_GPU_CLASSES` decides where it is set. On a machine with cards its entries must be there; on a machine
without, they stand for cards that are not (to try scheduling out), and trainers run on the CPU. A card on which no job
can train, for want of bfloat16 or of memory, counts as none, which the log says.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.api.data_sheets import NO_BFLOAT16, lacks_bfloat16
from orchestrator.errors import InvalidObject
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable
from orchestrator.sizing.hardware import CPU_CLASS, MIB, GpuClass, cpu_class

log = logging.getLogger(__name__)

CPU_MEMORY_SHARE = 0.8
"""The share of the machine's memory that CPU slots may use together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Room for one train stage."""

    name: str
    device: str | None = None
    """The card's UUID, where there is a card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """All slots, by GPU class."""

    classes: tuple[GpuClass, ...]
    by_class: Mapping[str, tuple[Slot, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as NVML shows it."""

    uuid: str
    total_mib: int
    """0 where NVML does not tell, as of a card that shares the machine's memory."""
    name: str
    compute_capability: int
    """The major one."""

    def unfit(self, table: GpuTable = BUILT_IN) -> str:
        """Why no job trains on it, in words; empty where one may."""
        if lacks_bfloat16(self.name, self.compute_capability):
            return f"it {NO_BFLOAT16}"
        if words := table.too_small(self.name, self.total_mib):
            return words
        if table.classify(self.name, self.total_mib) is None:
            told = f"{self.total_mib} MiB are too little" if self.total_mib else "it does not tell a memory of its own"
            return f"{told}, so it is in no GPU class"
        return ""


def find_slots(wanted: str, table: GpuTable = BUILT_IN) -> Slots:
    """The slots that a `gpu_classes` setting asks for, or those of the cards that are here."""
    cards: list[Card] = []
    for card in _find_cards():
        if unfit := card.unfit(table):
            log.warning("%s (%s) is left out: %s", card.name, card.uuid, unfit)
        else:
            cards.append(card)
    devices: dict[str, list[str]] = defaultdict(list)
    products: dict[str, set[str]] = defaultdict(set)
    for card in cards:
        if (name := table.classify(card.name, card.total_mib)) is not None:
            devices[name].append(card.uuid)
            products[name].add(card.name)
    counts = _parse(wanted, table) or {name: len(found) for name, found in devices.items()} or {CPU_CLASS: 1}
    by_class = {name: _slots(name, count, devices[name], simulated=not cards) for name, count in counts.items()}
    return Slots(
        classes=tuple(
            _describe(name, count, products[name], table, sum(counts.values())) for name, count in counts.items()
        ),
        by_class=by_class,
    )


def _parse(wanted: str, table: GpuTable) -> dict[str, int]:
    counts = {name: int(count) for name, count in (entry.split("=") for entry in wanted.split(",") if entry)}
    for name in counts:
        if name != CPU_CLASS and name not in table.names:
            known = ", ".join((*table.names, CPU_CLASS))
            raise InvalidObject(f"QLORA_GPU_CLASSES names the GPU class {name}, which is none of: {known}")
    return counts


def _slots(name: str, count: int, devices: list[str], *, simulated: bool) -> tuple[Slot, ...]:
    if name == CPU_CLASS or simulated:
        return tuple(Slot(name=f"{name}-{number}") for number in range(count))
    if count > len(devices):
        raise InvalidObject(
            f"QLORA_GPU_CLASSES asks for {count} cards of class {name}, but this machine has {len(devices)}; "
            f"lower the number, or leave the setting empty to use what is there"
        )
    return tuple(Slot(name=device, device=device) for device in devices[:count])


def _describe(name: str, count: int, products: set[str], table: GpuTable, gpus: int) -> GpuClass:
    """A class; all GPUs, of whatever class, share the machine's memory."""
    if name == CPU_CLASS:
        return cpu_class(int(_memory_bytes() * CPU_MEMORY_SHARE) // max(1, count), count)
    return replace(table.gpu_class(name, count, products), host_bytes=_memory_bytes() // max(1, gpus))


def _memory_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemTotal"].split()[0]) * 1024


def _find_cards() -> list[Card]:
    """The cards that this process may use."""
    try:
        pynvml: Any = importlib.import_module("pynvml")  # Any: it has no types
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no card
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = [
            Card(
                uuid=pynvml.nvmlDeviceGetUUID(handle),
                total_mib=_total_mib(pynvml, handle),
                name=str(pynvml.nvmlDeviceGetName(handle)),
                compute_capability=int(pynvml.nvmlDeviceGetCudaComputeCapability(handle)[0]),
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()
    return visible(cards)


def _total_mib(pynvml: Any, handle: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) // MIB
    except pynvml.NVMLError_NotSupported:
        return 0


def visible(cards: list[Card]) -> list[Card]:
    """Those that CUDA_VISIBLE_DEVICES, by index or UUID, leaves."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return cards
    chosen = {entry.strip() for entry in listed.split(",") if entry.strip()}
    return [card for index, card in enumerate(cards) if chosen & {str(index), card.uuid}]
