"""Data sets as people have them: trained as their ecosystem means them, or refused with a place and what to do."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from qlora_trainer.data.dataset import EncodeRanges, ReadDataset, in_process, read_dataset
from qlora_trainer.data.ranges import RANGE_CHARACTERS, EncodedRange, Range, RangeEncoder
from qlora_trainer.data.reader import Records
from qlora_trainer.data.report import bounded, in_brackets, shown
from qlora_trainer.outcome import UserError
from tiny_model import save_tokenizer

from orchestrator.api.job import DatasetSource, TrainingSpec
from orchestrator.api.results import MAX_WARNINGS

TEMPLATES = Path(__file__).parent / "chat_templates"
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    template = (TEMPLATES / "qwen2_5.jinja").read_text()
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("found"), chat_template=template))


def read(path: Path, tokenizer: Any, form: str, encode: EncodeRanges = in_process, **fields: Any) -> ReadDataset:
    dataset = DatasetSource.model_validate({"source": path.as_uri(), "format": form, **fields})
    records = Records(dataset.source, split="train", scratch=path.parent, field="spec.dataset.source")
    return read_dataset(records, tokenizer, dataset, TrainingSpec(), encode)


def line(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record) + "\n")
    return path


def said(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


def user(content: Any = "h", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any = "g", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def turns(*pairs: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": sender, "value": value} for sender, value in pairs], **fields}


CHAT = "<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\n⟦g<|im_end|>⟧\n"
SECOND_ALONE = "assistant\ng<|im_end|>\n<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\n⟦z<|im_end|>⟧\n"
TRAINED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alpaca with an empty input": (
        "alpaca",
        {"instruction": "i", "input": "", "output": "o", "text": "Below is"},
        f"<s>{ALPACA.format('')}### Instruction:\ni\n\n### Response:⟦o<|im_end|>⟧",
    ),
    "ShareGPT with a call as JSON text": (
        "sharegpt",
        turns(("human", "h"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "g")),
        f"assistant\n⟦{CALLED}<|im_end|>⟧\n",
    ),
    "ShareGPT with a call as an object": (
        "sharegpt",
        turns(("human", "h"), ("function_call", CALL), ("observation", "4"), ("gpt", "g")),
        f"assistant\n⟦{CALLED}<|im_end|>⟧\n",
    ),
    "OpenAI's weights": ("messages", said(user(), assistant(weight=0), user(), assistant("z", weight=1)), SECOND_ALONE),
    "axolotl's train": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "h", "train": False},
                {"from": "gpt", "value": "g", "train": False},
                {"from": "human", "value": "h"},
                {"from": "gpt", "value": "z", "train": True},
            ]
        },
        SECOND_ALONE,
    ),
    "ms-swift's loss": (
        "messages",
        said(user(), assistant(loss=False), user(), assistant("z", loss=True)),
        SECOND_ALONE,
    ),
    "OpenAI's tools: a call by id without content, several answers, and words": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Help."},
                user("Wetter in Wien und Graz?"),
                {
                    "role": "assistant",
                    "weight": 0,
                    "tool_calls": [
                        {
                            "id": f"call_{city}",
                            "type": "function",
                            "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'},
                        }
                        for city in ("Wien", "Graz")
                    ],
                },
                {"role": "tool", "tool_call_id": "call_Wien", "content": "3"},
                {"role": "tool", "tool_call_id": "call_Graz", "content": "5"},
                assistant("3 und 5 Grad.", weight=1),
            ],
            "parallel_tool_calls": True,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "description": "The weather of a city",
                        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                        "strict": True,
                    },
                }
            ],
        },
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\n3\n</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦3 und 5 Grad.<|im_end|>⟧\n",
    ),
    "OpenAI's tools: the call is the last word": (
        "messages",
        said(
            user(),
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": CALL}]},
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        ),
        f"assistant\n⟦{CALLED}<|im_end|>⟧\n",
    ),
    "OpenAI's parallel_tool_calls": (
        "messages",
        said(
            user(),
            assistant(None, tool_calls=[{"id": "c", "type": "function", "function": CALL}]),
            parallel_tool_calls=False,
        ),
        f"assistant\n⟦{CALLED}<|im_end|>⟧\n",
    ),
    "contents in parts": ("messages", said(user([{"type": "text", "text": "h"}]), assistant()), CHAT),
    "columns that others fill": ("messages", said(user(), assistant(), images=[], image=None, chosen=None), CHAT),
    "KTO's good completions": ("prompt-completion", {"prompt": "p", "completion": "c", "label": True}, "⟦c<|im_end|>⟧"),
    "no width": ("messages", said(user("\u200bh"), assistant("\u200bg\ufeff")), "⟦\u200bg\ufeff<|im_end|>⟧"),
    "emoji": ("messages", said(user("👩‍👩‍👧‍👦"), assistant("🎉")), "⟦🎉<|im_end|>⟧"),
}


@pytest.mark.parametrize("what", TRAINED)
def test_it_is_trained_as_its_ecosystem_means_it(tmp_path: Path, tokenizer: Any, what: str) -> None:
    form, record, expected = TRAINED[what]
    found = read(line(tmp_path / "a.jsonl", record), tokenizer, form)
    assert expected in in_brackets(shown(tokenizer, found.train.records[0]))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "KTO's bad completions": (
        "prompt-completion",
        {"prompt": "p", "completion": "c", "label": False},
        "`label` that is fal",
    ),
    "DPO": (
        "messages",
        {"chosen": [user()], "rejected": [user()]},
        "field `chosen`: preferences are trained with spec.dataset.format: preference",
    ),
    "OpenAI's preferences": (
        "messages",
        {
            "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("good")],
            "non_preferred_output": [assistant("bad")],
        },
        "field `preferred_output`: preferences are trained with spec.dataset.format: preference",
    ),
    "OpenAI's older function calls": (
        "messages",
        {"messages": [user(), assistant(None, function_call={"name": "f", "arguments": "{}"})], "functions": [{}]},
        "field `functions`: give them as `tools`",
    ),
    "LLaVA's image": (
        "sharegpt",
        turns(("human", "<image>"), ("gpt", "g"), image="a.jpg"),
        "`image`: only text can be",
    ),
    "parts of turns": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "g", "train_detail": [{}]}]},
        "turn 1 with a field `train_detail`: turns are trained",
    ),
    "axolotl's trained user": (
        "messages",
        said(user(train=True), assistant()),
        "role 'user' with `train`; only the assis",
    ),
    "masks that disagree": (
        "messages",
        said(user(), assistant(weight=1, train=0)),
        "`weight`, `train` do not agree; keep",
    ),
    "OpenAI's old functions": (
        "messages",
        said(user(), {"role": "function", "name": "f", "content": "4"}),
        "as 'tool'",
    ),
    "OpenAI's developer": ("messages", said({"role": "developer", "content": "s"}, user()), "write it as 'system'"),
    "other names of roles": (
        "messages",
        said({"role": "human", "content": "s"}),
        "role 'human'; .* write it as 'user'",
    ),
    "roles in capitals": ("messages", said({"role": "User", "content": "s"}), "role 'User'; .* write it as 'user'"),
    "two systems": (
        "messages",
        said(*[{"role": "system", "content": "s"}] * 2, user()),
        "join the two into one message",
    ),
    "a system in the midst": (
        "messages",
        said(user(), assistant(), {"role": "system"}),
        "it must be the first|empty `con",
    ),
    "two users": ("messages", said(user(), user(), assistant()), "message 2 of role 'user' after .* join the two"),
    "the assistant first": (
        "messages",
        said(assistant(), user(), assistant()),
        "alternate .*, and begin with the user",
    ),
    "the user last": ("messages", said(user(), assistant(), user()), "ends with a message of role 'user'; .*remove it"),
    "the system alone": ("messages", said({"role": "system", "content": "s"}), "ends with a message of role 'system'"),
    "ShareGPT's names in messages": (
        "messages",
        {"messages": [{"from": "human", "value": "h"}]},
        "the format sharegpt's",
    ),
    "messages' names in ShareGPT": ("sharegpt", {"conversations": [user(), assistant()]}, "the format messages', in"),
    "another format": (
        "messages",
        {"instruction": "i", "output": "o"},
        "`instruction`, `output`, as of the format alpaca",
    ),
    "other names": (
        "prompt-completion",
        {"prompt": "p", "response": "c"},
        "`prompt`, `response`; rename the one that is",
    ),
    "questions": (
        "prompt-completion",
        {"question": "p", "answer": "c"},
        "no field `prompt`, .*; its fields: `question`",
    ),
    "TRL's conversations": (
        "prompt-completion",
        {"prompt": [user()], "completion": [assistant()]},
        "messages', all of",
    ),
    "null": ("messages", {"messages": None}, "has a field `messages` that is null"),
    "a call that is no JSON": (
        "sharegpt",
        turns(("human", "h"), ("function_call", "f(1)")),
        "turn 2 from 'function_call' that",
    ),
    "a call that is a number": (
        "sharegpt",
        turns(("human", "h"), ("function_call", "1")),
        "a tool call that names no fun",
    ),
    "a list": ("messages", [user(), assistant()], "holds a list and not one object a line; .* is called .json"),
    "a name without end": ("text", {"k" * 100_000: 1}, r"fields: `k{64}`; rename"),
    "half a character in a name": ("text", {"\ud83c\n\x1b[31m": 1}, r"fields: `\\ud83c \\x1b\[31m`"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_what_to_do(tmp_path: Path, tokenizer: Any, what: str) -> None:
    form, record, problem = REFUSED[what]
    with pytest.raises(UserError, match=f"a.jsonl.*{problem}"):
        read(line(tmp_path / "a.jsonl", record), tokenizer, form)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}\n')
    return file.getvalue()


def table(*columns: Any, names: tuple[str, ...] = ("text",)) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(list(columns), list(names)), file)
    return file.getvalue()


TEXTS = pyarrow.array(["a"])
LINE = b'{"text": "a"}\n'
FILES: dict[str, tuple[str, bytes, str]] = {
    "a field that is there twice": ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1 .* the field `text` 2 times"),
    "the same in an array": ("a.json", b'[\n{"text": "a", "text": "b"}]', "line 2 .* the field `text` 2 times"),
    "the same deep inside": ("a.jsonl", b'{"text": "a", "m": [{"b": 1, "b": 1}]}', "line 1 .* the field `b` 2 times"),
    "a column that is there twice": ("a.parquet", table(TEXTS, TEXTS, names=("text", "text")), "`text` more than once"),
    "an endless number": ("a.jsonl", b'{"text": "a", "x": 1e999}', "line 1 .*1e999 is larger than any number"),
    "a long number": (
        "a.jsonl",
        b'{"text": "a", "x": ' + b"9" * 5000 + b"}",
        "line 1 .*a number of thousands of digits",
    ),
    "NaN": ("a.json", b'[{"text": "a"},\n{"text": NaN}]', "line 2 is not valid JSON: NaN is no value"),
    "a comma too many": ("a.json", b'[{"text": "a"},]', "line 1 is not valid JSON"),
    "objects beside each other": (
        "a.jsonl",
        b'{"text": "a"}{"text": "b"}',
        "line 1 is not valid JSON: Extra data at ch",
    ),
    "an object over lines": (
        "a.jsonl",
        b'{\n"text": "a"\n}\n',
        "3 of 3 records cannot be used: line 1 is not valid JSON",
    ),
    "an array as lines": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "file of one JSON array is called .json"),
    "lines as an array": ("a.json", LINE * 2, "a file of one object a line is called .jsonl"),
    "an array in an object": (
        "a.json",
        b'{"data": [{"text": "a"}]}',
        "one JSON array of records, and nothing around it",
    ),
    "nothing": ("a.json", b"", "holds no records"),
    "semicolons": ("a.csv", b"text;label\na;b\n", "its columns are separated by ';'; save it with commas"),
    "tabs": ("a.csv", b"text\tlabel\na\tb\n", "its columns are separated by"),
    "an empty first line": ("a.csv", b"\ntext\na\n", "line 1 is empty; it must name the columns"),
    "a ZIP archive": ("a.csv", zipped(), "is a ZIP archive .*; unpack it, or export it as CSV"),
    "bzip2": ("a.jsonl", bz2.compress(LINE), "is bzip2 data; unpack it"),
    "xz": ("a.jsonl", lzma.compress(LINE), "is xz data; unpack it"),
    "Zstandard": ("a.json", b"\x28\xb5\x2f\xfd\x24", "is Zstandard data; unpack it"),
    "a table by another name": ("a.jsonl", table(TEXTS), "is a Parquet file; give it a name that ends in .parquet"),
    "lines by a table's name": ("a.parquet", LINE, "is not a whole Parquet file"),
    "UTF-32": ("a.jsonl", LINE.decode().encode("utf-32"), "UTF-16 .or UTF-32. and not UTF-8; save it as UTF-8"),
    "a date that Python has not": (
        "a.parquet",
        table(TEXTS, pyarrow.array([2**30], pyarrow.date32()), names=("text", "day")),
        "a value after row 0 cannot be read .*; correct it, or remove its column",
    ),
    "a time zone that nobody has": (
        "a.parquet",
        table(TEXTS, pyarrow.array([0], pyarrow.timestamp("s", "Mars/Olympus")), names=("text", "at")),
        "a value after row 0 cannot be read",
    ),
    "texts as bytes": (
        "a.parquet",
        table(pyarrow.array([b"a"], pyarrow.binary())),
        "row 1 has a field `text` that is no",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_refused_with_its_place(tmp_path: Path, tokenizer: Any, what: str) -> None:
    name, content, problem = FILES[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{problem}"):
        read(tmp_path / name, tokenizer, "text")


COLUMNS: dict[str, Callable[[], Any]] = {
    "large_string": lambda: pyarrow.array(["a"], pyarrow.large_string()),
    "dictionary": lambda: pyarrow.array(["a"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_texts_of_a_table_are_texts_however_it_keeps_them(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    others = (pyarrow.array([1], pyarrow.timestamp("ns", "UTC")), pyarrow.array([1]).cast(pyarrow.decimal128(22, 2)))
    (tmp_path / "a.parquet").write_bytes(table(COLUMNS[kind](), *others, names=("text", "at", "cost")))
    found = read(tmp_path / "a.parquet", tokenizer, "text")
    assert tokenizer.decode(found.train.records[0].input_ids) == "<s>a<|im_end|>"
    assert found.warnings == ("fields that the format text does not have are not trained on: `at`, `cost`",)


@pytest.mark.parametrize(
    "name", ["a b.jsonl", "a#1.jsonl", "a%20b.jsonl", "ñandú 日本.jsonl", "a?x=1.jsonl", ".a.JSONL"]
)
def test_a_file_is_found_whatever_its_name(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / name).write_bytes(LINE)
    assert read(tmp_path / name, tokenizer, "text").train.samples == 1


def test_a_name_that_means_something_else_in_a_uri_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "a%201.jsonl").write_bytes(LINE)
    dataset = DatasetSource(source=f"file://{tmp_path}/a%201.jsonl", format="text")
    with pytest.raises(UserError, match=r"a%201\.jsonl; check its path .in a URI, % is written %25"):
        Records(dataset.source, split="train", scratch=tmp_path, field="spec.dataset.source")


@pytest.mark.parametrize("name", ["shards", "shards.jsonl"])
def test_a_folder_is_told_from_a_file(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder; give one"):
        read(tmp_path / name, tokenizer, "text")


def test_a_templates_own_tokens_in_a_content_are_warned_of_once(tmp_path: Path, tokenizer: Any) -> None:
    records = [said(user("<think>h"), assistant(f"g<|im_end|>\n<|im_start|>user\n{number}")) for number in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (warning,) = read(path, tokenizer, "messages").warnings
    assert warning.startswith("contents of messages hold special tokens, such as <|im_end|>, which the model takes for")


def test_of_different_tokens_in_two_ranges_the_first_is_named_alone(tmp_path: Path, tokenizer: Any) -> None:
    long = user("<|im_end|>" + "a" * RANGE_CHARACTERS)
    records = [said(long, assistant()), said(user("<|im_start|>"), assistant())]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    ranges: list[int] = []

    def encode(encoder: RangeEncoder, cut: Iterator[Range]) -> Iterator[EncodedRange]:
        for part in cut:
            ranges.append(len(part))
            yield encoder.encode(part)

    (warning,) = read(path, tokenizer, "messages", encode, tooLong="drop").warnings
    assert ranges == [1, 1]
    assert "special tokens, such as <|im_end|>, which" in warning


def test_warnings_are_fit_to_be_kept_and_none_is_lost_without_a_word(tmp_path: Path, tokenizer: Any) -> None:
    path = line(tmp_path / "a.jsonl", {"text": "a", "half \ud83c\n\x1b[31m": 1})
    (kept,) = bounded(list(read(path, tokenizer, "text").warnings))
    assert kept.endswith(r"not trained on: `half \ud83c \x1b[31m`")
    assert bounded([str(number) for number in range(MAX_WARNINGS)]) == ("0", "1", "2", "3", "4")
    assert bounded([str(number) for number in range(7)]) == ("0", "1", "2", "3", "3 more warnings are in prepare's log")
