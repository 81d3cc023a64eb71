"""`python -m qlora_trainer prepare | train | publish`: one attempt at one stage of one job.

`python -m qlora_trainer show N` prints the first N records of a prepare task as they would be trained, and
`python -m qlora_trainer trace` what the layers of its model take, by the config.json that it reads.
`python -m qlora_trainer chat FOLDER TOKENS [PROMPT]` talks to an adapter in a folder on the task's base model.

The frame around a stage: its task, its environment, its log, and its verdict, which is the exit code and the
termination message and nothing else. Nothing heavy is imported before the stage that needs it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import gmtime
from types import FrameType
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import Failure, PrepareResult, PublishResult, StageResult, TrainResult
from orchestrator.api.task import TASK_VARIABLE, StageTask, task_text
from orchestrator.api.words import in_json, in_lines, without_logins
from qlora_trainer.outcome import Preempted, StageError, UserError, write_result
from qlora_trainer.storage.stored_log import StoredLog

STAGES = ("prepare", "train", "publish")
SECRET_VARIABLES = re.compile(r".*(TOKEN|SECRET|PASSWORD|CONNECTION_STRING|(API|ACCESS|ACCOUNT|PRIVATE)_KEY)")
"""Names of variables whose values are told to nobody: those of hubs, stores and registries of every kind end so."""
MIN_SECRET_CHARACTERS = 6
"""Shorter values are none, and would be found in every other word."""
END_SECONDS, HURRIED_END_SECONDS = 5.0, 1.0
"""How long the end of a stage waits for the last lines of its log to be stored."""
INSIST_SECONDS = 1.0
"""How long after SIGTERM, and how often from then on, a stage that goes on is stopped again."""
MAX_MESSAGE_CHARACTERS = 2048  # the bound of orchestrator.api.base.Sentence

GPU_FAULTS = re.compile(
    r"uncorrectable (ECC|NVLink) error|device\(?s?\)? is/are busy or unavailable|devices are busy or unavailable"
    r"|No CUDA GPUs are available|no CUDA-capable device is detected|CUDA driver initialization failed"
    r"|CUDA error: (initialization error|unknown error|system not yet initialized|invalid device ordinal)"
    r"|CUDA unknown error|Found no NVIDIA driver|GPU (is lost|has fallen off the bus)|Driver/library version mismatch"
    r"|hardware error|GPU requires reset",
    re.IGNORECASE,
)
"""What CUDA and its driver say of a card that is lost, busy or damaged, whatever runs on it. What a faulty kernel of
ours leads to (device-side assert, illegal memory access, launch failure) is none of these."""

log = logging.getLogger("qlora_trainer")


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, because it may arrive inside a library that swallows those."""


def main(arguments: list[str]) -> ExitCode:
    """Run the stage that the command line names; the exit code is the verdict."""
    if arguments[:1] == ["show"]:
        return answer("show", lambda prepare, task: prepare.show(task, int(arguments[1])))
    if arguments == ["trace"]:
        return answer("trace", lambda prepare, task: prepare.trace(task, sys.stdin.read()))
    if arguments[:1] == ["chat"]:
        return talk(Path(arguments[1]), int(arguments[2]), next(iter(arguments[3:]), None))
    stage = arguments[0] if len(arguments) == 1 else ""
    start_logging(stage=stage)
    stored_log: StoredLog | None = None
    try:
        try:
            task = read_task(stage)
            stored_log = start_logging_of(task)
            set_environment(task)
            if stage != "train":  # train listens for SIGTERM itself, because it has something to save
                signal.signal(signal.SIGTERM, _stop)
            result = run_stage(task)
        finally:
            _insist_no_more()
    except Stopped:
        _insist_no_more()  # again, for it may have come on the way out, before the first time
        exit_code, result = verdict(Preempted())
    except Exception as error:  # noqa: BLE001 - the frame: whatever comes out of a stage becomes its verdict
        # Native code that `Stopped` interrupts, in an import above all, may raise an error of its own instead.
        exit_code, result = verdict(Preempted() if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN else error)
    else:
        exit_code = ExitCode.OK
    write_result(result)
    log.info("the stage ended with %s (%d)", exit_code.name, exit_code)
    if stored_log is not None:
        stored_log.end(HURRIED_END_SECONDS if exit_code is ExitCode.PREEMPTED else END_SECONDS)
    return exit_code


def answer(command: str, ask: Callable[[Any, StageTask], BaseModel]) -> ExitCode:
    """Print what is asked about prepare's task as JSON, or what is wrong with that; nothing is written."""
    try:
        task = read_task("prepare")
        set_environment(task)
        start_logging(stage=command)
        logging.getLogger().setLevel(logging.WARNING)
        found = ask(import_module("qlora_trainer.prepare"), task)
    except Exception as error:  # noqa: BLE001 - the frame: whatever comes out becomes the answer
        exit_code, result = verdict(error)
        print(result.model_dump_json(), flush=True)  # noqa: T201 - the answer
        return exit_code
    print(found.model_dump_json(), flush=True)  # noqa: T201 - the answer
    return ExitCode.OK


def talk(adapter: Path, max_new_tokens: int, prompt: str | None) -> ExitCode:
    """Answer a prompt, or those that are typed; what goes wrong is written where a stage's result would be."""
    try:
        task = read_task("prepare")
        set_environment(task)
        start_logging(stage="chat")
        logging.getLogger().setLevel(logging.ERROR)
        import_module("qlora_trainer.chat").run(task, adapter, prompt, max_new_tokens)
    except Exception as error:  # noqa: BLE001 - the frame: whatever comes out becomes the verdict
        logging.getLogger().setLevel(logging.CRITICAL)  # whoever asked prints it
        exit_code, result = verdict(error)
        write_result(result)
        return exit_code
    return ExitCode.OK


def read_task(stage: str) -> StageTask:
    """The task from the environment; it must be one for the stage of the command line."""
    if stage not in STAGES:
        raise UserError(f"usage: python -m qlora_trainer {' | '.join(STAGES)}")
    text = task_text(os.environ)
    if text is None:
        raise UserError(f"{TASK_VARIABLE} is not set; it must hold the stage's task as JSON")
    try:
        task = StageTask.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{TASK_VARIABLE} is not a task of this trainer's version: {error}") from error
    if task.stage != stage:
        raise UserError(f"{TASK_VARIABLE} is for the stage {task.stage!r}, not {stage!r}")
    return task


def set_environment(task: StageTask) -> None:
    """Nothing but what the job declares is fetched, and nobody is told about it."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    # What libraries draw and remark is for whoever calls them; what matters to the job, the stage says itself.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Tokenizers' threads and a later fork do not mix, and prepare forks nothing that would profit.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread that waits for another one sleeps: spinning on a core that somebody else needs makes training on two
    # threads five times slower than on one. The order of sums, and so the bits, depend on the number of threads alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    spec = task.spec
    sources = (spec.model.source, spec.dataset.source, spec.dataset.eval_source, spec.adapter.start)
    if not any(source is not None and source.startswith("hf://") for source in sources):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def run_stage(task: StageTask) -> StageResult:
    """Import the stage's module and run it."""
    log.info(
        "stage %s of %s/%s, attempt %d, store %s", task.stage, task.namespace, task.job, task.attempt, task.store_uri
    )
    found: PrepareResult | TrainResult | PublishResult = import_module(f"qlora_trainer.{task.stage}").run(task)
    return StageResult.model_validate({task.stage: found})


def verdict(error: Exception) -> tuple[ExitCode, StageResult]:
    """The exit code and the termination message that an error stands for."""
    exit_code, message = _judge(error)
    expected = isinstance(error, StageError)
    log.log(logging.WARNING if expected else logging.ERROR, "%s", message, exc_info=None if expected else error)
    message = in_lines(redact(message))
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 3] + "..."
    train = error.result if isinstance(error, Preempted) else None
    return exit_code, StageResult(train=train, failure=Failure(reason=exit_code.reason, message=message))


def _judge(error: Exception) -> tuple[ExitCode, str]:
    if isinstance(error, StageError):
        return error.exit_code, error.message
    if _is_out_of_gpu_memory(error):
        return ExitCode.OUT_OF_MEMORY, f"the GPU's memory is full: {error}"
    if (fault := _gpu_fault(error)) is not None:
        return ExitCode.BROKEN_GPU, f"{_gpu_name()} is broken: {fault}; the node's driver log says more (dmesg, Xid)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "the disk that was being written to"
        return ExitCode.TRANSIENT_ERROR, f"no space left on {where}: free some, or give the job a larger volume"
    return ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}"


def _is_out_of_gpu_memory(error: Exception) -> bool:
    # bitsandbytes' paged memory and CUDA libraries report exhaustion as a plain RuntimeError.
    named = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    return named or (isinstance(error, RuntimeError) and bool(re.search(r"CUDA.*out of memory", str(error), re.DOTALL)))


def _gpu_fault(error: BaseException | None) -> str | None:
    """The first line of what CUDA says about a card that is broken, if that is what an error comes of."""
    while error is not None:
        if isinstance(error, RuntimeError) and GPU_FAULTS.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _gpu_name() -> str:
    """What the card is called, if it still says so."""
    try:
        return str(import_module("torch.cuda").get_device_name())
    except Exception:  # noqa: BLE001 - it is broken
        return "the GPU"


def _stop(_signal_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out must not be interrupted
    # But a library may take `Stopped` for an import that failed, and go on without what it wanted to import.
    signal.signal(signal.SIGALRM, _insist)
    signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS, INSIST_SECONDS)
    raise Stopped


def _insist(_signal_number: int, _frame: FrameType | None) -> None:
    raise Stopped


def _insist_no_more() -> None:
    if signal.getsignal(signal.SIGALRM) is _insist:
        signal.setitimer(signal.ITIMER_REAL, 0)


def redact(text: str) -> str:
    """The text without the values of secret variables and without logins in URLs."""
    for variable, value in os.environ.items():
        if len(value) >= MIN_SECRET_CHARACTERS and SECRET_VARIABLES.fullmatch(variable):
            text = text.replace(value, f"<{variable}>")
    return without_logins(text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the fields that say whose line it is."""

    def __init__(self, fields: dict[str, str | int]) -> None:
        super().__init__()
        self.converter = gmtime
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str | int] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._fields,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return in_json(json.dumps(line, ensure_ascii=False))


def start_logging(**fields: str | int) -> None:
    """Log JSON lines to stderr, each with the given fields."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(fields))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in (
        "httpx",
        "httpcore",
        "urllib3",
        "botocore",
        "aiobotocore",
        "s3fs",
        "fsspec",
        "alembic",
        "filelock",
        "gguf",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for remarking in ("py.warnings", "accelerate", "bitsandbytes", "peft", "torch"):
        logging.getLogger(remarking).setLevel(logging.ERROR)


def start_logging_of(task: StageTask) -> StoredLog:
    """Log with the attempt's fields, and keep a copy in its job's store."""
    fields: dict[str, str | int] = {
        "stage": task.stage,
        "job": f"{task.namespace}/{task.job}",
        "attempt": task.attempt,
    }
    start_logging(**fields)
    stored_log = StoredLog(task, JsonFormatter(fields))
    logging.getLogger().addHandler(stored_log)
    return stored_log


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    # The verdict is written; a native library that crashes while the interpreter is torn down must not change it.
    os._exit(code)
