"""GPU classes: which cards are interchangeable for sizing, by the bytes that they really offer.

Marketing names are of no use: a "48 GB" L40S shows 46,068 MiB and an A6000 49,140. A class promises the allocator
bytes of the smallest card in it, so whatever is sized for the class fits every card that is put into it.
`classify` finds the class of a card by what `nvidia-smi` shows, and `gpu_class` describes a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from orchestrator.api.data_sheets import DATA_SHEETS, PRODUCTS_KEPT, Generation, find_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """How fast a GPU is (`orchestrator.api.data_sheets`)."""

    name: str
    matmul_tflops: float
    """What dense bfloat16 products that are summed in float32 sustain."""
    memory_gbps: float
    """Gigabytes (10^9) a second of the card's own memory."""
    host_gbps: float
    """Gigabytes a second that PCIe carries in one direction in practice."""
    flash_share: float
    """What of the products' speed torch's flash attention reaches in its forward pass."""
    attention_share: float
    """What our own attention kernels reach, with records of any length."""
    flash4_share: float | None = None
    """What flash-attn-4 reaches; none where nobody has measured it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClass:
    """GPUs that are interchangeable for sizing: what the smallest card among them offers."""

    name: str
    marketed_gib: int
    """What the card is sold as; `spec.resources.vram` asks in these."""
    usable_bytes: int
    """Allocator bytes after the CUDA context, on the smallest card of the class."""
    capacity: int
    """GPUs of this class that exist now."""
    spot: int | None = None
    """How many of them spot machines have; none where that is not known, or there is no such thing."""
    multiprocessors: int = 148
    """The most on a card of the class: deterministic attention keeps a sum for each."""
    card: Card | None = None
    """The slowest card of the class, which times are told for."""
    card_known: bool = False
    """Whether that is the slowest of those that are here, which have told their names, and no guess."""
    dollars_per_hour: float | None = None
    """What one GPU costs, where the operator has told."""
    host_bytes: int | None = None
    """The least that the machines of its GPUs have of memory for each of them; none where that is not known."""
    cpu: bool = False
    """A stand-in for machines without a GPU: slots of host memory, trained on the CPU."""

    def __hash__(self) -> int:
        return hash(self.name)  # of thousands of equal questions; what else differs is compared


MIB = 1 << 20
GIB = 1 << 30

GIGABYTES_OF_PCIE = {3: 12.0, 4: 25.0, 5: 55.0}
"""A second and direction over 16 lanes: of 63 an H200's link carried 55 (`benchmarks.streaming`); of 15.8 and 31.5,
which nobody measured here, about 80 %."""
FLASH_SHARES: Mapping[Generation, float] = MappingProxyType({"Hopper": 0.30, "Blackwell": 0.15})
"""Speed of torch's flash attention against sustained products: its kernels are of the generation before Hopper.

Measured on an H100 (at 8B; benchmarks/results/kernels.json). That they are no faster on a Blackwell is an assumption.
"""
ATTENTION_SHARES: Mapping[Generation, float] = MappingProxyType({"Hopper": 0.60, "Blackwell": 0.30})
"""Speed of the trainer's own attention kernels, likewise."""
FLASH4_SHARES: Mapping[Generation, float] = MappingProxyType({"Hopper": 0.90})
"""Speed of flash-attn-4, likewise, on an H200."""
ATTENTION_SHARE = 0.6
"""Either of them on other cards: FlashAttention-2 reaches 50 to 73 % of an A100 (Dao, 2023, section 4.1), and that our
own kernels do as well there is an assumption."""

# Slices of multi-instance GPUs are eighths of the memory and sevenths of the processors (NVIDIA, "MIG User Guide",
# supported profiles); MiB as nvidia-smi shows them on A100 80GB, the smallest of those that have them.
MIG_TOTAL_MIB: Mapping[str, int] = MappingProxyType({"1g.10gb": 9_728, "2g.20gb": 19_968, "3g.40gb": 40_192})

# What a process has on the card beside the allocator: the CUDA context and the libraries' own buffers, at the least
# (measured: 0.9 to 1.25 GiB). A card belongs to a class when it has the class's usable bytes and this on top.
CONTEXT_MIB = 922

# name -> (GiB that the cards are sold as, MiB that PyTorch's allocator can have on the smallest of them, the most
# multiprocessors on one of them, by NVIDIA's data sheets; the slowest of them)
_CLASSES: Mapping[str, tuple[int, int, int, str]] = MappingProxyType(
    {
        "8Gi": (8, 7_168, 48, "RTX 3050"),  # 7.0 GiB: RTX 5060; RTX 3070
        "10Gi": (10, 8_704, 70, "A100 80GB MIG 1g.10gb"),  # 8.5 GiB: a seventh of an A100 or H100; RTX 3080
        "12Gi": (12, 11_264, 80, "RTX 3060"),  # 11.0 GiB: RTX 5070; RTX 3080 Ti
        "16Gi": (16, 14_336, 84, "A2"),  # 14.0 GiB: A2; RTX 5080
        "20Gi": (20, 18_944, 56, "A100 80GB MIG 2g.20gb"),  # 18.5 GiB: two sevenths of an A100 or H100; RTX A4500
        "24Gi": (24, 22_016, 128, "A10G"),  # 21.5 GiB: A10G, L4; RTX 4090
        "32Gi": (32, 31_232, 170, "RTX 5090"),  # 30.5 GiB: RTX 5090
        "40Gi": (40, 39_168, 108, "A100 80GB MIG 3g.40gb"),  # 38.25 GiB: half an A100 or H100; A100 40GB
        "48Gi": (48, 45_056, 142, "L20"),  # 44.0 GiB: L40S, A40, L20
        "80Gi": (80, 79_872, 132, "A100 80GB"),  # 78.0 GiB: H100 80GB
        "96Gi": (96, 94_208, 188, "H20"),  # 92.0 GiB: H100 NVL; RTX PRO 6000
        "141Gi": (141, 142_336, 132, "H200"),  # 139.0 GiB: H200
        "180Gi": (180, 181_760, 148, "B200"),  # 177.5 GiB: B200
        "288Gi": (288, 272_384, 160, "B300"),  # 266.0 GiB: B300
    }
)
CLASS_NAMES: tuple[str, ...] = tuple(_CLASSES)
CPU_CLASS = "cpu"


def classify(total_mib: int) -> str | None:
    """The largest class whose promise a card with so many MiB keeps; None where it is too small for any."""
    kept = [name for name, (_, usable_mib, *_) in _CLASSES.items() if usable_mib + CONTEXT_MIB <= total_mib]
    return kept[-1] if kept else None


def memory_range_mib(name: str) -> tuple[int, int | None]:
    """Total MiB of the cards that `classify` puts into a class: from the first on, below the second, if any."""
    lower = {known: usable_mib + CONTEXT_MIB for known, (_, usable_mib, *_) in _CLASSES.items()}
    return lower[name], min((mib for mib in lower.values() if mib > lower[name]), default=None)


def gpu_class(name: str, capacity: int, products: Iterable[str] = ()) -> GpuClass:
    """So many GPUs of a class of this table, of these products where that is known; KeyError for another name."""
    marketed_gib, usable_mib, multiprocessors, slowest = _CLASSES[name]
    found = [find_card(product) for product in products]
    known = [card for card in found if card is not None]
    card_known = bool(known) and len(known) == len(found)
    return GpuClass(
        name=name,
        marketed_gib=marketed_gib,
        usable_bytes=usable_mib * MIB,
        capacity=capacity,
        multiprocessors=multiprocessors,
        card=min(known, key=_speed) if card_known else find_card(slowest),
        card_known=card_known,
    )


@lru_cache(maxsize=PRODUCTS_KEPT)
def find_card(product: str) -> Card | None:
    """The card behind a product's name, as `NVIDIA-L40S` or `NVIDIA A100-SXM4-80GB MIG 3g.40gb`; None if unknown."""
    slice_of = _MIG.search(product)
    name = find_name(product.replace(slice_of[0], "") if slice_of else product)
    card = _card(name) if name is not None else None
    return _slice(card, DATA_SHEETS[card.name].total_mib, slice_of) if card is not None and slice_of else card


_MIG = re.compile(r"MIG[- ](\d)g\.(\d+)gb", re.IGNORECASE)


def _card(name: str) -> Card | None:
    """A card's speed, if it has bfloat16."""
    sheet = DATA_SHEETS[name]
    if sheet.sustained_tflops is None:
        return None
    return Card(
        name=name,
        matmul_tflops=sheet.sustained_tflops,
        memory_gbps=sheet.memory_gbps,
        host_gbps=GIGABYTES_OF_PCIE[sheet.pcie] * sheet.pcie_width / 16,
        flash_share=FLASH_SHARES.get(sheet.generation, ATTENTION_SHARE),
        attention_share=ATTENTION_SHARES.get(sheet.generation, ATTENTION_SHARE),
        flash4_share=FLASH4_SHARES.get(sheet.generation),
    )


def _slice(card: Card, total_mib: int, slice_of: re.Match[str]) -> Card:
    """A slice has so many sevenths of the processors, and the share of the memory's speed that it has of its size."""
    processors, gigabytes = int(slice_of[1]) / 7, int(slice_of[2])
    eighths = round(8 * gigabytes * 1000 / total_mib) / 8
    return replace(
        card,
        name=f"{card.name} {slice_of[0]}",
        matmul_tflops=card.matmul_tflops * processors,
        memory_gbps=card.memory_gbps * min(1.0, eighths),
    )


def _speed(card: Card) -> tuple[float, str]:
    return card.matmul_tflops, card.name


def priced(classes: Iterable[GpuClass], prices: str) -> tuple[GpuClass, ...]:
    """The classes with the price of a GPU's hour, from `24Gi=0.5,48Gi=0.8`; those that are not named have none."""
    dollars = {name: float(price) for name, _, price in (entry.partition("=") for entry in prices.split(",") if entry)}
    return tuple(replace(each, dollars_per_hour=dollars.get(each.name, each.dollars_per_hour)) for each in classes)


def cpu_class(slot_bytes: int, capacity: int) -> GpuClass:
    """The stand-in on a machine without a GPU: so many slots of so many bytes of host memory each."""
    return GpuClass(
        name=CPU_CLASS,
        marketed_gib=max(1, slot_bytes // GIB),
        usable_bytes=slot_bytes,
        capacity=capacity,
        cpu=True,
    )
