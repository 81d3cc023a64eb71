"""Steps that a plan tells from a local data file; `tests/trainer/test_plan_agrees.py` holds them against prepare's."""

from __future__ import annotations

import csv
import gzip
import json
import random
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.job import QLoRAJobSpec
from orchestrator.sdk import Client
from orchestrator.sdk.data_count import DataCount, count_data
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up

RECORD = {"prompt": "What lowers a fever?", "completion": " An antipyretic."}


def counted(path: Path, form: str = "prompt-completion", **fields: Any) -> DataCount | None:
    dataset = {"source": f"file://{path}", "format": form, **fields.pop("dataset", {})}
    spec = {"model": {"source": "file:///model"}, "dataset": dataset, **fields}
    return count_data(QLoRAJobSpec.model_validate(spec))


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    return service_that_is_up(tmp_path, monkeypatch)


def test_every_kind_of_file_is_counted(tmp_path: Path) -> None:
    records = [RECORD] * 60
    lines = write(tmp_path / "a.jsonl", records)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(RECORD))
        table.writeheader()
        table.writerows(records)
    found = {path.name: counted(path) for path in sorted(tmp_path.iterdir())}
    assert set(found) == {"a.csv", "a.json", "a.jsonl", "a.jsonl.gz"}
    assert {(it.records, it.sequences, it.steps, it.exact) for it in found.values() if it is not None} == {
        (60, 60, 12, True)
    }
    assert None not in found.values()


def test_parquet_is_counted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([RECORD] * 60), tmp_path / "a.parquet")
    found = counted(tmp_path / "a.parquet")
    assert found is not None
    assert (found.records, found.steps, found.exact) == (60, 12, True)


@pytest.mark.parametrize(
    ("fields", "exact"),
    [
        ({}, True),
        ({"training": {"packing": False}}, True),
        ({"training": {"sequenceLength": 64}}, True),  # prepare refuses what is longer
        ({"training": {"sequenceLength": 64}, "dataset": {"tooLong": "drop"}}, False),
        ({"training": {"sequenceLength": 64}, "dataset": {"tooLong": "truncate"}}, False),
        ({"training": {"maxSteps": 7}}, True),
    ],
)
def test_a_count_is_exact_where_no_tokenizer_could_change_it(
    tmp_path: Path, fields: dict[str, Any], exact: bool
) -> None:
    found = counted(write(tmp_path / "a.jsonl", [RECORD] * 60), **fields)
    assert found is not None
    assert found.exact is exact


def test_turns_that_may_need_contexts_of_their_own_are_an_estimate(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "so"} for role in ("user", "assistant") * 2]
    several = counted(write(tmp_path / "a.jsonl", [{"messages": turns}] * 60), "messages")
    last = counted(tmp_path / "a.jsonl", "messages", dataset={"trainOn": "completion"})
    assert several is not None
    assert last is not None
    assert (several.exact, last.exact) == (False, True)
    shared = [{"from": role, "value": "so"} for role in ("human", "model") * 2]
    other = counted(write(tmp_path / "b.jsonl", [{"conversations": shared}] * 60), "sharegpt")
    assert other is not None
    assert not other.exact


@pytest.mark.parametrize(
    "content", ["", "no JSON\n", "[1]\n", '{"text": "a field of another format"}\n', '{"prompt": "a", "compl']
)
def test_what_prepare_refuses_is_not_counted(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert counted(tmp_path / "a.jsonl") is None
    assert counted(tmp_path / "missing.jsonl") is None


def large(suffix: str) -> bytes:
    """21 MB of 30,000 texts of 720 characters that do not compress to nothing."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=720)) for _ in range(3_000)] * 10
    if suffix == ".csv":
        return "\n".join(["text", *texts]).encode()
    lines = [json.dumps({"text": text}) for text in texts]
    if suffix == ".json":
        return f"[{','.join(lines)}]".encode()
    written = "\n".join(lines).encode()
    return gzip.compress(written, 1) if suffix.endswith(".gz") else written


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_of_a_large_file_the_beginning_is_read_and_the_rest_is_like_it(tmp_path: Path, suffix: str) -> None:
    """Within a tenth, in bounded time and memory."""
    count, path = 30_000, tmp_path / f"a{suffix}"
    path.write_bytes(large(suffix))
    tracemalloc.start()
    began = time.process_time()
    found = counted(path, "text")
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert not found.exact
    assert found.records == pytest.approx(count, rel=0.1)
    assert found.tokens == pytest.approx(count * (720 / 4 + 16), rel=0.1)
    assert peak < 64 << 20
    assert seconds < 5  # traced, which is several times slower than it is


def test_a_plan_tells_hours_and_dollars_of_local_data_and_warns_of_few_steps(service: PaperService) -> None:
    write(service.folder / "train.jsonl", [{"messages": [{"role": "user", "content": "a"}] * 2}] * 60)
    settings = service.settings.model_copy(update={"gpu_prices": "24Gi=0.5"})
    plan = Client(settings, connection=service.connection).plan(job_document())
    assert plan.data is not None
    assert plan.chosen is not None
    assert (plan.chosen.steps, plan.data.steps) == (12, 12)
    assert plan.chosen.seconds
    assert plan.chosen.dollars
    assert [note for note in plan.notes if note.startswith("few steps")] == [
        "few steps: 3 epochs of 60 sequences in batches of 16 are 12 optimizer steps, with which an adapter hardly "
        "learns; lower spec.training.globalBatchSize to 9 or raise spec.training.epochs"
    ]
    assert plan.to_wire()["data"] == {"records": 60, "sequences": 60, "tokens": 1740, "steps": 12, "exact": True}
