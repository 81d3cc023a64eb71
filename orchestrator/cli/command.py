"""What every command is beside its function: `--context` anywhere, help with examples and names for values."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup

from orchestrator.cli.examples import EXAMPLES


class Command(TyperCommand):
    """One command. Any below: typer keeps the classes of click that it takes to itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own parameters, and those of `qlora` itself that may stand behind a command, too."""
        shared = [param for param in ctx.find_root().command.params if param.name == "context"]
        *own, help_option = super().get_params(ctx)
        return [*own, *shared, help_option]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`NAME` for what has to be there, `[NAME]` for what may."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options by the names of their values, without Python's types."""
        arguments: list[tuple[str, str]] = []
        options: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            name, help_text = param.get_help_record(ctx)
            if isinstance(param, TyperArgument):
                arguments.append((param.display_name_raw, help_text.removesuffix("  [required]")))
            else:
                options.append((name, help_text))
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, each on a line of its own."""
        with formatter.section("Examples"):
            for line in EXAMPLES[ctx.command_path.partition(" ")[2]]:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(TyperGroup):
    """Commands of one kind of object."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each with all that it says of itself."""
        with formatter.section("Commands"):
            commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, command.help or "") for name, command in commands if command is not None])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Where the options of a command are told."""
        formatter.write(f"\nOptions and examples of each: {ctx.command_path} COMMAND --help\n")
