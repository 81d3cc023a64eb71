"""An alias with a gate, on a real pretrained model: a worse adapter does not get it, unless a person says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.errors import InvalidObject
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, medical_job

pytestmark = pytest.mark.timeout(3600)  # real training, also on a machine that is busy with other things

PROMPTS = 5


def gated_job(name: str, model: Path, *, steps: int, learning_rate: str) -> Document:
    """A job that wants the alias `champion` of a model that several jobs write to."""
    job = medical_job(name, model, steps=steps)
    spec = cast("dict[str, dict[str, object]]", job["spec"])
    spec["training"] |= {"learningRate": learning_rate, "warmupRatio": "0"}
    spec["evaluation"] = {"generation": {"prompts": PROMPTS, "maxNewTokens": 24, "metrics": ["chrf", "exactMatch"]}}
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


def test_a_worse_adapter_does_not_get_the_alias(
    client: Client, settings: Settings, pretrained: Path, tmp_path: Path
) -> None:
    mlflow = MlflowClient(settings.tracking_uri, settings.tracking_uri)

    def version(alias: str) -> int:
        return int(mlflow.get_model_version_by_alias("terms", alias).version)

    good = finished(client, gated_job("good", pretrained, steps=16, learning_rate="1e-3"))
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
