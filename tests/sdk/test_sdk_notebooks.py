"""The SDK as notebooks use it: what is shown, what one call does, and that the examples in docstrings are right."""

from __future__ import annotations

import doctest
import json
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pandas
import pytest
import yaml

from orchestrator.errors import InvalidObject, NotFound, WaitTimedOut
from orchestrator.sdk import JobHandle
from tests.sdk.paper_service import STEPS, PaperService, job_document, service_that_is_up

RECORDS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 3 =", "completion": " 6"}]
DOCUMENTED = [import_module(f"orchestrator.sdk.{name}") for name in ("client", "handle")]
EXAMPLES = [test for module in DOCUMENTED for test in doctest.DocTestFinder().find(module) if test.examples]
SHOWN = {"tune", "submit", "plan", "list", "wait", "wait_all", "state", "logs", "metrics", "adapter", "result"}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    return service_that_is_up(tmp_path, monkeypatch)


@pytest.fixture
def handle(service: PaperService) -> JobHandle:
    return service.client.submit(job_document())


def succeeded(service: PaperService) -> JobHandle:
    service.prepare()
    service.train()
    service.succeed()
    return service.client.handle("medical")


def later(*actions: Callable[[], object]) -> None:
    def play() -> None:
        for action in actions:
            time.sleep(0.2)
            action()

    threading.Thread(target=play, daemon=True).start()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.removeprefix("orchestrator.sdk."))
def test_the_examples_in_docstrings_are_right(
    service: PaperService, handle: JobHandle, example: doctest.DocTest
) -> None:
    Path("notes.yaml").write_text(yaml.safe_dump(job_document("notes")))
    service.write_log("train-2", '{"time":"2026-01-01T12:03:11.1Z","message":"the stage ended with OK (0)"}\n')
    succeeded(service)
    example.globs |= {"client": service.client, "handle": handle}
    told: list[str] = []
    failed = doctest.DocTestRunner().run(example, out=told.append).failed
    assert failed == 0, "".join(told)


def test_most_verbs_have_an_example() -> None:
    assert {test.name.rpartition(".")[2] for test in EXAMPLES} >= SHOWN


def test_a_plan_a_job_a_list_and_a_client_are_tables_in_a_notebook(service: PaperService, handle: JobHandle) -> None:
    plan = service.client.plan(job_document())._repr_html_()
    assert "<td>24Gi</td><td>1</td>" in plan
    assert "<td>chosen</td>" in plan
    service.prepare()
    service.fail(message="line 7 of <script>alert(1)</script> is not JSON")
    failed = handle._repr_html_()
    assert "<td>Failed</td>" in failed
    assert "<script>" not in failed
    assert "line 7 of &lt;script&gt;" in failed
    assert service.client.list()._repr_html_() == failed
    assert service.client._repr_html_().endswith(f": up</p>{failed}")
    service.running = False
    assert "down; start it: qlora up" in service.client._repr_html_()


@pytest.mark.parametrize("data", [RECORDS, tuple(RECORDS), pandas.DataFrame(RECORDS)], ids=["list", "tuple", "frame"])
def test_records_in_python_are_a_data_set(service: PaperService, data: object) -> None:
    job = service.client.tune("model", data, name="sums", training={"epochs": 1}, dataset={"evalFraction": 0.5})
    spec = job.object().spec
    path = Path(spec.dataset.source.removeprefix("file://"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS
    assert (spec.dataset.format, spec.dataset.eval_fraction, spec.training.epochs) == ("prompt-completion", "0.5", "1")
    assert spec.model.source == f"file://{service.folder}/model"
    assert path.parent.stat().st_mode & 0o077 == 0
    service.client.tune("model", RECORDS)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "the same records are the same file"


def test_a_job_without_a_name_gets_one_of_its_own(service: PaperService) -> None:
    Path("notes.jsonl").write_text(json.dumps(RECORDS[0]))
    first, second = (service.client.tune("model", "notes.jsonl") for _ in range(2))
    assert first.name != second.name
    assert first.name.startswith("model-")
    made = service.client.submit(job_document() | {"metadata": {"generateName": "my-" + "x" * 60}}).name
    assert made.startswith("my-xxx")
    assert len(made) == 48
    both = job_document() | {"metadata": {"generateName": "my-", "name": "fixed"}}
    assert service.client.submit(both).name == "fixed"
    for wrong in ("My_Notes-", 7, ""):
        with pytest.raises(InvalidObject, match=r"metadata\.(name|generateName)"):
            service.client.submit(job_document() | {"metadata": {"generateName": wrong}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "there is no record"),
        (["text"], "record 1 is no mapping of fields to values, but str"),
        ([RECORDS[0], {"prompt": float("nan")}], "record 2 cannot be written as JSON"),
        ([{"prompt": object()}], "record 1 cannot be written as JSON"),
        ([{"prompt": "\ud800"}], "record 1 cannot be written as JSON"),
        ([{"a": "b"}], "the fields of its first record are those of no format: a"),
        (7, "no file, list of records or DataFrame"),
    ],
)
def test_records_that_are_none_are_refused_in_words(service: PaperService, data: object, said: str) -> None:
    with pytest.raises(InvalidObject, match=said):
        service.client.tune("model", data)
    assert service.store.list_jobs() == []


def test_fields_that_a_frame_lacks_are_left_out(service: PaperService) -> None:
    asked = {"instruction": "add", "input": "2, 2", "output": "4"}
    frame = pandas.DataFrame([asked, {"instruction": "hi", "output": "ho"}])
    source = service.client.tune("model", frame).object().spec.dataset.source
    lines = Path(source.removeprefix("file://")).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asked, {"instruction": "hi", "output": "ho"}]


def test_metrics_are_a_frame_with_a_row_a_step(service: PaperService, handle: JobHandle) -> None:
    with pytest.raises(NotFound, match="no checkpoint yet"):
        handle.metrics()
    metrics = succeeded(service).metrics()
    assert list(metrics.index) == [0, 1, STEPS]
    assert metrics.loc[STEPS, "train/loss"] == 1.5
    assert pandas.isna(metrics.loc[0, "train/loss"])


def test_waiting_tells_of_progress_and_several_jobs_are_waited_for(
    service: PaperService, handle: JobHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    other = service.client.submit(job_document("other"))
    service.prepare()
    later(service.train, service.succeed, lambda: service.cancel("other"))
    ended = service.client.wait_all([handle, other], 20, progress=True)
    assert [job.status.summary.partition(":")[0] for job in ended] == ["Succeeded", "Cancelled"]
    assert (handle.state, other.state) == ("Succeeded", "Cancelled")
    said = capsys.readouterr().out.splitlines()
    assert f"medical: Training  10/{STEPS}  loss 2.5000  eval loss 2.2500  812 tokens/s  ETA 1m15s" in said
    assert said[-1] == "other: Cancelled"
    with pytest.raises(WaitTimedOut):
        service.client.wait_all([service.client.submit(job_document("third"))], 0.1)


def test_a_log_is_text(service: PaperService, handle: JobHandle) -> None:
    service.write_log(
        "train-2", '{"time":"2026-01-01T12:03:11.1Z","level":"warning","message":"slow"}\nplain \x1b[2J\n'
    )
    assert str(handle.logs()) == "12:03:11  WARNING slow\nplain \\x1b[2J"
    assert [line.text for line in handle.logs(tail=1)] == ["plain \x1b[2J"]


def test_an_adapter_may_be_asked_for_twice(service: PaperService, handle: JobHandle) -> None:
    done = succeeded(service)
    assert done.adapter("here") == done.adapter("here") == Path("here")
