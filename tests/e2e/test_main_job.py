"""Spec in, adapter in the registry out, on a real pretrained model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.api.job import QLoRAJob
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import EXAMPLE, Document, held_out, medical_job

pytestmark = pytest.mark.timeout(1800)  # real training, also on a machine that is busy with other things

MARGIN = 0.5
"""Nats by which held-out loss must fall in the few steps of this test; measured falls are about twice that."""
STEPS = 16
BASE_STEPS = 24
"""So many of two packed sequences are enough for a new end of texts to be learned; it is tens of records."""
LIMIT = 96
"""Tokens of an answer; the data's are of about half of that."""
QUESTIONS = 3
ROUNDING = 0.005
"""How far held-out losses may be apart, in nats: two bfloat16 ways through SmolLM2's thirty layers differ by up to
0.003, while an adapter of another step or a wrong mask is off by ten times as much."""


@pytest.fixture(scope="module")
def done(client: Client, pretrained: Path) -> JobHandle:
    """One finished job on SmolLM2."""
    handle = client.submit(medical_job("medical", pretrained, steps=STEPS))
    handle.wait(timeout_seconds=900)
    return handle


def test_held_out_loss_falls_by_the_margin(done: JobHandle) -> None:
    result = done.result()
    assert result.eval_loss_before is not None
    assert result.eval_loss is not None
    assert result.eval_loss < result.eval_loss_before - MARGIN


def test_the_registered_adapter_gives_the_trainers_last_loss_in_a_process_that_knows_nothing_of_us(
    done: JobHandle, settings: Settings, pretrained: Path
) -> None:
    result = done.result()
    script = Path(__file__).with_name("independent_eval.py")
    command = [sys.executable, "-I", str(script), settings.tracking_uri, str(result.model_uri)]
    answer = subprocess.run([*command, str(pretrained), str(held_out())], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(result.eval_loss, abs=ROUNDING)
    assert found["has_signature"]


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


def questions() -> list[str]:
    lines = (EXAMPLE / "heldout.jsonl").read_text().splitlines()[:QUESTIONS]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def answers_of_a_stranger(settings: Settings, model_uri: str, base: Path, rows: list[Document]) -> dict[str, Any]:
    """What a process finds that can import nothing of this project; nothing of this process's surroundings helps it."""
    script = Path(__file__).with_name("independent_answers.py")
    command = [sys.executable, "-I", str(script), settings.tracking_uri, model_uri, str(base), str(LIMIT)]
    told = "".join(f"{json.dumps(row)}\n" for row in rows)
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("QLORA_", "PYTHON"))}
    ended = subprocess.run(command, input=told, env=surroundings, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["project"] == []
    return found


def stops_by_itself(found: dict[str, Any], end: str) -> bool:
    """Whether both ways of loading end their answers; a model of this size may lose itself in one of them."""
    ended = sum(tokens < LIMIT for tokens in found["served_tokens"])
    ended_by_peft = sum(last == end for last in found["peft_ends"])
    return min(ended, ended_by_peft) >= QUESTIONS - 1


def test_the_registered_chat_model_stops_by_itself_where_nobody_knows_of_us(
    done: JobHandle, settings: Settings, pretrained: Path
) -> None:
    rows: list[Document] = [{"messages": [{"role": "user", "content": question}]} for question in questions()]
    found = answers_of_a_stranger(settings, str(done.result().model_uri), pretrained, rows)
    assert stops_by_itself(found, "<|im_end|>"), found


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Records as people tune a base model on, and how such a model is asked."""

    fields: Document
    model_fields: Document = field(default_factory=dict[str, object])
    record: Callable[[str, str], Document]
    asked: Callable[[str], Document]
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
        asked=lambda question: {"prompt": in_plain_text(question)},
        end="<|endoftext|>",
        ends=[0],
    ),
    "texts": Form(
        fields={"format": "text"},
        record=lambda question, answer: {"text": f"{in_plain_text(question)} {answer}"},
        asked=lambda question: {"prompt": in_plain_text(question)},
        end="<|endoftext|>",
        ends=[0],
    ),
    "chats in a named template": Form(
        fields={"format": "messages"},
        model_fields={"chatTemplate": "chatml"},
        record=lambda question, answer: {
            "messages": [in_a_chat(question), {"role": "assistant", "content": answer}],
        },
        asked=lambda question: {"messages": [in_a_chat(question)]},
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
    job: dict[str, Any] = medical_job(name.replace(" ", "-"), base, steps=BASE_STEPS)
    job["spec"]["dataset"] = {"source": data.as_uri(), **form.fields}
    job["spec"]["model"] |= form.model_fields
    handle = client.submit(job)
    handle.wait(timeout_seconds=900)
    saved = handle.adapter(tmp_path / "adapter") / "generation_config.json"
    assert json.loads(saved.read_text())["eos_token_id"] == form.ends
    rows = [form.asked(question) for question in questions()]
    found = answers_of_a_stranger(settings, str(handle.result().model_uri), base, rows)
    assert stops_by_itself(found, form.end), found


def test_mlflow_shows_one_finished_run_with_every_step_once(done: JobHandle, settings: Settings) -> None:
    mlflow = MlflowClient(settings.tracking_uri)
    experiment = mlflow.get_experiment_by_name("medical")
    assert experiment is not None
    runs = mlflow.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = mlflow.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))


def test_the_model_version_has_its_alias_and_card(done: JobHandle, settings: Settings) -> None:
    version = MlflowClient(settings.tracking_uri).get_model_version_by_alias("medical", "candidate")
    assert version.run_id == done.result().run_id
    assert "A LoRA adapter for" in (version.description or "")


def test_the_pages_of_the_run_show_what_it_was_made_of_and_what_came_of_it(
    done: JobHandle, settings: Settings, tmp_path: Path
) -> None:
    mlflow = MlflowClient(settings.tracking_uri)
    run = mlflow.get_run(str(done.result().run_id))
    assert mlflow.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["train.jsonl", "heldout.jsonl"]
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    tags = mlflow.get_logged_model(output.model_id).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "medical", "version": "1"}]
    assert run.data.tags["mlflow.note.content"].startswith("# medical")
    assert (run.data.params["training.maxSteps"], run.data.params.get("training.epochs")) == (str(STEPS), None)
    table = json.loads(Path(mlflow.download_artifacts(run.info.run_id, "data/records.json", str(tmp_path))).read_text())
    text, tokens, supervised = table["data"][0]
    assert text.startswith("<|im_start|>system")
    assert text.rstrip().endswith("<|im_end|>⟧")
    assert 0 < supervised < tokens
    in_training_tab = sorted(name for name in run.data.metrics if not name.startswith("system/"))
    assert in_training_tab[0] == "eval/loss", "charts are sorted by name, and the first one is a loss"


def test_the_adapter_downloads_verified(done: JobHandle, tmp_path: Path) -> None:
    folder = done.adapter(tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in folder.iterdir()}


def test_the_same_work_is_not_prepared_twice(client: Client, done: JobHandle, pretrained: Path) -> None:
    handle = client.submit(medical_job("again", pretrained, steps=2))
    job: QLoRAJob = next(job for job in handle.watch(600) if job.status.prepared or job.status.finish_time)
    handle.cancel()
    assert job.status.prepared is not None
    assert done.status().prepared is not None
    assert job.status.prepared.digest == done.status().prepared.digest
    handle.wait(timeout_seconds=600)
