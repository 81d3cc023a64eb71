"""Records with their masks: what `show` prints, what prepare keeps, what the run's page has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from qlora_trainer import prepare, publish
from qlora_trainer.data.encoding import EncodedRecord
from qlora_trainer.data.report import SHOWN_CHARACTERS, SHOWN_PARTS, in_brackets, shown
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.tracking import mlflow_run
from qlora_trainer.tracking.records_page import PAGE_PATH, records_page
from qlora_trainer.tracking.run_page import Results
from tiny_model import EOS, tiny_model
from transformers import AutoTokenizer

from orchestrator.api.formats import ShownPart, ShownRecord, ShownRecords
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult
from orchestrator.api.task import StageTask, task_variables

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow's pages and SQLAlchemy's pool

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]}


def make_task(folder: Path, *lines: str, stage: str = "prepare", **fields: Any) -> StageTask:
    data = folder / "data.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines))
    spec = {"model": {"source": f"file://{tiny_model()}"}, "dataset": {"source": f"file://{data}"}}
    whole = {"stage": stage, "namespace": "team-a", "job": "j", "uid": "u-1", "attempt": 1, "spec": spec, **fields}
    return StageTask.model_validate({"store_uri": f"file://{folder}/store", **whole})


def run_show(task: StageTask, count: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | task_variables(task.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "qlora_trainer", "show", str(count)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_show_reads_no_more_than_it_is_asked_for_and_stores_nothing(tmp_path: Path) -> None:
    ended = run_show(make_task(tmp_path, json.dumps(CHAT), json.dumps(CHAT), "{damaged"), 2)
    assert ended.returncode == ExitCode.OK, ended.stderr
    found = ShownRecords.model_validate_json(ended.stdout)
    assert [record.parts[1] for record in found.records] == 2 * [ShownPart(text=f"good morning{EOS}", supervised=True)]
    assert not (tmp_path / "store").exists()


def test_show_says_what_prepare_would_refuse(tmp_path: Path) -> None:
    ended = run_show(make_task(tmp_path, json.dumps(CHAT), "{damaged"), 3)
    failure = StageResult.model_validate_json(ended.stdout).failure
    assert ended.returncode == ExitCode.USER_ERROR
    assert failure is not None
    assert "line 2 is not valid JSON" in failure.message


def test_prepare_keeps_its_first_records_and_publish_puts_them_on_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    own = {"qlora.dev/namespace": "team-a"}
    run = client.create_run(client.create_experiment("team-a", (tmp_path / "a").as_uri(), own))
    task = make_task(tmp_path, *5 * [json.dumps(CHAT)])
    result = prepare.run(task)
    task = task.model_copy(update={"stage": "publish", "prepared": result, "run_id": run.info.run_id})
    kept = publish.read_shown(JobStore(task.store_uri), task)
    assert kept is not None
    assert len(kept.records) == prepare.SHOWN_RECORDS
    assert any("few steps" in warning for warning in kept.warnings)
    mlflow_run.describe(task, run.info.run_id, {}, Results(card="# a card", records=kept))
    page = Path(client.download_artifacts(run.info.run_id, PAGE_PATH, str(tmp_path))).read_text()
    assert "<mark>good morning" in page
    assert "few steps" in page
    tags = client.get_run(run.info.run_id).data.tags
    (shown,) = json.loads(tags["mlflow.loggedArtifacts"])
    assert shown["type"] == "table"
    table = json.loads(Path(client.download_artifacts(run.info.run_id, shown["path"], str(tmp_path))).read_text())
    text, tokens, supervised = table["data"][0]
    assert "⟦good morning" in text
    assert (tokens, supervised) == (kept.records[0].tokens, kept.records[0].supervised_tokens)
    assert len(table["data"]) == len(kept.records)
    assert len(table["columns"]) == 3
    assert tags["mlflow.note.content"] == "# a card"


class Tags(HTMLParser):
    """The elements of a page, and the text inside its records."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_record_is_text_on_the_page_whatever_it_holds() -> None:
    nasty = "</pre><script>alert(1)</script>\x1b[31m\u202e &amp; <|im_end|>"
    record = ShownRecord(tokens=1, supervised_tokens=1, parts=(ShownPart(text=nasty, supervised=True),))
    page = records_page(ShownRecords(records=(record,), warnings=(nasty,)))
    parsed = Tags()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert parsed.tags.count("mark") == 2
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "</pre><script>alert(1)</script>\\x1b[31m\\u202e &amp; <|im_end|>" in parsed.text


def test_long_records_are_shown_with_all_kinds_of_their_parts() -> None:
    import numpy as np

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model())
    ids = np.array(tokenizer("word " * 2000).input_ids, dtype=np.int32)
    once = shown(tokenizer, EncodedRecord(input_ids=ids, labels=np.where(np.arange(len(ids)) < 9, -100, ids)))
    assert [part.supervised for part in once.parts] == [False, True]
    assert len(in_brackets(once)) < SHOWN_CHARACTERS + 200
    assert "characters ...]" in in_brackets(once)
    striped = shown(tokenizer, EncodedRecord(input_ids=ids, labels=np.where(np.arange(len(ids)) % 2 == 0, -100, ids)))
    assert len(striped.parts) == SHOWN_PARTS + 1
    assert striped.supervised_tokens == len(ids) // 2
