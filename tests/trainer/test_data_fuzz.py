"""Whatever is in a data set's file: it is read, or refused in a sentence that names the file; nothing else comes out.

QLORA_FUZZ sets how many mutated records are tried; each file of them is made from its number alone.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from qlora_trainer.data.dataset import arrange, read_dataset
from qlora_trainer.data.reader import Records
from qlora_trainer.data.report import data_warnings, shown
from qlora_trainer.outcome import UserError
from tiny_model import save_tokenizer

from orchestrator.api.job import DatasetSource, TrainingSpec

RECORDS = int(os.environ.get("QLORA_FUZZ", "2000"))
MOST_IN_A_FILE = 5
SHARES = 4
"""The files are tried in so many tests."""
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "21", "tool_call_id": "c1"},
            {"role": "assistant", "content": [{"type": "text", "text": "bye"}], "weight": 1, "reasoning_content": "so"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    "sharegpt": {
        "system": "be brief",
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye"}],
    },
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    "prompt-completion": {"prompt": "a ", "completion": " b"},
    "text": {"text": "a text"},
}
JUNK: Sequence[Any] = (
    *(None, True, 0, -1, 2**70, 0.5, float("nan"), float("inf"), "", " ", "x", "\0", "\ud83d", "<|im_end|>", "{{ x }}"),
    *([], {}, [[]], [None], {"a": None}, {"role": "user"}, {"type": "image"}, ["user"], "[1", '{"a": 1}', "é" * 3000),
)
SUFFIXES = ("jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "txt")
SECONDS_OF_A_FILE = 20
"""A hang, on however busy a machine."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, with the key or index of each of its entries."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in entries]
    for _, entry in entries:
        if isinstance(entry, dict | list):
            found += places(entry)
    return found


def mutated(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with a few entries removed, replaced or renamed."""
    made = copy.deepcopy(record)
    for _ in range(rng.randint(0, 3)):
        container, key = rng.choice(places(made) or [(made, "x")])
        kind = rng.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["images", "name", "weight", "thinking", "foo", "tool_calls"])] = rng.choice(JUNK)
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
        if not made:
            break
    return made


def content(records: Sequence[dict[str, Any]], suffix: str, rng: random.Random) -> bytes:
    """The records as a file of a kind, now and then with damaged bytes."""
    if suffix.endswith(".gz"):
        return damaged(gzip.compress(content(records, suffix.removesuffix(".gz"), rng), mtime=0), rng)
    if suffix == "csv":
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(records[0])
        for record in records:
            writer.writerow(value if isinstance(value, str) else json.dumps(value) for value in record.values())
        data = file.getvalue().encode("utf-8", "surrogatepass")
    else:
        lines = [json.dumps(record) for record in records]
        data = (f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines)).encode()
    return damaged(data, rng)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes, one time in four with some of them replaced."""
    if rng.randrange(4) == 0 and data:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice([b"", b"\xff", b"\0", b'"', b"\r", b"[" * 200_000, data[:at]]) + data[at + 1 :]
    return data


def write(path: Path, records: Sequence[dict[str, Any]], rng: random.Random) -> bool:
    """Whether the records can be written as this kind of file at all."""
    if path.suffix != ".parquet":
        path.write_bytes(content(records, path.name.split(".", 1)[1], rng))
        return True
    try:
        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, UnicodeError):
        return False
    return True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    template = (Path(__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("fuzz"), chat_template=template))


@pytest.mark.parametrize("share", range(SHARES))
def test_a_mutated_file_is_read_or_refused_by_name(tmp_path: Path, tokenizer: Any, share: int) -> None:
    read = tried = 0
    number = share
    while tried < RECORDS // SHARES:
        rng = random.Random(number)
        form = rng.choice(list(GOOD))
        path = tmp_path / f"{number}.{rng.choice(SUFFIXES)}"
        records = [mutated(GOOD[form], rng) for _ in range(rng.randint(1, MOST_IN_A_FILE))]
        number += SHARES
        if not write(path, records, rng):
            continue
        tried += len(records)
        began = process_time()
        refusal = refused(path, form, tokenizer, rng)
        read += refusal is None
        assert process_time() - began < SECONDS_OF_A_FILE, path.name
        assert refusal is None or (path.name in refusal and len(refusal) < 4000), refusal
        path.unlink()
    assert read, "some are read"


def refused(path: Path, form: str, tokenizer: Any, rng: random.Random) -> str | None:
    """What a user is told of a file that is refused; None if it is read. Whatever else is raised is a fault."""
    fields = {"source": f"file://{path}", "format": form, "trainOn": rng.choice(["assistant", "completion", "all"])}
    fields |= {"tooLong": rng.choice(["fail", "truncate", "drop"]), "evalFraction": rng.choice(["0", "0.3"])}
    dataset = DatasetSource.model_validate(fields)
    training = TrainingSpec(sequence_length=rng.choice([16, 2048]))
    try:
        records = Records(dataset.source, split="train", scratch=path.parent, field="spec.dataset.source")
        found = read_dataset(records, tokenizer, dataset, training)
        arrange(found.train, training, fewest_rows=112)
        list(data_warnings(found.train, found.evaluation))
        if found.train.records:
            shown(tokenizer, found.train.records[0])
    except UserError as error:
        return error.message
    except Exception as error:
        raise AssertionError(f"{path.name}: {type(error).__name__}: {error}") from error
    return None
