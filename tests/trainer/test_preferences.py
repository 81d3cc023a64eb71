"""Preferences from a file to rows: read as TRL reads them, paired in rows, or refused with what to do."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from pydantic import ValidationError
from qlora_trainer import prepare
from qlora_trainer.data.dataset import ReadDataset, arrange, read_dataset
from qlora_trainer.data.reader import Records
from qlora_trainer.outcome import UserError
from tiny_model import BOS, EOS, TURN_START, save_tokenizer, tiny_model

from orchestrator.api.job import DatasetSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.task import StageTask

ASKED, GOOD, BAD = "What is the capital of France?", "Paris.", "Lyon, I think."
DPO = {"objective": {"type": "dpo"}}


def user(content: Any = ASKED) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = GOOD, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


TEXTS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant(BAD)]}
IMPLICIT = {"chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]}
OPENAI = {
    "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant()],
    "non_preferred_output": [assistant(BAD)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("preferences")))


def read(path: Path, tokenizer: Any, *records: Any, length: int = 256, **fields: Any) -> ReadDataset:
    path /= "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = DatasetSource.model_validate({"source": path.as_uri(), "format": "preference", **fields})
    source = Records(dataset.source, split="train", scratch=path.parent, field="spec.dataset.source")
    return read_dataset(source, tokenizer, dataset, TrainingSpec.model_validate({"sequence_length": length, **DPO}))


def sides(found: ReadDataset, tokenizer: Any) -> list[tuple[str, str]]:
    """The context and what carries loss, of each record in turn."""
    told: list[tuple[str, str]] = []
    for record in found.train.records:
        supervised = record.labels >= 0
        assert not (supervised[:-1] & ~supervised[1:] & (record.labels[1:] >= 0)).any(), "one stretch"
        told.append((tokenizer.decode(record.input_ids[~supervised]), tokenizer.decode(record.input_ids[supervised])))
    return told


ASKED_TEXT = f"{BOS}{TURN_START}user\n{ASKED}{EOS}\n{TURN_START}assistant\n"
CHATS = [(f"{ASKED_TEXT}\n", GOOD + EOS), (f"{ASKED_TEXT}\n", BAD + EOS)]
READ: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "texts": (TEXTS, [(f"{BOS}2 + 2 =", f" 4{EOS}"), (f"{BOS}2 + 2 =", f" 5{EOS}")]),
    "texts, implicit prompt": (
        {"chosen": "2 + 2 = four", "rejected": "2 + 2 = six"},
        [(f"{BOS}2 + 2 =", f" four{EOS}"), (f"{BOS}2 + 2 =", f" six{EOS}")],
    ),
    "a chat": (CHAT, CHATS),
    "a chat, implicit prompt": (IMPLICIT, CHATS),
    "a chat in the cells of a table": ({name: json.dumps(value) for name, value in CHAT.items()}, CHATS),
    "a prompt as text, that chats repeat": ({"prompt": ASKED, **IMPLICIT}, CHATS),
    "a chat of OpenAI's": (OPENAI, CHATS),
    "fields that others have": ({**CHAT, "tools": None, "score_chosen": 3.5, "prompt_id": "x"}, CHATS),
}


@pytest.mark.parametrize("what", READ)
def test_it_is_read_as_trl_reads_it(tmp_path: Path, tokenizer: Any, what: str) -> None:
    record, expected = READ[what]
    found = read(tmp_path, tokenizer, record)
    assert sides(found, tokenizer) == expected
    assert found.train.samples == 1
    assert found.chats == ("chat" in what or "fields" in what)


def test_what_is_no_field_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (warning,) = read(tmp_path, tokenizer, {**CHAT, "score": 1, "chosen": [assistant(id=3)]}).warnings
    assert warning.endswith("not trained on: `chosen[].id`, `score`")


REFUSED: dict[str, tuple[Any, str]] = {
    "other data": ({"messages": [user(), assistant()]}, "has no field `chosen`.* as of the format messages"),
    "half": ({"prompt": "a", "chosen": "b"}, "has no field `rejected`"),
    "null": ({**TEXTS, "rejected": None}, "has a field `rejected` that is null"),
    "the same texts": ({**TEXTS, "rejected": " 4"}, "the same, which prefers nothing; remove the record"),
    "the same chats": ({**CHAT, "rejected": [assistant()]}, "the same, which prefers nothing; remove the record"),
    "the same, implicit": ({"chosen": [user(), assistant()], "rejected": [user(), assistant()]}, "same as the other"),
    "an empty text": ({**TEXTS, "rejected": " "}, "has an empty field `rejected`"),
    "an empty answer": ({**CHAT, "rejected": [assistant("")]}, "message 2 with empty `content` .*to `rejected`"),
    "no answer": ({**CHAT, "rejected": []}, "has a `rejected` that is the same as the other"),
    "an empty prompt": ({**TEXTS, "prompt": " "}, "has an empty field `prompt`"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "has no `prompt`"),
    "the prompt alone": ({"chosen": "a b", "rejected": "a b c"}, "has a `chosen` that is the prompt alone"),
    "kinds": ({**CHAT, "rejected": BAD}, "give both as one kind"),
    "kinds of prompts": ({**TEXTS, "prompt": [user()]}, "give all of them as one kind"),
    "another prompt": ({"prompt": "Why?", **IMPLICIT}, "has a `prompt` that is not what"),
    "no message": ({**CHAT, "chosen": ["Paris"]}, "has a message 2 that is not an object with `role`"),
    "several messages": (
        {**CHAT, "chosen": [assistant(), user(), assistant()]},
        "has a `chosen` that is 3 messages after the prompt",
    ),
    "two questions": ({"chosen": [user("a"), assistant()], "rejected": [user("b"), assistant()]}, "2 messages after"),
    "the user's answer": ({**CHAT, "rejected": [user()]}, "message 2 of role 'user' after role 'user'.*`rejected`"),
    "a turn of weight 0": ({**CHAT, "rejected": [assistant(BAD, weight=0)]}, "`rejected` with no token to train on"),
    "tools beside texts": ({**TEXTS, "tools": [{"type": "function"}]}, "`tools` beside answers that are texts"),
    "OpenAI's without its input": ({**OPENAI, "input": None}, "has no `input` that is an object"),
    "OpenAI's with half of it": ({**OPENAI, "non_preferred_output": None}, "has no field `non_preferred_output`"),
    "OpenAI's of two messages": ({**OPENAI, "preferred_output": [user(), assistant()]}, "2 messages after"),
    "OpenAI's beside TRL's": ({**OPENAI, "chosen": [assistant()]}, "has `chosen` beside `preferred_output`"),
    "OpenAI's images": (
        {**OPENAI, "input": {"messages": [user([{"type": "image_url", "image_url": {}}])]}},
        "only text can be trained on",
    ),
    "images": ({**CHAT, "images": ["a.png"]}, "only text can be trained on"),
    "a number": ({**TEXTS, "chosen": 4}, "has a field `chosen` that is not a text"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_its_place(tmp_path: Path, tokenizer: Any, what: str) -> None:
    record, said = REFUSED[what]
    with pytest.raises(UserError, match=rf"line 2 .*{said}"):
        read(tmp_path, tokenizer, CHAT, record)


def test_answers_that_are_the_same_to_the_model_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    trimming = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    trimming.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    with pytest.raises(UserError, match="the same to the model"):
        read(tmp_path, trimming, {**CHAT, "rejected": [assistant(f"{GOOD} ")]})


def cases(seed: int) -> Iterator[dict[str, Any]]:
    """Records of every kind, valid and broken, drawn."""
    draw = random.Random(seed)
    values: list[Any] = [None, "", " ", "a", "a b", [], [user()], [assistant()], [user(), assistant()], [{}], 3, {}]
    for _ in range(60):
        record = {name: draw.choice(values) for name in ("prompt", "chosen", "rejected", "tools")}
        yield {name: value for name, value in record.items() if draw.random() < 0.9}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_record_is_it_is_a_pair_or_refused(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    for record in cases(seed):
        refused: UserError | None = None
        try:
            found = read(tmp_path, tokenizer, record)
        except UserError as error:
            refused = error
        if refused is not None:
            assert "1 of 1 records cannot be used: line 1 " in str(refused)
            continue
        (chosen, of_chosen), (rejected, of_rejected) = sides(found, tokenizer)
        assert chosen == rejected, "one prompt"
        assert of_chosen != of_rejected
        assert of_chosen
        assert of_rejected


def test_chats_need_a_template_and_texts_do_not(tmp_path: Path, tokenizer: Any) -> None:
    bare = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    assert len(read(tmp_path, bare, TEXTS).train.records) == 2
    with pytest.raises(UserError, match="answers are messages, but the model has no chat template"):
        read(tmp_path, bare, CHAT)
    bare.chat_template = "{{ 'nothing' }}"
    with pytest.raises(UserError, match="the chat template does not write what messages say"):
        read(tmp_path, bare, CHAT)


def test_a_pair_is_as_long_as_both_of_its_answers(tmp_path: Path, tokenizer: Any) -> None:
    tokens = read(tmp_path, tokenizer, CHAT).train.tokens
    assert read(tmp_path, tokenizer, CHAT, length=tokens).train.tokens == tokens
    with pytest.raises(UserError, match=rf"has {tokens} tokens in both answers.*set spec.dataset.tooLong to drop$"):
        read(tmp_path, tokenizer, CHAT, length=tokens - 1)
    with pytest.raises(UserError, match="has more than 20 tokens in both answers, each with its prompt spec"):
        read(tmp_path, tokenizer, {**CHAT, "prompt": [user("word " * 5000)]}, length=20)
    found = read(tmp_path, tokenizer, CHAT, TEXTS, length=tokens - 1, tooLong="drop")
    assert (found.train.dropped, found.train.samples) == (1, 1)


@pytest.mark.parametrize("rows", [0, 112])
@pytest.mark.parametrize("packing", [True, False])
def test_pairs_stay_together(tmp_path: Path, tokenizer: Any, packing: bool, rows: int) -> None:
    drawn = random.Random(0)
    records = [{**TEXTS, "chosen": " a" * drawn.randrange(1, 40), "rejected": f" {number}"} for number in range(50)]
    split = read(tmp_path, tokenizer, *records, length=128).train
    training = TrainingSpec.model_validate({"packing": packing, "sequence_length": 128, **DPO})
    found = arrange(split, training, pairs=True, fewest_rows=rows)
    assert sorted(record for row in found for record in row) == list(range(100))
    chosen = [record for row in found for record in row[0::2]]
    assert sorted(chosen) == list(range(0, 100, 2))
    assert [record for row in found for record in row[1::2]] == [record + 1 for record in chosen]
    assert max(sum(len(split.records[record].input_ids) for record in row) for row in found) <= 128
    if not packing:
        assert chosen == list(range(0, 100, 2))
    assert len(found) == 50 if rows or not packing else len(found) < 50


def make_task(store: Path, records: list[Any], **dataset: Any) -> StageTask:
    path = store.parent / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = {
        "model": {"source": f"file://{tiny_model()}"},
        "dataset": {"source": path.as_uri(), "format": "preference", "evalFraction": "0.2", **dataset},
        "training": {"sequenceLength": 128, "globalBatchSize": 2, **DPO},
    }
    return StageTask(
        stage="prepare",
        namespace="team-a",
        job="pairs",
        uid="0001",
        attempt=1,
        spec=QLoRAJobSpec.model_validate(spec),
        store_uri=f"file://{store}",
    )


@pytest.mark.parametrize(("rate", "warned"), [("2e-4", True), ("5e-5", False)])
def test_a_learning_rate_of_other_records_is_warned_of(tmp_path: Path, rate: str, warned: bool) -> None:
    records = [{**CHAT, "prompt": [user(f"Say {number}")]} for number in range(20)]
    task = make_task(tmp_path / "store", records)
    training = task.spec.training.model_copy(update={"learning_rate": rate})
    task = task.model_copy(update={"spec": task.spec.model_copy(update={"training": training})})
    first = prepare.run(task)
    assert sum("spec.training.learningRate is 2e-4" in each for each in first.warnings) == warned
    again = prepare.run(task.model_copy(update={"attempt": 2}))
    assert again.warnings == first.warnings, "of prepared data that is found"


def test_prepare_writes_pairs(tmp_path: Path) -> None:
    records = [{**CHAT, "prompt": [user(f"Say {number}")]} for number in range(20)]
    result = prepare.run(make_task(tmp_path / "store", records))
    assert (result.train_records, result.train_records + result.eval_records) == (result.train_sequences, 20)
    assert result.chats
    assert result.eval_records >= 1
    folder = Path(result.uri.removeprefix("file://"))
    for name, count in (("train", result.train_records), ("eval", result.eval_records)):
        rows = parquet.read_table(folder / f"{name}.parquet").to_pylist()
        assert sum(row["position_ids"].count(0) for row in rows) == 2 * count
    shown = json.loads((folder / "shown.json").read_text())["records"]
    assert [record["answer"] for record in shown] == ["chosen", "rejected"] * 3
    assert "".join(part["text"] for part in shown[0]["parts"] if part["supervised"]) == GOOD + EOS


def test_the_first_pairs_are_shown_without_preparing(tmp_path: Path) -> None:
    found = prepare.show(make_task(tmp_path / "store", [CHAT, TEXTS]), 1)
    assert [record.answer for record in found.records] == ["chosen", "rejected"]


MISMATCHED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sft with preferences": ({"format": "preference"}, {}, "go together: set both, or neither"),
    "dpo with messages": ({"format": "messages"}, DPO, "go together: set both, or neither"),
    "dpo with the default": ({}, DPO, "go together: set both, or neither"),
    "cut answers": ({"format": "preference", "tooLong": "truncate"}, DPO, "an answer that is cut"),
    "all tokens": ({"format": "preference", "trainOn": "all"}, DPO, "their answers alone"),
    "beta of sft": ({}, {"objective": {"beta": "0.2"}}, "beta is of preferences"),
    "smoothing of sft": ({}, {"objective": {"labelSmoothing": "0.1"}}, "labelSmoothing is of dpo"),
    "smoothing of orpo": (
        {"format": "preference"},
        {"objective": {"type": "orpo", "labelSmoothing": "0.1"}},
        "labelSmoothing is of dpo",
    ),
    "orpo with messages": (
        {"format": "messages"},
        {"objective": {"type": "orpo"}},
        "go together: set both, or neither",
    ),
    "no beta": ({"format": "preference"}, {"objective": {"type": "dpo", "beta": "0"}}, "beta must be above 0"),
    "half the labels": (
        {"format": "preference"},
        {"objective": {"type": "dpo", "labelSmoothing": "0.5"}},
        "labelSmoothing must be below 0.5",
    ),
    "another": ({"format": "preference"}, {"objective": {"type": "kto"}}, "Input should be 'sft', 'dpo' or 'orpo'"),
}


@pytest.mark.parametrize("what", MISMATCHED)
def test_a_spec_whose_parts_do_not_fit_is_refused(what: str) -> None:
    dataset, training, said = MISMATCHED[what]
    spec = {"model": {"source": "hf://a/b"}, "dataset": {"source": "hf://a/b", **dataset}, "training": training}
    with pytest.raises(ValidationError, match=said):
        QLoRAJobSpec.model_validate(spec)


def test_preferences_are_not_held_against_one_answer() -> None:
    spec = {
        "model": {"source": "hf://a/b"},
        "dataset": {"source": "hf://a/b", "format": "preference", "evalFraction": "0.1"},
        "training": DPO,
        "evaluation": {"generation": {}},
    }
    with pytest.raises(ValidationError, match="leave them out for preferences"):
        QLoRAJobSpec.model_validate(spec)
