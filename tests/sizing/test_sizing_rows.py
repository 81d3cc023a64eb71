"""The memory model against every job that was measured on a GPU (benchmarks/results/*_rows.jsonl)."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import traced_report
from benchmarks.estimators import ROWS, Row
from benchmarks.sizing_report import error, report, reserved_error
from benchmarks.traced_report import errors
from orchestrator.sizing import guess

LONG_ROWS = ROWS.with_name("long_rows.jsonl")


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
    assert exact["mean"] <= 0.15
    assert -2.5 <= exact["least"] <= exact["most"] <= 1.5
    for part in ("fitted", "held_out", "not_rehearsed"):
        assert found[part]["mean"] <= 2
    assert found["all"]["most"] <= 14
    assert found["share_within_4_percent"] >= 0.95


def test_what_is_kept_of_attention_and_what_flash_attn_4_takes_are_counted() -> None:
    rows = [Row.read(json.loads(line)) for line in LONG_ROWS.read_text().splitlines()]
    jobs = [row for row in rows if row is not None]
    assert len(jobs) >= 40
    assert sum(job.plan.keep_attention for job in jobs) >= 20
    assert sum(job.plan.attention == "flash-attn-4" for job in jobs) >= 25
    found = errors([error(job) for job in jobs])
    assert found["least"] >= 0
    assert found["mean"] <= 1.5
    assert found["most"] <= 4
    assert max(abs(reserved_error(job)) for job in jobs) <= 4


def test_preferences_are_never_under() -> None:
    rows = [Row.read(json.loads(line)) for line in ROWS.with_name("preference_rows.jsonl").read_text().splitlines()]
    found = [error(row) for row in rows if row is not None]
    assert len(found) >= 2
    assert 0 <= min(found) <= max(found) <= 1.5


def test_types_without_a_table_are_sized_by_their_traces_as_well_as_others_by_tables() -> None:
    found: dict[str, Any] = traced_report.report()
    assert found["held_out"]["jobs"] >= 95
    assert found["held_out"]["models"] >= 24
    assert found["held_out"]["reserved_within_4_percent"] >= 0.95
    assert found["worked_out"]["jobs"] >= 180
    for part, most in {"held_out": 4, "worked_out": 8, "whole": 4}.items():
        assert found[part]["least"] >= 0
        assert found[part]["mean"] <= 1.5
        assert found[part]["most"] <= most
    assert all(each["jobs"] and each["least"] >= 0 for each in found["held_out_by_kind"].values())


def test_what_guesses_were_off_by_is_what_they_are_said_to_be() -> None:
    found: Any = traced_report.report()["guess"]
    assert (found["jobs"], found["models"], found["under"]) == (guess.JOBS, guess.MODELS, guess.JOBS_UNDER)
    said = guess.MEAN_ERROR, guess.WORST_UNDER, guess.WORST_OVER
    assert said == tuple(round(found[name] / 100, 4) for name in ("mean", "least", "most"))


def test_the_pages_table_of_traced_types_is_what_the_rows_say() -> None:
    assert traced_report.PAGE.read_text() == traced_report.page()
