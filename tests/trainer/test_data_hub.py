"""Hub data sets with configurations and splits, and files that cannot be a table, asked of a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Repository, serve
from pydantic import ValidationError
from qlora_trainer.data.reader import Records
from qlora_trainer.outcome import UserError

from orchestrator.api.job import DatasetSource

READ = """
import json, sys
from pathlib import Path
from qlora_trainer.data.reader import BadRecord, Records
from qlora_trainer.outcome import StageError
answers = []
for config, split, field in json.loads(sys.argv[1]):
    try:
        records = Records("hf://acme/data", split=split, config=config, scratch=Path("."), field=field)
        read = list(records.read())
        bad = [f"{record.where} {record.problem}" for record in read if isinstance(record, BadRecord)]
        answers.append(bad or [records.digest(), [record.value for record in read]])
    except StageError as error:
        answers.append(f"{type(error).__name__}: {error.message}")
print(json.dumps(answers))
"""
SOURCE = "spec.dataset.source"


def ask(folder: Path, home: Path, *questions: tuple[str | None, str, str]) -> list[Any]:
    """In a process of its own, because huggingface_hub reads its endpoint when it is imported."""
    with serve({"acme/data": Repository(folder=folder, kind="datasets")}) as (endpoint, _):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment["QLORA_MODEL_CACHE"] = str(home / "models")
        environment.pop("HF_HUB_OFFLINE", None)
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", READ, json.dumps(questions)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_configuration_is_named_and_where_it_is_not_all_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    header = "---\nconfigs:\n"
    for name in ("main", "socratic"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name, "nested": {"a": None}}) + "\n")
        header += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (folder / "README.md").write_text(header + "---\n")
    questions = [("main", "train", SOURCE), ("socratic", "train", SOURCE), (None, "train", SOURCE)]
    split = ("main", "test", "spec.dataset.evalSource")
    main, socratic, unnamed, unknown = ask(folder, tmp_path / "home", *questions, split)
    assert (main[1], socratic[1]) == ([{"text": "main", "nested": {}}], [{"text": "socratic", "nested": {}}])
    assert main[0] != socratic[0]
    assert unnamed.startswith("UserError: hf://acme/data: ")
    assert "'main', 'socratic'" in unnamed
    assert unnamed.endswith("set spec.dataset.config")
    assert unknown.endswith("check spec.dataset.evalSource and spec.dataset.evalSplit")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, f"UserError: hf://acme/data holds no file that can be read .* check {SOURCE}"),
        (b"\xff\xfe\xff", "UserError: hf://acme/data/train.jsonl is UTF-16 .* and not UTF-8"),
        (b'{"text": ', r"line 1 is not valid JSON: Expecting value at character 10"),
    ],
)
def test_files_that_are_no_table_are_the_users_to_mend(tmp_path: Path, content: bytes | None, told: str) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "README.md").write_text("nothing\n")
    if content is not None:
        (folder / "train.jsonl").write_bytes(content)
    [answer] = ask(folder, tmp_path / "home", (None, "train", SOURCE))
    assert re.match(told, answer if isinstance(answer, str) else answer[0])


def test_what_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="evalSplit is a split of evalSource: set both"):
        DatasetSource.model_validate({"source": "hf://acme/data", "evalSplit": "test"})
    with pytest.raises(UserError, match=r"is a file, which has no configurations; remove spec\.dataset\.config"):
        Records(f"file://{tmp_path}/a.jsonl", split="train", config="main", scratch=tmp_path, field=SOURCE)
