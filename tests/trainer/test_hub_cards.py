"""Hub data sets: what a hostile card leads nobody to; of others, the rows that the `datasets` library reads."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import Repository, serve
from qlora_trainer.data.hub_files import Wanted, files_of_split
from qlora_trainer.outcome import UserError

from tests.servers import Server, serving

CANARY = "CANARY-77aa01"
ASK = """
import json, sys
from pathlib import Path
from qlora_trainer.data.reader import BadRecord, Records
from qlora_trainer.outcome import StageError
for name, config, split in json.loads(sys.argv[1]):
    try:
        records = Records(f"hf://{name}", split=split, config=config, scratch=Path("."), field="spec.dataset.source")
        told = [record.problem if isinstance(record, BadRecord) else record.value for record in records.read()]
    except StageError as error:
        told = f"{type(error).__name__}: {error.message}"
    print("ANSWER", json.dumps(told))
"""
JUDGE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import datasets
datasets.disable_progress_bars()

def without_nulls(value):
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value

for name, config, split in json.loads(sys.argv[1]):
    try:
        told = [without_nulls(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    print("ANSWER", json.dumps(told))
"""
Question = tuple[str, str | None, str]


def ask(program: str, endpoint: str, home: Path, questions: list[Question]) -> list[Any]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment["QLORA_MODEL_CACHE"] = str(home / "models")
    environment.pop("HF_HUB_OFFLINE", None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", program, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


# --- what a hostile card tries


@dataclass(frozen=True)
class Outside:
    """What no card may lead to: a folder with a canary, and a server that writes down who asks."""

    folder: Path
    address: str
    asked: list[str]


@contextmanager
def outside(folder: Path) -> Generator[Outside]:
    asked: list[str] = []
    secret = json.dumps({"text": CANARY}).encode() + b"\n"
    folder.mkdir()
    (folder / "secret.jsonl").write_bytes(secret)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(secret)))
            self.end_headers()
            self.wfile.write(secret)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with serving(Server(Handler)) as server:
        yield Outside(folder, f"http://127.0.0.1:{server.server_port}", asked)


HOSTILE = {
    "absolute": "data_files: {folder}/**",
    "absolute-file": "data_files: {folder}/secret.jsonl",
    "file-address": "data_files: file://{folder}/secret.jsonl",
    "inner-address": "data_files: {address}/secret.jsonl",
    "one-of-a-list": "data_files: [own.jsonl, '{address}/secret.jsonl']",
    "in-a-split": "data_files: [{{split: train, path: {address}/secret.jsonl}}]",
    "in-a-list-of-a-split": "data_files: [{{split: train, path: [own.jsonl, '{folder}/secret.jsonl']}}]",
    "up": "data_files: ../../../../../../../../../..{folder}/secret.jsonl",
    "up-in-the-middle": "data_files: x/../../..{folder}/secret.jsonl",
    "chained": "data_files: zip://secret.jsonl::{address}/a.zip",
    "other-repository": "data_files: hf://datasets/acme/private/own.jsonl",
    "bucket": "data_files: s3://bucket/secret.jsonl",
    "home": "data_files: ~/secret.jsonl",
    "windows": "data_files: 'C:\\\\secret.jsonl'",
    "absolute-folder": "data_dir: {folder}",
    "folder-up": "data_dir: ../../../../../../../..{folder}",
    "folder-address": "data_dir: {address}",
    "a-number": "data_files: 7",
    "a-mapping": "data_files: {{train: {folder}/secret.jsonl}}",
    "a-setting": "data_files: own.jsonl\n  loading_script: {address}/x.py",
    "code": "data_files: !!python/object/apply:os.system ['touch {folder}/pwned']",
}


def test_no_card_leads_out_of_its_repository(tmp_path: Path) -> None:
    with outside(tmp_path / "outside") as beyond:
        repositories: dict[str, Repository] = {}
        for name, line in HOSTILE.items():
            folder = tmp_path / "hub" / name
            folder.mkdir(parents=True)
            (folder / "own.jsonl").write_text('{"text": "own"}\n')
            line = line.format(folder=beyond.folder, address=beyond.address)
            (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {line}\n---\n")
            repositories[f"acme/{name}"] = Repository(folder=folder, kind="datasets")
        before = sorted(path.name for path in beyond.folder.iterdir())
        with serve(repositories) as (endpoint, requests):
            questions: list[Question] = [(f"acme/{name}", None, "train") for name in HOSTILE]
            answers = dict(zip(HOSTILE, ask(ASK, endpoint, tmp_path / "home", questions), strict=True))
        assert beyond.asked == []
        assert sorted(path.name for path in beyond.folder.iterdir()) == before
        for name, answer in answers.items():
            assert isinstance(answer, str), f"{name}: {answer}"
            assert answer.startswith(f"UserError: hf://acme/{name}: "), answer
            assert CANARY not in answer
        assert not any("jsonl" in request for request in requests), "nothing is fetched of a card that is refused"


def test_a_card_of_many_wildcards_is_matched_in_time() -> None:
    card = f"---\nconfigs:\n- config_name: a\n  data_files: '{'**/' * 200}{'*a' * 100}b.jsonl'\n---\n"
    paths = ["/".join(["a" * 200] * 20) + "/c.jsonl"] * 50
    wanted = Wanted(source="hf://a/b", config=None, split="train", field="spec.dataset.source")
    with pytest.raises(UserError, match="holds no file that can be read"):
        files_of_split(paths, card, wanted)


@pytest.mark.parametrize("path", ["/etc/passwd.jsonl", "a/../../b.jsonl"])
def test_a_hub_that_lists_a_path_outside_is_not_believed(path: str) -> None:
    wanted = Wanted(source="hf://a/b", config=None, split="train", field="spec.dataset.source")
    assert files_of_split(["train.jsonl", path], "", wanted) == ["train.jsonl"]


# --- what others read of a card


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(*texts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts), "extra": [None] * len(texts)}), sink)
    return sink.getvalue()


def card(configurations: str) -> bytes:
    return f"---\nlicense: mit\nconfigs:\n{configurations}\n---\n# Hello\n".encode()


LAYOUTS: dict[str, tuple[dict[str, bytes], str | None, str]] = {
    "one-file": ({"data.jsonl": lines("a", "b")}, None, "train"),
    "names": ({"train.jsonl": lines("a"), "test.jsonl": lines("b")}, None, "test"),
    "names-in-names": (
        {"my-train-1.jsonl": lines("a"), "my-train-2.jsonl": lines("c"), "dev.jsonl": lines("b")},
        None,
        "train",
    ),
    "validation": ({"train.csv": b"text\na\n", "valid.csv": b"text\nb\n"}, None, "validation"),
    "no-keyword-in-a-word": ({"trainer.jsonl": lines("a"), "latest.jsonl": lines("b")}, None, "train"),
    "folders": ({"train/x.jsonl": lines("a"), "train/y.jsonl": lines("b"), "test/x.jsonl": lines("c")}, None, "train"),
    "deep-folders": ({"en/training/0.jsonl": lines("a"), "de/training/0.jsonl": lines("b")}, None, "train"),
    "shards": (
        {f"data/{s}-0000{n}-of-00002.parquet": table(f"{s}{n}") for s in ("train", "extra") for n in (0, 1)},
        None,
        "extra",
    ),
    "parquet": ({"train.parquet": table("a", "b")}, None, "train"),
    "array": ({"train.json": b'[{"text": "a"}, {"text": "b"}]'}, None, "train"),
    "lines-called-json": ({"train.json": lines("a", "b")}, None, "train"),
    "gzip": ({"train.jsonl.gz": gzip.compress(lines("a"))}, None, "train"),
    "hidden": (
        {"train.jsonl": lines("a"), ".train.jsonl": lines("no"), "__pycache__/train.jsonl": lines("no")},
        None,
        "train",
    ),
    "others-beside": (
        {"train.jsonl": lines("a"), "config.json": b"{}", "notes.md": b"no", "load.py": b"no"},
        None,
        "train",
    ),
    "nulls": (
        {"train.jsonl": b'{"text": "a", "more": null}\n{"text": "b", "more": {"x": null, "y": "z"}}\n'},
        None,
        "train",
    ),
    "card-file": (
        {
            "a.jsonl": lines("a"),
            "b.jsonl": lines("b"),
            "README.md": card("- {config_name: default, data_files: b.jsonl}"),
        },
        None,
        "train",
    ),
    "card-splits": (
        {
            "p/1.jsonl": lines("a"),
            "p/2.jsonl": lines("b"),
            "q/1.jsonl": lines("c"),
            "README.md": card(
                "- config_name: default\n  data_files:\n"
                "  - {split: one, path: [p/2.jsonl, p/1.jsonl]}\n  - {split: two, path: q/*}"
            ),
        },
        None,
        "one",
    ),
    "card-configurations": (
        {
            "en/a.jsonl": lines("a"),
            "de/a.jsonl": lines("b"),
            "README.md": card(
                "- {config_name: en, data_files: 'en/*.jsonl', default: true}\n- {config_name: de, data_files: 'de/**'}"
            ),
        },
        "de",
        "train",
    ),
    "card-default": (
        {
            "en/a.jsonl": lines("a"),
            "de/a.jsonl": lines("b"),
            "README.md": card(
                "- {config_name: de, data_files: 'de/**'}\n- {config_name: en, data_files: 'en/*.jsonl', default: true}"
            ),
        },
        None,
        "train",
    ),
    "card-folder": (
        {
            "en/train.jsonl": lines("a"),
            "en/test.jsonl": lines("b"),
            "de/train.jsonl": lines("c"),
            "README.md": card("- {config_name: en, data_dir: en}\n- {config_name: de, data_dir: de}"),
        },
        "en",
        "test",
    ),
    "card-without-configurations": (
        {"train.jsonl": lines("a"), "README.md": b"---\nlicense: mit\n---\n"},
        None,
        "train",
    ),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Ours and the library's rows of every layout."""
    root = tmp_path_factory.mktemp("layouts")
    repositories: dict[str, Repository] = {}
    for name, (files, _, _) in LAYOUTS.items():
        for path, data in files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)
        repositories[f"acme/{name}"] = Repository(folder=root / name, kind="datasets")
    questions: list[Question] = [(f"acme/{name}", config, split) for name, (_, config, split) in LAYOUTS.items()]
    with serve(repositories) as (endpoint, _):
        ours = ask(ASK, endpoint, root / "home", questions)
        theirs = ask(JUDGE, endpoint, root / "home", questions)
    return dict(zip(LAYOUTS, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rows_are_those_that_the_datasets_library_reads(compared: dict[str, tuple[Any, Any]], name: str) -> None:
    ours, theirs = compared[name]
    assert isinstance(theirs, list), f"the judge cannot read it: {theirs}"
    assert ours == theirs


@pytest.mark.parametrize("suffix", ["arrow", "tar", "zip", "txt", "tsv"])
def test_files_that_are_not_read_here_are_refused_in_words(suffix: str) -> None:
    wanted = Wanted(source="hf://a/b", config=None, split="train", field="spec.dataset.source")
    with pytest.raises(UserError, match=rf"its \.{suffix} files are not read here; give a copy of them as Parquet"):
        files_of_split([f"train/1.{suffix}", f"train/2.{suffix}", "train/more.jsonl"], "", wanted)
