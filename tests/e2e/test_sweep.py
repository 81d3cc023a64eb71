"""A sweep on real parts: trials that queue for one slot, a controller that is killed, and what MLflow has then."""

from __future__ import annotations

import os
import signal
import time

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.api.reasons import ConditionType
from orchestrator.controller import supervisor
from orchestrator.sdk import Client, InvalidObject
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, tiny_job
from tests.trainer.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(900)
TRIALS, STEPS = 3, 6
LEARNING_RATES = ("1e-2", "1e-3", "1e-5")


def rate_sweep() -> Document:
    """Learning rates that come apart in a few steps."""
    job: dict[str, object] = dict(tiny_job("template", tiny_model(), steps=STEPS)["spec"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    job["tracking"] = {"experiment": "rates"}
    job["evaluation"] = {"everySteps": STEPS}
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRASweep",
        "metadata": {"name": "rates"},
        "spec": {
            "job": job,
            "space": [{"field": "training.learningRate", "choice": list(LEARNING_RATES)}],
            "trials": TRIALS,
            "parallel": 2,
            "promote": "champion",
            "seed": 3,
        },
    }


def test_the_best_trial_is_named_and_promoted_though_the_controller_is_killed(
    client: Client, settings: Settings
) -> None:
    wrong = rate_sweep()
    wrong["spec"] |= {"space": [{"field": "adapter.rank", "choice": [8, 9999]}]}  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(InvalidObject, match=r"spec\.space\[0\]: no job takes 9999 as adapter\.rank"):
        client.sweep(wrong)

    client.sweep(rate_sweep())
    while not client.get_sweep("rates").status.succeeded:
        time.sleep(0.2)
    controller = supervisor.status(settings).controller_pid
    assert controller is not None
    os.kill(controller, signal.SIGKILL)

    sweep = client.wait_sweep("rates", timeout_seconds=800)
    trials = sweep.status.trials
    assert [(trial.job, trial.state) for trial in trials] == [(f"rates-{n}", "Succeeded") for n in range(TRIALS)]
    assert len({trial.parameters["training.learningRate"] for trial in trials}) > 1
    assert [job.metadata.name for job in client.list()] == [trial.job for trial in trials]

    mlflow = MlflowClient(settings.tracking_uri, settings.tracking_uri)
    experiment = mlflow.get_experiment_by_name("rates")
    assert experiment is not None
    runs = {run.info.run_name: run for run in mlflow.search_runs([experiment.experiment_id])}
    parent = runs.pop("rates")
    assert runs.keys() == {trial.job for trial in trials}, "one run a trial, however often somebody was killed"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}

    losses = {name: last_loss(mlflow, run) for name, run in runs.items()}
    best = min(sorted(losses), key=lambda name: losses[name])
    assert sweep.status.best is not None
    assert (sweep.status.best.job, sweep.status.best.value) == (best, pytest.approx(losses[best]))
    assert parent.data.tags["qlora.dev/best"] == best
    assert len(set(losses.values())) > 1
    for trial in trials:
        assert runs[trial.job].data.params["training.learningRate"] == trial.parameters["training.learningRate"]

    version = mlflow.get_model_version_by_alias("default-rates", "champion")
    assert version.tags["qlora.dev/job"] == best
    assert set(mlflow.get_registered_model("default-rates").aliases) == {"champion"}
    promoted = sweep.status.condition(ConditionType.PROMOTED)
    assert promoted is not None
    assert promoted.status == "True"

    client.delete_sweep("rates")
    assert client.list_sweeps() == []
    assert client.list() == []


def last_loss(mlflow: MlflowClient, run: Run) -> float:
    return max(mlflow.get_metric_history(run.info.run_id, "eval/loss"), key=lambda metric: metric.step).value
