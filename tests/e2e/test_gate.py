"""An alias with a gate, and the formats that a job publishes, on a real pretrained model.

A worse adapter does not get the alias, unless a person says so; what is published answers as the adapter does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from mlflow import MlflowClient

from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.errors import InvalidObject
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, held_out, medical_job

pytestmark = pytest.mark.timeout(3600)  # real training, also on a machine that is busy with other things

PROMPTS, ANSWER_TOKENS = 5, 24
ASKED, ASKED_TOKENS = 20, 12


def gated_job(name: str, model: Path, *, steps: int, learning_rate: str) -> Document:
    """A job that wants the alias `champion` of a model that several jobs write to."""
    job = medical_job(name, model, steps=steps, held_out_records=ASKED)
    spec = cast("dict[str, dict[str, object]]", job["spec"])
    spec["training"] |= {"learningRate": learning_rate, "warmupRatio": "0"}
    spec["evaluation"] = {
        "generation": {"prompts": PROMPTS, "maxNewTokens": ANSWER_TOKENS, "metrics": ["chrf", "exactMatch"]}
    }
    gate = {"alias": "champion", "when": [{"metric": "chrf", "over": "holder", "atLeast": "0"}], "approval": "manual"}
    spec["tracking"] |= {"registeredModel": "terms", "promote": gate}
    return job


def finished(client: Client, job: Document) -> JobHandle:
    handle = client.submit(job)
    handle.wait(timeout_seconds=1500)
    return handle


def answers(mlflow: MlflowClient, handle: JobHandle, folder: Path) -> list[dict[str, str]]:
    """The rows of the run's table, by column."""
    run_id = handle.object().status.mlflow.run_id
    assert run_id is not None
    table: dict[str, Any] = json.loads(
        Path(mlflow.download_artifacts(run_id, "answers/answers.json", str(folder))).read_text()
    )
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def outcome(handle: JobHandle) -> tuple[str, Reason]:
    found = handle.object().status.condition(ConditionType.PROMOTED)
    assert found is not None
    return found.status, found.reason


@pytest.fixture(scope="module")
def good(client: Client, pretrained: Path) -> JobHandle:
    """A job that is done, which publishes all that there is."""
    job = gated_job("good", pretrained, steps=16, learning_rate="1e-3")
    cast("dict[str, object]", job["spec"])["publish"] = {"formats": ["merged", "gguf-q8_0", "gguf-adapter"]}
    return finished(client, job)


def test_a_worse_adapter_does_not_get_the_alias(
    client: Client, settings: Settings, good: JobHandle, pretrained: Path, tmp_path: Path
) -> None:
    mlflow = MlflowClient(settings.tracking_uri, settings.tracking_uri)

    def version(alias: str) -> int:
        return int(mlflow.get_model_version_by_alias("terms", alias).version)

    assert outcome(good) == ("False", Reason.AWAITING_APPROVAL)
    assert set(mlflow.get_registered_model("terms").aliases) == {"candidate"}
    assert "the alias champion moved to version 1" in client.promote("good")
    assert outcome(good) == ("True", Reason.PROMOTED)
    assert (version("champion"), version("candidate")) == (1, 1)

    worse = finished(client, gated_job("worse", pretrained, steps=1, learning_rate="1e-6"))
    assert outcome(worse) == ("False", Reason.GATE_NOT_PASSED)
    assert (version("champion"), version("candidate")) == (1, 2)

    run = mlflow.get_run(str(worse.object().status.mlflow.run_id))
    assert run.data.metrics["eval/chrf_over_holder"] < 0
    first, second = answers(mlflow, good, tmp_path / "good"), answers(mlflow, worse, tmp_path / "worse")
    assert len(first) == len(second) == PROMPTS
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["base"] for row in first] == [row["base"] for row in second]
    assert [row["holder"] for row in second] == [row["adapter"] for row in first], "the same weights, in another job"

    with pytest.raises(InvalidObject, match=r"GateNotPassed.*--force --reason"):
        client.promote("worse")
    client.promote("worse", force=True, reason="to be seen by many")
    assert outcome(worse) == ("True", Reason.PROMOTED)
    assert version("champion") == 2
    assert (
        mlflow.get_model_version("terms", "2")
        .tags["qlora.dev/promoted/champion"]
        .startswith("forced (to be seen by many); chrf over the holder is -")
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
def test_what_is_published_answers_held_out_prompts_as_the_adapter_does(
    settings: Settings, good: JobHandle, pretrained: Path
) -> None:
    """All on the base's 16-bit weights, computed in float32; what training computed with is the base in NF4.

    As long as each next token is the same, so is the whole answer: one pass over PEFT's answer tells.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = good.result()
    assert set(found.formats) == {"merged", "gguf-q8_0", "gguf-adapter"}
    mlflow = MlflowClient(settings.tracking_uri, settings.tracking_uri)
    tags = mlflow.get_model_version("terms", str(found.model_version)).tags
    assert {name: tags[f"qlora.dev/format/{name}"] for name in found.formats} == found.formats
    folders = {name: Path(url2pathname(urlsplit(uri).path)) for name, uri in found.formats.items()}
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["merged"])

    def read(folder: Path, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    adapter = PeftModel.from_pretrained(read(pretrained), url2pathname(urlsplit(found.adapter_uri).path)).eval()
    models = {
        "merged": read(folders["merged"]),
        "gguf-q8_0": read(folders["gguf-q8_0"], gguf_file="model-q8_0.gguf"),
    }
    same: dict[str, list[bool]] = {name: [] for name in models}
    whole = dict.fromkeys(models, 0)
    for line in held_out(ASKED).read_text().splitlines():
        messages = json.loads(line)["messages"][:-1]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            answered = adapter.generate(**prompt, max_new_tokens=ASKED_TOKENS, do_sample=False)
            start = prompt["input_ids"].shape[1]
            for name, model in models.items():
                steps = (model(answered).logits[0, start - 1 : -1].argmax(-1) == answered[0, start:]).tolist()
                same[name] += steps
                whole[name] += all(steps)
    shares = {name: sum(steps) / len(steps) for name, steps in same.items()}
    print(f"same tokens: {shares}, whole answers of {ASKED}: {whole}")
    assert whole["merged"] >= ASKED - 1, "but for a tie that rounding to 16 bits decides"
    assert shares["gguf-q8_0"] >= 0.95


def test_somebody_talks_to_it(settings: Settings, good: JobHandle) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "chat", "good", "--prompt", "¿Qué es la disnea?"]
    environment = {**os.environ, "QLORA_HOME": str(settings.home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
