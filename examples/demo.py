"""`make demo`: one real job from spec to registry on this machine, and what it changed.

Tunes SmolLM2-135M-Instruct with QLoRA on Spanish medical terminology through the embedded service, then loads
the adapter back from MLflow and puts its answers to held-out questions beside the base model's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from orchestrator.errors import NotFound
from orchestrator.sdk import Client, JobResult

HERE = Path(__file__).parent / "medical-es"
QUESTIONS = 3


def main() -> int:
    """Run the job, then show what it did; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    base = parser.parse_args().model.resolve()
    console = Console()
    client = Client()
    name = free_name(client, "medical-es")
    began = time.monotonic()
    outcome = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", "--keep-up", str(manifest(client, name, base))], check=False
    )
    if outcome.returncode != 0:
        return outcome.returncode
    result = client.handle(name).result()
    console.print(losses(result))
    console.print(answers(client, base, result))
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
    """`medical-es/job.yaml` with this machine's paths, written to the service's home."""
    job = yaml.safe_load((HERE / "job.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["model"]["source"] = base.as_uri()
    job["spec"]["dataset"]["source"] = (HERE / "train.jsonl").resolve().as_uri()
    job["spec"]["dataset"]["evalSource"] = (HERE / "heldout.jsonl").resolve().as_uri()
    path = client.settings.home / "demo" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def losses(result: JobResult) -> Table:
    """Held-out loss before and after."""
    table = Table(title="Loss on the held-out questions", title_justify="left")
    table.add_column("base model")
    table.add_column("with the adapter")
    table.add_row(f"{result.eval_loss_before:.3f}", f"[bold green]{result.eval_loss:.3f}[/]")
    return table


def answers(client: Client, base: Path, result: JobResult) -> Table:
    """Held-out questions answered by the base model and by the registered adapter."""
    import mlflow
    import transformers

    from examples.answers import compare

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mlflow.set_tracking_uri(client.settings.tracking_uri)
    lines = (HERE / "heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines[:: len(lines) // QUESTIONS][:QUESTIONS]]
    table = Table(title=f"Held-out questions, answered with {result.model_uri}", title_justify="left", show_lines=True)
    for column in ("question", "base model", "with the adapter"):
        table.add_column(column, ratio=1)
    for row in compare(str(base), str(result.model_uri), questions):
        table.add_row(*row)
    return table


def whereabouts(name: str, result: JobResult, seconds: float) -> Panel:
    """Where everything is, and how to look at it."""
    return Panel.fit(
        f"The job, comparison included, took {seconds:.0f} s.\n\n"
        f"MLflow run     {result.run_id}\n"
        f"model version  {result.model_uri}\n"
        f"adapter        {result.adapter_uri}\n\n"
        f"qlora ui                 look at curves, parameters and the registered model\n"
        f"qlora describe {name:<9} the job's whole story\n"
        f"qlora down               stop the embedded service\n\n"
        f"(qlora is {Path(sys.executable).with_name('qlora')})",
        title="Where it is",
        title_align="left",
    )


if __name__ == "__main__":
    sys.exit(main())
