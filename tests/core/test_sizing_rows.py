"""The memory model against every job that was measured on a GPU (benchmarks/results/sizing_rows.jsonl)."""

from __future__ import annotations

import json

from benchmarks.estimators import ROWS, read_rows
from benchmarks.sizing_report import SMALL_JOB_BYTES, report, reserved_error


def test_predicted_peaks_are_never_below_the_measured_ones_and_at_most_three_per_cent_above() -> None:
    found = report([json.loads(line) for line in ROWS.read_text().splitlines()])
    assert found["rows"] >= 200
    assert found["architectures"] >= 20
    assert found["too_small"] == []
    for part in ("fitted", "held_out"):
        assert found[part]["mean"] <= 1.5
        assert found[part]["most"] <= 3


def test_what_the_allocator_reserves_is_predicted_within_two_per_cent_on_average() -> None:
    found = report([json.loads(line) for line in ROWS.read_text().splitlines()])["reserved_over_predicted_percent"]
    for part in ("fitted", "held_out", "layers_by_hand", "layers_of_transformers"):
        assert found[part]["mean"] <= 2
    assert found["all"]["most"] <= 17  # a page of a job with 294 MiB
    assert max(reserved_error(row) for row in read_rows(ROWS) if row.reserved_bytes >= SMALL_JOB_BYTES) <= 14
    assert found["share_within_4_percent"] >= 0.9
