"""Every character that harms, in every text that a stranger sends, read where people and programs read it.

Terminal, log lines, events and conditions, metrics' labels, MLflow's tags and parameters, and the card of an adapter.
"""

from __future__ import annotations

import json
import logging
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from qlora_trainer import __main__ as trainer
from qlora_trainer.storage.final_adapter import FinalAdapter
from qlora_trainer.tracking.mlflow_run import parameters, tags
from qlora_trainer.tracking.model_card import model_card
from qlora_trainer.tracking.run_page import PLAN_TAG
from typer.testing import CliRunner

from orchestrator.api.formats import CheckpointManifest
from orchestrator.api.job import QLoRAJob, TrackingSpec
from orchestrator.api.reasons import Reason
from orchestrator.api.task import StageTask
from orchestrator.cli.main import app
from orchestrator.controller.logs import JsonFormatter
from orchestrator.controller.metrics import Metrics
from orchestrator.core.commands import Event
from orchestrator.core.decide import decide
from orchestrator.sdk.log_text import log_text
from orchestrator.sdk.manifest import parse_object
from tests.builders import DIGEST, gpus, make_task, prepare_result, snapshot, submitted_job
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up, write_inputs
from tests.strangers.generate import instance
from tests.strangers.harm import harmful
from tests.strangers.test_decide import a_status
from tests.strangers.test_fuzz import SEED

BAD = "".join(character for code in range(0x110000) if harmful(character := chr(code)) and not 0xD800 <= code < 0xE000)
"""All of them but halves of characters, which no text on the wire can hold."""
REVISION = f"main{BAD}"[:128]
TEMPLATE = "{{ messages }}" + "".join(c for c in BAD if unicodedata.category(c) != "Cc")
MARKDOWN = '"); __import__("os").system("id")#<script>x</script>![i](a)`</code>[l](b)|'


def shown(text: str) -> list[str]:
    """What harms in an answer of several lines."""
    return harmful(text.replace("\n", "").replace("\t", ""))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service on paper, with files whose names and contents are odd."""
    return service_that_is_up(tmp_path, monkeypatch)


def poisoned_job(folder: Path, name: str = "medical") -> QLoRAJob:
    """With all that the API server takes."""
    config = json.loads((folder / "model/config.json").read_text())
    config |= {"model_type": f"llama{BAD}", "architectures": [f"LlamaForCausalLM{BAD}"]}
    (folder / "model/config.json").write_text(json.dumps(config))
    document = job_document(name)
    document["spec"]["model"] |= {"revision": REVISION, "chatTemplate": TEMPLATE}
    document["spec"]["dataset"] |= {"config": REVISION}
    document["metadata"]["annotations"] = {"note": BAD}
    found = parse_object(document, folder=folder)
    assert isinstance(found, QLoRAJob)
    return found


def test_commands_show_nothing_that_harms(service: PaperService) -> None:
    dice = random.Random(SEED)
    service.store.create_job(poisoned_job(service.folder))
    service.prepare()
    service.write_log(
        "train-2", f"raw {BAD}\n" + json.dumps({"time": BAD, "level": BAD, "message": BAD, BAD: BAD}) + "\n"
    )
    service.train()
    service.store.record_event(service.job(), Event(reason=Reason.USER_ERROR, message=BAD, warning=True))
    answers: list[tuple[str, str]] = []

    def ask(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        answers.append((" ".join(arguments), result.stdout + result.stderr))

    Path("bad.yaml").write_text(
        f"apiVersion: qlora.dev/v1alpha1\nkind: QLoRAJob\nmetadata: {{name: {json.dumps(BAD)}}}\n"
    )
    Path("job.yaml").write_text(json.dumps(job_document(model={"source": "file://./model", "revision": REVISION})))
    for command in ("get", "describe", "explain", "logs"):
        ask(command, "medical")
    for form in ("json", "yaml"):
        ask("get", "medical", "-o", form)
    for command in ("plan", "submit"):
        ask(command, "job.yaml")
        ask(command, "bad.yaml")
    for number in range(20):
        service.store.create_job(poisoned_job(service.folder, f"odd-{number}"))
        job = service.job(f"odd-{number}")
        service.store.update_status(job, a_status(dice))
        ask("describe", f"odd-{number}")
    ask("get")
    for options in (
        ("--gpus", "24Gi=+1"),
        ("--gpus", BAD),
        ("--quota", f"{BAD}:24Gi=1"),
        ("--job", "job.yaml"),
        ("--job", "bad.yaml"),
    ):
        ask("simulate", *options)
    assert [(what, shown(text)) for what, text in answers if shown(text)] == []


def test_a_record_of_a_log_is_one_line_and_a_message_forges_none() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s", (BAD,), None)
    for formatter in (JsonFormatter(), trainer.JsonFormatter({"stage": "train", "job": BAD})):
        line = formatter.format(record)
        assert harmful(line) == []
        assert json.loads(line)["message"] == BAD
    forged = json.dumps({"time": "2026-01-01T12:00:00Z", "level": "info", "message": "a\n12:00:01  ERROR b"})
    assert log_text(forged).splitlines() == ["12:00:00  a", "          12:00:01  ERROR b"]
    assert log_text('{"message":' + "[" * 100_000).startswith("{")


def test_events_conditions_and_labels_hold_none() -> None:
    dice = random.Random(SEED)
    for _ in range(50):
        job = submitted_job("odd").model_copy(update={"status": a_status(dice)})
        found = snapshot(job, gpu_classes=gpus(_24Gi=1))
        for command in decide(found):
            status, events = getattr(command, "status", job.status), getattr(command, "events", ())
            texts = [c.message for c in status.conditions] + [event.message for event in events] + [status.summary]
            assert harmful("".join(texts)) == []
        metrics = Metrics()
        metrics.round_done(snapshot(), (), 0.1, 0.0)
        metrics.round_done(found, (), 0.1, 0.0)
        assert shown(generate_latest(metrics.registry).decode()) == []


def a_task(tmp_path: Path, **tracking: Any) -> StageTask:
    job = poisoned_job(tmp_path)
    prepared = prepare_result().model_copy(update={"uri": f"file:///{BAD}"})
    job = job.model_copy(
        update={"spec": job.spec.model_copy(update={"tracking": TrackingSpec.model_construct(**tracking)})}
    )
    return make_task(job, "publish", store=tmp_path, prepared=prepared, run_id="run")


def test_tags_parameters_and_the_card_hold_none_and_run_nothing(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    task = a_task(tmp_path, registered_model=MARKDOWN, alias="candidate", experiment=None)
    assert harmful("".join(tags(task).values())) == []
    assert shown("".join(parameters(task).values())) == []
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": MARKDOWN + BAD}))
    manifest = CheckpointManifest.model_validate(
        {**instance(random.Random(SEED), CheckpointManifest), "versions": {MARKDOWN + BAD: MARKDOWN + BAD}}
    )
    adapter = FinalAdapter(folder=tmp_path, manifest=manifest, digest=DIGEST, journal=())
    card = model_card(task, adapter, {f"{PLAN_TAG}/{MARKDOWN}": MARKDOWN + BAD, f"{PLAN_TAG}/2": MARKDOWN + BAD})
    assert shown(card) == []
    prose = re.sub(r"^```(?:python|sh)$.*?^```$", "", card.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<script|!\[|\]\(|</code>", prose)
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        code = compile(snippet, "card", "exec")
        assert "__import__" not in code.co_names
