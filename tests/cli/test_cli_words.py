"""Numbers and times as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.cli.output import Cell, Columns
from orchestrator.cli.plan_view import bar
from orchestrator.sdk.log_text import log_text
from orchestrator.sdk.words import duration, gib, short, step_time


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


ROWS = [[Cell(text="日本"), Cell(text="a long message that\ngoes on")], [Cell(text="x"), Cell(text="")]]
TABLE = Columns(header=("NAME", "MESSAGE"), rows=ROWS)


def told(table: Columns, width: int | None) -> list[str]:
    return [line.plain for line in table.lines(width)]


def test_columns_line_up_whatever_the_width_of_a_character_and_fit() -> None:
    assert told(TABLE, 24) == ["NAME  MESSAGE", "日本  a long message th…", "x"]
    assert told(TABLE, None) == ["NAME  MESSAGE", "日本  a long message that goes on", "x"]


def test_a_long_column_goes_on_under_itself_or_below_where_it_has_no_room() -> None:
    wraps = replace(TABLE, wraps=True)
    assert told(wraps, 26) == ["NAME  MESSAGE", "日本  a long message that", "      goes on", "x"]
    assert told(wraps, 22) == ["NAME  MESSAGE", "日本", "      a long message", "      that goes on", "x"]


def test_columns_that_may_be_left_out_make_room_one_after_the_other() -> None:
    rows = [[Cell(text="job"), Cell(text="default"), Cell(text="24Gi"), Cell(text="waits for a GPU that is free")]]
    table = Columns(header=("NAME", "QUEUE", "GPU", "MESSAGE"), rows=rows, optional=("QUEUE", "GPU"))
    assert told(table, 41)[0] == "NAME  QUEUE    GPU   MESSAGE"
    assert told(table, 36) == ["NAME  GPU   MESSAGE", "job   24Gi  waits for a GPU that is…"]
    assert told(table, 28) == ["NAME  MESSAGE", "job   waits for a GPU that …"]


def test_digests_are_as_long_as_people_compare_them() -> None:
    assert short(f"sha256:{'1f' * 32} at {'ab' * 20}") == "sha256:1f1f1f1f1f1f… at abababababab…"
    assert short("7f3a run-1 0123456789abcdef") == "7f3a run-1 0123456789abcdef"


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
