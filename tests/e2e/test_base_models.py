"""Base models, as they come, become models that stop where their records ended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sdk import Client
from orchestrator.settings import Settings
from tests.e2e.jobs import EXAMPLE, Document, medical_job
from tests.e2e.strangers_answers import answers_of_a_stranger, held_out_pairs, stops_by_itself

pytestmark = pytest.mark.timeout(1800)  # real training, also on a machine that is busy with other things

STEPS = 24
"""So many are enough for a new end to be learned where text is complete; it is tens of records."""


@pytest.fixture(scope="module")
def base(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as they come: without a chat template, and with an end of text that ends no turn."""
    folder = tmp_path_factory.mktemp("base")
    for file in pretrained.iterdir():
        if file.suffix != ".jinja":
            shutil.copyfile(file, folder / file.name)
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    end = "<|endoftext|>"
    rewrite(folder / "tokenizer_config.json", bos_token=end, eos_token=end, pad_token=end)
    return folder


def rewrite(file: Path, **changes: object) -> None:
    """Change a JSON file."""
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(document))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Records as people tune a base model on, and how such a model is asked."""

    fields: Document
    model_fields: Document = field(default_factory=dict[str, object])
    record: Callable[[str, str], Document]
    asked: Callable[[str, str], Document]
    """Plain text with the whole answer, which is to be ended; a chat with the question, so that it is answered, too."""
    rows: int
    """Of a step."""
    end: str
    ends: list[int]
    """Of generation_config.json: the base's own, and what ended the trained answers."""


def in_plain_text(question: str) -> str:
    return f"P: {question}\nR:"


def in_a_chat(question: str) -> Document:
    return {"role": "user", "content": question}


FORMS = {
    "completions": Form(
        fields={"format": "prompt-completion"},
        record=lambda question, answer: {"prompt": in_plain_text(question), "completion": f" {answer}"},
        asked=lambda question, answer: {"prompt": f"{in_plain_text(question)} {answer}"},
        rows=1,
        end="<|endoftext|>",
        ends=[0],
    ),
    "texts": Form(
        fields={"format": "text"},
        record=lambda question, answer: {"text": f"{in_plain_text(question)} {answer}"},
        asked=lambda question, answer: {"prompt": f"{in_plain_text(question)} {answer}"},
        rows=1,
        end="<|endoftext|>",
        ends=[0],
    ),
    "chats in a named template": Form(
        fields={"format": "messages"},
        model_fields={"chatTemplate": "chatml"},
        record=lambda question, answer: {
            "messages": [in_a_chat(question), {"role": "assistant", "content": answer}],
        },
        asked=lambda question, _: {"messages": [in_a_chat(question)]},
        rows=2,
        end="<|im_end|>",
        ends=[0, 2],
    ),
}


@pytest.mark.parametrize("name", FORMS if os.environ.get("QLORA_BASE_FORMS") == "all" else ["completions"])
def test_a_base_model_stops_where_its_records_ended(
    client: Client, settings: Settings, base: Path, tmp_path: Path, name: str
) -> None:
    form = FORMS[name]
    records = [json.loads(line)["messages"] for line in (EXAMPLE / "train.jsonl").read_text().splitlines()]
    data = tmp_path / "train.jsonl"
    lines = [form.record(asked["content"], said["content"]) for asked, said in records]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    job: dict[str, Any] = medical_job(name.replace(" ", "-"), base, steps=STEPS)
    job["spec"]["dataset"] = {"source": data.as_uri(), **form.fields}
    job["spec"]["model"] |= form.model_fields
    job["spec"]["training"]["globalBatchSize"] = form.rows
    handle = client.submit(job)
    handle.wait(timeout_seconds=900)
    saved = handle.adapter(tmp_path / "adapter") / "generation_config.json"
    assert json.loads(saved.read_text())["eos_token_id"] == form.ends
    rows = [form.asked(question, answer) for question, answer in held_out_pairs()]
    found = answers_of_a_stranger(settings, str(handle.result().model_uri), base, rows)
    assert stops_by_itself(found, form.end), found
