"""`qlora queue`: the commands that make queues, look at them and steer them. By itself it is `qlora get queues`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.completion import complete_namespace, complete_queue
from orchestrator.cli.formats import DataFormat, Kind, UsageFormat, UsageOf
from orchestrator.cli.job_commands import connect, get
from orchestrator.cli.options import DryRun, Output

if TYPE_CHECKING:
    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.queue import StopPolicy
    from orchestrator.sdk.client import Client

QueueName = Annotated[str, typer.Argument(metavar="NAME", help="The queue's name.", autocompletion=complete_queue)]


def queue(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show again after every change, until Ctrl-C.")] = False,
) -> None:
    """List queues, or make, show, hold and release them: create, describe, hold, release, delete."""
    if context.invoked_subcommand is None:
        get(Kind.QUEUES, watch=watch)


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The queue's name.")],
    quotas: Annotated[
        list[str] | None,
        typer.Option(
            "--quota", metavar="CLASS=GPUS", help="GPUs of a class; repeat. None: no limit.", show_default=False
        ),
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option("--cohort", metavar="COHORT", help="Lends and borrows what is unused in it.", show_default=False),
    ] = None,
    weight: Annotated[int, typer.Option("--weight", metavar="WEIGHT", min=1, help="Its fair share of GPU time.")] = 1,
    namespaces: Annotated[
        list[str] | None,
        typer.Option(
            "--namespace",
            "-n",
            metavar="NAMESPACE",
            help="Whose jobs may use it; repeat. None: everybody's.",
            show_default=False,
            autocompletion=complete_namespace,
        ),
    ] = None,
    max_priority: Annotated[
        int | None,
        typer.Option("--max-priority", metavar="PRIORITY", help="Jobs of a higher one wait.", show_default=False),
    ] = None,
    never_preempt: Annotated[bool, typer.Option("--never-preempt", help="Its jobs move nobody.")] = False,
    user_running: Annotated[
        int | None,
        typer.Option("--user-running", metavar="JOBS", min=1, help="GPUs that a namespace holds.", show_default=False),
    ] = None,
    user_waiting: Annotated[
        int | None,
        typer.Option(
            "--user-waiting", metavar="JOBS", min=1, help="Jobs of a namespace that wait.", show_default=False
        ),
    ] = None,
    gpu_hours: Annotated[
        int | None,
        typer.Option("--gpu-hours", metavar="HOURS", min=0, help="Its budget of a month.", show_default=False),
    ] = None,
    dollars: Annotated[
        int | None,
        typer.Option("--dollars", metavar="DOLLARS", min=0, help="The same by QLORA_GPU_PRICES.", show_default=False),
    ] = None,
    fair_users: Annotated[bool, typer.Option("--fair-users", help="Namespaces that had less go first.")] = False,
    turn_seconds: Annotated[
        int | None,
        typer.Option("--turn-seconds", metavar="SECONDS", help="Then a job yields to its equals.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Nobody goes before the one who is next.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Admit nothing before `qlora queue release`.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Make a queue. To change one, edit what `qlora get queues NAME -o yaml` prints, and submit it."""
    from orchestrator.api.base import API_VERSION
    from orchestrator.cli.output import print_text
    from orchestrator.errors import AlreadyExists
    from orchestrator.sdk.manifest import parse_object
    from orchestrator.sizing.gpu_table import gpu_table

    client = connect(None)
    names = gpu_table(client.settings.gpu_class_definitions).names
    spec = {
        "quotas": [_quota(text, names) for text in quotas or ()],
        "cohort": cohort,
        "weight": weight,
        "namespaces": list(namespaces or ()),
        "maxPriority": max_priority,
        "preemption": "Never" if never_preempt else "LowerPriority",
        "fairSharing": "PerUser" if fair_users else "None",
        "turnSeconds": turn_seconds,
        "queueingStrategy": "StrictFIFO" if strict else "BestEffortFIFO",
        "stopPolicy": "Hold" if hold else "None",
        "perUser": {"running": user_running, "waiting": user_waiting},
        "budget": None if gpu_hours is None and dollars is None else {"gpuHours": gpu_hours, "dollars": dollars},
    }
    wanted = parse_object({"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": name}, "spec": spec})
    if any(queue.metadata.name == name for queue in client.list_queues()):
        raise AlreadyExists(f"queue {name} exists already; change it with: qlora get queues {name} -o yaml")
    if not dry_run:
        client.apply_queue(wanted.to_wire())
    print_text(f"queue/{name} {'would be created' if dry_run else 'created'}")


def describe(name: QueueName, output: Output = None) -> None:
    """Show one queue: its rules, what its jobs hold of its quotas, and the jobs that are not finished."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.describe import show_queue
    from orchestrator.cli.output import print_data, wire

    client = connect(None)
    found = client.get_queue(name)
    if output is not None:
        print_data(wire(found), output)
    else:
        show_queue(answers(), found, _unfinished(client, name), datetime.now(UTC))


def hold(
    name: QueueName,
    drain: Annotated[bool, typer.Option("--drain", help="Those that run save a checkpoint and wait, too.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Admit no more of a queue's jobs. Those that run go on."""
    _set_stop(name, "HoldAndDrain" if drain else "Hold", dry_run=dry_run)


def release(name: QueueName, dry_run: DryRun = False) -> None:
    """Admit a held queue's jobs again."""
    _set_stop(name, "None", dry_run=dry_run)


def delete(name: QueueName, dry_run: DryRun = False) -> None:
    """Remove a queue. Jobs that name it wait until it is there again; those that run go on."""
    from orchestrator.cli.output import print_text

    client = connect(None)
    client.get_queue(name)
    count = len(_unfinished(client, name))
    if not dry_run:
        client.delete_queue(name)
    left = f"; {count} unfinished job{'s' if count > 1 else ''} of it" if count else ""
    print_text(f"queue/{name} {'would be deleted' if dry_run else 'deleted'}{left}")


def usage(
    by: Annotated[UsageOf, typer.Option("--by", metavar="user|queue|job", help="What a line is of.")] = UsageOf.USER,
    month: Annotated[
        str, typer.Option("--month", metavar="YYYY-MM", help="Which month (UTC); this one.", show_default=False)
    ] = "",
    output: Annotated[
        UsageFormat, typer.Option("--output", "-o", metavar="table|csv|json|yaml", help="How to answer.")
    ] = UsageFormat.TABLE,
) -> None:
    """Say what GPU time and money a month took, by user (namespace), queue or job, deleted jobs included."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.output import csv_text, print_columns, print_data, print_text
    from orchestrator.cli.tables import USAGE_FIELDS, usage_table

    rows = connect(None).usage(month, by.value)
    if output is UsageFormat.TABLE:
        print_columns(answers(), usage_table(rows, by.value))
    elif output is UsageFormat.CSV:
        print_text(csv_text(USAGE_FIELDS, [row.to_wire() for row in rows]))
    else:
        print_data({"usage": [row.to_wire() for row in rows]}, DataFormat(output.value))


COMMANDS = (create, describe, hold, release, delete)


_STOPPED = {"None": "released", "Hold": "held", "HoldAndDrain": "drained"}


def _set_stop(name: str, stop_policy: StopPolicy, *, dry_run: bool) -> None:
    from orchestrator.cli.output import print_text

    client, word = connect(None), _STOPPED[stop_policy]
    if client.get_queue(name).spec.stops == stop_policy:
        print_text(f"queue/{name} is {'not held' if stop_policy == 'None' else word} already")
    elif dry_run:
        print_text(f"queue/{name} would be {word}")
    else:
        client.hold_queue(name, hold=stop_policy != "None", drain=stop_policy == "HoldAndDrain")
        print_text(f"queue/{name} {word}")


def _unfinished(client: Client, name: str) -> Sequence[QLoRAJob]:
    from orchestrator.sdk.handle import is_finished

    jobs = client.list(all_namespaces=True)
    return [job for job in jobs if job.spec.queue == name and not is_finished(job)]


def _quota(text: str, names: Sequence[str]) -> dict[str, object]:
    """`24Gi=4` as a quota; raises InvalidObject."""
    from orchestrator.errors import InvalidObject
    from orchestrator.sizing.hardware import CPU_CLASS

    gpu_class, _, count = text.partition("=")
    if not count.isdecimal() or gpu_class not in (*names, CPU_CLASS):
        known = ", ".join(names)
        told = "; of classes that the operator has defined, QLORA_GPU_CLASS_DEFINITIONS tells this command"
        raise InvalidObject(f"--quota {text}: must be a GPU class ({known}) and a number of GPUs, such as 24Gi=4{told}")
    return {"gpuClass": gpu_class, "nominal": int(count)}
