"""`make demo`: one real job from spec to registry on this machine, and what it changed.

Teaches SmolLM2-135M-Instruct with QLoRA to fill in a form from a Spanish clinical note, through the embedded service;
then loads the adapter back from MLflow, lets it and the base model read the same held-out notes, and counts the forms
that are right to the letter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from orchestrator.errors import NotFound
from orchestrator.sdk import Client, JobResult

HERE = Path(__file__).parent / "notes-es"
SHOWN = 3


def main() -> int:
    """Run the job, then show what it did; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    base = parser.parse_args().model.resolve()
    console = Console()
    client = Client()
    name = free_name(client, "notes-es")
    began = time.monotonic()
    outcome = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", "--keep-up", str(manifest(client, name, base))], check=False
    )
    if outcome.returncode != 0:
        return outcome.returncode
    result = client.handle(name).result()
    console.print(score(client, base, result))
    console.print(whereabouts(name, result, time.monotonic() - began))
    return 0


def free_name(client: Client, stem: str) -> str:
    """The first of `stem`, `stem-2`, ... that no job has yet."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not exists(client, name))


def exists(client: Client, name: str) -> bool:
    """Whether there is a job of this name."""
    try:
        client.get(name)
    except NotFound:
        return False
    return True


def manifest(client: Client, name: str, base: Path) -> Path:
    """`notes-es/job.yaml` with this machine's paths, written to the service's home."""
    job = yaml.safe_load((HERE / "job.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["model"]["source"] = base.as_uri()
    job["spec"]["dataset"]["source"] = (HERE / "train.jsonl").resolve().as_uri()
    job["spec"]["dataset"]["evalSource"] = (HERE / "heldout.jsonl").resolve().as_uri()
    path = client.settings.home / "demo" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def score(client: Client, base: Path, result: JobResult) -> Group:
    """How many held-out notes the base model and the registered adapter put into the form right, and some of both."""
    # MLflow and transformers take seconds to import: the job is at work meanwhile, and this is after it.
    import mlflow
    import transformers

    from examples.answers import compare

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mlflow.set_tracking_uri(client.settings.tracking_uri)
    chats = [json.loads(line)["messages"] for line in (HERE / "heldout.jsonl").read_text().splitlines()]
    notes, forms = [chat[0]["content"] for chat in chats], [chat[1]["content"] for chat in chats]
    before, after = compare(str(base), str(result.model_uri), notes)
    table = Table(title=f"{len(notes)} held-out notes, read with {result.model_uri}", title_justify="left")
    for column in ("", "base model", "with the adapter"):
        table.add_column(column)
    table.add_row(
        "forms right to the letter", *(f"{right(answers, forms)} of {len(forms)}" for answers in (before, after))
    )
    table.add_row("loss", f"{result.eval_loss_before:.3f}", f"{result.eval_loss:.3f}")
    shown = [example(*row) for row in list(zip(notes, forms, before, after, strict=True))[:SHOWN]]
    return Group(table, *shown)


def right(answers: list[str], forms: list[str]) -> int:
    """How many of the answers are the form, character by character."""
    return sum(answer == form for answer, form in zip(answers, forms, strict=True))


def example(note: str, form: str, before: str, after: str) -> Table:
    """One note with the form that belongs to it and both answers."""
    lines = {"note": note, "form": form, "base model": " ".join(before.split()), "adapter": " ".join(after.split())}
    grid = Table.grid(padding=(0, 1))
    for name, words in lines.items():
        grid.add_row(Text(name, "bold"), Text(words, "green" if words == form else ""))
    grid.add_row()
    return grid


def whereabouts(name: str, result: JobResult, seconds: float) -> Panel:
    """Where everything is, and how to look at it."""
    return Panel.fit(
        f"The job, comparison included, took {seconds:.0f} s.\n\n"
        f"MLflow run     {result.run_id}\n"
        f"model version  {result.model_uri}\n"
        f"adapter        {result.adapter_uri}\n\n"
        f"qlora ui                 look at curves, parameters and the registered model\n"
        f"{f'qlora describe {name}':<24} the job's whole story\n"
        f"qlora down               stop the embedded service\n\n"
        f"(qlora is {Path(sys.executable).with_name('qlora')})",
        title="Where it is",
        title_align="left",
    )


if __name__ == "__main__":
    sys.exit(main())
