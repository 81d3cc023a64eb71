"""Who may look, in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.page.sight import EVERYTHING, Sight


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Whoever comes sees this."""

    sight: Sight = EVERYTHING

    def admit(self, headers: Mapping[str, str]) -> Sight:
        """That."""
        return self.sight
