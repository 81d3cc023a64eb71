"""Who may look, in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.page.app import Refused
from orchestrator.page.sight import EVERYTHING, Sight
from orchestrator.page.token_gate import NO_TOKEN, NOBODYS
from orchestrator.page.token_login import shown_token


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Whoever comes sees this."""

    sight: Sight = EVERYTHING

    def admit(self, headers: Mapping[str, str]) -> Sight:
        """That."""
        return self.sight


@dataclass(frozen=True, slots=True)
class OneToken:
    """Whoever has it sees everything; a cluster's own gate is tried with an API server."""

    token: str

    def admit(self, headers: Mapping[str, str]) -> Sight | Refused:
        """Everything, or why not."""
        token, is_cookie = shown_token(headers)
        if not token:
            return NO_TOKEN
        return replace(EVERYTHING, has_login=is_cookie) if token == self.token else NOBODYS
