"""The comparison of estimators: which rows count, and what each is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.architectures import config
from benchmarks.estimators import compare, ours, read_rows, unsloth_table
from orchestrator.sizing.footprint import peak_bytes

GIB = 1 << 30


def row(model: str = "llama-3.1-8b", part: str = "whole", layers: int | None = None, **fields: object) -> dict:
    """A line as `benchmarks.sizing` writes it."""
    return {
        "part": part,
        "model": model,
        "config": config(model, layers),
        "adapter": {"rank": 16},
        "training": {"sequenceLength": 2048, "globalBatchSize": 4},
        "plan": {"microBatchSize": 2, "accumulationSteps": 2, "recomputeLayers": 1024},
        "records": 4,
        "multiprocessors": 132,
        "step_seconds": 0.5,
        "evaluation": False,
        "peak_allocated_bytes": 8 * GIB,
        "peak_reserved_bytes": 9 * GIB,
        **fields,
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    failed = row(error="OutOfMemoryError")
    failed.pop("step_seconds")
    lines = [row(), failed, row(part="lora16"), row("qwen2.5-7b", "cut", 4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_that_did_not_finish_or_are_no_jobs_of_ours_do_not_count(rows: Path) -> None:
    assert [found.model for found in read_rows(rows)] == ["llama-3.1-8b", "qwen2.5-7b"]


def test_ours_is_what_the_controller_sizes_with(rows: Path) -> None:
    found = next(read_rows(rows))
    expected = peak_bytes(found.spec, found.facts, found.plan, multiprocessors=132, records=8)
    assert ours(found, margin=True) == expected
    assert ours(found, margin=False) < expected


def test_a_job_on_preferences_is_a_row_like_others(tmp_path: Path) -> None:
    training = {"objective": {"type": "dpo"}, "sequenceLength": 2048, "globalBatchSize": 4}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (row(), row(training=training))))
    answers, preferences = read_rows(path)
    assert (answers.spec.dataset.format, preferences.spec.dataset.format) == ("messages", "preference")
    assert preferences.spec.training.objective.type == "dpo"
    assert ours(preferences, margin=True) > 0


def test_the_published_table_is_read_between_its_lines_and_for_whole_models_alone(rows: Path) -> None:
    whole, cut = read_rows(rows)
    assert unsloth_table(whole) == pytest.approx(6.015e9, rel=0.01)  # 8.03 billion parameters
    assert unsloth_table(cut) is None


def test_errors_are_told_in_per_cent_of_what_was_measured(rows: Path) -> None:
    found = compare(list(read_rows(rows)))
    quarter = found["estimators"]["accelerate estimate-memory, int4"]
    assert quarter["rows"] == quarter["too_small"] == 2
    assert quarter["most"] == pytest.approx(100 * (8.03e9 / 2 / (8 * GIB) - 1), abs=0.5)
