"""The memory model against every job that was measured on a GPU (benchmarks/results/sizing_rows.jsonl)."""

from __future__ import annotations

import json

from benchmarks.estimators import ROWS
from benchmarks.sizing_report import report


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
