"""What Tab offers, from the store and the kubeconfig: of each kind what the command can do something with.

A shell's Tab must never show an error, so there none is raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.api.job import QLoRAJob
    from orchestrator.sdk.client import Client


def complete_job(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of jobs: of those that the command can do something with."""
    wanted = _jobs_of(ctx.command.name or "")
    return _offered(ctx, incomplete, lambda client: [job.metadata.name for job in client.list() if wanted(job)])


def complete_listed(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of what `get` is asked for."""
    return complete_queue(ctx, incomplete) if ctx.params.get("kind") == "queues" else complete_job(ctx, incomplete)


def complete_queue(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of queues: those to be held are not held, those to be released are."""
    held = {"hold": False, "release": True}.get(ctx.command.name or "")
    return _offered(
        ctx,
        incomplete,
        lambda client: [q.metadata.name for q in client.list_queues() if held in (None, q.spec.stops != "None")],
    )


def complete_sweep(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of sweeps: those to be cancelled or waited for are not over."""
    is_open = ctx.command.name in ("cancel", "wait")
    return _offered(
        ctx,
        incomplete,
        lambda client: [
            sweep.metadata.name for sweep in client.list_sweeps() if not is_open or sweep.status.finish_time is None
        ],
    )


def complete_namespace(ctx: typer.Context, incomplete: str) -> list[str]:
    """Namespaces in which there are jobs."""
    return _offered(
        ctx, incomplete, lambda client: [job.metadata.namespace for job in client.list(all_namespaces=True)]
    )


def complete_context(incomplete: str) -> list[str]:
    """The contexts of the kubeconfig."""
    import yaml

    names = {"current"}
    for path in os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep):
        try:
            read: object = yaml.safe_load(Path(path).expanduser().read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        found: Any = read  # Any: anything may stand there
        with suppress(AttributeError, KeyError, TypeError):
            names |= {str(context["name"]) for context in found.get("contexts", ())}
    return _beginning(incomplete, names)


def _jobs_of(command: str) -> Callable[[QLoRAJob], bool]:
    from orchestrator.sdk.handle import is_finished

    match command:
        case "cancel" | "wait":
            return lambda job: not is_finished(job)
        case "suspend":
            return lambda job: not is_finished(job) and not job.spec.suspend
        case "resume":
            return lambda job: not is_finished(job) and job.spec.suspend
        case "promote":
            return _is_left
        case "download" | "chat":
            return lambda job: job.status.adapter_uri is not None
        case _:
            return lambda _: True


def _is_left(job: QLoRAJob) -> bool:
    """Whether an alias with a gate has not moved to the job's version."""
    from orchestrator.api.reasons import ConditionType

    found = job.status.condition(ConditionType.PROMOTED)
    return found is not None and found.status == "False"


def _offered(ctx: typer.Context, incomplete: str, names: Callable[[Client], Iterable[str]]) -> list[str]:
    from orchestrator.sdk.client import Client

    try:
        return _beginning(incomplete, names(Client(namespace=ctx.params.get("namespace"))))
    except OrchestratorError:
        return []


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
