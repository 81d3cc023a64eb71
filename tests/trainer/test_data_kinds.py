"""What a data set says is used or refused by name: fields, files, templates and hub data sets, each in a few lines."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from qlora_trainer.data.chat import ChatRenderer
from qlora_trainer.data.chat_templates import NAMED_TEMPLATES, named_template, refuse_useless_template
from qlora_trainer.data.dataset import ReadDataset, arrange, read_dataset
from qlora_trainer.data.encoding import EncodedRecord, Encoder
from qlora_trainer.data.formats import read_sample
from qlora_trainer.data.reader import BadRecord, Records
from qlora_trainer.data.report import data_warnings, in_brackets
from qlora_trainer.data.report import shown as shown_record
from qlora_trainer.outcome import UserError
from tiny_model import EOS, save_tokenizer

from orchestrator.api.job import CHAT_TEMPLATE_NAMES, DatasetSource, TrainingSpec

TEMPLATES = Path(__file__).parent / "chat_templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text()
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text()
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "21 degrees"},
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("kinds")))


def read(
    path: Path, tokenizer: Any, template: str = CHATML, training: TrainingSpec | None = None, **fields: Any
) -> ReadDataset:
    tokenizer.chat_template = template
    dataset = DatasetSource.model_validate({"source": f"file://{path}", **fields})
    records = Records(dataset.source, split="train", scratch=path.parent, field="spec.dataset.source")
    return read_dataset(records, tokenizer, dataset, training or TrainingSpec())


def shown(tokenizer: Any, record: EncodedRecord) -> str:
    return in_brackets(shown_record(tokenizer, record))


def texts(tokenizer: Any, found: ReadDataset) -> list[str]:
    return [tokenizer.decode(record.input_ids) for record in found.train.records]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat(*said: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return {"messages": messages, **fields}


def answering(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


# --- fields


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": CALLING}, "message 2 with `tool_calls`, which the chat template does not write"),
        (chat("a", "b", tools=[{"type": "function"}]), "field `tools`, which the chat template does not write"),
        (answering(reasoning_content="because"), "message 2 with `reasoning_content`, which the chat template"),
        (answering(thinking="because"), "message 2 with `thinking`, which the chat template"),
        (answering(name="Ada"), "message 2 with `name`, which the chat template"),
        (answering(weight=0.5), "message 2 whose `weight` is 0.5; it must be 0 or 1"),
        (answering(function_call={"name": "f"}), "message 2 with a field `function_call`: give it as `tool_calls`"),
        (chat("a", "b", images=["a.png"]), "field `images`: only text can be trained on"),
        (chat("a", "b", tools="{"), "field `tools` that is not valid JSON"),
        (answering(tool_calls=[{"function": {"name": "f", "arguments": "city"}}]), "field `arguments`"),
        (answering(tool_calls=[{"function": {"arguments": {}}}]), "a tool call that names no function"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 of role \\['user'\\]; known are"),
        ({"messages": [{"role": {"name": "user"}, "content": "a"}]}, "message 1 of role {'name': 'user'}; known are"),
        (chat("half \ud83d", "b"), "holds half of a surrogate pair \\(U\\+D83D\\)"),
    ],
)
def test_a_field_that_would_be_lost_is_refused_with_line_and_name(
    tmp_path: Path, tokenizer: Any, record: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=f"a.jsonl: 1 of 2 records cannot be used: line 2 .*{problem}"):
        read(jsonl(tmp_path / "a.jsonl", chat("a", "b"), record), tokenizer)


def test_a_turn_of_weight_nothing_is_masked(tmp_path: Path, tokenizer: Any) -> None:
    record = chat("one", "rude", "two", "polite")
    record["messages"][1]["weight"] = 0
    found = read(jsonl(tmp_path / "a.jsonl", record), tokenizer)
    assert shown(tokenizer, found.train.records[0]).count("⟦") == 1
    assert f"⟦polite{EOS}⟧" in shown(tokenizer, found.train.records[0])
    with pytest.raises(UserError, match="message 2 of `weight` 0, which trainOn: all would train"):
        read(tmp_path / "a.jsonl", tokenizer, trainOn="all")


def test_alpacas_system_and_history_stand_in_the_prompt(tokenizer: Any) -> None:
    record = {"instruction": "Say it.", "output": "Ahoy!", "system": "Be a pirate.", "history": [["Who?", "Ada."]]}
    encoded = Encoder(tokenizer, "assistant").encode(read_sample(record, "alpaca"))
    assert shown(tokenizer, encoded) == (
        "<s>### System:\nBe a pirate.\n\n### Instruction:\nWho?\n\n### Response:Ada.\n\n"
        f"### Instruction:\nSay it.\n\n### Response:⟦Ahoy!{EOS}⟧"
    )


def test_sharegpts_system_and_calls_are_messages() -> None:
    calls = json.dumps({"name": "weather", "arguments": {"city": "Paris"}})
    turns = [("human", "How warm is it?"), ("function_call", calls), ("observation", "21"), ("gpt", "21 degrees")]
    conversations = [{"from": sender, "value": value} for sender, value in turns]
    sample = read_sample({"system": "Be brief.", "conversations": conversations}, "sharegpt")
    system = {"role": "system", "content": "Be brief."}
    assert sample == read_sample({"messages": [system, *CALLING]}, "messages")


def test_unknown_fields_are_named_once(tmp_path: Path, tokenizer: Any) -> None:
    record = chat("a", "b", source="web")
    record["messages"][0]["id"] = 3
    found = read(jsonl(tmp_path / "a.jsonl", record, record), tokenizer)
    named = "fields that the format messages does not have are not trained on: `messages[].id`, `source`"
    assert found.warnings == (named,)


def test_a_tables_nulls_are_absent_at_every_depth(tmp_path: Path, tokenizer: Any) -> None:
    other = {"type": "function", "function": {"name": "mail", "arguments": {"to": "Ada", "subject": "hello"}}}
    records = [{"messages": CALLING}, {"messages": [CALLING[0], {**CALLING[1], "tool_calls": [other]}, *CALLING[2:]]}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = texts(tokenizer, read(jsonl(tmp_path / "a.jsonl", *records), tokenizer, QWEN3))
    assert texts(tokenizer, read(tmp_path / "a.parquet", tokenizer, QWEN3)) == expected


# --- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16 .* and not UTF-8; save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "is UTF-16 .* and not UTF-8; save it as UTF-8"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), "holds gzip data; give it a name that ends in .gz"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer.*git lfs pull"),
        ("a.json", b"[" * 200_000, "a.json is nested too deeply"),
        ("a.json", b'[{"text": NaN}]', "a.json: line 1 is not valid JSON: NaN is no value of JSON"),
        ("a.jsonl", b'{"text": "a", "b": Infinity}', "line 1 is not valid JSON: Infinity is no value of JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "line 1 is nested too deeply"),
        ("a.csv", b"text,text\na,b\n", "has the column `text` more than once; rename or remove one"),
        ("a.csv", b"text,\na,b\n", "column 2 of the header has no name"),
        ("a.csv", b"text,a\xf1o\na,b\n", "line 1 is not UTF-8"),
        ("a.csv", b'"text,b\na,b\n', "line 1 is not valid CSV"),
    ],
)
def test_a_file_that_is_something_else_is_refused_in_words(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, tokenizer, format="text")


def test_windows_files_and_long_lines_are_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext\r\n"two\r\nlines"\r\n')
    assert texts(tokenizer, read(tmp_path / "a.csv", tokenizer, format="text")) == [f"<s>two\r\nlines{EOS}"]
    path = jsonl(tmp_path / "a.jsonl", {"text": "word " * 200_000}, {"text": "short"})
    assert read(path, tokenizer, format="text", tooLong="drop").train.dropped == 1
    with pytest.raises(UserError, match=r"line 1 has more than 2048 tokens"):
        read(path, tokenizer, format="text")


def test_a_long_text_is_cut_where_its_whole_would_be(tmp_path: Path, tokenizer: Any) -> None:
    said = " ".join(f"palabra{number}ñ" for number in range(3000))
    path = jsonl(tmp_path / "a.jsonl", chat("a", said))
    training = TrainingSpec(sequence_length=64)
    (cut,) = read(path, tokenizer, training=training, tooLong="truncate").train.records
    (whole,) = read(path, tokenizer, training=TrainingSpec(sequence_length=1 << 16)).train.records
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:64]
    assert cut.labels.tolist() == whole.labels.tolist()[:64]


class CountingTokenizer:
    """A tokenizer that counts the messages that it renders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.rendered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        self.rendered += len(messages)
        return self._tokenizer.apply_chat_template(messages, **options)


def test_each_message_is_rendered_a_bounded_number_of_times(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    for turns in (20, 800):
        counting = CountingTokenizer(tokenizer)
        sample = read_sample(chat(*(f"turn {number}" for number in range(2 * turns))), "messages")
        renderer = ChatRenderer(counting, "assistant", warn=pytest.fail)  # the one that LimitedRenderer runs elsewhere
        text = renderer.text(sample)
        start, end = renderer.render(sample, text).contexts[-1].spans[-1]
        assert text[start:end] == f"turn {2 * turns - 1}{EOS}"
        assert 0 < counting.rendered < 8 * 2 * turns


# --- templates


def test_the_names_that_the_contract_knows_are_templates(tokenizer: Any) -> None:
    assert tuple(NAMED_TEMPLATES) == CHAT_TEMPLATE_NAMES
    assert named_template("{{ messages }}") == "{{ messages }}"
    assert named_template(None) is None
    with pytest.raises(
        UserError, match="neither the text of a Jinja template nor a name of one; known names are chatml"
    ):
        named_template("templates/chat.jinja")
    tokenizer.chat_template = named_template("chatml")
    refuse_useless_template(tokenizer)


@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3"])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_once(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = named_template(name)
    with pytest.raises(UserError, match=r"the chat template ends a turn .* would not learn to stop"):
        refuse_useless_template(tokenizer)


def test_a_template_that_writes_nothing_of_what_is_said_is_refused_once(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}hello"
    with pytest.raises(UserError, match=r"does not write what messages say: .* '<s>hello'; give a Jinja template"):
        refuse_useless_template(tokenizer)


def test_an_end_that_is_written_between_turns_is_appended_to_the_last(tmp_path: Path, tokenizer: Any) -> None:
    template = CHATML.replace(
        "+ '<|im_end|>' + '\\n'", "+ ('' if loop.last and not add_generation_prompt else '<|im_end|>\\n')"
    )
    assert template != CHATML
    found = read(jsonl(tmp_path / "a.jsonl", chat("a", "b", "c", "d")), tokenizer, template)
    assert shown(tokenizer, found.train.records[0]).endswith(f"assistant\n⟦d{EOS}⟧")


def test_a_mark_that_closes_before_the_end_of_the_turn_has_the_end_as_well(tmp_path: Path, tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token = "<unk>"
    try:
        found = read(jsonl(tmp_path / "a.jsonl", chat("a", "b")), tokenizer, template)
    finally:
        tokenizer.eos_token = EOS
    assert f"⟦b{EOS}⟧" in shown(tokenizer, found.train.records[0])


def test_a_prompt_that_opens_a_thought_is_warned_of(tmp_path: Path, tokenizer: Any) -> None:
    template = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
    found = read(jsonl(tmp_path / "a.jsonl", chat("a", "b")), tokenizer, template)
    assert f"assistant\n⟦b{EOS}⟧" in shown(tokenizer, found.train.records[0])
    assert "prompt for an answer ends with '<think>', but it writes turns without" in found.warnings[0]


def test_a_prompt_that_writes_an_empty_thought_is_what_turns_are_trained_after(tmp_path: Path, tokenizer: Any) -> None:
    template = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
    found = read(jsonl(tmp_path / "a.jsonl", chat("a", "b", "c", "d")), tokenizer, template)
    assert [
        f"</think>\n\n⟦{said}{EOS}⟧\n" in shown(tokenizer, record)
        for said, record in zip("bd", found.train.records, strict=True)
    ] == [True, True]
    assert arrange(found.train, TrainingSpec()) == [[0, 1]], "contexts of a chat keep their order"


def test_completion_looks_at_the_last_turn_alone(tmp_path: Path, tokenizer: Any) -> None:
    record = chat("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
    found = read(jsonl(tmp_path / "a.jsonl", record), tokenizer, QWEN3, trainOn="completion")
    (only,) = found.train.records
    assert shown(tokenizer, only).count("⟦") == 1
    assert shown(tokenizer, only).endswith(f"⟦<think>\ny\n</think>\n\nd{EOS}⟧\n")


# --- what is said about it


def test_data_that_can_hardly_be_learnt_from_is_warned_of(tmp_path: Path, tokenizer: Any) -> None:
    training = TrainingSpec(sequence_length=64)
    records = [{"prompt": "x y z " * 9, "completion": "long " * 60} for _ in range(10)]
    path = jsonl(tmp_path / "a.jsonl", *records)
    found = read(path, tokenizer, training=training, format="prompt-completion", tooLong="truncate", evalFraction="0.2")
    cut, overlapping = data_warnings(found.train, found.evaluation)
    assert "10 of" in cut
    assert "raise spec.training.sequenceLength" in cut
    assert f"{len(found.evaluation.records)} evaluation records are training records" in overlapping
    masked = read(
        jsonl(tmp_path / "b.jsonl", {"prompt": "x y z " * 300, "completion": "a"}),
        tokenizer,
        format="prompt-completion",
    )
    (few,) = data_warnings(masked.train, masked.evaluation)
    assert "of the tokens carry loss" in few


# --- what is read is bounded, whatever its size compressed


def gzipped(path: Path, pieces: int, piece: bytes) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(pieces):
            file.write(piece)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl.gz", r"a\.jsonl\.gz: line 1 is longer than 64 MiB; split its record"),
        ("a.csv.gz", r"a\.csv\.gz: line 1 is longer than 64 MiB"),
        ("a.json.gz", r"a\.json\.gz: line 1 is not valid JSON"),
    ],
)
def test_a_small_file_that_unpacks_without_end_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    bomb = gzipped(tmp_path / name, 600, b"x" * (1 << 20))
    assert bomb.stat().st_size < 4 << 20
    records = Records(f"file://{bomb}", split="train", scratch=tmp_path, field="spec.dataset.source")
    with pytest.raises(UserError, match=expected):
        list(records.read())


def test_an_array_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    """White space is passed over, and a record has the bound of a line."""
    blank, endless = gzipped(tmp_path / "a.json.gz", 600, b" " * ((1 << 20) - 1) + b"\n"), tmp_path / "b.json.gz"
    filler = gzipped(tmp_path / "filler.gz", 600, b"x" * (1 << 20))
    endless.write_bytes(gzip.compress(b'[{"text": "a"},\n{"text": "', mtime=0) + filler.read_bytes())
    tracemalloc.start()
    try:
        assert (
            list(Records(f"file://{blank}", split="train", scratch=tmp_path, field="spec.dataset.source").read()) == []
        )
        with pytest.raises(UserError, match="record that begins on line 2 is longer than"):
            list(Records(f"file://{endless}", split="train", scratch=tmp_path, field="spec.dataset.source").read())
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


def test_a_million_nested_lists_are_a_sentence(tmp_path: Path) -> None:
    line, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    line.write_bytes(b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}")
    array.write_bytes(b"[" * 10**6 + b"]" * 10**6)
    [bad] = Records(f"file://{line}", split="train", scratch=tmp_path, field="spec.dataset.source").read()
    assert isinstance(bad, BadRecord)
    assert bad.problem == "is nested too deeply to be read"
    with pytest.raises(UserError, match="nested too deeply to be read"):
        list(Records(f"file://{array}", split="train", scratch=tmp_path, field="spec.dataset.source").read())
