"""The tokens that end an answer are found in what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qlora_trainer.data.micro_batch import PreparedRows
from qlora_trainer.training.generation import answer_ends, special_tokens
from toy_job import Row, write_rows

QUESTION, SAYS, NEWLINE, TURN_END, THINK, EOS = 5, 6, 7, 90, 91, 92
SPECIAL = frozenset((TURN_END, THINK, EOS))


def row(*records: tuple[list[int], list[int]]) -> Row:
    """Each record is a prompt that carries no loss and an answer that does."""
    return {
        "input_ids": [token for prompt, answer in records for token in (*prompt, *answer)],
        "labels": [label for prompt, answer in records for label in (*[-100] * len(prompt), *answer)],
        "position_ids": [place for prompt, answer in records for place in range(len(prompt) + len(answer))],
    }


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        ([[SAYS, TURN_END]], [TURN_END]),
        ([[SAYS, TURN_END, NEWLINE]], [TURN_END]),
        ([[THINK, SAYS, THINK, TURN_END, NEWLINE]], [TURN_END]),
        ([[SAYS, TURN_END], [SAYS, EOS]], [TURN_END, EOS]),
        ([[SAYS, SAYS, SAYS]], []),
        ([[THINK, SAYS, SAYS, SAYS, SAYS, SAYS]], []),
        ([[SAYS, TURN_END]] * 40 + [[SAYS, THINK]], [TURN_END]),
    ],
)
def test_an_answer_ends_with_the_last_special_token_of_its_tail(
    tmp_path: Path, answers: list[list[int]], ends: list[int]
) -> None:
    packed = row(*(([QUESTION, QUESTION], answer) for answer in answers))
    rows = PreparedRows(write_rows([packed], tmp_path / "train.parquet"))
    assert answer_ends(rows, SPECIAL) == ends


def test_records_without_a_prompt_are_told_apart_by_their_positions(tmp_path: Path) -> None:
    rows = PreparedRows(write_rows([row(([], [SAYS, EOS]), ([], [SAYS, EOS]))], tmp_path / "train.parquet"))
    assert answer_ends(rows, SPECIAL) == [EOS]


def test_special_tokens_are_those_that_the_tokenizer_calls_so(tmp_path: Path) -> None:
    assert special_tokens(tmp_path) == frozenset()
    added = [{"id": 1, "content": "<a>", "special": True}, {"id": 2, "content": "<b>", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert special_tokens(tmp_path) == frozenset((1,))
