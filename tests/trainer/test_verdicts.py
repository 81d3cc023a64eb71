"""What is wrong with a job ends its stage as a verdict, seen as its pod's runtime sees it.

Each case is a process of its own: its exit code, its termination message, which says where and what to do, and a log
without a traceback. QLORA_FUZZ_PROCESSES sets how many files of mutated records are tried beside.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_job
from mlflow import MlflowClient
from mlflow_server import free_port, mlflow_server
from pyarrow import Table, array, date32, parquet
from test_data_fuzz import GOOD, SUFFIXES, mutated, write
from test_prepare import make_task as prepare_task
from test_publish import make_store
from test_publish import make_task as publish_task
from tiny_model import build_tiny_model, tiny_model

from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import StageResult
from orchestrator.api.task import StageTask

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy speak of their own deprecations

FILES = int(os.environ.get("QLORA_FUZZ_PROCESSES", "8"))
RECORDS_IN_A_FILE = 25
SECRET = "sEcReT%40"
TEMPLATE = (Path(__file__).parent / "chat_templates" / "qwen3.jinja").read_text()


class Stages:
    """Runs stages in processes of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, tmp_path: Path, task: StageTask, **environment: str) -> tuple[ExitCode, StageResult, str]:
        """Exit code, termination message and log of a stage."""
        message, log = tmp_path / "termination-log", tmp_path / "log"
        variables = {"QLORA_TASK": task.model_dump_json(by_alias=True), "QLORA_TERMINATION_LOG": str(message)}
        request = {"stage": task.stage, "variables": variables | environment, "log": str(log)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = ExitCode(int(self._process.stdout.readline()))
        told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        assert "Traceback" not in log.read_text()
        assert [line for line in told if "traceback" in line] == []
        return code, StageResult.model_validate_json(message.read_text()), log.read_text()

    def refusal(self, tmp_path: Path, task: StageTask, code: ExitCode, **environment: str) -> str:
        """What a stage says that ends with this code."""
        ended, result, _ = self.run(tmp_path, task, **environment)
        assert (ended, result.failure and result.failure.reason) == (code, code.reason), result
        assert result.failure is not None
        return result.failure.message


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("forked_stages.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
    ) as process:
        yield Stages(process)


# --- prepare

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*records: Any) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def far_away() -> bytes:
    file = io.BytesIO()
    parquet.write_table(Table.from_arrays([array(["a"]), array([2**30], date32())], ["text", "day"]), file)
    return file.getvalue()


DATA: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "half a character in a name": ("a.jsonl", lines({"\ud83c": 1}), {}, "line 1 has no field `messages`"),
    "a role that nobody knows": (
        "a.jsonl",
        lines(CHAT, {"messages": [{"role": "\ud83c"}]}),
        {},
        "line 2 has a message 1",
    ),
    "a field twice": ("a.json", b'[{"text": "a", "text": "b"}]', {"format": "text"}, "line 1 is not valid JSON: an ob"),
    "a call that is a number": (
        "a.jsonl",
        lines({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "5"}]}),
        {"format": "sharegpt"},
        "line 1 has a message 2 with a tool call that names no function",
    ),
    "a date beyond Python's": ("a.parquet", far_away(), {"format": "text"}, "a.parquet: a value after row 0 cannot"),
    "an archive": ("a.csv", b"PK\x03\x04" + b"\0" * 99, {"format": "text"}, "is a ZIP archive"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", {}, "run `git lfs pull`"),
    "nothing": ("a.jsonl", b"", {}, "holds no records; give"),
    "one record to hold out": ("a.jsonl", lines(CHAT), {"evalFraction": "0.5"}, "cannot hold out a share; set it to 0"),
    "too long": ("a.jsonl", lines({"text": "word " * 900}), {"format": "text"}, "Raise spec.training.sequenceLength"),
}


@pytest.mark.parametrize("what", DATA)
def test_bad_data_are_the_users_to_mend(stages: Stages, tmp_path: Path, what: str) -> None:
    name, content, fields, problem = DATA[what]
    path = tmp_path / name
    path.write_bytes(content)
    dataset = {"source": path.as_uri(), "evalSource": None, **fields}
    message = stages.refusal(tmp_path, prepare_task(tmp_path / "store", dataset=dataset), ExitCode.USER_ERROR)
    assert name in message
    assert problem in message
    assert not list((tmp_path / "store").rglob("*.parquet")), "nothing is prepared"


def no_template(tmp_path: Path) -> dict[str, Any]:
    return {"model": build_tiny_model(tmp_path / "base", chat_template=None)}


def no_end(tmp_path: Path) -> dict[str, Any]:
    model = build_tiny_model(tmp_path / "base")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    data = tmp_path / "a.jsonl"
    data.write_bytes(lines({"text": "a"}))
    return {"model": model, "dataset": {"source": data.as_uri(), "evalSource": None, "format": "text"}}


def cut_weights(tmp_path: Path) -> dict[str, Any]:
    model = shutil.copytree(tiny_model(), tmp_path / "base")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return {"model": model}


JOBS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no file": (
        lambda _: {"dataset": {"source": "file:///nowhere/a.jsonl"}},
        "there is no file file:///nowhere/a.jsonl",
    ),
    "no model": (lambda path: {"model": path / "nowhere"}, "there is no model folder at .* check spec.model.source"),
    "no chat template": (no_template, "has no chat template: set spec.model.chatTemplate"),
    "no token that ends a text": (
        no_end,
        r"base: its tokenizer names no eos_token, .* set it in tokenizer_config.json",
    ),
    "weights that are cut off": (cut_weights, "model.safetensors"),
    "a template that is none": (lambda _: {"model_fields": {"chatTemplate": "{% if %}"}}, "not valid Jinja: .* line 1"),
    "a template that never ends": (
        lambda _: {"model_fields": {"chatTemplate": "{% for x in range(10**9) %}{% endfor %}{{ messages }}"}},
        "chat template takes too much|is refused by the chat template",
    ),
    "targets that are none": (lambda _: {"adapter": {"targetModules": ["nothing"]}}, "nothing"),
}


@pytest.mark.parametrize("what", JOBS)
def test_a_job_that_cannot_be_is_refused_by_prepare(stages: Stages, tmp_path: Path, what: str) -> None:
    make, problem = JOBS[what]
    message = stages.refusal(tmp_path, prepare_task(tmp_path / "store", **make(tmp_path)), ExitCode.USER_ERROR)
    assert re.search(problem, message), message


@pytest.mark.parametrize("number", range(FILES))
def test_mutated_records_end_prepare_as_done_or_as_a_users_error(stages: Stages, tmp_path: Path, number: int) -> None:
    rng = random.Random(f"process {number}")
    form = rng.choice(list(GOOD))
    path = tmp_path / f"{number}.{rng.choice([suffix for suffix in SUFFIXES if suffix != 'txt'])}"
    records = [mutated(GOOD[form], rng) for _ in range(rng.choice([1, RECORDS_IN_A_FILE]))]
    if not write(path, records, rng):
        path = path.with_suffix(".jsonl")
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    dataset = {"source": path.as_uri(), "evalSource": None, "format": form, "tooLong": "truncate"}
    task = prepare_task(tmp_path / "store", dataset=dataset, model_fields={"chatTemplate": TEMPLATE})
    ended, result, _ = stages.run(tmp_path, task)
    if ended is ExitCode.OK:
        assert result.prepare is not None
        return
    assert ended is ExitCode.USER_ERROR, result
    assert result.failure is not None
    assert path.name in result.failure.message


# --- train


def test_what_prepare_made_and_is_gone_is_made_again(stages: Stages, tmp_path: Path) -> None:
    task = toy_job.make_task(tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "prepared")
    assert stages.refusal(tmp_path, task, ExitCode.TRANSIENT_ERROR).endswith(
        "is gone; the prepare stage must run again"
    )


def test_a_model_that_is_gone_is_the_users_to_mend(stages: Stages, tmp_path: Path) -> None:
    task = toy_job.make_task(tmp_path / "store")
    model = task.spec.model.model_copy(update={"source": "file:///nowhere"})
    gone = task.model_copy(update={"spec": task.spec.model_copy(update={"model": model})})
    assert "there is no model folder at file:///nowhere" in stages.refusal(tmp_path, gone, ExitCode.USER_ERROR)


# --- publish


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The address of an MLflow server of its own."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    os.environ.setdefault("MLFLOW_TRACKING_URI", "")
    with mlflow_server(folder, port):
        yield f"127.0.0.1:{port}"


def test_a_login_in_the_registrys_address_is_told_to_nobody(stages: Stages, tmp_path: Path, server: str) -> None:
    client = MlflowClient(f"http://{server}", f"http://{server}")
    client.create_experiment("team-a", tags={"qlora.dev/namespace": "team-a"})
    address = f"http://user:{SECRET}@{server}"
    store = make_store(tmp_path)
    ended, result, log = stages.run(
        tmp_path, publish_task(client, store, registered_model="terms"), MLFLOW_TRACKING_URI=address
    )
    assert ended is ExitCode.OK, result
    version = client.get_model_version_by_alias("terms", "candidate")
    told = [log, result.model_dump_json(), repr(version), repr(client.get_run(str(version.run_id)))]
    told += [repr(model) for model in client.search_logged_models(["1"])]
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    client.download_artifacts(str(version.run_id), "", str(downloaded))
    told += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert version.description is not None
    assert f'mlflow.set_tracking_uri("http://{server}")' in version.description
    assert [text[:200] for text in told if SECRET in text or "sEcReT@" in text] == []


def test_a_registry_that_is_away_is_asked_again_and_its_login_is_told_to_nobody(
    stages: Stages, tmp_path: Path, server: str
) -> None:
    client = MlflowClient(f"http://{server}", f"http://{server}")
    if client.get_experiment_by_name("team-a") is None:
        client.create_experiment("team-a", tags={"qlora.dev/namespace": "team-a"})
    task = publish_task(client, make_store(tmp_path), uid="u-2")
    away = f"http://user:{SECRET}@127.0.0.1:{free_port()}"
    code, result, log = stages.run(tmp_path, task, MLFLOW_TRACKING_URI=away)
    assert code is ExitCode.TRANSIENT_ERROR
    assert result.failure is not None
    assert result.failure.reason is Reason.TRANSIENT_ERROR
    assert "MLflow is away" in result.failure.message
    assert SECRET not in log + result.failure.message
