"""`qlora sweep` and `qlora sweeps`: hand in sweeps, look at them and their trials, and end them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.completion import complete_sweep
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.job_commands import connect, load
from orchestrator.cli.options import AllNamespaces, DryRun, Manifest, Namespace, Output, Timeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.sweep import QLoRASweep
    from orchestrator.sdk.client import Client

SweepName = Annotated[str, typer.Argument(metavar="NAME", help="The sweep's name.", autocompletion=complete_sweep)]


def sweep(file: Manifest, namespace: Namespace = None, dry_run: DryRun = False, output: Output = None) -> None:
    """Try a job with several values of its hyperparameters; with --dry-run, say which."""
    from orchestrator.api.sweep import QLoRASweep
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.output import print_columns, print_data, print_text, wire
    from orchestrator.cli.tables import planned_trials
    from orchestrator.errors import InvalidObject

    found = [item for item in load(file, namespace) if isinstance(item, QLoRASweep)]
    if len(found) != 1:
        raise InvalidObject(f"{file} holds {len(found)} sweeps where one is wanted; for several use: qlora submit")
    client = connect(namespace)
    checked = client.check_sweep(found[0]) if dry_run else client.sweep(found[0], told=say)
    name = checked.metadata.name
    if output is not None:
        print_data(wire(checked), output)
    elif dry_run:
        print_text(f"sweep/{name} is valid; nothing was changed")
        print_columns(answers(), planned_trials(checked))
    else:
        print_text(f"sweep/{name} submitted")
        say(f"follow it: qlora sweeps wait {name}", style="quiet")


def sweeps(
    context: typer.Context, namespace: Namespace = None, all_namespaces: AllNamespaces = False, output: Output = None
) -> None:
    """List sweeps, or show one with its trials, wait for one, end or remove it: describe, wait, cancel, delete."""
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.output import print_columns, print_data, wire
    from orchestrator.cli.tables import sweep_table

    if context.invoked_subcommand is not None:
        return
    client = connect(namespace)
    found = client.list_sweeps(all_namespaces=all_namespaces)
    if output is not None:
        print_data([wire(each) for each in found], output)
    elif not found:
        say(f"no sweeps{'' if all_namespaces else f' in namespace {client.namespace}'}")
    else:
        print_columns(answers(), sweep_table(found, datetime.now(UTC), namespaces=all_namespaces))


def describe(name: SweepName, namespace: Namespace = None, output: Output = None) -> None:
    """Show one sweep: how it goes, and its trials with their values, the best first."""
    from orchestrator.cli.output import print_data, wire

    client = connect(namespace)
    found = client.get_sweep(name)
    if output is not None:
        print_data(wire(found), output)
    else:
        _show(client, found)


def wait(name: SweepName, timeout: Timeout = None, namespace: Namespace = None, output: Output = None) -> None:
    """Wait until a sweep is over; the exit status says whether there is a best trial."""
    from orchestrator.api.reasons import ConditionType, Reason
    from orchestrator.cli.output import print_data, wire

    client = connect(namespace)
    found = client.wait_sweep(name, timeout)
    if output is not None:
        print_data(wire(found), output)
    else:
        _show(client, found)
    finished = found.status.condition(ConditionType.FINISHED)
    if finished is None or finished.reason is not Reason.SUCCEEDED:
        raise typer.Exit(ExitStatus.JOB_FAILED)


def cancel(name: SweepName, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """End a sweep and its trials for good. What they have saved and published stays."""
    from orchestrator.cli.output import print_text

    client = connect(namespace)
    found = client.get_sweep(name)
    if found.status.finish_time is not None:
        print_text(f"sweep/{name} is over already: {found.status.summary}")
        return
    if not dry_run:
        client.cancel_sweep(name)
    print_text(f"sweep/{name} {'would be' if dry_run else 'is being'} cancelled")


def delete(name: SweepName, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """Remove a sweep and the jobs of its trials. MLflow and their store keep what they have."""
    from orchestrator.cli.output import print_text

    client = connect(namespace)
    client.get_sweep(name)
    if not dry_run:
        client.delete_sweep(name)
    print_text(f"sweep/{name} {'would be deleted' if dry_run else 'deleted'}, and its trials with it")


COMMANDS = (describe, wait, cancel, delete)


def _show(client: Client, found: QLoRASweep) -> None:
    from orchestrator.cli.console import answers
    from orchestrator.cli.output import print_columns, print_text
    from orchestrator.cli.tables import trial_table

    jobs: Sequence[QLoRAJob] = client.list(namespace=found.metadata.namespace)
    print_text(f"sweep/{found.metadata.name}: {found.status.summary or 'nobody has looked at it yet'}")
    for condition in found.status.conditions:
        print_text(f"{condition.type.value} {condition.status}: {condition.reason.value}: {condition.message}")
    print_columns(answers(), trial_table(found, {job.metadata.name: job for job in jobs}))
