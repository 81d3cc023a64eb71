"""What prepare warns of is told by the job's condition, `qlora describe` and the MLflow run, with what to change."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from qlora_trainer import prepare
from qlora_trainer.tracking.run_page import tags
from rich.console import Console
from test_prepare import make_task

from orchestrator.api.results import PrepareResult, StageResult
from orchestrator.cli.describe import show_job
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import decide
from tests.builders import NOW, exited, make_attempt, make_job, snapshot

WARNED = {
    "few steps: ": "or raise spec.training.epochs",
    "2 of 6 records are truncated and 0 dropped": "raise spec.training.sequenceLength, or shorten the records",
    "of the tokens carry loss": "see whether spec.dataset.format and spec.dataset.trainOn are meant so",
    "2 of 2 evaluation records are training records as well": "remove duplicates from the data set, or give another",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PrepareResult:
    """Of data with each of these faults."""
    folder = tmp_path_factory.mktemp("warned")
    said = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "a"}]
    plain = {"messages": said}
    long = {"messages": [*said, {"role": "user", "content": "word " * 4000}, said[1]]}
    path, held_out = folder / "data.jsonl", folder / "heldout.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in [plain] * 4 + [long] * 2))
    held_out.write_text(f"{json.dumps(plain)}\n" * 2)
    dataset = {"source": path.as_uri(), "evalSource": held_out.as_uri()}
    training = {"sequenceLength": 2048, "packing": False}
    return prepare.run(make_task(folder / "store", dataset={**dataset, "tooLong": "truncate"}, training=training))


def test_each_is_told_everywhere_with_what_to_change(result: PrepareResult) -> None:
    assert len(result.warnings) == len(WARNED), result.warnings
    job = make_job()
    attempt = make_attempt("prepare", 1, start_time=NOW, created_time=NOW)
    running = job.model_copy(
        update={"status": job.status.model_copy(update={"attempts": (attempt,), "attempts_total": 1})}
    )
    ended = exited(running, 0, StageResult(prepare=result))
    [write] = [command for command in decide(snapshot(running, stages=(ended,))) if isinstance(command, WriteStatus)]
    [condition] = [each.message for each in write.status.conditions if each.type == "Prepared"]
    console = Console(width=400, record=True, file=io.StringIO())
    show_job(console, job.model_copy(update={"status": write.status}), [], NOW)
    described = console.export_text()
    task = make_task(Path("/store")).model_copy(update={"prepared": result})
    tagged = [value for name, value in tags(task).items() if name.startswith("qlora.dev/warning/")]
    for what, change in WARNED.items():
        [warning] = [each for each in result.warnings if what in each]
        assert change in warning
        assert warning in tagged
        assert warning in condition
        assert warning in described
