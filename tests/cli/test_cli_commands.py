"""The commands as scripts and people use them: what they print, where, and with which exit status.

The service is on paper: the real store in a fresh home, whose supervisor's record names the test process itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from orchestrator.api.job import PROMOTE_ANNOTATION, ObjectMeta
from orchestrator.api.promotion import moved, stays
from orchestrator.api.queue import MonthlyUsage, QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Promotion
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.main import app
from orchestrator.controller.supervisor import RECORD_NAME
from orchestrator.core.job.promotion import owed_promotion
from orchestrator.sdk.words import gib
from tests.sdk.paper_service import STEPS, PaperService, gated_job_document, job_document, service_that_is_up

CONTROL_CODE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
QUEUE = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": "team-a"}}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service that counts as up for as long as this process lives."""
    return service_that_is_up(tmp_path, monkeypatch)


def qlora(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in this process; only what it means to exit with is an exit."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own, without a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.fixture(autouse=True)
def take_interrupts() -> Iterator[None]:
    """Whoever runs the tests in the background ignores SIGINT, and children inherit that unless it is handled here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def write_manifest(*documents: dict[str, object], name: str = "job.yaml") -> str:
    Path(name).write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    return name


def down(service: PaperService) -> None:
    (service.settings.home / RECORD_NAME).unlink()


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["frobnicate"], ["get", "pods"], ["cancel"], ["logs", "a", "--attempt", "0"]])
def test_wrong_usage_is_status_2_without_a_traceback(service: PaperService, arguments: list[str]) -> None:
    result = qlora(*arguments)
    assert result.exit_code == ExitStatus.INVALID
    assert "Error:" in result.stderr
    assert "Traceback" not in result.stderr


# --- submit -------------------------------------------------------------------------------------------------------


def test_submit_takes_several_files_with_jobs_and_queues(service: PaperService) -> None:
    write_manifest(QUEUE, job_document("one", queue="team-a"), name="a.yaml")
    write_manifest(job_document("two"), name="b.yaml")
    result = qlora("submit", "a.yaml", "-f", "b.yaml")
    assert result.stdout.splitlines() == ["queue/team-a applied", "job/one submitted", "job/two submitted"]
    assert [job.metadata.name for job in service.store.list_jobs()] == ["one", "two"]
    assert [queue.metadata.name for queue in service.store.list_queues()] == ["team-a"]


def test_submit_reads_standard_input(service: PaperService) -> None:
    assert qlora("submit", "-", stdin=yaml.safe_dump(job_document())).exit_code == ExitStatus.OK
    assert service.job().spec.model.source == f"file://{service.folder}/model"


def test_one_bad_object_keeps_the_others_from_being_stored(service: PaperService) -> None:
    write_manifest(QUEUE, job_document("good"), job_document("bad", resources={"vram": "48GB"}))
    result = qlora("submit", "job.yaml")
    assert result.exit_code == ExitStatus.INVALID
    assert result.stderr.startswith("error: job.yaml, document 3, line ")
    assert 'spec.resources.vram: must be auto or a quantity in Gi; found "48GB"; write "48Gi"' in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert service.store.list_jobs() == service.store.list_queues() == []


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (job_document(resources={"vram": "900Gi"}), "no GPU here offers vram 900Gi"),
        (job_document(dataset={"source": "file://./missing.jsonl"}), "missing.jsonl does not exist"),
        (job_document(model={"source": "file://./missing"}), "missing is not a folder"),
        (job_document(tracking={"experiment": 7}), "write it in quotes"),
        (job_document(store={"uri": "file://./train.jsonl/x"}), "train.jsonl is not a folder"),
        (job_document(trainig={}), "spec.trainig: unknown field; did you mean training?"),
        ({"kind": "Pod"}, "apiVersion: is missing"),
    ],
)
def test_what_cannot_work_is_status_2_and_one_line(
    service: PaperService, document: dict[str, object], expected: str
) -> None:
    result = qlora("submit", write_manifest(document))
    assert (result.exit_code, result.stdout) == (ExitStatus.INVALID, "")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert service.store.list_jobs() == []


def test_a_missing_manifest_and_a_taken_name_are_status_2(service: PaperService) -> None:
    assert "cannot be read: No such file" in qlora("submit", "nowhere.yaml").stderr
    service.client.submit(job_document())
    result = qlora("submit", write_manifest(job_document()))
    assert result.exit_code == ExitStatus.INVALID
    assert "job default/medical exists already" in result.stderr
    assert "end it with: qlora cancel medical" in result.stderr
    twice = qlora("submit", write_manifest(job_document("same"), job_document("same")))
    assert "QLoRAJob same stands more than once" in twice.stderr


def test_a_finished_job_can_be_replaced_and_one_at_work_cannot(service: PaperService) -> None:
    path = write_manifest(job_document())
    qlora("submit", path)
    service.prepare()
    busy = qlora("submit", "--replace", path)
    assert busy.exit_code == ExitStatus.INVALID
    assert "exists already and has not finished" in busy.stderr
    service.fail()
    before = service.job()
    again = qlora("submit", path)
    assert again.exit_code == ExitStatus.INVALID
    assert "run it anew with --replace" in again.stderr
    assert service.job() == before
    assert qlora("run", "--replace", path, "--dry-run").exit_code == ExitStatus.OK
    assert service.job() == before
    assert qlora("submit", "--replace", path).stdout == "job/medical submitted\n"
    assert service.job().metadata.uid != before.metadata.uid


def test_submitting_to_a_service_that_is_down_is_status_4(service: PaperService) -> None:
    down(service)
    result = qlora("submit", write_manifest(job_document()))
    assert result.exit_code == ExitStatus.UNAVAILABLE
    assert "qlora up" in result.stderr
    assert service.store.list_jobs() == []


def test_a_dry_run_checks_plans_and_changes_nothing(service: PaperService) -> None:
    down(service)
    result = qlora("submit", "--dry-run", write_manifest(QUEUE, job_document()))
    assert result.exit_code == ExitStatus.OK
    assert "job/medical is valid; nothing was changed" in result.stdout
    assert "usable on 24Gi" in result.stdout
    assert service.store.list_jobs() == service.store.list_queues() == []


def test_a_namespace_goes_with_the_command_or_the_manifest_but_not_against_it(service: PaperService) -> None:
    assert qlora("submit", "-n", "team-a", write_manifest(job_document())).exit_code == ExitStatus.OK
    assert [job.key for job in service.store.list_jobs()] == ["team-a/medical"]
    other = job_document("other")
    other["metadata"]["namespace"] = "team-b"
    result = qlora("submit", "-n", "team-a", write_manifest(other))
    assert result.exit_code == ExitStatus.INVALID
    assert "is in namespace team-b, not team-a" in result.stderr


def test_init_writes_a_manifest_that_a_plan_takes_and_overwrites_nothing(service: PaperService) -> None:
    Path("notes.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = qlora("init", "notes.jsonl", "--model", "model", "--no-look")
    assert result.stdout == "job.yaml written: prompt-completion records\n"
    assert result.stderr == "next: look at job.yaml, then: qlora run job.yaml\n"
    assert qlora("plan", "job.yaml").exit_code == ExitStatus.OK
    again = qlora("init", "notes.jsonl")
    assert (again.exit_code, again.stderr) == (
        ExitStatus.INVALID,
        "error: job.yaml exists already; name another one: --output\n",
    )


def test_a_job_of_openais_goes_from_its_export_into_the_service(service: PaperService) -> None:
    Path("file-a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = json.dumps({"id": "ftjob-a", "model": "gpt-4o", "training_file": "file-a", "seed": 7, "integrations": [{}]})
    found = qlora("import", "openai", "-", "--model", "model", stdin=job)
    assert found.exit_code == ExitStatus.OK
    assert "note: integrations: has no counterpart here, and is left out\n" in found.stderr
    assert qlora("submit", "-", stdin=found.stdout).stdout == "job/ftjob-a submitted\n"
    stored = service.job("ftjob-a").spec
    assert (stored.training.seed, stored.dataset.format) == (7, "prompt-completion")
    assert stored.dataset.source == f"file://{service.folder}/file-a.jsonl"


def test_a_job_of_openais_as_a_file_that_overwrites_nothing(service: PaperService) -> None:
    Path("a.json").write_text(json.dumps({"model": "gpt-4o", "training_file": "file-a"}))
    Path("jobs").mkdir()
    given = ("--model", "model", "--training-file", "train.jsonl", "--output", "jobs/a.yaml")
    assert qlora("import", "openai", "a.json", *given).stdout == "jobs/a.yaml written\n"
    assert yaml.safe_load(Path("jobs/a.yaml").read_text())["spec"]["dataset"]["source"] == "file://../train.jsonl"
    assert qlora("plan", "jobs/a.yaml").exit_code == ExitStatus.OK
    assert "jobs/a.yaml exists already" in qlora("import", "openai", "a.json", *given).stderr
    absent = qlora("import", "openai", "a.json", *given[:-1], "none/a.yaml")
    assert absent.stderr.endswith("error: none/a.yaml: cannot be written: No such file or directory\n")
    assert qlora("import", "openai", "none.json").exit_code == ExitStatus.INVALID


def test_init_shows_the_plan_and_says_why_it_cannot_show_records(service: PaperService) -> None:
    Path("notes.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = qlora("init", "notes.jsonl", "--model", "model")
    assert result.exit_code == ExitStatus.OK
    assert "records not shown: " in result.stderr
    assert "chat template: none, records of the format prompt-completion are trained as they stand" in result.stderr
    assert "usable on 24Gi" in result.stdout


def test_fields_can_be_set_beside_the_manifest(service: PaperService) -> None:
    path = write_manifest(QUEUE, job_document(training={"epochs": "3"}, tracking={"alias": "best"}))
    set_ = ("--set", "training.epochs=1", "--set", "spec.priority=7", "--set", "tracking.alias=")
    assert qlora("submit", path, *set_).exit_code == ExitStatus.OK
    spec = service.job().spec
    assert (spec.training.epochs, spec.priority, spec.tracking.alias) == ("1", 7, None)
    assert "24Gi +1" not in qlora("plan", write_manifest(job_document()), "--set", "resources.gpuClasses=[48Gi]").stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.epoch=1", "spec.training.epoch: unknown field; did you mean epochs?"),
        ("training.epochs", "training.epochs: must be a field of a job's spec and a value, such as training.epochs=1"),
        ("training..epochs=1", "must be a field of a job's spec"),
        ("queue.name=a", "spec.queue: has no fields to set"),
        ("training.seed=[1", "training.seed: the value is not valid YAML"),
        ("model.source=/models/llama", 'write "file:///models/llama"'),
    ],
)
def test_a_change_that_cannot_be_is_told_in_one_line(service: PaperService, change: str, said: str) -> None:
    path = write_manifest(job_document(queue="default"))
    result = qlora("submit", path, "--set", change)
    assert result.exit_code == ExitStatus.INVALID
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert service.store.list_jobs() == []


# --- looking ------------------------------------------------------------------------------------------------------


def test_get_is_a_table_with_one_line_a_job(service: PaperService) -> None:
    for name in ("first", "second"):
        service.client.submit(job_document(name, priority=5))
    service.prepare("first")
    service.train("first", step=10)
    service.fail("second", message="line 7 is not JSON")
    header, first, second = qlora("get").stdout.splitlines()
    assert header.split() == ["NAME", "QUEUE", "PRIORITY", "STATE", "GPU", "PROGRESS", "ETA", "AGE", "MESSAGE"]
    assert first.split()[:7] == ["first", "default", "5", "Training", "24Gi", f"10/{STEPS}", "1m15s"]
    assert second.split()[3] == "Failed"
    assert second.endswith("UserError: line 7 is not JSON")
    assert header.index("STATE") == first.index("Training") == second.index("Failed")


def test_get_answers_programs(service: PaperService) -> None:
    service.client.submit(job_document())
    listed = json.loads(qlora("get", "jobs", "-o", "json").stdout)
    alone = yaml.safe_load(qlora("get", "jobs", "medical", "-o", "yaml").stdout)
    assert listed == [alone]
    assert alone["spec"]["model"]["source"] == f"file://{service.folder}/model"
    assert qlora("get", "-o", "name").stdout == "job/medical\n"
    assert "RUN" in qlora("get", "-o", "wide").stdout


def test_what_get_prints_can_be_submitted_again(service: PaperService) -> None:
    service.client.submit(job_document(tracking={"alias": None}, priority=3))
    service.fail()
    Path("again.yaml").write_text(qlora("get", "jobs", "medical", "-o", "yaml").stdout)
    before = service.job()
    assert qlora("delete", "medical").stdout == "job/medical deleted\n"
    assert qlora("submit", "again.yaml").exit_code == ExitStatus.OK
    assert service.job().spec == before.spec
    assert service.job().metadata.uid != before.metadata.uid


def test_get_of_nothing_says_so_apart_from_the_answer(service: PaperService) -> None:
    result = qlora("get", "-n", "empty")
    assert (result.exit_code, result.stdout, result.stderr) == (ExitStatus.OK, "", "no jobs in namespace empty\n")


def test_get_queues_counts_their_jobs(service: PaperService) -> None:
    service.client.apply_queue(QUEUE)
    service.client.submit(job_document("a", queue="team-a"))
    service.client.submit(job_document("b", queue="team-a"))
    service.prepare("a")
    service.train("a")
    row = qlora("get", "queues").stdout.splitlines()[1]
    assert row.split() == ["team-a", "-", "1", "LowerPriority", "None", "1", "1", "-", "no", "limit"]
    assert qlora("queue").stdout == qlora("get", "queues").stdout


def test_answers_for_programs_have_the_state_that_the_table_shows(service: PaperService) -> None:
    service.client.submit(job_document(suspend=True))
    assert json.loads(qlora("get", "jobs", "medical", "-o", "json").stdout)["status"]["state"] == "Suspended"
    service.prepare()
    described = yaml.safe_load(qlora("describe", "medical", "-o", "yaml").stdout)
    assert described["job"]["status"]["state"] == "Suspended"
    assert described["job"]["status"]["prepared"]["steps"] == STEPS


@pytest.mark.parametrize("command", [("get",), ("describe", "medical"), ("explain", "medical")])
def test_a_service_that_is_down_is_told_of_where_a_job_waits_for_it(
    service: PaperService, command: tuple[str, ...]
) -> None:
    service.client.submit(job_document())
    assert "qlora up" not in qlora(*command).output
    down(service)
    assert re.search(r"service is not running.*qlora up", qlora(*command).output)
    service.prepare()
    service.train()
    service.succeed()
    assert "qlora up" not in qlora(*command).output


def test_the_last_lines_of_a_log_and_those_that_come(service: PaperService) -> None:
    service.client.submit(job_document())
    service.write_log("prepare-1", "a\nb\nc\n")
    service.write_log("train-2", "d\ne\n")
    assert qlora("logs", "medical", "--tail", "3").stdout == "c\nd\ne\n"
    assert qlora("logs", "medical", "--tail", "0").stdout == ""
    service.fail()
    assert qlora("logs", "medical", "--tail", "1", "--follow").stdout == "e\n"


@pytest.mark.parametrize("command", ["describe", "logs", "cancel", "suspend", "resume", "delete", "explain", "wait"])
def test_what_does_not_exist_is_status_3(service: PaperService, command: str) -> None:
    result = qlora(command, "nobody")
    assert (result.exit_code, result.stdout) == (ExitStatus.NOT_FOUND, "")
    assert result.stderr == "error: there is no job default/nobody; list them with: qlora get\n"


def test_describe_tells_the_whole_story(service: PaperService) -> None:
    service.client.submit(job_document())
    service.prepare()
    service.train()
    service.succeed()
    page = qlora("describe", "medical").stdout
    estimate = service.client.get("medical").status.estimate
    assert estimate is not None
    for told in (
        "default/medical  Succeeded",
        "600 records in 64 sequences",
        f"24Gi: {gib(estimate.peak_bytes)} of 21.50 GiB usable",
        "MLflow run    run-1 (FINISHED)",
        "models:/medical/3",
        "Finished  True",
        "2  train    24Gi",
    ):
        assert told in page
    data = json.loads(qlora("describe", "medical", "-o", "json").stdout)
    assert data["specDigest"].startswith("sha256:")
    assert data["job"]["status"]["mlflow"]["runId"] == "run-1"


def test_logs_are_readable_or_raw(service: PaperService) -> None:
    service.client.submit(job_document())
    line = '{"time":"2026-01-01T12:03:11.123Z","level":"warning","message":"slow disk","free":7}'
    service.write_log("train-2", f"{line}\nplain\n")
    result = qlora("logs", "medical")
    assert result.stdout == "12:03:11  WARNING slow disk  free=7\nplain\n"
    assert result.stderr == "--- train, attempt 2 ---\n"
    assert qlora("logs", "medical", "--raw", "--stage", "train").stdout == f"{line}\nplain\n"
    assert qlora("logs", "medical", "--stage", "publish").stdout == ""


def test_explain_says_who_is_in_the_way(service: PaperService) -> None:
    for name in ("holder", "waiter"):
        service.client.submit(job_document(name))
        service.prepare(name)
    service.train("holder")
    assert "default/holder" in qlora("explain", "waiter").stdout
    assert json.loads(qlora("explain", "waiter", "-o", "json").stdout)["state"] == "Queued"


def test_simulate_says_who_gains_by_a_card_more_and_changes_nothing(service: PaperService) -> None:
    for name in ("holder", "waiter"):
        service.client.submit(job_document(name))
        service.prepare(name)
    service.train("holder")
    stored = [job.to_wire() for job in service.client.list()]
    told = {
        each["job"]: each for each in json.loads(qlora("simulate", "--gpus", "24Gi=+1", "-o", "json").stdout)["jobs"]
    }
    assert told["default/holder"]["state"] == "Training"
    assert told["default/waiter"]["after"]["gpuClass"] == "24Gi"
    before, after = (datetime.fromisoformat(told["default/waiter"][which]["start"]) for which in ("before", "after"))
    assert after < before
    assert re.search(r"default/waiter +default +\S+ +now ", qlora("simulate", "--gpus", "24Gi=+1").stdout)
    assert [job.to_wire() for job in service.client.list()] == stored


def test_simulate_takes_a_job_that_is_not_submitted(service: PaperService) -> None:
    service.client.submit(job_document("holder"))
    service.prepare("holder")
    service.train("holder")
    path = write_manifest(job_document("new", training={"maxSteps": 10}))
    answer = json.loads(qlora("simulate", "--job", path, "-o", "json").stdout)
    new = next(each for each in answer["jobs"] if each["job"] == "default/new")
    assert new["before"] == {"start": None, "end": None, "gpuClass": None}
    assert new["after"]["start"] < new["after"]["end"]
    assert [job.metadata.name for job in service.client.list()] == ["holder"]
    taken = write_manifest(job_document("holder"), name="taken.yaml")
    assert qlora("simulate", "--job", taken).exit_code == ExitStatus.INVALID
    endless = write_manifest(job_document("endless"), name="endless.yaml")
    assert "training.maxSteps" in qlora("simulate", "--job", endless).stderr
    twice = qlora("simulate", "--job", path, "--job", path)
    assert twice.exit_code == ExitStatus.INVALID
    assert "a name of its own" in twice.stderr


NO_CHANGES = ["24Gi", "24Gi=", "24Gi=two", "24Gi=++2", "25Gi=+1", "24Gi=-3", "24Gi=9999999", "24Gi=٢"]


@pytest.mark.parametrize(
    "change",
    [
        *(("--gpus", text) for text in (*NO_CHANGES, "team-a:24Gi=1")),
        *(("--quota", f"team-a:{text}") for text in NO_CHANGES),
        ("--quota", "24Gi=+1"),
        ("--quota", "open:24Gi=+1"),
    ],
)
def test_simulate_refuses_a_number_of_gpus_that_is_none(service: PaperService, change: tuple[str, str]) -> None:
    service.client.apply_queue({**QUEUE, "spec": {"quotas": [{"gpuClass": "24Gi", "nominal": 2}]}})
    service.client.apply_queue({**QUEUE, "metadata": {"name": "open"}})
    refused = qlora("simulate", *change)
    assert (refused.exit_code, refused.stdout) == (ExitStatus.INVALID, "")
    assert change[1] in refused.stderr


def test_simulate_says_who_gains_by_a_quota(service: PaperService) -> None:
    service.client.apply_queue({**QUEUE, "spec": {"quotas": [{"gpuClass": "24Gi", "nominal": 0}]}})
    service.client.submit(job_document("waiter", queue="team-a"))
    service.prepare("waiter")

    def waiter(*options: str) -> dict[str, object]:
        [told] = json.loads(qlora("simulate", *options, "-o", "json").stdout)["jobs"]
        assert told["before"]["start"] is None
        return told["after"]

    assert waiter()["start"] is None
    assert waiter("--quota", "team-a:24Gi=+1")["gpuClass"] == "24Gi"
    assert waiter("--quota", "team-a:24Gi=1")["gpuClass"] == "24Gi"
    assert waiter("--quota", "team-a:48Gi=1")["start"] is None
    unknown = qlora("simulate", "--quota", "nobodys:24Gi=1")
    assert (unknown.exit_code, unknown.stdout) == (ExitStatus.NOT_FOUND, "")
    assert service.client.get_queue("team-a").spec.quotas[0].nominal == 0
    assert "qlora up" not in qlora("simulate").stdout
    down(service)
    assert "qlora up" in qlora("simulate").stdout


def test_plan_shows_bytes_choice_and_alternatives(service: PaperService) -> None:
    path = write_manifest(job_document())
    text = qlora("plan", path).stdout
    assert re.search(r"base weights, NF4 +3\.35 GiB", text)
    assert re.search(r"24Gi +1 .* chosen", text)
    data = json.loads(qlora("plan", path, "--json").stdout)
    assert sum(item["bytes"] for item in data["chosen"]["items"]) == data["chosen"]["peakBytes"]


def test_plan_traces_layers_that_no_table_knows_and_says_so(service: PaperService) -> None:
    path = write_manifest(job_document())
    assert "traced here" not in qlora("plan", path).stdout
    config = service.folder / "model" / "config.json"
    glm4 = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "pad_token_id": 0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **glm4}))
    done = qlora("plan", path, "--json")
    assert done.exit_code == ExitStatus.OK, done.output
    plan = json.loads(done.stdout)
    assert "guess" not in plan
    assert plan["model"]["trace"]["layers"] == "a" * plan["model"]["numLayers"]
    assert "layers of model type glm4 are in no table, and were traced here with transformers" in plan["notes"][0]


def test_calibration_shows_what_finished_jobs_measured(service: PaperService) -> None:
    assert json.loads(qlora("calibration", "--json").stdout) == {"bounds": []}
    service.client.submit(job_document())
    service.prepare()
    status = service.train().status
    measured = status.attempts[-1].model_copy(
        update={
            "plan": status.estimate.plan,
            "finish_time": datetime.now(UTC),
            "reason": Reason.SUCCEEDED,
            "predicted_bytes": 1000,
            "measured_bytes": 1100,
            "versions": "torch 2.11.0",
        }
    )
    service.write(service.job(), attempts=(*status.attempts[:-1], measured), adapter_uri="file:///adapter")
    [bound] = json.loads(qlora("calibration", "--json").stdout)["bounds"]
    assert (bound["architecture"], bound["observations"], bound["marginShare"]) == ("LlamaForCausalLM", 1, 0.1)
    assert re.search(r"LlamaForCausalLM +kept\S* +1 +\+10.00% +10.00% +no +torch 2.11.0", qlora("calibration").stdout)


def test_a_plan_that_is_impossible_here_is_status_2(service: PaperService) -> None:
    result = qlora("plan", write_manifest(job_document(resources={"vram": "80Gi"})))
    assert result.exit_code == ExitStatus.INVALID
    assert "cannot run here" in result.stdout
    assert re.search(r"80Gi +0 .* fits; none here", result.stdout)


def test_a_model_on_a_claim_has_no_plan_before_prepare(service: PaperService) -> None:
    result = qlora("plan", write_manifest(job_document(model={"source": "pvc://models/llama"})))
    assert result.exit_code == ExitStatus.INVALID
    assert result.stderr.startswith("error: pvc://models/llama lies on a claim, which only the cluster can read")


def test_a_bucket_that_does_not_answer_is_status_4(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("s3fs") is None:
        pytest.skip("s3fs is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    result = qlora("plan", write_manifest(job_document(model={"source": "s3://bucket/llama"})))
    assert result.exit_code == ExitStatus.UNAVAILABLE
    assert result.stderr.startswith("error: s3://bucket/llama: could not be read: ")


def test_a_hub_out_of_reach_is_status_4_at_once_and_one_line(service: PaperService) -> None:
    """In a process of its own: the hub's library reads its variables when it is imported."""
    manifest = write_manifest(job_document(model={"source": "hf://acme/tiny"}))
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(service.folder / "hub")}
    try:
        process = start("plan", manifest)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    finally:
        del os.environ["HF_ENDPOINT"], os.environ["HF_HOME"]
    assert process.returncode == ExitStatus.UNAVAILABLE
    assert stderr == "error: hf://acme/tiny: the hub does not answer; try again later\n"
    assert time.monotonic() - began < 20, "its library tries for 25 s"


# --- steering -----------------------------------------------------------------------------------------------------


def test_steering_says_what_it_did_and_a_dry_run_does_nothing(service: PaperService) -> None:
    service.client.submit(job_document())
    assert qlora("suspend", "medical", "--dry-run").stdout == "job/medical would be suspended\n"
    assert not service.job().spec.suspend
    assert qlora("suspend", "medical").stdout == "job/medical suspended\n"
    assert qlora("suspend", "medical").stdout == "job/medical is already suspended\n"
    assert qlora("resume", "medical").stdout == "job/medical resumed\n"
    service.prepare()
    service.train()
    assert qlora("cancel", "medical").stdout == "job/medical is being cancelled\n"
    assert service.job().cancelled
    assert qlora("delete", "medical", "--dry-run").stdout == "job/medical would be deleted\n"
    assert "marked for deletion" in qlora("delete", "medical").stdout
    service.fail()
    assert "has finished already" in qlora("cancel", "medical").stdout


FIGURES = "f1 over the holder is +0.1, which reaches 0"


def answered(service: PaperService, promotion: Promotion) -> threading.Thread:
    """A controller that waits for a request, and MLflow's answer to it."""

    def answer() -> None:
        while owed_promotion(service.job()) is None:
            time.sleep(0.02)
        service.judge(promotion)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_an_alias_that_waits_for_approval_moves_when_somebody_says_so(service: PaperService) -> None:
    service.client.submit(gated_job_document())
    early = qlora("promote", "medical")
    assert (early.exit_code, early.stdout) == (ExitStatus.INVALID, "")
    assert "job default/medical cannot be promoted: it is not published" in early.stderr
    service.prepare()
    service.train()
    service.succeed()
    service.judge(stays("champion", "2", Reason.AWAITING_APPROVAL, FIGURES))
    told = qlora("promote", "medical", "--dry-run")
    assert told.stdout == (
        "job/medical: the alias champion would move to version 3 of default-medical if it is still where it was when "
        f"the adapter was compared with its holder; now the alias champion stays with version 2: {FIGURES}\n"
    )
    assert PROMOTE_ANNOTATION not in service.job().metadata.annotations
    controller = answered(service, moved("champion", "3", f"approved; {FIGURES}"))
    done = f"the alias champion moved to version 3: approved; {FIGURES}\n"
    assert qlora("promote", "medical").stdout == f"job/medical: {done}"
    controller.join()
    version = service.job().metadata.resource_version
    assert qlora("promote", "medical").stdout == f"job/medical: {done}"
    assert service.job().metadata.resource_version == version, "asking twice writes once"
    assert qlora("promote", "medical", "--dry-run").stdout == f"job/medical: promoted already: {done}"


def test_what_the_gate_did_not_let_pass_is_promoted_by_force_alone(service: PaperService) -> None:
    service.client.submit(gated_job_document())
    service.prepare()
    service.train()
    service.succeed()
    service.judge(stays("champion", "2", Reason.AWAITING_APPROVAL, FIGURES))
    controller = answered(service, stays("champion", "4", Reason.HOLDER_CHANGED, "submit the job again"))
    lost = qlora("promote", "medical")
    controller.join()
    assert (lost.exit_code, lost.stdout) == (ExitStatus.INVALID, "")
    changed = "HolderChanged: the alias champion stays with version 4: submit the job again"
    assert lost.stderr == f"error: job default/medical is not promoted: {changed}\n"
    for again in (("--dry-run",), ()):
        refused = qlora("promote", "medical", *again)
        assert refused.exit_code == ExitStatus.INVALID
        assert f"cannot be promoted: {changed}; to move the alias all the same: --force --reason TEXT" in refused.stderr
    for half, words in ((("--force",), "needs a reason"), (("--reason", "x"), "only of what is forced")):
        assert words in qlora("promote", "medical", *half).stderr
    why = "the holder speaks Latin"
    controller = answered(service, moved("champion", "3", f"forced ({why}); {FIGURES}"))
    forced = qlora("promote", "medical", "--force", "--reason", why)
    controller.join()
    assert forced.stdout == f"job/medical: the alias champion moved to version 3: forced ({why}); {FIGURES}\n"
    assert service.job().metadata.annotations[PROMOTE_ANNOTATION] == f"forced: {why}"


def test_a_request_stays_where_the_service_is_down(service: PaperService) -> None:
    service.client.submit(gated_job_document())
    service.prepare()
    service.train()
    service.succeed()
    service.judge(stays("champion", "2", Reason.AWAITING_APPROVAL, FIGURES))
    (service.settings.home / RECORD_NAME).unlink()
    down = qlora("promote", "medical")
    assert down.exit_code == ExitStatus.UNAVAILABLE
    assert down.stderr == "error: job default/medical waits to be promoted by the service; start it: qlora up\n"
    assert owed_promotion(service.job()) is not None


def test_several_jobs_are_steered_at_once_or_none(service: PaperService) -> None:
    for name in ("one", "two"):
        service.client.submit(job_document(name))
    wrong = qlora("cancel", "one", "three", "two")
    assert (wrong.exit_code, wrong.stdout) == (ExitStatus.NOT_FOUND, "")
    assert not service.job("one").cancelled
    assert qlora("suspend", "one", "two", "one").stdout == "job/one suspended\njob/two suspended\n"
    assert qlora("cancel", "one", "two").stdout.splitlines() == ["job/one cancelled", "job/two cancelled"]
    service.fail("one")
    service.fail("two")
    assert qlora("delete", "one", "two").stdout == "job/one deleted\njob/two deleted\n"


def test_a_job_that_was_cancelled_is_said_to_be_once(service: PaperService) -> None:
    service.client.submit(job_document())
    service.cancel()
    result = qlora("wait", "medical")
    assert result.exit_code == ExitStatus.JOB_FAILED
    assert "job default/medical was cancelled\n" in result.stderr


def test_queues_are_made_held_released_and_deleted(service: PaperService) -> None:
    options = ("--quota", "24Gi=4", "--quota", "48Gi=1", "--cohort", "lab", "-n", "team-a", "--max-priority", "9")
    assert qlora("queue", "create", "research", *options, "--dry-run").stdout == "queue/research would be created\n"
    assert service.store.list_queues() == []
    assert qlora("queue", "create", "research", *options).stdout == "queue/research created\n"
    assert "exists already" in qlora("queue", "create", "research").stderr
    [queue] = service.store.list_queues()
    assert [(quota.gpu_class, quota.nominal) for quota in queue.spec.quotas] == [("24Gi", 4), ("48Gi", 1)]
    assert (queue.spec.cohort, queue.spec.namespaces, queue.spec.max_priority) == ("lab", ("team-a",), 9)
    assert qlora("queue", "hold", "research").stdout == "queue/research held\n"
    assert qlora("queue", "hold", "research").stdout == "queue/research is held already\n"
    [held] = service.store.list_queues()
    assert held.spec == queue.spec.model_copy(update={"stop_policy": "Hold"})
    service.client.submit(job_document("one", queue="research") | {"metadata": {"name": "one", "namespace": "team-a"}})
    page = qlora("queue", "describe", "research").stdout
    assert page.startswith("queue research  held\n")
    assert re.search(r"24Gi +0 +4 +any +0 +0\n", page)
    assert re.search(r"team-a +one ", page)
    assert qlora("queue", "hold", "research", "--drain").stdout == "queue/research drained\n"
    assert qlora("queue", "release", "research").stdout == "queue/research released\n"
    assert service.store.list_queues()[0].spec == queue.spec
    assert "1 unfinished job of it" in qlora("queue", "delete", "research", "--dry-run").stdout
    assert qlora("queue", "delete", "research").stdout == "queue/research deleted; 1 unfinished job of it\n"
    assert service.store.list_queues() == []


@pytest.mark.parametrize("verb", ["describe", "hold", "release", "delete"])
def test_a_queue_that_does_not_exist_is_status_3(service: PaperService, verb: str) -> None:
    result = qlora("queue", verb, "nobody")
    assert result.exit_code == ExitStatus.NOT_FOUND
    assert result.stderr == "error: there is no queue nobody; list them with: qlora get queues\n"


@pytest.mark.parametrize("quota", ["24Gi", "24GB=1", "24Gi=1,48Gi=2", "24Gi=-1", "24Gi=many", "=3"])
def test_a_quota_that_makes_no_sense_is_told_in_one_line(service: PaperService, quota: str) -> None:
    result = qlora("queue", "create", "research", "--quota", quota)
    assert result.exit_code == ExitStatus.INVALID
    assert "a number of GPUs, such as 24Gi=4" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert service.store.list_queues() == []


def test_what_a_month_took_is_told_as_a_table_and_for_programs(service: PaperService) -> None:
    store = service.store
    queue = store.apply_queue(QLoRAQueue(metadata=ObjectMeta(name="research")))
    had = MonthlyUsage(month="2026-11", user="team-a", gpu_class="24Gi", gpu_seconds=5400.0, dollars=1.5)
    store.update_queue_status(queue, QLoRAQueueStatus(counted_until=datetime.now(UTC), months=(had,)))
    month = ("--month", "2026-11")
    assert qlora("usage", *month).stdout.split() == [
        *["MONTH", "USER", "GPU", "HOURS", "DOLLARS"],
        *["2026-11", "team-a", "1.50", "1.50"],
    ]
    assert qlora("usage", *month, "--by", "job", "--output", "csv").stdout == (
        "month,queue,user,job,gpuSeconds,dollars\n2026-11,research,team-a,(deleted),5400.0,1.5\n"
    )
    told = {"month": "2026-11", "queue": "research", "gpuSeconds": 5400.0, "dollars": 1.5}
    assert json.loads(qlora("usage", *month, "--by", "queue", "-o", "json").stdout) == {"usage": [told]}
    assert qlora("usage", "--month", "2026-10", "-o", "csv").stdout == "month,queue,user,job,gpuSeconds,dollars\n"
    wrong = qlora("usage", "--month", "November")
    assert (wrong.exit_code, wrong.stderr) == (
        ExitStatus.INVALID,
        "error: month November: must be a year and a month, such as 2026-11\n",
    )


def test_an_adapter_is_downloaded_as_a_folder(service: PaperService) -> None:
    service.client.submit(job_document())
    service.prepare()
    assert "has no adapter" in qlora("download", "medical").stderr
    service.train()
    service.succeed()
    assert qlora("download", "medical").stdout == "medical-adapter\n"
    assert (Path("medical-adapter") / "adapter_config.json").exists()
    assert qlora("download", "medical", "--into", "b/c").stdout == "b/c\n"


def test_up_and_down_know_what_is_there(service: PaperService) -> None:
    assert qlora("up").stdout.startswith("the service is up already")
    service.client.submit(job_document())
    assert qlora("down", "--dry-run").stdout == (
        "the service would be stopped; 1 unfinished job will go on at the next start\n"
    )
    down(service)
    assert qlora("down").stdout == "the service is down already\n"
    assert qlora("up", "--dry-run").stdout == f"the service would be started in {service.settings.home}\n"


def test_ui_serves_the_local_store_or_names_the_remote_one(
    service: PaperService, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    command = qlora("ui", "--dry-run", "--port", "5011").stdout
    assert f"--backend-store-uri sqlite:///{service.settings.home}/mlflow.db" in command
    assert "--uvicorn-opts '--uds SOCKET'" in command
    assert "on http://127.0.0.1:5011, behind a password" in command
    monkeypatch.setenv("QLORA_TRACKING_URI", "http://mlflow.example:5000")
    assert qlora("ui").stdout == "http://mlflow.example:5000\n"


def test_a_wrong_setting_is_named(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_GPU_CLASSES", "24GB=2")
    result = qlora("get")
    assert result.exit_code == ExitStatus.INVALID
    assert result.stderr.startswith("error: QLORA_GPU_CLASSES: ")


def test_version_names_what_jobs_run_with() -> None:
    versions = json.loads(qlora("version", "-o", "json").stdout)
    assert versions["python"] == sys.version.split()[0]
    assert {"qlora-orchestrator", "mlflow", "ray", "torch"} <= set(versions)


def test_a_trace_is_played_on_the_queues_and_gpus_that_are_here(service: PaperService) -> None:
    Path("trace.csv").write_text(
        "submit,user,gpuClass,seconds,due\n0,ana,24Gi,600,700\n0,ben,24Gi,600,900\n0,ben,24Gi,600,\n"
    )
    told = json.loads(qlora("simulate", "--trace", "trace.csv", "--gpus", "24Gi=3", "-o", "json").stdout)
    before, after = (told[which]["groups"][0] for which in ("before", "after"))
    assert (before["jobs"], before["missed"]) == (3, 1)
    assert (after["missed"], after["meanWaitSeconds"]) == (0, 0)
    shown = qlora("simulate", "--trace", "trace.csv").stdout
    assert re.search(r"QUEUE +USER +JOBS +MEAN WAIT", shown)
    assert re.search(r"default +ben +2", shown)
    assert "GPU time used as it is: 24Gi " in shown
    refused = qlora("simulate", "--trace", "trace.csv", "--job", write_manifest(job_document()))
    assert (refused.exit_code, "cannot be combined" in refused.stderr) == (ExitStatus.INVALID, True)
    Path("trace.csv").write_text("submit,gpuClass,seconds\n0,24Gi,never\n")
    assert "trace.csv: line 2: seconds: must be a number" in qlora("simulate", "--trace", "trace.csv").stderr


# --- run and wait, in processes of their own ----------------------------------------------------------------------


def drive(service: PaperService, end: Callable[[], object]) -> threading.Thread:
    """Play the controller: take the job through its life once it is there."""

    def play() -> None:
        deadline = time.monotonic() + 20
        while not service.store.list_jobs() and time.monotonic() < deadline:
            time.sleep(0.05)
        service.prepare()
        for step in (10, 20, 30):
            service.train(step=step)
            time.sleep(0.25)
        end()

    thread = threading.Thread(target=play)
    thread.start()
    return thread


def test_run_follows_a_job_to_its_result_without_a_terminal(service: PaperService) -> None:
    player = drive(service, service.succeed)
    process = start("run", write_manifest(job_document()))
    stdout, stderr = process.communicate(timeout=30)
    player.join()
    assert process.returncode == ExitStatus.OK, stderr
    result = dict(line.split(": ", 1) for line in stdout.splitlines())
    assert (result["state"], result["evalLossBefore"], result["evalLoss"]) == ("Succeeded", "3.5000", "1.7500")
    assert result["model"] == "models:/medical/3"
    assert result["registry"].startswith("sqlite:///")
    assert qlora("env").stdout == f"export MLFLOW_TRACKING_URI={result['registry']}\n"
    assert "submitted default/medical" in stderr
    assert re.search(r"medical: Training  \d0/40  loss 2\.5000  eval loss 2\.2500  812 tokens/s  ETA 1m15s", stderr)
    assert not CONTROL_CODE.search(stdout + stderr)


def test_the_registry_of_a_cluster_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CONTEXT", "far-away")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    unknown = qlora("env")
    assert unknown.exit_code != ExitStatus.OK
    assert "set MLFLOW_TRACKING_URI" in unknown.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example/a b")
    assert qlora("env").stdout == "export MLFLOW_TRACKING_URI='https://mlflow.example/a b'\n"


def test_run_of_a_job_that_fails_is_status_1_and_says_where_to_look(service: PaperService) -> None:
    player = drive(service, service.fail)
    process = start("run", write_manifest(job_document()), "-o", "json")
    stdout, stderr = process.communicate(timeout=30)
    player.join()
    assert process.returncode == ExitStatus.JOB_FAILED
    assert json.loads(stdout)["status"]["summary"].startswith("UserError: line 7")
    assert "job default/medical did not succeed: UserError: line 7 of train.jsonl is not JSON" in stderr
    assert "qlora logs medical" in stderr
    assert "Traceback" not in stderr


def test_run_under_another_name_and_its_dry_run(service: PaperService) -> None:
    path = write_manifest(job_document())
    result = qlora("run", path, "--name", "other", "--dry-run")
    assert "job/other is valid; nothing was changed" in result.stdout
    assert service.store.list_jobs() == []
    bad = qlora("run", path, "--name", "Other", "--dry-run")
    assert bad.exit_code == ExitStatus.INVALID
    assert "metadata.name" in bad.stderr


def test_run_takes_a_file_of_records_instead_of_a_manifest(service: PaperService) -> None:
    Path("notes.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = qlora("run", "--data", "notes.jsonl", "--model", "model", "--set", "training.epochs=1", "--dry-run")
    assert "job/notes is valid; nothing was changed" in result.stdout
    assert "name a manifest, or --data" in qlora("run").stderr
    assert "name a manifest, or --data" in qlora("run", write_manifest(job_document()), "--model", "model").stderr
    assert "those of no format" in qlora("run", "--data", "model/config.json").stderr


def test_run_takes_exactly_one_job(service: PaperService) -> None:
    result = qlora("run", write_manifest(job_document("a"), job_document("b")))
    assert result.exit_code == ExitStatus.INVALID
    assert "holds 2 jobs where one is wanted" in result.stderr


def test_wait_is_status_5_when_the_time_is_over_and_0_when_the_job_is_done(service: PaperService) -> None:
    service.client.submit(job_document())
    service.prepare()
    result = qlora("wait", "medical", "--timeout", "0.3")
    assert result.exit_code == ExitStatus.TIMED_OUT
    assert "had not finished after 0.3 s: WaitingForGpu" in result.stderr
    service.succeed()
    assert qlora("wait", "medical").exit_code == ExitStatus.OK


def test_ctrl_c_detaches_and_says_how_to_come_back(service: PaperService) -> None:
    service.client.submit(job_document())
    service.prepare()
    process = start("wait", "medical")
    assert process.stderr is not None
    assert "WaitingForGpu" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitStatus.INTERRUPTED
    assert "qlora wait medical" in stderr
    assert "Traceback" not in stderr
    assert not service.job().cancelled


def test_a_reader_that_leaves_early_is_no_error(service: PaperService) -> None:
    service.client.submit(job_document())
    service.write_log("train-2", "a line\n" * 20_000)
    process = start("logs", "medical")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == ExitStatus.OK


# --- a service on a cluster ----------------------------------------------------------------------------------------


def test_a_context_that_leads_nowhere_is_named(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "nowhere.kubeconfig")
    monkeypatch.setenv("QLORA_CONTEXT", "production")
    for damaged in (None, "contexts: [{nam", "[]", "contexts: {a: 1}", "\udcff", "contexts: [{name: production}]"):
        if damaged is not None:
            Path("nowhere.kubeconfig").write_bytes(damaged.encode(errors="surrogateescape"))
        result = qlora("get")
        assert result.exit_code == ExitStatus.INVALID
        assert result.stderr.startswith("error: no way to a cluster")
        assert "KUBECONFIG" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_context_may_be_an_option(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "nowhere.kubeconfig")
    for command in (("--context", "current", "get"), ("get", "--context", "current"), ("get", "-A", "--context=x")):
        monkeypatch.setenv("QLORA_CONTEXT", "")
        assert "no way to a cluster" in qlora(*command).stderr
    monkeypatch.setenv("QLORA_CONTEXT", "")
    assert "no way to a cluster" in qlora("queue", "hold", "research", "--context", "current").stderr


@pytest.mark.parametrize("command", ["up", "down", "ui"])
def test_commands_of_the_embedded_service_refuse_a_cluster(
    service: PaperService, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("QLORA_CONTEXT", "production")
    result = qlora(command)
    assert result.exit_code == ExitStatus.INVALID
    assert f"qlora {command} is about the embedded service" in result.stderr
