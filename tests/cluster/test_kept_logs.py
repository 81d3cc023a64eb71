"""Logs outlive pods: what a stage wrote is read when the cluster has nothing of it any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.job import QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.cli.main import app
from tests.builders import NOW, ON_THE_HUB, make_attempt, submitted_job
from tests.cluster.control_plane import CONTEXT, ControlPlane
from tests.cluster.resources import clear
from tests.trainer.test_outcome import make_task, run_trainer


def test_logs_outlive_pods_and_are_read_by_their_attempt(
    cluster: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is the real program, which has ended; of its pod there is nothing."""
    store = tmp_path / "store"
    task = make_task(store, stage="prepare").model_copy(update={"attempt": 1})
    run_trainer(tmp_path, "prepare", task.model_dump_json(by_alias=True))
    api = cluster.api()
    clear(api)
    jobs = KubernetesStore(api)
    ended = make_attempt(stage="prepare", number=1, reason=Reason.USER_ERROR, finish_time=NOW)
    later = make_attempt(stage="prepare", number=2, reason=Reason.USER_ERROR, finish_time=NOW)
    status = QLoRAJobStatus(attempts=(ended, later), attempts_total=2, store_uri=store.as_uri())
    jobs.update_status(jobs.create_job(submitted_job("job", **ON_THE_HUB)), status)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig_for(cluster.token, name="reader")))
    monkeypatch.setenv("QLORA_CONTEXT", CONTEXT)
    read = CliRunner().invoke(app, ["logs", "job", "--namespace", "team-a", "--attempt", "1"])
    assert read.exit_code == 0, read.output
    assert "there is no file file:///data.jsonl" in read.output
    assert "the stage ended with USER_ERROR" in read.output
