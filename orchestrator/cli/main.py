"""`qlora`: the command line of the service.

Registers the commands and turns expected errors into one line and an exit status. Nothing heavy is imported before a
command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli import import_commands, job_commands, queue_commands, service_commands, sweep_commands
from orchestrator.cli.command import Command, Group
from orchestrator.cli.completion import complete_context
from orchestrator.cli.exits import ExitStatus, status_of
from orchestrator.errors import OrchestratorError

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "One job, start to finish": (
        job_commands.init,
        import_commands.import_,
        job_commands.plan,
        job_commands.prepare,
        service_commands.run,
    ),
    "Jobs and queues": (
        job_commands.submit,
        job_commands.get,
        job_commands.describe,
        job_commands.logs,
        job_commands.wait,
        job_commands.download,
        job_commands.chat,
        job_commands.explain,
        job_commands.simulate,
        job_commands.calibration,
        job_commands.cancel,
        job_commands.suspend,
        job_commands.resume,
        job_commands.promote,
        job_commands.delete,
        queue_commands.usage,
        service_commands.page,
        queue_commands.queue,
    ),
    "Sweeps": (sweep_commands.sweep, sweep_commands.sweeps),
    "The embedded service": (
        service_commands.up,
        service_commands.down,
        service_commands.ui,
        service_commands.env,
        service_commands.version,
    ),
}
GROUPS: dict[Callable[..., None], tuple[Callable[..., None], ...]] = {
    import_commands.import_: (import_commands.openai,),
    queue_commands.queue: queue_commands.COMMANDS,
    sweep_commands.sweeps: sweep_commands.COMMANDS,
}
"""Commands that have commands of their own."""


class Commands(TyperGroup):
    """The commands, in sections; their expected errors become a line on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:  # Any: the signature of click
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except OrchestratorError as error:
            _report(error)
            raise typer.Exit(status_of(error)) from error
        except KeyboardInterrupt:
            raise typer.Exit(ExitStatus.INTERRUPTED) from None
        except BrokenPipeError:
            _leave_closed_pipe()
            raise typer.Exit(ExitStatus.OK) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  as in click
        """The list of commands by what they are for."""
        for title, functions in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(f.__name__, (f.__doc__ or "").strip()) for f in functions])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  as in click
        """The exit statuses."""
        with formatter.section("Exit statuses"):
            formatter.write_dl([(str(status.value), status.meaning) for status in ExitStatus])


# Plain help: rich's would take longer to import than everything else together.
app = typer.Typer(
    cls=Commands,
    name="qlora",
    help="Fine-tune models with QLoRA: describe a job, and the service sizes, queues, runs and registers it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    from orchestrator import __version__
    from orchestrator.cli.output import print_text

    if wanted:
        print_text(f"qlora-orchestrator {__version__}")
        raise typer.Exit(ExitStatus.OK)


def _choose_context(context: str | None) -> None:
    """Where every command looks, by way of the settings' own variable."""
    if context is not None:
        os.environ["QLORA_CONTEXT"] = context


@app.callback()
def choose_service(
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="CONTEXT",
            callback=_choose_context,
            expose_value=False,
            is_eager=True,
            help="A kubeconfig context, or `current`: the service on that cluster instead of the embedded one "
            "(also QLORA_CONTEXT).",
            show_default=False,
            autocompletion=complete_context,
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command; each of the two does its own."""


for _functions in COMMANDS.values():
    for _function in _functions:
        if _function in GROUPS:
            _group = typer.Typer(cls=Group, name=_function.__name__, rich_markup_mode=None)
            _group.callback(invoke_without_command=True)(_function)
            for _member in GROUPS[_function]:
                _group.command(cls=Command)(_member)
            app.add_typer(_group)
        else:
            app.command(cls=Command)(_function)


def _leave_closed_pipe() -> None:
    """Nobody reads any more (`qlora logs | head`): let Python's own last flush go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: OrchestratorError) -> None:
    from orchestrator.cli.console import say

    for line in str(error).splitlines():
        say(f"error: {line}", style="bad")


if __name__ == "__main__":
    app()
