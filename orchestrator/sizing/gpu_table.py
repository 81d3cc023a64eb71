"""The GPU classes of one service: those that are built in, and those that its operator has defined.

A defined class takes cards by their names, out of the classes that their memory would put them into; all else stays as
it is. The table is a value that is made of the setting's text (`gpu_class_definitions`), and is handed to whoever
looks classes up: no process has a table that is not in its settings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from orchestrator.api.data_sheets import DATA_SHEETS, NO_BFLOAT16, find_name, lacks_bfloat16
from orchestrator.api.gpu_definitions import GpuDefinition, read_definitions
from orchestrator.sizing import hardware
from orchestrator.sizing.hardware import CLASS_NAMES, CONTEXT_MIB, CPU_CLASS, MIB, Card, GpuClass

LEAST_SHARE = 0.5
"""A class that promises less of what its cards are sold as is taken for a slip."""
TABLES_KEPT = 16
_SLICE = re.compile(r"MIG", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTable:
    """All classes by which cards are sorted."""

    names: tuple[str, ...] = CLASS_NAMES
    """Smallest first, by what they promise."""
    definitions: Mapping[str, GpuDefinition] = field(default_factory=dict[str, GpuDefinition])
    by_card: Mapping[str, str] = field(default_factory=dict[str, str])
    """Defined classes by the cards that they take."""
    digest: str = ""
    """Tells tables apart; empty where nothing is defined."""

    def gpu_class(self, name: str, capacity: int, products: Iterable[str] = ()) -> GpuClass:
        """So many GPUs of a class, of these products where that is known; KeyError for a name that is none."""
        definition = self.definitions.get(name)
        if definition is None:
            return hardware.gpu_class(name, capacity, products)
        card, card_known = _card(name, definition, tuple(products))
        return GpuClass(
            name=name,
            marketed_gib=_marketed_gib(name),
            usable_bytes=definition.usable_mib * MIB,
            capacity=capacity,
            multiprocessors=definition.multiprocessors or _most_multiprocessors(),
            card=card,
            card_known=card_known,
            dollars_per_hour=definition.dollars_per_hour,
        )

    def classify(self, product: str, total_mib: int) -> str | None:
        """The class of a card by its name, else by its memory; None where it keeps the promise of none.

        `total_mib` is 0 where nobody tells it, as of a card that shares its host's memory.
        """
        name = self.by_card.get(as_label(product))
        if name is None:
            return hardware.classify(total_mib)
        return name if not total_mib or total_mib >= self.least_mib(name) else None

    def least_mib(self, name: str) -> int:
        """Total MiB that a card of a defined class has at least."""
        return self.definitions[name].usable_mib + CONTEXT_MIB

    def cards_of(self, name: str) -> tuple[str, ...]:
        """What a defined class takes, by name; nothing of another."""
        definition = self.definitions.get(name)
        return definition.cards if definition is not None else ()

    def too_small(self, product: str, total_mib: int) -> str:
        """Why a card that a class names is not in it, in words; empty where it is, or none names it."""
        name = self.by_card.get(as_label(product))
        if name is None or not total_mib or total_mib >= self.least_mib(name):
            return ""
        return f"{product} has {total_mib} MiB, and class {name}, which names it, asks for {self.least_mib(name)} MiB"


BUILT_IN = GpuTable()


@lru_cache(maxsize=TABLES_KEPT)
def gpu_table(text: str) -> GpuTable:
    """The table of a setting. Raises ValueError, which names class, field and value."""
    definitions = read_definitions(text)
    if not definitions:
        return BUILT_IN
    by_card: dict[str, str] = {}
    for name, definition in definitions.items():
        _check(name, definition)
        for card in definition.cards:
            if card in by_card:
                raise ValueError(f"{name}.cards: {card} is in {by_card[card]} already; a card is in one class")
            by_card[card] = name
    usable = {name: hardware.gpu_class(name, 0).usable_bytes for name in CLASS_NAMES}
    usable |= {name: definition.usable_mib * MIB for name, definition in definitions.items()}
    return GpuTable(
        names=tuple(sorted(usable, key=lambda name: (usable[name], name))),
        definitions=definitions,
        by_card=by_card,
        digest=hashlib.sha256(repr(sorted(definitions.items())).encode()).hexdigest()[:8],
    )


def as_label(product: str) -> str:
    """A product's name, as NVML tells it, as GPU Feature Discovery writes it into a label."""
    return product.replace(" ", "-")


def undefined(names: Iterable[str], table: GpuTable) -> tuple[str, ...]:
    """Those of the names that are no class of a table."""
    return tuple(sorted(set(names) - {*table.names, CPU_CLASS}))


def _check(name: str, definition: GpuDefinition) -> None:
    if name in CLASS_NAMES:
        raise ValueError(f"{name}: a class of this name is built in; choose another, such as the next GiB that is free")
    total = definition.usable_mib + CONTEXT_MIB
    sold = _marketed_gib(name) * 1024
    if total > sold:
        raise ValueError(
            f"{name}.usableMiB: {definition.usable_mib} and {CONTEXT_MIB} MiB of a CUDA context are more than the "
            f"{sold} MiB that the class is named after; at most {sold - CONTEXT_MIB}"
        )
    if definition.usable_mib < sold * LEAST_SHARE:
        raise ValueError(f"{name}.usableMiB: {definition.usable_mib} is less than half of {sold} MiB; name it for less")
    for card in definition.cards:
        if card.upper().endswith("-SHARED"):
            raise ValueError(f"{name}.cards: {card} is a card that is handed out several times; name whole ones")
        if lacks_bfloat16(card):
            raise ValueError(f"{name}.cards: {card} {NO_BFLOAT16}")
        known = None if _SLICE.search(card) else find_name(card)
        if known is not None and DATA_SHEETS[known].total_mib < total:
            raise ValueError(
                f"{name}.usableMiB: {definition.usable_mib} is more than {card} can give: it shows "
                f"{DATA_SHEETS[known].total_mib} MiB, of which a CUDA context takes {CONTEXT_MIB}"
            )


def _marketed_gib(name: str) -> int:
    return int(name.removesuffix("Gi"))


def _most_multiprocessors() -> int:
    return max(hardware.gpu_class(name, 0).multiprocessors for name in CLASS_NAMES)


def _card(name: str, definition: GpuDefinition, products: tuple[str, ...]) -> tuple[Card | None, bool]:
    """What times are told for, and whether that is no guess: what was told, or the slowest of the cards if all of them
    are known, or else the slowest of the built-in class that promises as much."""
    found = [hardware.find_card(product) for product in (products if all(products) else ()) or definition.cards]
    known = [card for card in found if card is not None]
    slowest = min(known, key=lambda card: (card.matmul_tflops, card.name), default=None)
    if definition.tflops is not None and definition.memory_gbps is not None and definition.host_gbps is not None:
        told = Card(
            name=name,
            matmul_tflops=definition.tflops,
            memory_gbps=definition.memory_gbps,
            host_gbps=definition.host_gbps,
            flash_share=slowest.flash_share if slowest is not None else hardware.ATTENTION_SHARE,
            attention_share=slowest.attention_share if slowest is not None else hardware.ATTENTION_SHARE,
        )
        return told, True
    if slowest is not None and len(known) == len(found):
        return slowest, True
    alike = hardware.classify(definition.usable_mib + CONTEXT_MIB) or CLASS_NAMES[0]
    return hardware.gpu_class(alike, 0).card, False
