"""Spec in, adapter in the registry out, on a real pretrained model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.api.job import QLoRAJob
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import EXAMPLE, medical_job

pytestmark = pytest.mark.timeout(1800)  # real training, also on a machine that is busy with other things

MARGIN = 0.5
"""Nats by which held-out loss must fall in the few steps of this test; measured falls are about twice that."""
STEPS = 16
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
    heldout = EXAMPLE / "heldout.jsonl"
    command = [sys.executable, "-I", str(script), settings.tracking_uri, str(result.model_uri)]
    answer = subprocess.run([*command, str(pretrained), str(heldout)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(result.eval_loss, abs=ROUNDING)
    assert found["has_signature"]


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


def test_the_adapter_downloads_verified(done: JobHandle, tmp_path: Path) -> None:
    folder = done.adapter(tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in folder.iterdir()}


def test_the_same_work_is_not_prepared_twice(client: Client, done: JobHandle, pretrained: Path) -> None:
    handle = client.submit(medical_job("again", pretrained, steps=2))
    job: QLoRAJob = handle.wait(timeout_seconds=600)
    assert job.status.prepared is not None
    assert done.status().prepared is not None
    assert job.status.prepared.digest == done.status().prepared.digest
