"""What NVIDIA's data sheets say of the cards that jobs train on, and what large matrix products reach on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

Generation = Literal["Turing", "Ampere", "Ada", "Hopper", "Blackwell"]
PRODUCTS_KEPT = 1024
"""Names of products, as nodes tell them, whose cards are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """A card as it is sold: what it holds, and how fast it is."""

    generation: Generation
    total_mib: int
    """As nvidia-smi shows it, ECC on where the card has it."""
    tflops: float | None
    """Peak of dense bfloat16 products that are summed in float32; Turing has no bfloat16."""
    measured_tflops: float | None = None
    """What large products reach within the card's power limit, where that is known to be less."""
    memory_gbps: float
    """Gigabytes (10^9) a second of the card's own memory."""
    pcie: int = 4
    """Generation of its 16 lanes."""

    @property
    def sustained_tflops(self) -> float | None:
        """What products can be expected to reach."""
        return self.measured_tflops or self.tflops


HOPPER_TFLOPS, HOPPER_MEASURED_TFLOPS = 989.0, 790.0
"""Of H100 SXM and H200: by their data sheets, and what large products reach (measured)."""


def _hopper(total_mib: int, memory_gbps: float) -> DataSheet:
    return DataSheet(
        generation="Hopper",
        total_mib=total_mib,
        tflops=HOPPER_TFLOPS,
        measured_tflops=HOPPER_MEASURED_TFLOPS,
        memory_gbps=memory_gbps,
        pcie=5,
    )


def _ampere(total_mib: int, tflops: float, memory_gbps: float) -> DataSheet:
    return DataSheet(generation="Ampere", total_mib=total_mib, tflops=tflops, memory_gbps=memory_gbps)


def _ada(total_mib: int, tflops: float, memory_gbps: float) -> DataSheet:
    return DataSheet(generation="Ada", total_mib=total_mib, tflops=tflops, memory_gbps=memory_gbps)


DATA_SHEETS: Mapping[str, DataSheet] = MappingProxyType(
    {
        "T4": DataSheet(generation="Turing", total_mib=15_360, tflops=None, memory_gbps=320, pcie=3),
        "A10": _ampere(23_028, 125.0, 600),
        "A10G": _ampere(23_028, 70.0, 600),
        "L4": _ada(23_034, 121.0, 300),
        "RTX 3090": _ampere(24_576, 71.0, 936),
        "RTX 4090": _ada(24_564, 165.2, 1008),
        "A100 40GB": _ampere(40_960, 312.0, 1555),
        "A40": _ampere(46_068, 149.7, 696),
        "L40": _ada(46_068, 181.0, 864),
        "L40S": _ada(46_068, 362.0, 864),
        "A6000": _ampere(49_140, 154.8, 768),
        "RTX 6000 Ada": _ada(49_140, 364.2, 960),
        "H100 PCIe": DataSheet(generation="Hopper", total_mib=81_559, tflops=756.0, memory_gbps=2039, pcie=5),
        "H100 80GB": _hopper(81_559, 3350),
        "A100 80GB": _ampere(81_920, 312.0, 1935),  # PCIe's; SXM has 2,039
        "H200": _hopper(143_771, 4800),
        # That it falls short of its data sheet by as much as Hopper is an assumption.
        "B200": DataSheet(
            generation="Blackwell",
            total_mib=183_359,
            tflops=2250.0,
            measured_tflops=1800.0,
            memory_gbps=8000,
            pcie=5,
        ),
    }
)


@lru_cache(maxsize=PRODUCTS_KEPT)
def find_name(product: str) -> str | None:
    """Which card a product is, as `L40S` for `NVIDIA-L40S`; None if it is none of these."""
    words = frozenset(_WORD.findall(product.upper()))
    fitting = [name for name in DATA_SHEETS if words.issuperset(_WORD.findall(name.upper()))]
    return max(fitting, key=len, default=None)


_WORD = re.compile(r"[A-Z0-9]+")
