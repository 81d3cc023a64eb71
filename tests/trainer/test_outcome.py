"""The frame around a stage: exit code, termination message and log, as the controller sees them from outside."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from base64 import b85encode
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest
from qlora_trainer import __main__ as frame
from qlora_trainer.outcome import (
    BrokenGpu,
    DivergedError,
    FencedError,
    OutOfMemory,
    Preempted,
    StageError,
    Transient,
    UserError,
)
from qlora_trainer.outcome import write_result as write

from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec
from orchestrator.api.layer_trace import EndInstants, LayerInstants, LayerKind, ModelTrace
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import Failure, ResultTooLong, StageResult, TrainResult
from orchestrator.api.task import StageTask, task_text, task_variables
from tests.builders import prepare_result

SECRET = "not-to-be-seen-s3cr3t"


def make_task(store: Path, *, stage: str = "publish", source: str = "file:///models/base") -> StageTask:
    spec = QLoRAJobSpec(model=ModelSource(source=source), dataset=DatasetSource(source="file:///data.jsonl"))
    return StageTask.model_validate(
        {
            "stage": stage,
            "namespace": "team-a",
            "job": "job",
            "uid": "u-1",
            "attempt": 3,
            "spec": spec.to_wire(),
            "storeUri": store.as_uri(),
            "runId": "0" * 32,
        }
    )


def run_trainer(
    tmp_path: Path, stage: str, task: str | None, **environment: str
) -> tuple[int, StageResult, list[dict[str, object]]]:
    """Run the real program; its exit code, its termination message and its log."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    variables["QLORA_TERMINATION_LOG"] = str(tmp_path / "termination-log")
    variables.pop("QLORA_TASK", None)
    if task is not None:
        variables["QLORA_TASK"] = task
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer", stage], env=variables, capture_output=True, timeout=120, check=False
    )
    assert done.stdout == b""
    result = StageResult.model_validate_json((tmp_path / "termination-log").read_text())
    return done.returncode, result, [json.loads(line) for line in done.stderr.splitlines()]


def test_a_failed_stage_says_so_by_exit_code_message_and_log(tmp_path: Path) -> None:
    task = make_task(tmp_path / "store").model_dump_json(by_alias=True)
    code, result, lines = run_trainer(tmp_path, "publish", task)
    assert code == ExitCode.USER_ERROR
    assert result.failure is not None
    assert result.failure.reason is Reason.USER_ERROR
    assert "holds no finished adapter" in result.failure.message
    assert {(line["job"], line["stage"], line["attempt"]) for line in lines[1:]} == {("team-a/job", "publish", 3)}
    assert any(line["message"] == result.failure.message for line in lines)


@pytest.mark.parametrize(
    ("stage", "task", "complaint"),
    [
        ("publish", None, "QLORA_TASK is not set"),
        ("publish", "{}", "not a task of this trainer's version"),
        ("serve", "{}", "usage: python -m qlora_trainer prepare | train | publish"),
        ("prepare", "publish", "is for the stage 'publish', not 'prepare'"),
    ],
)
def test_a_wrong_start_is_a_users_error(tmp_path: Path, stage: str, task: str | None, complaint: str) -> None:
    if task == "publish":
        task = make_task(tmp_path).model_dump_json(by_alias=True)
    code, result, _ = run_trainer(tmp_path, stage, task)
    assert code == ExitCode.USER_ERROR
    assert result.failure is not None
    assert complaint in result.failure.message


def test_the_largest_template_that_is_accepted_reaches_the_trainer(tmp_path: Path) -> None:
    task = make_task(tmp_path / "store")
    model = ModelSource(source="file:///models/base", chat_template="{{ x }}" + '"' * 49_145)
    spec = task.spec.model_copy(update={"model": model})
    text = task.model_copy(update={"spec": spec}).model_dump_json(by_alias=True)
    variables = task_variables(text)
    assert len(variables) > 1, "one variable would do"
    assert all(len(f"{name}={part}".encode()) < 131_072 for name, part in task_variables("模" * 65_536).items())
    code, result, _ = run_trainer(tmp_path, "publish", variables.pop("QLORA_TASK"), **variables)
    assert code == ExitCode.USER_ERROR
    assert result.failure is not None
    assert "holds no finished adapter" in result.failure.message
    assert task_text(task_variables(text)) == text


def test_secrets_never_reach_the_log_or_the_message(tmp_path: Path) -> None:
    # The wrong task is quoted in the validation error, and with it whatever was in it.
    broken = json.dumps({"stage": SECRET, "storeUri": f"s3://user:{SECRET}@host"})
    variables = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": "x" * 40}
    _, result, lines = run_trainer(tmp_path, "publish", broken, **variables)
    assert result.failure is not None
    assert SECRET not in result.failure.message
    assert "<HF_TOKEN>" in result.failure.message
    assert SECRET not in json.dumps(lines)


def test_a_password_in_a_url_is_hidden() -> None:
    assert frame.redact("at postgres://me:pass@db/mlflow") == "at postgres://<credentials>@db/mlflow"
    assert frame.redact("at s3://bucket/key:1@2") == "at s3://bucket/key:1@2"
    assert frame.redact("at http://me:p@:ss@[::1]:5000/x") == "at http://<credentials>@[::1]:5000/x"
    assert frame.redact('"http://:pass@a" "https://token@b"') == '"http://<credentials>@a" "https://<credentials>@b"'


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 80),
        (Transient("x"), 81),
        (OutOfMemory("x"), 82),
        (DivergedError("x"), 83),
        (FencedError("x"), 84),
        (Preempted(), 85),
        (BrokenGpu("x"), 86),
        (Transient("x", of_credentials=True), 87),
        (StageError("x"), 1),
        (ValueError("x"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "/data/file"), 81),
        (RuntimeError("CUDA error: out of memory"), 82),
        (MemoryError(), 1),
    ],
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    found, result = frame.verdict(error)
    assert int(found) == code
    assert result.failure is not None
    assert result.failure.reason is found.reason


def test_torchs_out_of_memory_is_out_of_memory() -> None:
    torch = pytest.importorskip("torch")
    assert frame.verdict(torch.cuda.OutOfMemoryError("tried to allocate"))[0] is ExitCode.OUT_OF_MEMORY


BROKEN = (
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: an uncorrectable NVLink error was detected during the execution",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: all CUDA-capable devices are busy or unavailable",
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: initialization error",
    "CUDA error: unknown error",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "No CUDA GPUs are available",
    "Found no NVIDIA driver on your system.",
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized: CUDA unknown error",
)
OURS = (
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "CUDA error: invalid configuration argument",
    "mat1 and mat2 shapes cannot be multiplied (busy or unavailable)",
)


def in_a_library(text: str) -> Exception:
    """As a library wraps what torch says."""
    error = ValueError("could not load the model")
    error.__cause__ = RuntimeError(text)
    return error


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_card_is_no_fault_of_ours(text: str) -> None:
    for error in (RuntimeError(text), in_a_library(text)):
        code, result = frame.verdict(error)
        assert code is ExitCode.BROKEN_GPU
        assert result.failure is not None
        assert result.failure.reason is Reason.BROKEN_GPU
        assert f"is broken: {text.splitlines()[0]}" in result.failure.message


@pytest.mark.parametrize("text", OURS)
def test_a_faulty_kernel_is_no_broken_card(text: str) -> None:
    assert frame.verdict(RuntimeError(text))[0] is ExitCode.INTERNAL_ERROR


def test_a_card_that_does_not_come_up_is_broken_and_no_reason_for_the_cpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the card of this machine comes up")
    runtime = import_module("qlora_trainer.training.runtime")
    assert runtime.set_up(threads=1, deterministic=False, device_files=tmp_path).type == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(RuntimeError) as caught:
        runtime.set_up(threads=1, deterministic=False, device_files=tmp_path)
    assert frame.verdict(caught.value)[0] is ExitCode.BROKEN_GPU


def test_a_full_disk_is_named() -> None:
    _, result = frame.verdict(OSError(errno.ENOSPC, "No space left on device", "/data/file"))
    assert result.failure is not None
    assert "no space left on /data/file: free some" in result.failure.message


def test_a_preempted_train_stage_hands_over_how_far_it_came() -> None:
    train = TrainResult(step=7, complete=False, checkpoint_uri="file:///store/checkpoints/step-00000007")
    code, result = frame.verdict(Preempted(train))
    assert (code, result.train) == (ExitCode.PREEMPTED, train)


def test_an_endless_message_still_fits_a_pods_status(tmp_path: Path) -> None:
    _, result = frame.verdict(UserError('"\n' * 5000))
    assert len(result.to_termination_message().encode()) <= 4096


def traced_result(values: Iterator[float], kinds: int) -> StageResult:
    """What prepare found of a model whose layers have so many kinds of 24 moments each."""

    def polynomial() -> tuple[float, ...]:
        return next(values), next(values), next(values)

    def layer() -> LayerInstants:
        moments = [tuple(polynomial() for _ in range(12)) for _ in range(2)]
        return LayerInstants(kept=polynomial(), forward=moments[0], backward=moments[1])

    end = EndInstants(first_kept=polynomial(), loss=polynomial(), norm=(polynomial(),))
    found = tuple(
        LayerKind(weight_bytes=1, other_bytes=1, gradient_bytes=1, recomputed=layer(), whole=layer())
        for _ in range(kinds)
    )
    trace = ModelTrace(
        packed=True,
        kinds=found,
        layers="abcdefgh"[:kinds],
        recomputed=end,
        whole=end,
        other_bytes=1,
        adapter_parameters=1,
    )
    facts = prepare_result().model.model_copy(update={"trace": trace})
    return StageResult(prepare=prepare_result().model_copy(update={"model": facts, "warnings": ("w" * 280,) * 5}))


def test_a_trace_that_is_too_long_for_a_pods_status_is_deflated() -> None:
    result = traced_result(map(float, count(1_000)), kinds=3)
    assert len(result.model_dump_json(by_alias=True, exclude_none=True)) > 4096
    text = result.to_termination_message()
    assert len(text.encode()) <= 4096
    assert set(json.loads(text)) == {"deflated"}
    assert StageResult.from_termination_message(text) == result


def test_warnings_go_before_a_trace_does_and_a_trace_that_fits_in_no_way_is_told_as_such() -> None:
    draw = random.Random(0)
    noise = iter(draw.random, None)
    result = traced_result((round(1e9 * each, 3) for each in noise), kinds=1)
    sent = StageResult.from_termination_message(result.to_termination_message())
    assert result.prepare is not None
    assert sent.prepare is not None
    assert sent.prepare.model == result.prepare.model
    with pytest.raises(ResultTooLong):
        traced_result((round(1e9 * each, 3) for each in noise), kinds=8).to_termination_message()


def test_the_walk_of_a_trace_goes_before_a_warning_does() -> None:
    draw = random.Random(0)
    result = traced_result(map(float, count(1_000)), kinds=3)
    assert result.prepare is not None
    assert result.prepare.model.trace is not None
    walk = "".join(draw.choices("0123456789abcdefghijklmnopqrstuvwxyz", k=4096))
    trace = result.prepare.model.trace.model_copy(update={"walk": walk})
    model = result.prepare.model.model_copy(update={"trace": trace})
    long = StageResult(prepare=result.prepare.model_copy(update={"model": model}))
    assert StageResult.from_termination_message(long.to_termination_message()) == result


@pytest.mark.parametrize(
    "packed",
    [
        b"no zlib",
        zlib.compress(b"{}")[:-1],
        zlib.compress(b"x" * (65 << 10)),
        zlib.compress(b"\xff"),
        zlib.compress(b'{"deflated":""}'),
        zlib.compress(b"[" * 60_000),
    ],
)
def test_a_message_that_does_not_inflate_to_a_result_is_none(packed: bytes) -> None:
    text = f'{{"deflated":"{b85encode(packed).decode()}"}}'
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        StageResult.from_termination_message(text)


def test_a_termination_log_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a pod: the file is a mount of its own, so its folder's entry cannot be exchanged.
    path = tmp_path / "termination-log"
    path.write_bytes(b"")
    mounted = subprocess.run(["mount", "--bind", str(path), str(path)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("QLORA_TERMINATION_LOG", str(path))
        write(StageResult(failure=Failure(reason=Reason.USER_ERROR, message="why")))
        found = json.loads(path.read_text())
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["termination-log"]
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert found == {"failure": {"reason": "UserError", "message": "why"}}


@pytest.mark.parametrize(("source", "offline"), [("file:///models/base", "1"), ("hf://owner/name", None)])
def test_hubs_are_reached_only_where_the_job_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, offline: str | None
) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "to be restored")
        monkeypatch.delenv(variable)
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(variable, "0")
    frame.set_environment(make_task(tmp_path, source=source))
    assert os.environ.get("HF_HUB_OFFLINE") == offline
    assert os.environ.get("TRANSFORMERS_OFFLINE") == offline
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"


SWALLOWING = """
import contextlib, os, signal, sys, time
from qlora_trainer import __main__ as frame

def run_stage(task):
    with contextlib.suppress(BaseException):  # as an import does, of what a library can do without
        os.kill(os.getpid(), signal.SIGTERM)
    with contextlib.suppress(BaseException):
        time.sleep(20)
    time.sleep(20)

frame.run_stage = run_stage
sys.exit(frame.main(["publish"]))
"""


def test_a_stop_that_a_library_swallows_is_repeated(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "QLORA_TASK": make_task(tmp_path).model_dump_json(by_alias=True),
        "QLORA_TERMINATION_LOG": str(tmp_path / "termination-log"),
    }
    ended = subprocess.run([sys.executable, "-c", SWALLOWING], env=environment, timeout=30, check=False)
    assert ended.returncode == ExitCode.PREEMPTED
    result = StageResult.model_validate_json((tmp_path / "termination-log").read_text())
    assert result.failure is not None
    assert result.failure.reason is Reason.PREEMPTED


def test_sigterm_ends_a_stage_without_state_as_preempted(tmp_path: Path) -> None:
    # The store answers nobody, so publish is busy asking it again when it is told to stop.
    pytest.importorskip("s3fs")
    task = make_task(tmp_path).model_copy(update={"store_uri": "s3://bucket/job"}).model_dump_json(by_alias=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "QLORA_TASK": task,
        "QLORA_TERMINATION_LOG": str(tmp_path / "termination-log"),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer", "publish"], env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process, process.stderr:
        assert b"attempt 3" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ExitCode.PREEMPTED
    result = StageResult.model_validate_json((tmp_path / "termination-log").read_text())
    assert result.failure is not None
    assert result.failure.reason is Reason.PREEMPTED
