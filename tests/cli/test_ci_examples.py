"""The examples for CI and workflows: their shell commands run as they stand, against a service on paper."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.exits import ExitStatus
from orchestrator.controller.supervisor import RECORD_NAME
from orchestrator.sdk.handle import SERVICE_ABSENCE_SECONDS
from orchestrator.sdk.manifest import parse_manifest
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up

EXAMPLES = Path(__file__).parents[2] / "examples" / "ci"
JOB = "medical"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service that counts as up, a manifest of a job, and `qlora` on the path."""
    service = service_that_is_up(tmp_path, monkeypatch)
    Path("job.yaml").write_text(yaml.safe_dump(job_document()))
    programs = tmp_path / "programs"
    programs.mkdir()
    qlora = programs / "qlora"
    qlora.write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestrator.cli "$@"\n')
    qlora.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return service


def bash(script: str, environment: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("bash")
    assert program is not None
    return subprocess.run(
        [program, *options, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def of_github() -> tuple[str, str, dict[str, str]]:
    """What submits, what waits, and their variables."""
    workflow: Any = yaml.safe_load((EXAMPLES / "github-actions.yaml").read_text())
    assert {"push", "workflow_dispatch"} == set(workflow[True]), "YAML 1.1 reads `on` as true"
    job = workflow["jobs"]["train"]
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    scripts = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    return scripts["Submit"], scripts["Wait"], job["env"]


def of_argo() -> tuple[str, str, dict[str, str]]:
    workflow: Any = yaml.safe_load((EXAMPLES / "argo-workflow.yaml").read_text())
    assert (workflow["apiVersion"], workflow["kind"]) == ("argoproj.io/v1alpha1", "Workflow")
    [template] = workflow["spec"]["templates"]
    assert workflow["spec"]["entrypoint"] == template["name"]
    given = {each["name"]: each["value"] for each in workflow["spec"]["arguments"]["parameters"]}
    assert {each["name"] for each in template["inputs"]["parameters"]} == set(given)
    [submitted] = parse_manifest(given["manifest"], name="manifest", folder=Path.cwd())
    assert submitted.metadata.name == given["job"] == JOB
    script = template["script"]
    environment = {each["name"]: each["value"] for each in script["env"]}
    assert environment["MANIFEST"] == "{{inputs.parameters.manifest}}"
    submit, wait = script["source"].strip().splitlines()
    return submit, wait, {**environment, "JOB": JOB, "MANIFEST": yaml.safe_dump(job_document())}


def of_airflow() -> tuple[str, str, dict[str, str]]:
    module = ast.parse((EXAMPLES / "airflow_dag.py").read_text())
    known = {
        target.id: ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return known["SUBMIT"], known["WAIT"], {**known["ENVIRONMENT"], "MANIFEST": "job.yaml", "PAUSE_SECONDS": "0.2"}


Example = Callable[[], tuple[str, str, dict[str, str]]]
EXAMPLE = pytest.mark.parametrize("example", [of_github, of_argo, of_airflow])


def here(environment: Mapping[str, str], **changes: str) -> dict[str, str]:
    """The example's variables, but for whose service it is."""
    return {**environment, "QLORA_CONTEXT": "", **changes}


@EXAMPLE
def test_it_submits_waits_and_ends_well_as_the_job_does(service: PaperService, example: Example) -> None:
    submit, wait, environment = example()
    done = bash(submit, here(environment), "-e", "-o", "pipefail")
    assert done.returncode == 0, done.stderr
    service.prepare()
    service.succeed()
    done = bash(wait, here(environment), "-e", "-o", "pipefail")
    assert done.returncode == 0, done.stderr
    if example is of_argo:  # the others replace the job, which takes a controller
        again = bash(submit, here(environment), "-e", "-o", "pipefail")
        assert again.returncode == 0, "it may be run again"


@EXAMPLE
def test_it_fails_where_the_job_does(service: PaperService, example: Example) -> None:
    submit, wait, environment = example()
    assert bash(submit, here(environment), "-e").returncode == 0
    service.prepare()
    service.fail()
    done = bash(wait, here(environment), "-e", "-o", "pipefail")
    assert done.returncode == ExitStatus.JOB_FAILED, done.stderr
    assert "line 7 of train.jsonl is not JSON" in done.stdout + done.stderr


@pytest.mark.parametrize("example", [of_github, of_argo])
def test_it_does_not_wait_for_ever(service: PaperService, example: Example) -> None:
    submit, wait, environment = example()
    assert bash(submit, here(environment), "-e").returncode == 0
    service.prepare()
    done = bash(wait, here(environment, WAIT_SECONDS="0.3"), "-e")
    expected = 0 if example is of_github else ExitStatus.TIMED_OUT
    assert done.returncode == expected, done.stderr


def test_the_manifest_that_is_refused_is_no_success(service: PaperService) -> None:
    submit, _, environment = of_github()
    Path("job.yaml").write_text(
        yaml.safe_dump(job_document(notifications=[{"name": "ci", "url": "https://10.0.0.1/"}]))
    )
    done = bash(submit, here(environment), "-e")
    assert done.returncode == ExitStatus.INVALID
    assert "spec.notifications[0].url: https://10.0.0.1/ is no public address" in done.stderr
    assert service.store.list_jobs() == []


# --- the exit statuses of wait ------------------------------------------------------------------------------------


def _finish(service: PaperService, how: str) -> None:
    service.client.submit(job_document())
    service.prepare()
    {"succeed": service.succeed, "fail": service.fail, "cancel": service.cancel}[how]()


@pytest.mark.parametrize(
    ("how", "status"),
    [("succeed", ExitStatus.OK), ("fail", ExitStatus.JOB_FAILED), ("cancel", ExitStatus.JOB_FAILED)],
)
def test_wait_says_how_the_job_ended(service: PaperService, how: str, status: ExitStatus) -> None:
    _finish(service, how)
    assert bash("qlora wait medical", {}).returncode == status


def test_wait_says_why_there_is_nothing_to_wait_for(service: PaperService) -> None:
    assert bash("qlora wait nobody", {}).returncode == ExitStatus.NOT_FOUND
    assert bash("qlora wait", {}).returncode == ExitStatus.INVALID
    service.client.submit(job_document())
    assert bash("qlora wait medical --timeout 0.2", {}).returncode == ExitStatus.TIMED_OUT
    (service.settings.home / RECORD_NAME).unlink()
    assert bash(f"qlora wait medical --timeout {2 * SERVICE_ABSENCE_SECONDS}", {}).returncode == ExitStatus.UNAVAILABLE
