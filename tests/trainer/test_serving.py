"""The served model writes its prompts as they were trained: each is held against the trainer's own encoding."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from qlora_trainer import publish
from qlora_trainer.data.encoding import Encoder
from qlora_trainer.data.formats import Format, read_sample
from tiny_model import tiny_model
from transformers import AutoTokenizer

# MLflow speaks of its own deprecations; they are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

TEMPLATES = Path(__file__).parent / "chat_templates"
CALL = {"type": "function", "function": {"name": "dose", "arguments": {"drug": "ibuprofeno", "mg": 400}}}
CALL_AS_TEXT = {"type": "function", "function": {"name": "dose", "arguments": '{"drug": "ibuprofeno", "mg": 400}'}}
PARAMETERS = {"type": "object", "properties": {"drug": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "dose", "description": "Daily dose.", "parameters": PARAMETERS}}]
ASKED = {"role": "user", "content": "¿Cuánto ibuprofeno?"}
TOLD = {"role": "tool", "content": "1200 mg", "tool_call_id": "abcdefghi"}
ANSWER = {"role": "assistant", "content": "Hasta 1200 mg al día."}


def served(template: str | None = None) -> Any:
    """The served model as far as its prompts go: with a tokenizer, without weights."""
    # MLflow warns while the module is being imported that its arguments have no types of their own.
    module: Any = import_module("qlora_trainer.tracking.serving_model")
    model = module.AdapterModel()
    model.tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    if template is not None:
        model.tokenizer.chat_template = template
        model.tokenizer.add_tokens(sorted(set(re.findall(r"<\|\w+\|>", template))), special_tokens=True)
    return model


def prompt(model: Any, row: Mapping[str, Any]) -> list[int]:
    return model.encode(dict(row))["input_ids"][0].tolist()


def trained_prompt(model: Any, record: Mapping[str, Any], form: Format) -> list[int]:
    """What stood before the last supervised stretch when the record was trained."""
    encoded = Encoder(model.tokenizer, "completion").encode(read_sample(record, form))
    supervised = np.flatnonzero(encoded.labels >= 0)
    start = supervised[0] if form != "messages" else supervised[np.flatnonzero(np.diff(supervised, prepend=-9) > 1)[-1]]
    return encoded.input_ids[:start].tolist()


RECORDS: dict[str, tuple[Format, dict[str, Any], str]] = {
    "a prompt": ("prompt-completion", {"prompt": "La disnea es ", "completion": "falta de aire."}, "completion"),
    "an instruction": ("alpaca", {"instruction": "Define «asma».", "output": "Una enfermedad."}, "output"),
    "an instruction with an input": (
        "alpaca",
        {"instruction": "Traduce.", "input": "asthma", "output": "asma"},
        "output",
    ),
    "an instruction with a system and a history": (
        "alpaca",
        {"instruction": "¿Y el adulto?", "system": "Sé breve.", "history": [["¿Dosis?", "10 mg"]], "output": "400 mg"},
        "output",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_texts_are_asked_as_they_were_trained(name: str) -> None:
    form, record, answer = RECORDS[name]
    row = {key: value for key, value in record.items() if key != answer}
    model = served()
    assert prompt(model, row) == trained_prompt(model, record, form)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "granite", "llama3"])
@pytest.mark.parametrize("arguments", ["as an object", "as text"])
def test_tools_and_their_answers_are_asked_as_they_were_trained(template: str, arguments: str) -> None:
    model = served((TEMPLATES / f"{template}.jinja").read_text())
    call = CALL if arguments == "as an object" else CALL_AS_TEXT
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefghi", **call}]}, TOLD]
    trained = trained_prompt(model, {"messages": [*messages, ANSWER], "tools": TOOLS}, "messages")
    rows = [
        {"messages": messages, "tools": TOOLS},
        {"messages": messages, "tools": json.dumps(TOOLS)},
        {"messages": messages, "tools": [json.dumps(tool) for tool in TOOLS], "prompt": None, "instruction": None},
        {"messages": [{"name": None, "tool_calls": None, **message} for message in messages], "tools": TOOLS},
    ]
    for row in rows:
        assert prompt(model, row) == trained


def test_rows_arrive_through_mlflows_signature_as_they_were_given() -> None:
    from mlflow.models.utils import _enforce_schema  # pyright: ignore[reportPrivateUsage]

    model = served((TEMPLATES / "qwen2_5.jinja").read_text())
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOLD]
    row = {"messages": messages, "tools": TOOLS}
    for given in ([row], pd.DataFrame([row])):
        table = _enforce_schema(given, publish.signature().inputs)
        (arrived,) = table.to_dict("records") if isinstance(table, pd.DataFrame) else table
        assert prompt(model, arrived) == prompt(model, row)


def test_a_template_that_asks_for_the_date_gets_todays() -> None:
    template = "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = served(template).tokenizer.decode(prompt(served(template), {"messages": [ASKED]}))
    assert text == f"{datetime.now(tz=UTC).astimezone():%d %b %Y}|{ASKED['content']}"


@pytest.mark.parametrize("row", [{}, {"prompt": "a", "instruction": "b"}, {"messages": [ASKED], "prompt": "a"}])
def test_a_row_is_one_question(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give each row one of"):
        prompt(served(), row)
