"""Large and small data sets: JSON arrays piece by piece, rows that leave training enough steps."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_trainer.data import reader
from qlora_trainer.data.reader import BadRecord, Record, Records
from qlora_trainer.outcome import UserError

from orchestrator.api.job import TrainingSpec
from orchestrator.api.optimizer_steps import optimizer_steps
from orchestrator.api.packing import FEWEST_ROWS, pack


def read(path: Path) -> Iterator[Record | BadRecord]:
    return Records(f"file://{path}", split="train", scratch=path.parent, field="spec.dataset.source").read()


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_a_json_array_is_read_piece_by_piece_with_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(reader, "LEAST_READ_BYTES", piece)
    values = [{"text": 'ñandú 😀 \\ " ] , }', "n": [1.5, -2e10, True, None]}, {}, 12345, "x", -0.5, [1], None]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(values, indent=1), encoding="utf-8")
    records = list(read(path))
    assert [record.value for record in records if isinstance(record, Record)] == [values[0], {}]
    assert [record.where for record in records] == [f"record {number}" for number in range(1, 8)]
    assert isinstance(records[2], BadRecord)
    assert records[2].problem == "is not a JSON object but a number"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}\n{"a": 2}]', "line 2 is not valid JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n]', "line 2 is not valid JSON: Expecting value"),
        ('[{"a": 1},\n{"a": tru', "line 2 is not valid JSON: Expecting value"),
        ('[{"a": 1},\n{"a": "b', "line 2 is not valid JSON: Unterminated string"),
        ('[{"a": 1}\n', "line 2 is not valid JSON: Expecting ',' delimiter"),
        ('[{"a": 1}]\n\n[]', "line 3 is not valid JSON: Extra data"),
        ('[{"a": NaN}]', "NaN is no value of JSON"),
        ("\n\nhello", "line 3 is not valid JSON: Expecting value"),
        ("[" * 100_000, "is nested too deeply to be read"),
    ],
)
def test_a_json_array_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(problem)):
        list(read(path))


def test_of_a_json_array_no_more_is_held_than_a_record_takes(tmp_path: Path) -> None:
    """A damaged record early in a large file is refused before the file has been read."""
    path = tmp_path / "a.json"
    record = json.dumps({"text": "word " * 200})
    path.write_text(f"[{','.join([record] * 20_000)}]")
    tracemalloc.start()
    assert sum(1 for _ in read(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    path.write_text(f'[{record},{{"text" 1}},{",".join([record] * 20_000)}]')
    tracemalloc.reset_peak()
    with pytest.raises(UserError, match="Expecting ':' delimiter"):
        list(read(path))
    assert max(peak, tracemalloc.get_traced_memory()[1]) < 2 << 20
    tracemalloc.stop()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    seed=st.integers(0, 3),
    fewest=st.integers(0, 60),
)
def test_few_records_are_packed_no_closer_than_training_needs(lengths: list[int], seed: int, fewest: int) -> None:
    rows = pack(lengths, 40, seed, fewest_rows=fewest)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 40 for row in rows)
    tightest = pack(lengths, 40, seed)
    assert len(rows) == max(len(tightest), min(fewest, len(lengths))) or rows == tightest


def test_sixty_records_and_the_defaults_are_more_than_one_step() -> None:
    assert optimizer_steps(TrainingSpec(), len(pack([50] * 60, 2048, 0, fewest_rows=FEWEST_ROWS))) == 12
    assert optimizer_steps(TrainingSpec(), len(pack([50] * 1000, 2048, 0, fewest_rows=FEWEST_ROWS))) == 21
