"""What NVIDIA's data sheets say of the cards that jobs train on, and what large matrix products reach on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

Generation = Literal["Volta", "Turing", "Ampere", "Ada", "Hopper", "Blackwell", "Blackwell RTX"]
BFLOAT16_CAPABILITY = 8
"""The first major compute capability that has bfloat16: Ampere's."""
NO_BFLOAT16 = "has no bfloat16; jobs train on Ampere or newer"
PRODUCTS_KEPT = 1024
"""Names of products, as nodes tell them, whose cards are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """A card as it is sold: what it holds, and how fast it is."""

    generation: Generation
    total_mib: int
    """As nvidia-smi shows it, ECC on where the card has it."""
    tflops: float | None
    """Peak of dense bfloat16 products that are summed in float32; Volta and Turing have no bfloat16."""
    measured_tflops: float | None = None
    """What large products reach within the card's power limit, where that is known to be less."""
    memory_gbps: float
    """Gigabytes (10^9) a second of the card's own memory."""
    pcie: int = 4
    """Its generation."""
    pcie_width: int = 16
    """8 or 16."""

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


def _blackwell(total_mib: int) -> DataSheet:
    """That it falls short of its data sheet by as much as Hopper is an assumption."""
    return DataSheet(
        generation="Blackwell",
        total_mib=total_mib,
        tflops=2250.0,
        measured_tflops=1800.0,
        memory_gbps=8000,
        pcie=5,
    )


def _ampere(total_mib: int, tflops: float, memory_gbps: float, pcie_width: int = 16) -> DataSheet:
    return DataSheet(
        generation="Ampere", total_mib=total_mib, tflops=tflops, memory_gbps=memory_gbps, pcie_width=pcie_width
    )


def _ada(total_mib: int, tflops: float, memory_gbps: float, pcie_width: int = 16) -> DataSheet:
    return DataSheet(
        generation="Ada", total_mib=total_mib, tflops=tflops, memory_gbps=memory_gbps, pcie_width=pcie_width
    )


def _blackwell_rtx(total_mib: int, tflops: float, memory_gbps: float, pcie_width: int = 16) -> DataSheet:
    """GeForce and RTX PRO: another chip than B200's, with tensor cores like Ada's."""
    return DataSheet(
        generation="Blackwell RTX",
        total_mib=total_mib,
        tflops=tflops,
        memory_gbps=memory_gbps,
        pcie=5,
        pcie_width=pcie_width,
    )


DATA_SHEETS: Mapping[str, DataSheet] = MappingProxyType(
    {
        "V100": DataSheet(generation="Volta", total_mib=32_768, tflops=None, memory_gbps=900, pcie=3),
        "T4": DataSheet(generation="Turing", total_mib=15_360, tflops=None, memory_gbps=320, pcie=3),
        # GeForce: tensor cores that sum in float32 do twice what the others do in it (3090: 71 and 35.6).
        "RTX 3050": _ampere(8_192, 18.2, 224, pcie_width=8),
        "RTX 3060": _ampere(12_288, 25.5, 360),
        "RTX 3060 Ti": _ampere(8_192, 32.4, 448),
        "RTX 3070": _ampere(8_192, 40.6, 448),
        "RTX 3080": _ampere(10_240, 59.5, 760),
        "RTX 3090": _ampere(24_576, 71.0, 936),
        "A2": _ampere(15_356, 18.0, 200, pcie_width=8),
        "A4000": _ampere(16_376, 76.7, 448),
        "A10": _ampere(23_028, 125.0, 600),
        "A10G": _ampere(23_028, 70.0, 600),
        "A5000": _ampere(24_564, 111.1, 768),
        "A30": _ampere(24_576, 165.0, 933),
        "A100 40GB": _ampere(40_960, 312.0, 1555),
        "A40": _ampere(46_068, 149.7, 696),
        "A6000": _ampere(49_140, 154.8, 768),
        "A100 80GB": _ampere(81_920, 312.0, 1935),  # PCIe's; SXM has 2,039
        "RTX 4060": _ada(8_188, 30.2, 272, pcie_width=8),
        "RTX 4060 Ti": _ada(16_380, 44.1, 288, pcie_width=8),  # the larger of two
        "RTX 4070": _ada(12_282, 58.3, 504),
        "RTX 4080": _ada(16_376, 97.5, 717),
        "RTX 4090": _ada(24_564, 165.2, 1008),
        "L4": _ada(23_034, 121.0, 300),
        "RTX 5000 Ada": _ada(32_760, 261.2, 576),
        "L20": _ada(46_068, 119.5, 864),
        "L40": _ada(46_068, 181.0, 864),
        "L40S": _ada(46_068, 362.0, 864),
        "RTX 6000 Ada": _ada(49_140, 364.2, 960),
        "H100 PCIe": DataSheet(generation="Hopper", total_mib=81_559, tflops=756.0, memory_gbps=2039, pcie=5),
        "H100 80GB": _hopper(81_559, 3350),
        "H100 NVL": DataSheet(generation="Hopper", total_mib=95_830, tflops=835.0, memory_gbps=3938, pcie=5),
        "H20": DataSheet(generation="Hopper", total_mib=97_871, tflops=148.0, memory_gbps=4000, pcie=5),
        "H200": _hopper(143_771, 4800),
        "RTX 5060": _blackwell_rtx(8_151, 38.4, 448, pcie_width=8),
        "RTX 5060 Ti": _blackwell_rtx(16_311, 47.4, 448, pcie_width=8),  # the larger of two
        "RTX 5070": _blackwell_rtx(12_227, 61.7, 672),
        "RTX 5070 Ti": _blackwell_rtx(16_303, 87.9, 896),
        "RTX 5080": _blackwell_rtx(16_303, 112.6, 960),
        "RTX 5090": _blackwell_rtx(32_607, 209.5, 1792),
        "RTX PRO 6000": _blackwell_rtx(97_887, 438.9, 1597),  # the slower of its editions, each way
        "B200": _blackwell(183_359),
        "B300": _blackwell(275_040),
    }
)


@lru_cache(maxsize=PRODUCTS_KEPT)
def find_name(product: str) -> str | None:
    """Which card a product is, as `L40S` for `NVIDIA-L40S`; None if it is none of these, or a laptop's namesake."""
    words = frozenset(_WORD.findall(product.upper()))
    if "LAPTOP" in words:
        return None
    fitting = [name for name in DATA_SHEETS if words.issuperset(_WORD.findall(name.upper()))]
    return max(fitting, key=len, default=None)


def lacks_bfloat16(product: str, compute_capability: int | None = None) -> bool:
    """Whether a card is known to have no bfloat16, without which no job trains: by its major compute capability, or
    by its name where nobody tells that."""
    if compute_capability is not None:
        return compute_capability < BFLOAT16_CAPABILITY
    name = find_name(product)
    return name is not None and DATA_SHEETS[name].tflops is None


_WORD = re.compile(r"[A-Z0-9]+")
