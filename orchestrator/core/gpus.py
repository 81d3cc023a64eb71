"""GPU classes: which cards are interchangeable for sizing, by the bytes that they really offer.

Marketing names are of no use: a "48 GB" L40S shows 46,068 MiB and an A6000 49,140. A class promises the allocator
bytes of the smallest card in it, so whatever is sized for the class fits every card that is put into it. Runtimes
call `classify` with what `nvidia-smi` shows and `gpu_class` to describe what they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from orchestrator.core.facts import GpuClass

MIB = 1 << 20
GIB = 1 << 30

# Total memory in MiB as nvidia-smi shows it, ECC on where the card has it.
CARDS_TOTAL_MIB: Mapping[str, int] = MappingProxyType(
    {
        "T4": 15_360,
        "A10G": 23_028,
        "L4": 23_034,
        "RTX 3090": 24_576,
        "RTX 4090": 24_564,
        "A100 40GB": 40_960,
        "A40": 46_068,
        "L40S": 46_068,
        "A6000": 49_140,
        "RTX 6000 Ada": 49_140,
        "H100 80GB": 81_559,
        "A100 80GB": 81_920,
        "H200": 143_771,
        "B200": 183_359,
    }
)

# What a process has on the card beside the allocator: the CUDA context and the libraries' own buffers, at the least
# (measured: 0.9 to 1.25 GiB). A card belongs to a class when it has the class's usable bytes and this on top.
CONTEXT_MIB = 922

# name -> (GiB that the cards are sold as, MiB that PyTorch's allocator can have on the smallest of them, the most
# multiprocessors on one of them, by NVIDIA's data sheets)
_CLASSES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "16Gi": (16, 14_336, 40),  # 14.0 GiB: T4
        "24Gi": (24, 22_016, 128),  # 21.5 GiB: A10G, L4; RTX 4090
        "40Gi": (40, 39_424, 108),  # 38.5 GiB: A100 40GB
        "48Gi": (48, 45_056, 142),  # 44.0 GiB: L40S, A40
        "80Gi": (80, 79_872, 132),  # 78.0 GiB: H100 80GB
        "141Gi": (141, 142_336, 132),  # 139.0 GiB: H200
        "180Gi": (180, 181_760, 148),  # 177.5 GiB: B200
    }
)
CLASS_NAMES: tuple[str, ...] = tuple(_CLASSES)
CPU_CLASS = "cpu"


def classify(total_mib: int) -> str | None:
    """The largest class whose promise a card with so many MiB keeps; None where it is too small for any."""
    kept = [name for name, (_, usable_mib, _) in _CLASSES.items() if usable_mib + CONTEXT_MIB <= total_mib]
    return kept[-1] if kept else None


def memory_range_mib(name: str) -> tuple[int, int | None]:
    """Total MiB of the cards that `classify` puts into a class: from the first on, below the second, if any."""
    lower = {known: usable_mib + CONTEXT_MIB for known, (_, usable_mib, _) in _CLASSES.items()}
    return lower[name], min((mib for mib in lower.values() if mib > lower[name]), default=None)


def gpu_class(name: str, capacity: int) -> GpuClass:
    """So many GPUs of a class of this table; raises KeyError for a name that it does not have."""
    marketed_gib, usable_mib, multiprocessors = _CLASSES[name]
    return GpuClass(
        name=name,
        marketed_gib=marketed_gib,
        usable_bytes=usable_mib * MIB,
        capacity=capacity,
        multiprocessors=multiprocessors,
    )


def cpu_class(slot_bytes: int, capacity: int) -> GpuClass:
    """The stand-in on a machine without a GPU: so many slots of so many bytes of host memory each."""
    return GpuClass(
        name=CPU_CLASS,
        marketed_gib=max(1, slot_bytes // GIB),
        usable_bytes=slot_bytes,
        capacity=capacity,
        cpu=True,
    )
