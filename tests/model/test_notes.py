"""The dataset `examples/notes-es` is what its script writes; held-out notes ask for what no training note holds."""

from __future__ import annotations

import json
from pathlib import Path

from examples import notes_es


def complaints(split: str) -> set[str]:
    lines = (notes_es.FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    for question, form in ((chat[0]["content"], json.loads(chat[1]["content"])) for chat in chats):
        assert all(str(value) in question.lower() for value in form.values()), question
    return {json.loads(chat[1]["content"])["motivo"] for chat in chats}


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    committed = {path.name: path.read_bytes() for path in notes_es.FOLDER.glob("*.jsonl")}
    notes_es.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed


def test_no_held_out_complaint_is_trained_and_every_form_stands_in_its_note() -> None:
    trained, heldout = complaints("train"), complaints("heldout")
    assert len(trained) == len(notes_es.TRAIN_COMPLAINTS)
    assert len(heldout) == len(notes_es.HELDOUT_COMPLAINTS)
    assert not trained & heldout
