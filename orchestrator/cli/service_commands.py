"""The commands that start, stop and look at the embedded service, and `run`, which does all of it for one job."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.job_commands import (
    connect,
    finish_following,
    first_objects,
    load,
    only_job,
    print_dry_run,
    store_object,
)
from orchestrator.cli.options import Changes, DryRun, Model, Namespace, Output, Replace, Timeout

if TYPE_CHECKING:
    from collections.abc import Generator

    from orchestrator.sdk.client import Client
    from orchestrator.settings import Settings

PACKAGES = ("qlora-orchestrator", "mlflow", "ray", "torch", "transformers", "peft", "bitsandbytes")
DEFAULT_UI_PORT = 5000
UI_START_SECONDS = 180.0
"""A busy machine takes more than a minute. A server that has ended is told of at once."""


def run(
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC.YAML", help="A manifest; - reads standard input.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DATA", help="A file of records, instead of a manifest, as for init.", show_default=False
        ),
    ] = None,
    model: Model = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Instead of metadata.name.", show_default=False)
    ] = None,
    changes: Changes = None,
    replace: Replace = False,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave the service running afterwards.")] = False,
    timeout: Timeout = None,
    namespace: Namespace = None,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Run one job from spec to registry: start the service if need be, submit, follow, show the result."""
    from orchestrator.api.job import QLoRAJob
    from orchestrator.cli.console import say
    from orchestrator.sdk.manifest import parse_object

    if spec is not None and data is None and model is None:
        objects = load(spec, namespace, changes)
    elif spec is None and data is not None:
        objects = first_objects(data, model, changes)
    else:
        raise typer.BadParameter("name a manifest, or --data and, if you like, --model")
    job = only_job(objects, spec or data)
    if name is not None:
        metadata = job.metadata.model_copy(update={"name": name})
        renamed = parse_object(job.model_copy(update={"metadata": metadata}))
        assert isinstance(renamed, QLoRAJob), "a renamed job is a job"
        job = renamed
    client = connect(namespace)
    job = client.check(job, replace=replace)
    if dry_run:
        print_dry_run(client, [job], output)
        return
    with _service(client.settings, keep_up=keep_up):
        for item in objects:
            if not isinstance(item, QLoRAJob):
                store_object(client, item, replace=False, told=say)
        handle = client.submit(job, replace=replace, told=say)
        say(f"submitted {job.key}", style="quiet")
        finish_following(handle, timeout, output)


def up(dry_run: DryRun = False) -> None:
    """Start the embedded service; it stays until `qlora down`."""
    from orchestrator.cli.output import print_text
    from orchestrator.controller import supervisor

    settings = _embedded_settings("up")
    if supervisor.status(settings).running:
        print_text(f"the service is up already, in {settings.home}")
        return
    if dry_run:
        print_text(f"the service would be started in {settings.home}")
        return
    _start(settings)
    print_text(f"the service is up, in {settings.home}")


def down(dry_run: DryRun = False) -> None:
    """Stop the embedded service. Running jobs save a checkpoint and go on at the next `qlora up`."""
    from orchestrator.cli.output import print_text
    from orchestrator.controller import supervisor

    _embedded_settings("down")
    client = connect(None)
    if not supervisor.status(client.settings).running:
        print_text("the service is down already")
        return
    unfinished = _unfinished(client)
    if dry_run:
        print_text(f"the service would be stopped{unfinished}")
        return
    _stop(client.settings)
    print_text(f"the service is down{unfinished}")


def ui(
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=1, max=65535, help="Port on 127.0.0.1.")
    ] = DEFAULT_UI_PORT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command; start nothing.")] = False,
) -> None:
    """Serve the MLflow UI of the local tracking store on loopback, behind a password, until Ctrl-C."""
    import shlex

    from orchestrator.cli.output import print_text
    from orchestrator.cli.tracking_ui import serve, server_command

    settings = _embedded_settings("ui")
    if settings.tracking_uri.startswith(("http://", "https://")):
        print_text(settings.tracking_uri)
        return
    if dry_run:
        print_text(
            f"on http://127.0.0.1:{port}, behind a password: {shlex.join(server_command(settings, Path('SOCKET')))}"
        )
        return
    raise typer.Exit(serve(settings, port, UI_START_SECONDS))


def page(
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            min=0,
            max=65535,
            help="Port on 127.0.0.1 (also QLORA_PAGE_PORT).",
            show_default=False,
        ),
    ] = None,
    namespace: Namespace = None,
) -> None:
    """Show queues, cards and jobs on a page for the browser, on loopback, behind a password, until Ctrl-C."""
    from orchestrator.cli.console import say
    from orchestrator.cli.output import print_text
    from orchestrator.cli.tracking_ui import Terminated, terminable
    from orchestrator.sdk import extras

    extras.require("controller", purpose="the page")
    from orchestrator.page.server import serve

    def told(url: str) -> None:
        print_text(url)
        say("whoever has this address can see what you can; Ctrl-C ends it", style="quiet")

    client = connect(namespace)
    chosen = client.settings.page_port if port is None else port
    try:
        with terminable():
            serve(client, chosen, told)
    except (KeyboardInterrupt, Terminated):
        raise typer.Exit(ExitStatus.OK) from None


def env() -> None:
    """Print what other programs need to find the results, as exports: eval "$(qlora env)"."""
    import shlex

    from orchestrator.cli.output import print_text
    from orchestrator.errors import PermanentError
    from orchestrator.sdk.connection import read_settings

    address = read_settings().known_tracking_uri
    if address is None:
        raise PermanentError(
            "the address of that cluster's MLflow is not known here; set MLFLOW_TRACKING_URI to one that works here"
        )
    print_text(f"export MLFLOW_TRACKING_URI={shlex.quote(address)}")


def version(output: Output = None) -> None:
    """Print the versions of this program and of what it runs jobs with."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from orchestrator.cli.output import print_data, print_text

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = installed(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if output is not None:
        print_data(versions, output)
        return
    width = max(map(len, versions))
    print_text("\n".join(f"{package:<{width}}  {number}" for package, number in versions.items()))


def _embedded_settings(command: str) -> Settings:
    """The settings, for a command that makes no sense for a cluster."""
    from orchestrator.errors import InvalidObject
    from orchestrator.sdk.connection import read_settings

    settings = read_settings()
    if settings.context:
        raise InvalidObject(
            f"qlora {command} is about the embedded service, and context {settings.context} is a cluster; "
            "leave out --context and QLORA_CONTEXT"
        )
    return settings


@contextmanager
def _service(settings: Settings, *, keep_up: bool) -> Generator[None]:
    """The service, started if it is down, and then stopped again; a job that was detached from keeps it up."""
    from orchestrator.cli.console import say
    from orchestrator.controller import supervisor

    if settings.context or supervisor.status(settings).running:
        yield
        return
    _start(settings)
    detached = False
    try:
        yield
    except typer.Exit as end:
        detached = end.exit_code == ExitStatus.INTERRUPTED
        raise
    finally:
        if detached:
            say("the service stays up for it; stop it with: qlora down", style="quiet")
        elif not keep_up:
            _stop(settings)


def _start(settings: Settings) -> None:
    from orchestrator.cli.console import messages
    from orchestrator.controller import supervisor
    from orchestrator.sdk import extras

    own_trainer = settings.trainer_command == type(settings).model_fields["trainer_command"].default
    extras.require("local" if own_trainer else "controller", purpose="the service of this machine")
    with messages().status("starting the service", spinner_style="busy"):
        try:
            supervisor.start(settings)
        except BaseException:
            supervisor.stop(settings)  # what did not come up is not left half up
            raise


def _stop(settings: Settings) -> None:
    from orchestrator.cli.console import messages
    from orchestrator.controller import supervisor

    with messages().status("stopping the service", spinner_style="busy"):
        supervisor.stop(settings)


def _unfinished(client: Client) -> str:
    """How many jobs go on at the next start."""
    from orchestrator.sdk.handle import is_finished

    count = sum(1 for job in client.list(all_namespaces=True) if not is_finished(job))
    return f"; {count} unfinished job{'s' if count > 1 else ''} will go on at the next start" if count else ""
