"""A fine-tuning job of OpenAI's as one of this service: the same where it means the same, else told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.job import QLoRAJob, TrainingSpec
from orchestrator.errors import InvalidObject
from orchestrator.sdk.manifest import parse_object
from orchestrator.sdk.openai_job import Choices, Imported, imported

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai" / "ftjob.json"
CHAT = '{"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]}\n'
REQUEST = {"model": "gpt-4.1-mini-2025-04-14", "training_file": "file-a"}
"""What a job is asked for with; all of the rest is optional."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file-a.jsonl").write_text(CHAT)
    return tmp_path


def read(job: object, folder: Path, **choices: Any) -> Imported:
    wanted = Choices(**{"model": "Qwen/Qwen2.5-0.5B-Instruct", "folder": folder, **choices})
    return imported(json.dumps(job).encode(), "ftjob.json", wanted)


def job_of(found: Imported, folder: Path) -> QLoRAJob:
    job = parse_object(found.document, folder=folder)
    assert isinstance(job, QLoRAJob)
    return job


def supervised(**hyperparameters: object) -> dict[str, object]:
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return {**REQUEST, "method": method}


def test_a_job_as_the_api_returns_it(folder: Path) -> None:
    (folder / "file-medical.jsonl").write_text(CHAT)
    found = read(json.loads(EXAMPLE.read_text()), folder)
    assert found.document == {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "medical-terms", "annotations": {"team": "terminology"}},
        "spec": {
            "model": {"source": "hf://Qwen/Qwen2.5-0.5B-Instruct"},
            "dataset": {"source": "file://./file-medical.jsonl", "format": "messages"},
            "training": {
                "epochs": "3",
                "globalBatchSize": 4,
                "packing": False,
                "learningRate": "0.00036",
                "seed": 42,
            },
        },
    }
    assert [note.partition(":")[0] for note in found.notes] == ["batch_size", "learning_rate_multiplier"]


@pytest.mark.parametrize("auto", ["auto", None])
def test_what_openai_chose_is_left_to_the_defaults_here(folder: Path, auto: object) -> None:
    names = ("n_epochs", "batch_size", "learning_rate_multiplier")
    found = read(supervised(**dict.fromkeys(names, auto)), folder)
    assert job_of(found, folder).spec.training == TrainingSpec()
    assert found.notes == (
        "n_epochs: auto; training.epochs has its default here, 3",
        "batch_size: auto; training.globalBatchSize has its default here, 16",
        "learning_rate_multiplier: auto; training.learningRate has its default here, 2e-4",
    )


def test_hyperparameters_of_before_there_were_methods(folder: Path) -> None:
    found = read({**REQUEST, "hyperparameters": {"n_epochs": 7}}, folder)
    assert job_of(found, folder).spec.training.epochs == "7"


def test_those_of_the_method_go_first(folder: Path) -> None:
    found = read({**supervised(n_epochs=2), "hyperparameters": {"n_epochs": 7}}, folder)
    assert job_of(found, folder).spec.training.epochs == "2"


def test_the_name_is_the_suffix_or_the_id(folder: Path) -> None:
    named = read({**REQUEST, "suffix": "My Model, 2nd"}, folder)
    assert named.document["metadata"] == {"name": "my-model-2nd"}
    assert 'suffix: "My Model, 2nd" became the job\'s name my-model-2nd' in named.notes
    assert read({**REQUEST, "id": "ftjob-Ab1"}, folder).document["metadata"] == {"name": "ftjob-ab1"}
    assert read(REQUEST, folder).document["metadata"] == {"name": "file-a"}


def test_what_has_no_counterpart_is_told(folder: Path) -> None:
    job = supervised(prompt_loss_weight=0.1) | {
        "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
        "metadata": {"team": "a", "two words": "b", "qlora.dev/cancel": "true"},
        "status": "succeeded",
    }
    found = read(job, folder)
    assert found.document["metadata"] == {"name": "file-a", "annotations": {"team": "a"}}
    left_out = [note for note in found.notes if note.endswith("left out")]
    assert [note.partition(":")[0] for note in left_out] == [
        "metadata.two words",
        "metadata.qlora.dev/cancel",
        "integrations",
        "method.supervised.hyperparameters.prompt_loss_weight",
    ]


def test_files_that_openai_has_are_to_be_fetched_by_their_ids(tmp_path: Path) -> None:
    found = read({**REQUEST, "validation_file": "file-b"}, tmp_path)
    dataset = job_of(found, tmp_path).spec.dataset
    assert (dataset.source, dataset.eval_source) == (
        f"file://{tmp_path}/file-a.jsonl",
        f"file://{tmp_path}/file-b.jsonl",
    )
    told = "\n".join(found.notes)
    for field, file in (("training_file", "file-a"), ("validation_file", "file-b")):
        assert (
            f"{field}: {tmp_path}/{file}.jsonl is not there; name another file with --{field.replace('_', '-')}" in told
        )
        assert f"curl https://api.openai.com/v1/files/{file}/content " in told


def test_files_may_be_elsewhere(folder: Path) -> None:
    (folder / "old.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    old = read(REQUEST, folder, training_file=str(folder / "old.jsonl"), validation_file="s3://bucket/b.jsonl")
    assert old.document["spec"] | {"training": {}} == {
        "model": {"source": "hf://Qwen/Qwen2.5-0.5B-Instruct"},
        "dataset": {
            "source": "file://./old.jsonl",
            "format": "prompt-completion",
            "evalSource": "s3://bucket/b.jsonl",
        },
        "training": {},
    }
    there = read(REQUEST, folder, training_file="s3://bucket/a.jsonl")
    assert any(note.startswith("training_file: cannot be read from here") for note in there.notes)


REFUSED: dict[str, tuple[object, str]] = {
    "preferences, beside chats": (
        {**REQUEST, "method": {"type": "dpo", "dpo": {}}},
        "method.type: dpo, but the first record .* is no preference",
    ),
    "a beta of nothing": (
        {**REQUEST, "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.0}}}},
        r"method\.dpo\.hyperparameters\.beta",
    ),
    "rewards": ({**REQUEST, "method": {"type": "reinforcement"}}, "method.type: supervised and dpo can be trained"),
    "a list of jobs": ({"object": "list", "data": [REQUEST]}, 'object: must be fine_tuning.job; found "list"'),
    "no object": ([REQUEST], "must be a fine-tuning job, as the API returns it"),
    "no training file": ({"model": "gpt-4o"}, "training_file: is required"),
    "a path for an id": ({**REQUEST, "training_file": "../a"}, "training_file: does not match"),
    "epochs in words": (supervised(n_epochs="many"), "hyperparameters.n_epochs: must be auto or a whole number"),
    "epochs in halves": (supervised(n_epochs=1.5), "hyperparameters.n_epochs: must be auto or a whole number"),
    "no epochs": (supervised(n_epochs=0), "hyperparameters.n_epochs: must be auto or at least 1; found 0"),
    "a truth for a batch": (supervised(batch_size=True), "hyperparameters.batch_size: must be"),
    "a multiplier below zero": (supervised(learning_rate_multiplier=-1), "multiplier: must be auto or at least 1e-06"),
    "a multiplier without end": (
        supervised(learning_rate_multiplier=float("inf")),
        "multiplier: must be auto or at most 1000",
    ),
    "a seed of many digits": ({**REQUEST, "seed": 2**40}, "seed: must be at most 2147483647"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_its_field(folder: Path, what: str) -> None:
    job, said = REFUSED[what]
    with pytest.raises(InvalidObject, match=rf"^ftjob\.json: .*{said}"):
        read(job, folder)


def test_a_model_is_never_guessed(folder: Path) -> None:
    with pytest.raises(InvalidObject, match=r"model: gpt-4\.1-mini-2025-04-14 cannot be had .*: --model owner/name"):
        read(REQUEST, folder, model=None)


@pytest.mark.parametrize(
    ("hyperparameters", "beta", "rate"),
    [({}, "0.1", "5e-6"), ({"beta": 0.25, "learning_rate_multiplier": 2.0, "n_epochs": 2}, "0.25", "1e-05")],
)
def test_preferences_become_dpo(folder: Path, hyperparameters: dict[str, Any], beta: str, rate: str) -> None:
    question, answer = {"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": "Eso."}
    other = {**answer, "content": "Nada."}
    record = {"input": {"messages": [question]}, "preferred_output": [answer], "non_preferred_output": [other]}
    (folder / "file-a.jsonl").write_text(json.dumps(record))
    found = read({**REQUEST, "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}, folder)
    spec = job_of(found, folder).spec
    assert spec.dataset.format == "preference"
    assert (spec.training.objective.type, spec.training.objective.beta, spec.training.learning_rate) == (
        "dpo", beta, rate,
    )  # fmt: skip
    assert any(note.startswith("beta: auto") for note in found.notes) == ("beta" not in hyperparameters)


def test_preferences_are_found_in_the_file(folder: Path) -> None:
    (folder / "file-a.jsonl").write_text('{"input": {}, "preferred_output": [], "non_preferred_output": []}')
    with pytest.raises(InvalidObject, match=r"method\.type: supervised, but the first record .* is a preference"):
        read(REQUEST, folder)
