"""What a run tells about itself beside its losses: where its time went, how hard the card worked, energy, memory.

Read by the loop once a step. On the GPU, phases are measured by events in its own stream, so measuring never waits
for it. Everything that a machine cannot tell is absent, never zero.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from orchestrator.api.formats import Metric
from qlora_trainer.data.micro_batch import MicroBatch

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint")
PEAK_TFLOPS = (
    ("H200", 790.0),
    ("H100 80GB HBM3", 790.0),
    ("H100 PCIe", 756.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 149.7),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Dense bfloat16 TFLOP/s by a part of the card's name, the first that fits: data sheets, and for H100 SXM and H200
what large matrix products reach (790; their data sheet says 989)."""

log = logging.getLogger(__name__)


class PhaseClock:
    """Seconds by phase, summed over the attempt."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.seconds = dict.fromkeys(PHASES, 0.0)

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
class Arithmetic:
    """How many floating-point operations training takes: 4 per weight and token, because the base is frozen.

    Forward 2 and backward to the activations 2 (Dettmers et al., 2023, train no base weight, so the third pair of the
    usual 6 is not there); recomputation is not counted as work. Attention: 6 x layers x width per pair of tokens that
    see each other, forward and backward, of which causality keeps half.
    """

    linear_weights: int
    layers: int
    attention_width: int

    def operations(self, batches: Iterable[MicroBatch]) -> float:
        """Floating-point operations of a forward and backward pass over these micro-batches."""
        tokens = pairs = 0
        for batch in batches:
            lengths = batch.record_starts.diff().double()
            tokens += batch.tokens
            pairs += float(lengths.square().sum())
        return 4.0 * self.linear_weights * tokens + 6.0 * self.layers * self.attention_width * pairs


class Card:
    """The GPU that training runs on, if there is one."""

    def __init__(self, device: torch.device, energy_before_joules: float) -> None:
        self._device = device if device.type == "cuda" else None
        self.name = torch.cuda.get_device_name(device) if self._device else "CPU"
        self._peak = next((t * 1e12 for part, t in PEAK_TFLOPS if part in self.name), None) if self._device else None
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
        if self._peak is not None:
            found[Metric.MFU] = operations / seconds / self._peak
        if self._meter is not None:
            found[Metric.ENERGY_JOULES] = self._energy_before_joules + self._meter() - self._meter_at_start
        return found

    def peak_bytes(self) -> tuple[int | None, int | None]:
        """The most that was allocated and reserved."""
        if self._device is None:
            return None, None
        return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)


def _energy_meter(device: torch.device) -> Any:
    """A function that reads the card's energy counter in joules; None where there is none (before Volta, on MIG)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # noqa: BLE001 - no library, no driver, no counter: there is no energy to report
        log.info("the card's energy is not reported: %s", error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
