"""Whose jobs somebody may see, and whether the cards, the queues and everybody's place in line, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.api.job import QLoRAJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one account may see."""

    namespaces: frozenset[str] | None = None
    """None is all of them."""
    queues: bool = True
    """Whether queues are its to read."""
    cards: bool = True
    """Whether the nodes with the cards are its to read."""
    unasked: int = 0
    """Namespaces with jobs of which nobody has asked whether it may see them: there are too many."""
    has_login: bool = False
    """Whether its browser keeps a token, which it can forget."""

    @property
    def whole(self) -> bool:
        """Whether it may see everything, and so whatever is decided about it."""
        return self.namespaces is None and self.queues and self.cards

    def sees(self, namespace: str) -> bool:
        """Whether the namespace's jobs are its to read."""
        return self.namespaces is None or namespace in self.namespaces

    def of(self, jobs: Iterable[QLoRAJob]) -> tuple[QLoRAJob, ...]:
        """The jobs that it may see."""
        return tuple(job for job in jobs if self.sees(job.metadata.namespace))


EVERYTHING = Sight()
NOTHING = Sight(namespaces=frozenset(), queues=False, cards=False)
