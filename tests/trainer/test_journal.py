"""The metrics journal: exact on disk, one value a metric and step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qlora_trainer.storage.journal import Journal

from orchestrator.api.formats import JournalRecord


def make_record(step: int, **metrics: float) -> JournalRecord:
    return JournalRecord(step=step, time_ms=1_700_000_000_000 + step, metrics=metrics)


def test_the_journal_is_json_lines_in_order(tmp_path: Path) -> None:
    Journal([make_record(0, loss=2.5), make_record(1, loss=0.1)]).save(tmp_path / "journal.jsonl")
    assert [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()] == [
        {"step": 0, "timeMs": 1_700_000_000_000, "metrics": {"loss": 2.5}},
        {"step": 1, "timeMs": 1_700_000_000_001, "metrics": {"loss": 0.1}},
    ]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_every_float_comes_back_exactly(values: list[float]) -> None:
    records = [make_record(step, loss=value) for step, value in enumerate(values)]
    assert Journal.from_bytes(Journal(records).to_bytes()).records() == records


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(value: float) -> None:
    data = Journal([make_record(1, loss=value, eval_loss=2.0)]).to_bytes()
    assert json.loads(data)["metrics"] == {"eval_loss": 2.0}


def test_several_records_of_a_step_hold_different_metrics() -> None:
    journal = Journal([make_record(1, loss=1.0)])
    journal.append(make_record(1, eval_loss=2.0))
    with pytest.raises(AssertionError, match=r"step 1 has already recorded \['loss'\]"):
        journal.append(make_record(1, loss=1.0))
    journal.append(make_record(2, loss=1.0))
    assert len(journal) == 3


def test_steps_never_go_back() -> None:
    journal = Journal([make_record(2, loss=1.0)])
    with pytest.raises(AssertionError, match="step 1 was recorded after step 2"):
        journal.append(make_record(1, loss=1.0))


def test_a_broken_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        Journal.from_bytes(b'{"step": 1, "timeMs"')
