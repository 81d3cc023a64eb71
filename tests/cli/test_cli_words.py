"""Numbers and times as people read them."""

from __future__ import annotations

import pytest

from orchestrator.cli.log_view import log_text
from orchestrator.cli.output import Cell, columns
from orchestrator.cli.plan_view import bar
from orchestrator.cli.words import duration, gib, step_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-3, "0s"), (0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (356_400, "4d3h")],
)
def test_durations_have_two_units_at_most(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MiB"), (32 << 20, "32.0 MiB"), (3 << 29, "1.50 GiB")])
def test_bytes_are_gib_or_mib(count: int, text: str) -> None:
    assert gib(count) == text


@pytest.mark.parametrize(("share", "text"), [(-1, ""), (0, ""), (0.5, "████"), (0.515625, "████▏"), (2, "████████")])
def test_bars_are_exact_to_an_eighth_of_a_cell(share: float, text: str) -> None:
    assert bar(share, cells=8) == text


def test_bars_can_do_without_unicode() -> None:
    assert bar(0.5, cells=8, unicode=False) == "####"


def test_columns_line_up_whatever_the_width_of_a_character_and_fit() -> None:
    rows = [[Cell(text="日本"), Cell(text="a long message that\ngoes on")], [Cell(text="x"), Cell(text="")]]
    lines = [line.plain for line in columns(("NAME", "MESSAGE"), rows, width=24)]
    assert lines == ["NAME   MESSAGE", "日本   a long message t…", "x"]


@pytest.mark.parametrize("line", ["plain", "{not json", '{"no": "message"}', ""])
def test_lines_that_are_not_the_trainers_are_left_alone(line: str) -> None:
    assert log_text(line) == line


def test_a_traceback_follows_its_line() -> None:
    line = '{"time": "2026-01-01T12:00:00.000Z", "level": "error", "message": "boom", "traceback": "a\\nb"}'
    assert log_text(line) == "12:00:00  ERROR boom\na\nb"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "0.012s"), (0.0995, "0.100s"), (0.73, "0.73s"), (12.34, "12.3s"), (59.96, "1m00s"), (140.0, "2m20s")],
)
def test_a_steps_time_has_no_exponent(seconds: float, words: str) -> None:
    assert step_time(seconds) == words
