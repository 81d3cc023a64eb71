"""What a run tells about itself beside its losses: where its time went, how hard the card worked, energy, memory.

On the GPU, phases are measured by events in its own stream, so measuring never waits for it. Everything that a machine
cannot tell is absent, never zero.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from orchestrator.api.data_sheets import DATA_SHEETS, find_name
from orchestrator.api.formats import Metric

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint")

log = logging.getLogger(__name__)


class PhaseClock:
    """Seconds by phase, summed over the attempt."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> None:
        """The given phase begins, and with it the one before ends."""
        self._marks.append((phase, self._now()))

    def close(self) -> None:
        """The last phase ends. Call it where the GPU has just been waited for."""
        if not self._marks:
            return
        marks = [*self._marks, ("", self._now())]
        if self._on_gpu:
            marks[-1][1].synchronize()
        for (phase, start), (_, end) in pairwise(marks):
            self.seconds[phase] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        self._marks = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """Model FLOP utilization (Chowdhery et al., 2022)."""

    mfu: float
    """Share of the data sheet's peak of dense bfloat16 products."""
    sustained: float
    """Share of what large products reach within the card's power limit."""

    @classmethod
    def of(cls, product: str, operations: float, seconds: float) -> Utilization | None:
        """That of a card by its name; None where it is in no data sheet, or has no bfloat16."""
        name = find_name(product)
        sheet = DATA_SHEETS[name] if name is not None else None
        if sheet is None or sheet.tflops is None or sheet.sustained_tflops is None:
            return None
        tflops = operations / seconds / 1e12
        return cls(mfu=tflops / sheet.tflops, sustained=tflops / sheet.sustained_tflops)

    def rounded(self) -> dict[str, float]:
        """For a table of results."""
        return {"mfu": round(self.mfu, 4), "mfu_sustained": round(self.sustained, 4)}


class Card:
    """The GPU that training runs on, if there is one."""

    def __init__(self, device: torch.device, energy_before_joules: float) -> None:
        self._device = device if device.type == "cuda" else None
        self.name = torch.cuda.get_device_name(device) if self._device else "CPU"
        self._meter = _energy_meter(device) if self._device else None
        self._energy_before_joules = energy_before_joules
        self._meter_at_start = self._meter() if self._meter else 0.0

    def metrics(self, operations: float, seconds: float) -> dict[str, float]:
        """What the card tells about a step of so many operations and seconds."""
        if self._device is None:
            return {}
        found: dict[str, float] = {
            Metric.VRAM_ALLOCATED_BYTES: torch.cuda.max_memory_allocated(self._device),
            Metric.VRAM_RESERVED_BYTES: torch.cuda.max_memory_reserved(self._device),
        }
        if (utilization := self.utilization(operations, seconds)) is not None:
            found[Metric.MFU] = utilization.mfu
        if self._meter is not None:
            found[Metric.ENERGY_JOULES] = self._energy_before_joules + self._meter() - self._meter_at_start
        return found

    def utilization(self, operations: float, seconds: float) -> Utilization | None:
        """How much of the card's arithmetic so many operations in so many seconds are; None where nobody knows."""
        return Utilization.of(self.name, operations, seconds) if self._device is not None else None

    def peak_bytes(self) -> tuple[int | None, int | None]:
        """The most that was allocated and reserved."""
        if self._device is None:
            return None, None
        return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)


def _energy_meter(device: torch.device) -> Any:
    """A function that reads the card's energy counter in joules; None where there is none (before Volta, on MIG)."""
    cuda: Any = torch.cuda  # Any: what it says of a card has no types
    try:
        pynvml: Any = import_module("pynvml")  # Any: it has no types
        pynvml.nvmlInit()
        properties = cuda.get_device_properties(device)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # noqa: BLE001 - no library, no driver, no counter: there is no energy to report
        log.info("the card's energy is not reported: %s", error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
