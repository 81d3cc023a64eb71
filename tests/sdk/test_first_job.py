"""A manifest for somebody's file of records: the format is found, and what is written is valid as it stands."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from orchestrator.api.job import QLoRAJob
from orchestrator.errors import InvalidObject
from orchestrator.sdk import first_job
from orchestrator.sdk.manifest import parse_manifest

CHAT = {"messages": [{"role": "user", "content": "¿Qué?"}]}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "format"),
    [
        ("a.jsonl", f"\n{json.dumps(CHAT)}\nnot JSON\n", "messages"),
        ("a.jsonl.gz", json.dumps(CHAT), "messages"),
        ("a.jsonl", "\ufeff" + json.dumps({"conversations": []}), "sharegpt"),
        ("a.json", json.dumps([{"instruction": "a", "input": "", "output": "b"}, 3], indent=2), "alpaca"),
        ("a.csv", "id,prompt,completion\n1,a,b\n", "prompt-completion"),
        ("a.jsonl", '{"text": "a"}', "text"),
        ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}', "preference"),
        ("a.jsonl", '{"input": {}, "preferred_output": [], "non_preferred_output": []}', "preference"),
    ],
)
def test_the_format_is_found_in_the_first_record(tmp_path: Path, name: str, text: str, format: str) -> None:
    assert first_job.format_of(written(tmp_path, name, text)) == format


def test_columns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "a.parquet")
    assert first_job.format_of(tmp_path / "a.parquet") == "prompt-completion"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"mesages": []}', "those of no format: mesages; did you mean messages by mesages?"),
        ("a.jsonl", '{"x": 1}', r"those of no format: x; known are messages \(messages\), sharegpt"),
        ("a.jsonl", "", "its first record is no JSON: nothing is there"),
        ("a.jsonl", "hello\n", "its first record is no JSON: hello"),
        ("a.json", "[1]", r"its first record is no object with fields: 1\]"),
        ("a.jsonl", "\udce9", "cannot be read"),
        ("a.csv", "", "those of no format: none; known are"),
    ],
)
def test_what_is_no_data_is_told(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidObject, match=said):
        first_job.format_of(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidObject, match=r"none\.jsonl: cannot be read: No such file"):
        first_job.format_of(tmp_path / "none.jsonl")


@pytest.mark.parametrize("place", ["My Notes (2).jsonl", "data/My Notes (2).jsonl", "../My Notes (2).jsonl"])
def test_what_is_written_is_valid_and_finds_the_file(tmp_path: Path, place: str) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    data = written(jobs, place.replace(" ", "-"), json.dumps(CHAT))
    text = first_job.manifest(data, "Qwen/Qwen2.5-0.5B-Instruct", jobs)
    (job,) = parse_manifest(text, name="job.yaml", folder=jobs)
    assert isinstance(job, QLoRAJob)
    assert job.metadata.name == "my-notes-2"
    assert job.spec.model.source == "hf://Qwen/Qwen2.5-0.5B-Instruct"
    assert job.spec.dataset.source == f"file://{data.resolve()}"


def test_preferences_are_trained_by_dpo(tmp_path: Path) -> None:
    data = written(tmp_path, "a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}')
    (job,) = parse_manifest(first_job.manifest(data, "hf://a/b", tmp_path), name="job.yaml", folder=tmp_path)
    assert isinstance(job, QLoRAJob)
    assert (job.spec.dataset.format, job.spec.training.objective.type) == ("preference", "dpo")
    found = first_job.document(str(data), "hf://a/b", name="a", spec={"training": {"epochs": "2"}})
    spec = QLoRAJob.model_validate(found).spec
    assert (spec.training.objective.type, spec.training.learning_rate, spec.training.epochs) == ("dpo", "5e-6", "2")


def test_a_folder_is_taken_for_a_model_of_this_machine(tmp_path: Path) -> None:
    data = written(tmp_path, "a.jsonl", json.dumps(CHAT))
    assert f"source: file://{tmp_path}" in first_job.manifest(data, str(tmp_path), tmp_path)
    assert "source: s3://bucket/model" in first_job.manifest(data, "s3://bucket/model", tmp_path)
