"""The dataset `examples/brief-es` is what its script writes, and its job is one."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from examples import brief_es
from orchestrator.api.job import QLoRAJob


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    committed = {path.name: path.read_bytes() for path in brief_es.FOLDER.glob("*.jsonl")}
    brief_es.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed


def test_brief_answers_begin_long_ones_and_nobody_is_asked_twice() -> None:
    asked: set[str] = set()
    for name, count in (("train", brief_es.TRAIN), ("heldout", brief_es.HELDOUT)):
        pairs = [json.loads(line) for line in (brief_es.FOLDER / f"{name}.jsonl").read_text().splitlines()]
        assert len(pairs) == count
        for pair in pairs:
            brief, long = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
            assert long.startswith(f"{brief} ")
        questions = {pair["prompt"][0]["content"] for pair in pairs}
        assert len(questions) == count
        assert not questions & asked
        asked |= questions


def test_the_job_is_valid() -> None:
    job = QLoRAJob.model_validate(yaml.safe_load((brief_es.FOLDER / "job.yaml").read_text()))
    assert job.spec.training.objective.type == "dpo"
