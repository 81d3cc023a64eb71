"""Shell completion of job names, from the store. A shell's Tab must never show an error, so there none is raised."""

from __future__ import annotations

from orchestrator.errors import OrchestratorError


def complete_job_name(incomplete: str) -> list[str]:
    """Names that begin like this."""
    from orchestrator.sdk.client import Client

    try:
        names = {job.metadata.name for job in Client().list(all_namespaces=True)}
    except OrchestratorError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))
