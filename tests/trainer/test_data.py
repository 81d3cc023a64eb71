"""Records in, tokens out: formats, masks, packing, and what each kind of bad record is told.

What is supervised is checked by decoding it and comparing with the answers that went in; packing is checked against an
exhaustive count and against the records that went in.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from qlora_trainer.data.dataset import Split, arrange, read_dataset, write_rows
from qlora_trainer.data.encoding import EncodedRecord, Encoder
from qlora_trainer.data.formats import read_sample
from qlora_trainer.data.reader import Records
from qlora_trainer.outcome import UserError
from tiny_model import BOS, EOS, TURN_START, TokenizerKind, save_tokenizer

from orchestrator.api.job import DatasetSource, TrainingSpec
from orchestrator.api.packing import pack

EXAMPLES = Path(__file__).parents[2] / "examples" / "medical-es"
KINDS: tuple[TokenizerKind, ...] = ("byte-level", "byte-fallback")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITHOUT_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# As Mistral's: no generation prompt, a blank before the answer, contents trimmed.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
)
# As Qwen 3's: the last answer is preceded by empty thoughts, earlier ones are not.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Alpaca-like templates: words instead of special tokens, EOS at the end of an answer.
WORDS = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
# Contents backwards, and no prompt for an answer: nothing tells where one begins.
BACKWARDS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | reverse }}<|im_end|>{% endfor %}"

TURNS = [
    {"role": "system", "content": "Responde con precisión."},
    {"role": "user", "content": "¿Qué es la otitis?"},
    {"role": "assistant", "content": "La inflamación del oído. 漢字 🙂"},
    {"role": "user", "content": "¿Y la rinitis?"},
    {"role": "assistant", "content": "  La inflamación\n\nde la nariz."},
]
ANSWERS = [TURNS[2]["content"], TURNS[4]["content"]]


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_tokenizer(tmp_path_factory.mktemp(request.param), kind=request.param))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_tokenizer(tmp_path_factory.mktemp("plain")))


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode_chat(tokenizer: Any, template: str, turns: Sequence[dict[str, str]], train_on: Any) -> EncodedRecord:
    tokenizer.chat_template = template
    return Encoder(tokenizer, train_on).encode(read_sample({"messages": list(turns)}, "messages"))


def supervised_texts(tokenizer: Any, record: EncodedRecord) -> list[str]:
    """Each run of supervised tokens, decoded; label and token must agree."""
    runs: list[list[int]] = [[]]
    for token, label in zip(record.input_ids.tolist(), record.labels.tolist(), strict=True):
        if label == -100:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


# --- masks


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_MARKED, CHATML_WITHOUT_PROMPT], ids=["plain", "marked", "no-prompt"]
)
def test_every_answer_is_supervised_with_the_token_that_ends_it_and_nothing_else(tokenizer: Any, template: str) -> None:
    record = encode_chat(tokenizer, template, TURNS, "assistant")
    if template == CHATML_WITHOUT_PROMPT:  # blanks before an answer may be part of its first token
        assert [text.strip() for text in supervised_texts(tokenizer, record)] == [f"{a.strip()}{EOS}" for a in ANSWERS]
    else:
        assert supervised_texts(tokenizer, record) == [f"{answer}{EOS}" for answer in ANSWERS]


def test_completion_supervises_the_last_answer_alone(tokenizer: Any) -> None:
    for template in (CHATML, CHATML_MARKED):
        record = encode_chat(tokenizer, template, TURNS, "completion")
        assert supervised_texts(tokenizer, record) == [f"{ANSWERS[-1]}{EOS}"]


def test_all_supervises_every_token_but_the_first_which_nothing_predicts(tokenizer: Any) -> None:
    record = encode_chat(tokenizer, CHATML, TURNS, "all")
    assert record.labels.tolist() == [-100, *record.input_ids.tolist()[1:]]


def test_a_template_with_a_blank_before_trimmed_answers(tokenizer: Any) -> None:
    record = encode_chat(tokenizer, BRACKETS, TURNS[1:], "assistant")
    assert supervised_texts(tokenizer, record) == [f" {answer.strip()}{EOS}" for answer in ANSWERS]


def test_a_template_that_writes_the_last_answer_differently(tokenizer: Any) -> None:
    record = encode_chat(tokenizer, THINKING, TURNS, "assistant")
    # After the prompt for an answer the model itself writes its thoughts, empty or not, and it meets each answer last.
    assert supervised_texts(tokenizer, record) == [f"<think>\n\n</think>\n\n{answer}{EOS}" for answer in ANSWERS]
    first, second = record.split()
    assert tokenizer.decode(first.input_ids).endswith(f"<think>\n\n</think>\n\n{ANSWERS[0]}{EOS}\n")
    assert f"assistant\n{ANSWERS[0]}{EOS}" in tokenizer.decode(second.input_ids)


def test_a_template_of_words_whose_prompt_ends_where_the_answers_blank_begins(tokenizer: Any) -> None:
    record = encode_chat(tokenizer, WORDS, TURNS, "assistant")
    assert supervised_texts(tokenizer, record) == [f" {answer}{EOS}" for answer in ANSWERS]


def test_an_answer_that_cannot_be_told_exactly_is_refused(byte_level: Any) -> None:
    with pytest.raises(ValueError, match=r"message 3\) that cannot be told exactly .* {% generation %}"):
        encode_chat(byte_level, BACKWARDS, TURNS, "assistant")


def test_an_answer_that_the_template_leaves_out_is_refused(byte_level: Any) -> None:
    template = "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"message 3 .*`content`, which the chat template does not write"):
        encode_chat(byte_level, template, TURNS, "assistant")


def test_tokens_are_those_of_inference(tokenizer: Any) -> None:
    """The model is trained on what it will see: transformers' own tokens of prompt and conversation."""
    record = encode_chat(tokenizer, CHATML, TURNS, "assistant")
    assert record.input_ids.tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)
    prompt = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    assert record.input_ids.tolist()[: len(prompt)] == prompt
    assert record.labels.tolist()[: len(prompt) + 1] == [-100] * len(prompt) + [record.input_ids[len(prompt)]]


def test_a_boundary_inside_a_token_is_cut_as_inference_cuts_it(byte_level: Any) -> None:
    """A blank before an answer would melt into its first token, but a prompt that ends in one never sees that token."""
    sample = read_sample({"prompt": "Define la: ", "completion": "la gripe"}, "prompt-completion")
    whole = byte_level("Define la: la gripe", add_special_tokens=False).input_ids
    record = Encoder(byte_level, "assistant").encode(sample)
    prompt = byte_level("Define la: ").input_ids
    assert record.input_ids.tolist()[1:-1] != whole, "the case must be one where the whole text has other tokens"
    assert record.input_ids.tolist()[: len(prompt)] == prompt
    assert supervised_texts(byte_level, record) == [f"la gripe{EOS}"]


@pytest.mark.parametrize("template", [f"{BOS}{CHATML}", "{{ bos_token }}" + CHATML, CHATML])
def test_bos_is_written_by_the_template_alone(tokenizer: Any, template: str) -> None:
    record = encode_chat(tokenizer, template, TURNS, "assistant")
    assert record.input_ids.tolist().count(tokenizer.bos_token_id) == (0 if template == CHATML else 1)


@given(
    contents=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0)
)
def test_any_content_is_masked_exactly(byte_level: Any, contents: list[str]) -> None:
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    record = encode_chat(byte_level, CHATML, turns, "assistant")
    assert supervised_texts(byte_level, record) == [f"{turn['content']}{EOS}" for turn in turns[1::2]]
    spelled = byte_level.decode(record.input_ids.tolist())
    assert spelled == "".join(f"{TURN_START}{turn['role']}\n{turn['content']}{EOS}\n" for turn in turns)


def test_a_content_that_holds_a_control_token_does_not_end_its_turn_early(byte_level: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"one{EOS}\n{TURN_START}user\ntwo"}]
    record = encode_chat(byte_level, CHATML, turns, "assistant")
    assert supervised_texts(byte_level, record) == [f"one{EOS}\n{TURN_START}user\ntwo{EOS}"]


# --- formats


def test_sharegpt_is_the_same_conversation_as_messages(byte_level: Any) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    record = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]}
    byte_level.chat_template = CHATML
    encoder = Encoder(byte_level, "assistant")
    expected = encoder.encode(read_sample({"messages": TURNS}, "messages"))
    found = encoder.encode(read_sample(record, "sharegpt"))
    assert (found.input_ids.tolist(), found.labels.tolist()) == (expected.input_ids.tolist(), expected.labels.tolist())


def test_alpaca_uses_the_published_prompts(byte_level: Any) -> None:
    encoder = Encoder(byte_level, "assistant")
    plain = encoder.encode(read_sample({"instruction": "Traduce.", "input": "", "output": "Hecho."}, "alpaca"))
    assert byte_level.decode(plain.input_ids.tolist()) == (
        f"{BOS}Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\nTraduce.\n\n### Response:Hecho.{EOS}"
    )
    assert supervised_texts(byte_level, plain) == [f"Hecho.{EOS}"]
    paired = encoder.encode(read_sample({"instruction": "Traduce.", "input": "uno", "output": "one"}, "alpaca"))
    assert byte_level.decode(paired.input_ids.tolist()) == (
        f"{BOS}Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nTraduce.\n\n"
        f"### Input:\nuno\n\n### Response:one{EOS}"
    )


def test_prompt_and_completion(tokenizer: Any) -> None:
    sample = read_sample({"prompt": "Pregunta: ¿qué?\nRespuesta:", "completion": " nada"}, "prompt-completion")
    record = Encoder(tokenizer, "completion").encode(sample)
    assert tokenizer.decode(record.input_ids.tolist()) == f"{BOS}Pregunta: ¿qué?\nRespuesta: nada{EOS}"
    assert supervised_texts(tokenizer, record) == [f" nada{EOS}"]
    whole = Encoder(tokenizer, "all").encode(sample)
    assert supervised_texts(tokenizer, whole) == [f"Pregunta: ¿qué?\nRespuesta: nada{EOS}"]


@pytest.mark.parametrize("text", ["Un texto.", f"{BOS}Un texto.", f"Un texto.{EOS}"])
def test_plain_text_has_bos_and_eos_once(tokenizer: Any, text: str) -> None:
    record = Encoder(tokenizer, "assistant").encode(read_sample({"text": text}, "text"))
    assert tokenizer.decode(record.input_ids.tolist()) == f"{BOS}Un texto.{EOS}"
    assert record.labels.tolist() == [-100, *record.input_ids.tolist()[1:]]


@pytest.mark.parametrize(
    ("form", "record", "problem"),
    [
        ("messages", {"text": "a"}, "has no field `messages`.*its fields: `text`"),
        ("messages", {"messages": []}, "has an empty field `messages`"),
        ("messages", {"messages": "hola"}, "field `messages` that is not valid JSON: Expecting value at character 1"),
        ("messages", {"messages": ["hola"]}, "message 1 that is not an object with `role` and `content`"),
        ("messages", {"messages": TURNS[2:]}, "message 1 of role 'assistant' at the beginning"),
        ("messages", {"messages": [TURNS[1], TURNS[3]]}, "message 2 of role 'user' after role 'user'"),
        ("messages", {"messages": [*TURNS[1:3], TURNS[0]]}, "message 3 of role 'system' after role 'assistant'"),
        ("messages", {"messages": TURNS[:2]}, "ends with a message of role 'user'"),
        ("messages", {"messages": [TURNS[1], {"role": "bot", "content": "a"}]}, "message 2 of role 'bot'; known are"),
        ("messages", {"messages": [TURNS[1], {"role": "assistant", "content": " "}]}, "message 2 with empty `content`"),
        ("messages", {"messages": [TURNS[1], {"role": "assistant", "content": 3}]}, "message 2 whose `content` is not"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is not text"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "turn 1 from 'alien'; known are"),
        ("sharegpt", {"conversations": [{"role": "user", "content": "a"}]}, "not an object with `from` and `value`"),
        ("alpaca", {"instruction": "a", "response": "b"}, "has no field `output`"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "a field `input` that is not a text"),
        ("prompt-completion", {"prompt": "a", "completion": ""}, "has an empty field `completion`"),
        ("text", {"text": ["a"]}, "has a field `text` that is not a text"),
    ],
)
def test_a_record_that_breaks_its_format_is_told_how(form: Any, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_sample(record, form)


# --- files


def dataset_of(path: Path, **fields: Any) -> DatasetSource:
    return DatasetSource.model_validate({"source": f"file://{path}", **fields})


def split_file(path: Path, tokenizer: Any, training: TrainingSpec | None = None, **fields: Any) -> tuple[Split, Split]:
    tokenizer.chat_template = CHATML
    dataset = dataset_of(path, **fields)
    records = Records(dataset.source, split="train", scratch=path.parent, field="spec.dataset.source")
    read = read_dataset(records, tokenizer, dataset, training or TrainingSpec())
    return read.train, read.evaluation


def conversation(number: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"¿{number}?"}, {"role": "assistant", "content": f"Sí, {number}."}]
    }


def answers(tokenizer: Any, split: Split) -> list[str]:
    return ["".join(supervised_texts(tokenizer, record)).removesuffix(EOS) for record in split.records]


def write_as(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
        return path
    text = {".jsonl": lines, ".json": json.dumps(records), ".csv": as_csv(records)}[path.suffixes[0]]
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
        for record in records
    )
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, byte_level: Any, name: str) -> None:
    train, held_out = split_file(write_as(tmp_path / name, [conversation(n) for n in range(5)]), byte_level)
    assert answers(byte_level, train) == [f"Sí, {n}." for n in range(5)]
    assert len(held_out.records) == 0


def test_a_byte_order_mark_and_empty_lines_are_no_records(tmp_path: Path, byte_level: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode() + b"\r\n\r\n" + b'{"text": "b"}')
    train, _ = split_file(path, byte_level, format="text")
    assert len(train.records) == 2


def refusal(path: Path, tokenizer: Any, training: TrainingSpec | None = None, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        split_file(path, tokenizer, training, **fields)
    return caught.value.message


def test_bad_lines_are_all_counted_and_the_first_three_named(tmp_path: Path, byte_level: Any) -> None:
    good = json.dumps({"text": "bien"}).encode()
    lines = [good, b'{"text": "a"', good, b'{"text": "\xff"}', b"[1]", good, b'{"texto": "a"}', b'{"text": ""}', b""]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert refusal(path, byte_level, format="text") == (
        f"file://{path}: 5 of 8 records cannot be used: "
        "line 2 is not valid JSON: Expecting ',' delimiter at character 14; "
        "line 4 is not UTF-8 (byte 0xff at position 11); "
        "line 5 is not a JSON object but a list; and 2 more. Correct the dataset or spec.dataset.format"
    )


def test_bad_rows_of_a_csv_file_are_named_by_the_line_they_begin_on(tmp_path: Path, byte_level: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"two\nlines",yes\nonly one\n\nlatin,se\xf1or\nempty,\ngood,yes\n')
    assert refusal(path, byte_level, format="prompt-completion").startswith(
        f"file://{path}: 3 of 5 records cannot be used: line 4 has 1 fields where the header has 2; "
        "line 6 is not UTF-8 (byte 0xf1 at position 9); line 7 has an empty field `completion`. "
    )


def test_a_csv_file_with_an_open_quote_is_refused(tmp_path: Path, byte_level: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"open\nrest\n')
    assert refusal(path, byte_level, format="text").startswith(f"file://{path}: line 3 is not valid CSV: ")


def test_bad_rows_of_a_table_are_named_by_their_number(tmp_path: Path, byte_level: Any) -> None:
    path = write_as(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}, {"text": " "}])
    assert "2 of 3 records cannot be used: row 2 has no field `text`" in refusal(path, byte_level, format="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.csv", b"", "holds no records"),
        ("a.csv", b"text\n", "holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2 is not valid JSON: Expecting ':' delimiter"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "must hold one JSON array of records.*is called .jsonl"),
        ("a.json", b'{"text": "a"}', "must hold one JSON array"),
        ("a.json", b'["\n\xff"]', "line 2 is not UTF-8"),
        ("a.jsonl.gz", b"plain", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:-12], "is not a whole gzip file"),
        ("a.parquet", b"PAR1 and then nothing", "is not a whole Parquet file"),
        ("a.xlsx", b"", "is not of a known kind.*.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, byte_level: Any, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        split_file(tmp_path / name, byte_level, format="text")


def test_a_missing_file_is_named(tmp_path: Path, byte_level: Any) -> None:
    assert refusal(tmp_path / "no.jsonl", byte_level) == f"there is no file file://{tmp_path}/no.jsonl; check its path"


# --- records that are too long


def long_file(folder: Path) -> Path:
    return write_as(folder / "a.jsonl", [{"text": "x y z " * count} for count in (1, 40, 2, 30)])


def test_a_record_longer_than_a_sequence_is_named_with_the_ways_out(tmp_path: Path, byte_level: Any) -> None:
    path = long_file(tmp_path)
    tokens = len(byte_level("x y z " * 40).input_ids) + 1  # and EOS
    assert refusal(path, byte_level, TrainingSpec(sequence_length=64), format="text") == (
        f"file://{path}: line 2 has {tokens} tokens, more than spec.training.sequenceLength (64), as have 2 of 4 "
        "records in all. Raise spec.training.sequenceLength, or set spec.dataset.tooLong to truncate or to drop"
    )


def test_long_records_are_truncated_or_dropped_and_counted(tmp_path: Path, byte_level: Any) -> None:
    path, training = long_file(tmp_path), TrainingSpec(sequence_length=64)
    whole, _ = split_file(path, byte_level, format="text")
    cut, _ = split_file(path, byte_level, training, format="text", tooLong="truncate")
    assert (cut.truncated, cut.dropped) == (2, 0)
    expected = [record.input_ids.tolist()[:64] for record in whole.records]
    assert [record.input_ids.tolist() for record in cut.records] == expected
    dropped, _ = split_file(path, byte_level, training, format="text", tooLong="drop")
    assert (dropped.truncated, dropped.dropped) == (0, 2)
    assert [record.input_ids.tolist() for record in dropped.records] == [expected[0], expected[2]]


def test_a_record_whose_answer_is_truncated_away_is_dropped(tmp_path: Path, byte_level: Any) -> None:
    records = [{"prompt": "x y z " * 40, "completion": "si"}, {"prompt": "x", "completion": "si"}]
    path = write_as(tmp_path / "a.jsonl", records)
    split, _ = split_file(
        path, byte_level, TrainingSpec(sequence_length=32), format="prompt-completion", tooLong="truncate"
    )
    assert (len(split.records), split.truncated, split.dropped) == (1, 0, 1)


def test_a_dataset_of_long_records_alone_is_refused(tmp_path: Path, byte_level: Any) -> None:
    path = write_as(tmp_path / "a.jsonl", [{"text": "x y z " * 40}])
    message = refusal(path, byte_level, TrainingSpec(sequence_length=16), format="text", tooLong="drop")
    assert "all 1 records were dropped" in message


# --- holding out


def test_held_out_records_are_chosen_by_seed_and_stay_when_records_are_added(tmp_path: Path, byte_level: Any) -> None:
    def held_out(count: int, seed: int) -> set[str]:
        path = write_as(tmp_path / "a.jsonl", [conversation(n) for n in range(count)])
        train, evaluation = split_file(path, byte_level, TrainingSpec(seed=seed), evalFraction="0.2")
        both = [*answers(byte_level, train), *answers(byte_level, evaluation)]
        assert sorted(both) == sorted(f"Sí, {n}." for n in range(count)), "every record is in one of the splits"
        return set(answers(byte_level, evaluation))

    assert 20 <= len(held_out(200, seed=0)) <= 60
    assert held_out(200, seed=0) == held_out(200, seed=0)
    assert held_out(200, seed=0) != held_out(200, seed=1)
    assert held_out(200, seed=0) == {answer for answer in held_out(300, seed=0) if int(answer[4:-1]) < 200}


@pytest.mark.parametrize(("count", "fraction"), [(2, "0.0001"), (2, "0.5"), (3, "0.0001")])
def test_at_least_one_record_is_held_out_and_one_is_left(
    tmp_path: Path, byte_level: Any, count: int, fraction: str
) -> None:
    path = write_as(tmp_path / "a.jsonl", [conversation(n) for n in range(count)])
    train, evaluation = split_file(path, byte_level, evalFraction=fraction)
    assert len(evaluation.records) == 1
    assert len(train.records) == count - 1


def test_nothing_can_be_held_out_of_a_single_record(tmp_path: Path, byte_level: Any) -> None:
    path = write_as(tmp_path / "a.jsonl", [conversation(0)])
    assert "a single usable record" in refusal(path, byte_level, evalFraction="0.1")


# --- packing


def first_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """The textbook's quadratic way."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[index] <= room]
        if fitting:
            fitting[0].append(index)
        else:
            rows.append([index])
    return rows


@given(lengths=st.lists(st.integers(1, 40), max_size=60), seed=st.integers(0, 5))
def test_packing_is_first_fit_decreasing_in_an_order_by_seed(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 40, seed)
    expected = first_fit_decreasing(lengths, 40)
    assert sorted(rows) == sorted(expected)
    assert rows == pack(lengths, 40, seed)


def test_another_seed_is_another_order_of_the_same_rows() -> None:
    lengths = [random.Random(0).randint(1, 30) for _ in range(100)]
    assert pack(lengths, 40, 0) != pack(lengths, 40, 1)
    assert sorted(pack(lengths, 40, 0)) == sorted(pack(lengths, 40, 1))


def test_rows_hold_whole_records_whose_positions_restart_and_whose_boundaries_predict_nothing(
    tmp_path: Path, byte_level: Any
) -> None:
    path = tmp_path / "rows.parquet"
    training = TrainingSpec(sequence_length=256, seed=3)
    split, _ = split_file(EXAMPLES / "train.jsonl", byte_level, training)
    write_rows(path, split, arrange(split, training))
    rows = parquet.read_table(path).to_pylist()
    found = [record for row in rows for record in split_at_restarts(row)]
    expected = [(record.input_ids.tolist(), record.labels.tolist()) for record in split.records]
    assert sorted(found) == sorted(expected)
    assert all(labels[0] == -100 for _, labels in found)
    assert all(len(row["input_ids"]) <= 256 for row in rows)
    assert len(rows) < len(expected)
    # Each example is one record, so a record's number is its line's.
    numbered = zip([number for row in rows for number in row["samples"]], found, strict=True)
    assert [record for _, record in sorted(numbered)] == expected


def split_at_restarts(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """The records of a row, told by their positions alone, which must count up from 0 in each."""
    starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
    records = []
    for start, end in itertools.pairwise([*starts, len(row["position_ids"])]):
        assert row["position_ids"][start:end] == list(range(end - start))
        records.append((row["input_ids"][start:end], row["labels"][start:end]))
    return records


def test_without_packing_each_record_is_a_row_in_its_order(tmp_path: Path, byte_level: Any) -> None:
    training = TrainingSpec(packing=False)
    split, _ = split_file(write_as(tmp_path / "a.jsonl", [conversation(n) for n in range(5)]), byte_level, training)
    write_rows(tmp_path / "rows.parquet", split, arrange(split, training))
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["input_ids"] for row in rows] == [record.input_ids.tolist() for record in split.records]


def test_the_example_dataset_supervises_its_answers(tokenizer: Any) -> None:
    """Against the file itself, read with the standard library alone."""
    for name in ("train", "heldout"):
        path = EXAMPLES / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        expected = [json.loads(line)["messages"][1]["content"] for line in lines]
        split, _ = split_file(path, tokenizer)
        assert answers(tokenizer, split) == expected
