"""Secrets of webhooks on one machine: in the environment that the service starts from."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import TransientError


def secret_variable(name: str) -> str:
    """The variable that has the secret of a webhook of this name."""
    return f"QLORA_WEBHOOK_{name.replace('-', '_').upper()}_SECRET"


class EnvironmentSecrets:
    """As they were when the service started."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def read(self, namespace: str | None, name: str) -> str:  # noqa: ARG002 - all namespaces are one person's
        """The secret of a webhook. Raises TransientError where there is none."""
        variable = secret_variable(name)
        found = self._environment.get(variable, "")
        if not found:
            raise TransientError(f"the service's environment has no {variable}: set it, then qlora down and qlora up")
        return found
