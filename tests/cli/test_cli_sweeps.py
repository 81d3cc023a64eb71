"""`qlora sweep` and `qlora sweeps` on a service without a controller, and the same by the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.sweep import QLoRASweep
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.main import app
from orchestrator.core.commands import CreateJob, WriteSweepStatus
from orchestrator.core.decide import decide
from orchestrator.core.snapshot import Snapshot
from tests.builders import NOW, POLICY
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    return service_that_is_up(tmp_path, monkeypatch)


def qlora(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="qlora")


def write_sweep(**spec: Any) -> None:
    """The manifest of a sweep over ranks, as people write it: numbers are numbers, files lie beside it."""
    job: dict[str, Any] = job_document()["spec"]
    job["dataset"] |= {"evalFraction": 0.1}
    space = [{"field": "adapter.rank", "choice": [8, 16, 32]}]
    document = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRASweep",
        "metadata": {"name": "ranks"},
        "spec": {"trials": 3, "parallel": 2, "job": job, "space": space, **spec},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(document))


def look(service: PaperService) -> None:
    """What a controller does about sweeps in one round."""
    store = service.store
    seen = Snapshot(now=NOW, jobs=tuple(store.list_jobs()), sweeps=tuple(store.list_sweeps()), policy=POLICY)
    for command in decide(seen):
        match command:
            case WriteSweepStatus(sweep=sweep, status=status):
                store.update_sweep_status(sweep, status)
            case CreateJob(job=job):
                store.create_job(job)
            case _:
                pass


def stored(service: PaperService) -> QLoRASweep:
    [sweep] = service.store.list_sweeps()
    return sweep


def test_a_dry_run_says_the_trials_and_stores_nothing(service: PaperService) -> None:
    write_sweep()
    result = qlora("sweep", "sweep.yaml", "--dry-run")
    assert result.exit_code == ExitStatus.OK, result.output
    first, header, *rows = result.stdout.splitlines()
    assert first == "sweep/ranks is valid; nothing was changed"
    assert header.split() == ["TRIAL", "RANK"]
    assert [row.split()[0] for row in rows] == ["ranks-0", "ranks-1", "ranks-2"]
    assert {row.split()[1] for row in rows} <= {"8", "16", "32"}
    assert service.store.list_sweeps() == []


def test_a_sweep_from_its_manifest_to_its_end(service: PaperService, tmp_path: Path) -> None:
    write_sweep()
    assert qlora("sweep", "sweep.yaml").stdout == "sweep/ranks submitted\n"
    assert stored(service).spec.job.model.source == (tmp_path / "model").as_uri(), "beside the manifest"
    assert "exists already" in qlora("submit", "sweep.yaml").stderr
    look(service)
    assert [job.metadata.name for job in service.store.list_jobs()] == ["ranks-0", "ranks-1"]
    shown = qlora("sweeps", "describe", "ranks").stdout
    assert shown.startswith("sweep/ranks: Running: 0 of 3 trials have ended\n")
    assert "ranks-1" in shown
    assert qlora("sweeps").stdout.splitlines()[1].split()[:3] == ["ranks", "3", "2"]
    assert yaml.safe_load(qlora("sweeps", "describe", "ranks", "-o", "yaml").stdout)["status"]["running"] == 2

    assert qlora("sweeps", "cancel", "ranks", "--dry-run").stdout == "sweep/ranks would be cancelled\n"
    assert not stored(service).cancelled
    assert qlora("sweeps", "cancel", "ranks").stdout == "sweep/ranks is being cancelled\n"
    for job in service.store.list_jobs():
        service.store.delete_job(job.metadata.namespace, job.metadata.name)
    for _ in range(3):
        look(service)
    finished = stored(service).status.condition(ConditionType.FINISHED)
    assert finished is not None
    assert finished.reason is Reason.CANCELLED
    assert qlora("sweeps", "cancel", "ranks").stdout.startswith("sweep/ranks is over already: Cancelled")
    assert qlora("sweeps", "delete", "ranks").stdout == "sweep/ranks deleted, and its trials with it\n"
    assert qlora("sweeps").stderr == "no sweeps in namespace default\n"
    assert qlora("sweeps", "describe", "ranks").exit_code == ExitStatus.NOT_FOUND


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"space": [{"field": "adapter.rnak", "choice": [8]}]}, "did you mean adapter.rank?"),
    ({"space": [{"field": "adapter.rank", "choice": [8, 999]}]}, "spec.space[0]: no job takes 999 as adapter.rank"),
    ({"metric": {"name": "eval/los"}}, "did you mean eval/loss?"),
    ({"job": job_document()["spec"]}, "metric eval/loss is logged only where something is held out"),
    ({"job": {"model": {"source": "file://./nowhere"}, "dataset": {"source": "file://./train.jsonl"}},
      "metric": {"name": "train/loss"}}, "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "words"), REFUSED)
def test_what_cannot_work_is_refused_by_its_field(service: PaperService, spec: dict[str, Any], words: str) -> None:
    write_sweep(**spec)
    for command in (("sweep", "sweep.yaml"), ("sweep", "sweep.yaml", "--dry-run"), ("submit", "sweep.yaml")):
        result = qlora(*command)
        assert result.exit_code == ExitStatus.INVALID
        assert words in result.stderr
    assert service.store.list_sweeps() == []
