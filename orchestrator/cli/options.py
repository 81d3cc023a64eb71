"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.completion import complete_job, complete_namespace
from orchestrator.cli.formats import DataFormat

JobName = Annotated[str, typer.Argument(metavar="NAME", help="The job's name.", autocompletion=complete_job)]
JobNames = Annotated[list[str], typer.Argument(metavar="NAME", help="The jobs' names.", autocompletion=complete_job)]
Manifest = Annotated[Path, typer.Argument(metavar="SPEC.YAML", help="A manifest; - reads standard input.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="owner/name on the hub, or a folder; Qwen2.5-7B-Instruct.", show_default=False
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        "-n",
        metavar="NAMESPACE",
        help="Namespace of the job; of a cluster the context's own, else `default`.",
        show_default=False,
        autocompletion=complete_namespace,
    ),
]
AllNamespaces = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Those of every namespace.")]
Output = Annotated[
    DataFormat | None,
    typer.Option("--output", "-o", metavar="json|yaml", help="Answer for programs.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done; change nothing.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of the job's spec, such as training.epochs=1, instead of the manifest's; may be repeated.",
        show_default=False,
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="In the place of a finished job of that name.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up waiting after so long (status 5).")
]
