"""`qlora import`: jobs of other services as manifests of this one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def import_(context: typer.Context) -> None:
    """Turn a job of another service into a manifest: openai."""
    from orchestrator.cli.output import print_text

    if context.invoked_subcommand is None:
        print_text(context.get_help())


import_.__name__ = "import"  # which Python keeps to itself


def openai(
    job: Annotated[
        Path,
        typer.Argument(metavar="JOB.JSON", help="A fine-tuning job as the API returns it; - reads standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="What to train: owner/name on the hub, or a folder."),
    ] = None,
    training_file: Annotated[
        str | None,
        typer.Option("--training-file", metavar="FILE", help="Its records: a file or a URI; ID.jsonl by default."),
    ] = None,
    validation_file: Annotated[
        str | None,
        typer.Option("--validation-file", metavar="FILE", help="The same of the held-out ones, if there are any."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="SPEC.YAML", help="The manifest to write; standard output by default."),
    ] = None,
) -> None:
    """Turn a fine-tuning job of OpenAI's into a manifest, and say what has no counterpart."""
    from orchestrator.cli.console import say
    from orchestrator.cli.output import as_yaml, print_text, write_new
    from orchestrator.sdk.openai_job import Choices, imported

    choices = Choices(
        model=model,
        training_file=training_file,
        validation_file=validation_file,
        folder=output.parent if output is not None else Path(),
    )
    found = imported(_read(job), str(job) if str(job) != "-" else "standard input", choices)
    for note in found.notes:
        say(f"note: {note}", style="quiet")
    text = as_yaml(found.document)
    if output is None:
        print_text(text)
    else:
        write_new(output, text)
        print_text(f"{output} written")


def _read(job: Path) -> bytes:
    from orchestrator.errors import InvalidObject
    from orchestrator.sdk.openai_job import MAX_JOB_BYTES

    if str(job) == "-":
        return sys.stdin.buffer.read(MAX_JOB_BYTES + 1)
    try:
        with job.open("rb") as stream:
            return stream.read(MAX_JOB_BYTES + 1)
    except OSError as error:
        raise InvalidObject(f"{job}: cannot be read: {error.strerror}") from error
