"""The memory model against every job that was measured on a GPU (benchmarks/results/sizing_rows.jsonl)."""

from __future__ import annotations

import json

from benchmarks.estimators import ROWS, Row
from benchmarks.sizing_report import error, report

UNTABLED_ROWS = ROWS.with_name("untabled_rows.jsonl")


def test_predicted_peaks_are_never_below_the_measured_ones_and_at_most_three_per_cent_above() -> None:
    found = report([json.loads(line) for line in ROWS.read_text().splitlines()])
    assert found["rows"] >= 200
    assert found["architectures"] >= 20
    assert found["too_small"] == []
    for part in ("fitted", "held_out"):
        assert found[part]["mean"] <= 1.5
        assert found[part]["most"] <= 3


def test_what_the_allocator_reserves_is_rehearsed_to_a_page_and_elsewhere_predicted_within_two_per_cent() -> None:
    found = report([json.loads(line) for line in ROWS.read_text().splitlines()])["reserved_over_predicted_percent"]
    exact = found["rehearsed"]
    assert exact["rows"] >= 150
    assert exact["mean"] <= 0.1
    assert -1 <= exact["least"] <= exact["most"] <= 1
    for part in ("fitted", "held_out", "not_rehearsed"):
        assert found[part]["mean"] <= 2
    assert found["all"]["most"] <= 14
    assert found["share_within_4_percent"] >= 0.95


def untabled(*, sure: bool) -> list[float]:
    """Errors in per cent of jobs whose layers were traced: with LoRA and packed rows, or the rest."""
    raw = [json.loads(line) for line in UNTABLED_ROWS.read_text().splitlines()]
    rows = [(each, row) for each in raw if (row := Row.read(each)) is not None]
    assert all(each["trace"] for each, _ in rows)
    assert len({row.facts.model_type for _, row in rows}) >= 31
    return [error(row) for each, row in rows if sure == (not each["separate"] and not each["adapter"]["useDora"])]


def test_types_without_a_table_are_sized_by_their_traces_as_well_as_others_by_tables() -> None:
    errors = untabled(sure=True)
    assert len(errors) >= 115
    assert min(errors) >= 0
    assert sum(errors) / len(errors) <= 1
    assert max(errors) <= 4


def test_jobs_whose_traces_do_not_show_everything_are_sized_with_room() -> None:
    assert min(untabled(sure=False)) >= 0
