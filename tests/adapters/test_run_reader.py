"""What the page reads of a run, from a real MLflow: the job's own, and no other's."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from orchestrator.adapters.mlflow.run_reader import MAX_TABLE_BYTES, RunReader, Table
from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.api.formats import Metric
from orchestrator.api.job import QLoRAJob
from orchestrator.api.mlflow_pages import ANSWERS_PATH, SCORES_PATH
from orchestrator.errors import NotFound, TrackingUnavailable
from orchestrator.page.server import PageTracking
from tests.builders import submitted_job


def job_named(name: str) -> QLoRAJob:
    return submitted_job(name, meta={"uid": f"uid-{name}"})


def settings_in(folder: Path, uri: str = "") -> PageTracking:
    return PageTracking(
        tracking_uri=uri or f"sqlite:///{folder}/mlflow.db",
        tracking_timeout_seconds=60,
        tracking_start_seconds=90,
        artifact_root=folder / "artifacts",
    )


def test_a_run_is_read_as_it_was_written_and_by_its_own_job_alone(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    run_id = MlflowTracking(settings).ensure_run(job_named("one")).run_id
    assert run_id is not None
    client = mlflow.MlflowClient(settings.tracking_uri)
    for step in (3, 1, 2):
        client.log_metric(run_id, Metric.TRAIN_LOSS, 4.0 / step, step=step)
    client.log_metric(run_id, "eval/exact_match", 0.75, step=3)
    client.log_dict(run_id, {"columns": ["prompt", "adapter"], "data": [["2 + 2", "4"], ["null", None]]}, ANSWERS_PATH)
    client.log_text(run_id, "x" * (MAX_TABLE_BYTES + 1), SCORES_PATH)
    reader = RunReader(settings)
    found = reader.read(job_named("one"), run_id)
    assert found.curves == {"train/loss": ((1, 4.0), (2, 2.0), (3, 4.0 / 3))}
    assert found.last == {"train/loss": 4.0 / 3, "eval/exact_match": 0.75}
    assert found.answers == Table(columns=("prompt", "adapter"), rows=(("2 + 2", "4"), ("null", "None")))
    assert found.scores == Table(), "what is too long is looked at in MLflow"
    with pytest.raises(NotFound, match=r"no run .* of job team-a/two"):
        reader.read(job_named("two"), run_id)
    with pytest.raises(NotFound):
        reader.read(job_named("one"), "0" * 32)
    client.log_dict(run_id, {"columns": 7}, ANSWERS_PATH)
    with pytest.raises(TrackingUnavailable, match="does not parse"):
        reader.read(job_named("one"), run_id)


def test_an_mlflow_that_is_away_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrackingUnavailable, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
        RunReader(settings_in(tmp_path, "http://127.0.0.1:9")).read(job_named("one"), "0" * 32)
