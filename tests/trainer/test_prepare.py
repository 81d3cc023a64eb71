"""The prepare stage from outside: a task in, a folder in the store out, read back without the code that wrote it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from qlora_trainer import prepare
from qlora_trainer.outcome import FencedError, UserError
from qlora_trainer.storage.job_store import JobStore
from safetensors.torch import load_file, save_file
from tiny_model import EOS, build_tiny_model, tiny_model
from transformers import AutoTokenizer

from orchestrator.api.formats import PreparedManifest
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.results import PrepareResult, StageResult
from orchestrator.api.task import StageTask

EXAMPLES = Path(__file__).parents[2] / "examples" / "medical-es"
TRAIN, HELD_OUT = (f"file://{EXAMPLES / name}.jsonl" for name in ("train", "heldout"))

OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_task(store: Path, *, attempt: int = 1, model: Path | None = None, **sections: Any) -> StageTask:
    """A prepare task on the example dataset; sections of the spec may be overridden by field."""
    spec = {
        "model": {"source": f"file://{model or tiny_model()}", **sections.pop("model_fields", {})},
        "dataset": {"source": TRAIN, "evalSource": HELD_OUT, **sections.pop("dataset", {})},
        "training": {"sequenceLength": 256, **sections.pop("training", {})},
        **sections,
    }
    return StageTask(
        stage="prepare",
        namespace="team-a",
        job="medical-es",
        uid="0001",
        attempt=attempt,
        spec=QLoRAJobSpec.model_validate({key: without_none(value) for key, value in spec.items()}),
        store_uri=f"file://{store}",
    )


def without_none(section: Any) -> Any:
    """A section of the spec, if it is one, without the fields that a test has removed."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if value is not None}


def folder_of(result: PrepareResult) -> Path:
    return Path(result.uri.removeprefix("file://"))


def rows_of(result: PrepareResult, name: str) -> list[dict[str, list[int]]]:
    return parquet.read_table(folder_of(result) / name).to_pylist()


def write_dataset(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"file://{path}"


def test_the_example_dataset_is_prepared_and_its_facts_count_what_lies_there(tmp_path: Path) -> None:
    result = prepare.run(make_task(tmp_path))
    train, held_out = rows_of(result, "train.parquet"), rows_of(result, "eval.parquet")
    lines = {name: len((EXAMPLES / f"{name}.jsonl").read_bytes().splitlines()) for name in ("train", "heldout")}
    assert (result.train_records, result.eval_records) == (lines["train"], lines["heldout"])
    assert (result.train_sequences, result.eval_sequences) == (len(train), len(held_out))
    assert result.train_tokens == sum(len(row["input_ids"]) for row in train)
    assert result.supervised_tokens == sum(label != -100 for row in train for label in row["labels"])
    assert result.steps == ceil(3 * len(train) / 16)
    assert (result.truncated_records, result.dropped_records) == (0, 0)
    assert max(len(row["input_ids"]) for row in train + held_out) <= 256
    assert result.model.architecture == "LlamaForCausalLM"


def test_tied_weights_that_are_stored_twice_are_counted_twice(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", tied=True)
    assert prepare.run(make_task(tmp_path / "once", model=model)).model.tied_embeddings
    tensors = load_file(model / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file({**tensors, **head}, model / "model.safetensors", {"format": "pt"})
    assert not prepare.run(make_task(tmp_path / "twice", model=model)).model.tied_embeddings


def test_the_stored_tokenizer_reads_the_stored_rows(tmp_path: Path) -> None:
    result = prepare.run(make_task(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder_of(result))
    texts = [tokenizer.decode(row["input_ids"]) for row in rows_of(result, "eval.parquet")]
    lines = (EXAMPLES / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    joined = "\n".join(texts)
    assert all(f"<|im_start|>assistant\n{answer}{EOS}" in joined for answer in answers)
    assert tokenizer.chat_template == (tiny_model() / "chat_template.jinja").read_text()


def test_the_manifest_vouches_for_every_file(tmp_path: Path) -> None:
    result = prepare.run(make_task(tmp_path))
    folder = folder_of(result)
    manifest = PreparedManifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert manifest.result == result
    assert manifest.inputs == result.digest
    assert folder.name == result.digest.removeprefix("sha256:")[:16]
    assert {entry.name: (entry.bytes, entry.sha256) for entry in manifest.files} == {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    assert {"train.parquet", "eval.parquet", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        entry.name for entry in manifest.files
    }


def test_two_stores_hold_the_same_bytes(tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model(), tmp_path / "elsewhere")
    first = folder_of(prepare.run(make_task(tmp_path / "first")))
    second = folder_of(prepare.run(make_task(tmp_path / "second", model=moved)))
    names = sorted(path.name for path in first.iterdir() if path.name != "manifest.json")
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def test_prepared_data_is_found_again_and_only_the_steps_are_new(tmp_path: Path) -> None:
    first = prepare.run(make_task(tmp_path))
    train = folder_of(first) / "train.parquet"
    written = train.stat().st_mtime_ns, train.stat().st_ino
    again = prepare.run(make_task(tmp_path, attempt=2, training={"epochs": "1", "learningRate": "1e-5"}))
    assert (train.stat().st_mtime_ns, train.stat().st_ino) == written
    (warning,) = again.warnings
    assert warning.startswith("few steps: 1 epochs of ")
    assert again == first.model_copy(update={"steps": ceil(first.train_sequences / 16), "warnings": (warning,)})


def test_damaged_prepared_data_is_made_again(tmp_path: Path) -> None:
    first = prepare.run(make_task(tmp_path))
    train = folder_of(first) / "train.parquet"
    whole = train.read_bytes()
    train.write_bytes(whole[:-1] + b"x")
    assert prepare.run(make_task(tmp_path, attempt=2)) == first
    assert train.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"training": {"epochs": "7", "maxSteps": 5, "globalBatchSize": 2, "learningRate": "1"}}, True),
        ({"adapter": {"rank": 8}, "queue": "other"}, True),
        ({"training": {"sequenceLength": 300}}, False),
        ({"training": {"packing": False}}, False),
        ({"training": {"seed": 1}}, False),
        ({"dataset": {"trainOn": "all"}}, False),
        ({"dataset": {"source": HELD_OUT}}, False),
        ({"dataset": {"evalSource": None}}, False),
        ({"dataset": {"evalSource": None, "evalFraction": "0.1"}}, False),
        ({"model_fields": {"chatTemplate": OTHER_TEMPLATE}}, False),
    ],
)
def test_the_digest_covers_what_shapes_the_data_and_nothing_else(
    tmp_path: Path, change: dict[str, Any], same: bool
) -> None:
    first = prepare.run(make_task(tmp_path))
    second = prepare.run(make_task(tmp_path, **change))
    assert (first.digest == second.digest) == same
    assert (first.uri == second.uri) == same


def test_without_packing_the_seed_shapes_nothing(tmp_path: Path) -> None:
    digests = {prepare.run(make_task(tmp_path, training={"packing": False, "seed": s})).digest for s in (0, 1)}
    assert len(digests) == 1


def test_one_changed_character_of_the_dataset_is_another_digest(tmp_path: Path) -> None:
    data = {"format": "text", "evalSource": None}
    digests = []
    for text in ("uno", "unO"):
        source = write_dataset(tmp_path / "a.jsonl", [{"text": text}])
        digests.append(prepare.run(make_task(tmp_path / "store", dataset={"source": source, **data})).digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"epochs": "1", "globalBatchSize": 16}, 3),
        ({"epochs": "0.1", "globalBatchSize": 1}, 4),
        ({"epochs": "0.3", "globalBatchSize": 4}, 3),
        ({"epochs": "1e-5"}, 1),
        ({"epochs": "3", "maxSteps": 7}, 7),
    ],
)
def test_steps_are_counted_exactly(tmp_path: Path, training: dict[str, Any], steps: int) -> None:
    """40 sequences: 0.1 epochs of them are 4, though 0.1 + 0.1 + ... is not 1 in floating point; 0.3 x 40 / 4 is 3."""
    source = write_dataset(tmp_path / "a.jsonl", [{"text": str(number)} for number in range(40)])
    dataset = {"source": source, "format": "text", "evalSource": None}
    result = prepare.run(make_task(tmp_path / "store", dataset=dataset, training={"packing": False, **training}))
    assert result.train_sequences == 40
    assert result.steps == steps


def test_a_fraction_is_held_out_of_the_training_data(tmp_path: Path) -> None:
    whole = prepare.run(make_task(tmp_path / "a", dataset={"evalSource": None}))
    assert (whole.eval_records, whole.eval_sequences) == (0, 0)
    assert rows_of(whole, "eval.parquet") == []
    parts = prepare.run(make_task(tmp_path / "b", dataset={"evalSource": None, "evalFraction": "0.1"}))
    assert parts.train_records + parts.eval_records == whole.train_records
    assert parts.eval_records == pytest.approx(0.1 * whole.train_records, rel=0.4)


def refusal(task: StageTask) -> str:
    with pytest.raises(UserError) as caught:
        prepare.run(task)
    assert list(Path(task.store_uri.removeprefix("file://")).glob("prepared/*")) == [], "nothing is left in the store"
    return caught.value.message


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    bare = tiny_model(chat_template=None)
    message = refusal(make_task(tmp_path, model=bare))
    assert message.startswith(f"the dataset's format is messages, but file://{bare} has no chat template: ")
    assert "spec.model.chatTemplate" in message
    template = (tiny_model() / "chat_template.jinja").read_text()
    with_template = prepare.run(make_task(tmp_path, model=bare, model_fields={"chatTemplate": template}))
    assert (folder_of(with_template) / "chat_template.jinja").read_text() == template


def test_a_chat_template_that_is_not_jinja_is_refused(tmp_path: Path) -> None:
    message = refusal(make_task(tmp_path, model_fields={"chatTemplate": "{% for m in messages %}"}))
    assert message.startswith("the chat template is not valid Jinja: ")


def test_a_chat_template_that_refuses_a_record_is_quoted_with_the_line(tmp_path: Path) -> None:
    message = refusal(make_task(tmp_path, model_fields={"chatTemplate": "{{ raise_exception('no users here') }}"}))
    assert "line 1 is refused by the chat template: no users here; line 2 " in message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", vocab_size=400)
    for path in tiny_model().glob("tokenizer*"):
        shutil.copy(path, model)
    message = refusal(make_task(tmp_path / "store", model=model))
    assert "but the model has only 400; the tokenizer is another model's" in message


def test_records_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", max_position_embeddings=64)
    message = refusal(make_task(tmp_path / "store", model=model))
    assert f"file://{model} was made for 64 positions: set spec.training.sequenceLength to that" in message
    task = make_task(tmp_path / "store", model=model, training={"sequenceLength": 64}, dataset={"tooLong": "truncate"})
    assert prepare.run(task).truncated_records > 0


def test_an_attempt_that_was_overtaken_writes_nothing(tmp_path: Path) -> None:
    JobStore(f"file://{tmp_path}").take_fence(2)
    with pytest.raises(FencedError):
        prepare.run(make_task(tmp_path, attempt=1))
    assert list(tmp_path.glob("prepared/*")) == []


def test_a_claim_is_read_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PVC_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    shutil.copy(EXAMPLES / "heldout.jsonl", tmp_path / "data" / "held.jsonl")
    result = prepare.run(make_task(tmp_path / "store", dataset={"source": "pvc://data/held.jsonl", "evalSource": None}))
    assert result.train_records == len((EXAMPLES / "heldout.jsonl").read_bytes().splitlines())


def run_stage(task: StageTask, log: Path) -> tuple[int, StageResult]:
    """`python -m qlora_trainer prepare` in a process of its own, as a pod runs it."""
    environment = {
        **os.environ,
        "QLORA_TASK": task.model_dump_json(by_alias=True),
        "QLORA_TERMINATION_LOG": str(log),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "qlora_trainer", "prepare"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, StageResult.model_validate_json(log.read_bytes())


def test_as_a_process_it_answers_with_facts_or_with_the_line_to_mend(tmp_path: Path) -> None:
    task = make_task(tmp_path / "store")
    code, answer = run_stage(task, tmp_path / "log")
    assert code == 0
    assert answer.prepare == prepare.run(task)
    source = write_dataset(tmp_path / "bad.jsonl", [{"messages": []}])
    code, answer = run_stage(make_task(tmp_path / "other", dataset={"source": source}), tmp_path / "log")
    assert code == 80
    assert answer.failure is not None
    assert "bad.jsonl: 1 of 1 records cannot be used: line 1 has an empty field `messages`" in answer.failure.message


def test_what_is_likely_to_be_wrong_is_in_the_result_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"messages": [{"role": "user", "content": "¿a?"}, {"role": "assistant", "content": "b"}]}
    source = write_dataset(tmp_path / "a.jsonl", [record] * 50)
    dataset = {"source": source, "evalSource": None, "evalFraction": "0.1"}
    with caplog.at_level("INFO", logger="qlora_trainer"):
        result = prepare.run(make_task(tmp_path / "store", dataset=dataset))
    few, overlapping = result.warnings
    assert few.startswith(f"few steps: 3 epochs of {result.train_sequences} sequences in batches of 16 are ")
    assert "lower spec.training.globalBatchSize to 7 or raise spec.training.epochs" in few
    assert f"{result.eval_records} of {result.eval_records} evaluation records are training records" in overlapping
    assert set(result.warnings) <= {record.message for record in caplog.records if record.levelname == "WARNING"}
    said = "\n".join(record.message for record in caplog.records)
    assert f"⟦b{EOS}⟧" in said
    assert f"{result.steps} steps, 1 of them warm-up" in said


@pytest.mark.parametrize("asked", [{"keepBest": True}, {"earlyStoppingPatience": 2}])
def test_what_goes_by_evaluations_is_warned_of_where_there_are_none(tmp_path: Path, asked: dict[str, object]) -> None:
    store, nothing = tmp_path / "store", {"evalSource": None}
    for attempt in (1, 2):  # the second finds what is prepared
        result = prepare.run(make_task(store, attempt=attempt, dataset=nothing, evaluation=asked))
        assert [each for each in result.warnings if each.startswith("nothing is held out: spec.evaluation.keepBest")]
    again = prepare.run(make_task(store, attempt=3, dataset=nothing))
    assert again.uri == result.uri, "the same data"
    assert not [each for each in again.warnings if each.startswith("nothing is held out")]


def test_a_template_is_taken_by_its_name(tmp_path: Path) -> None:
    result = prepare.run(make_task(tmp_path, model_fields={"chatTemplate": "chatml"}))
    template = (folder_of(result) / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    assert template != (tiny_model() / "chat_template.jinja").read_text()


# --- answers to held-out prompts


def asking(store: Path, generation: dict[str, Any], **sections: Any) -> StageTask:
    return make_task(store, evaluation={"generation": generation}, **sections)


def test_answers_change_nothing_about_the_data(tmp_path: Path) -> None:
    plain, asked = prepare.run(make_task(tmp_path / "plain")), prepare.run(asking(tmp_path / "asked", {}))
    assert (plain.digest, plain.steps) == (asked.digest, asked.steps)


@pytest.mark.parametrize("pattern", ["(", "(?=a)", r"(a)\1"])
def test_a_pattern_that_is_none_is_refused_before_anything_is_read(tmp_path: Path, pattern: str) -> None:
    task = asking(tmp_path, {"metrics": ["regex"], "regex": pattern})
    with pytest.raises(UserError, match=r"^spec\.evaluation\.generation\.regex: .*look-around"):
        prepare.run(task)
    assert not any(tmp_path.iterdir())


def test_held_out_records_whose_answers_were_cut_cannot_be_asked(tmp_path: Path) -> None:
    held_out = write_dataset(tmp_path / "eval.jsonl", [{"prompt": "a", "completion": "b " * 300}])
    train = write_dataset(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    dataset = {"source": train, "evalSource": held_out, "format": "prompt-completion", "tooLong": "truncate"}
    task = asking(tmp_path / "store", {}, dataset=dataset)
    with pytest.raises(UserError, match=r"^spec\.evaluation\.generation: no held-out record has a prompt"):
        prepare.run(task)
