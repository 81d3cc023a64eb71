"""Talking to a finished adapter on this machine: the trainer's libraries load it, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError

from orchestrator.adapters.job_store import stored_adapter
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult
from orchestrator.api.task import TASK_VARIABLE, TERMINATION_LOG_VARIABLE, StageTask, task_variables
from orchestrator.errors import InvalidObject, JobFailed, PermanentError, TransientError
from orchestrator.sdk import extras

DEFAULT_ANSWER_TOKENS = 256


def chat(job: QLoRAJob, prompt: str | None = None, max_new_tokens: int = DEFAULT_ANSWER_TOKENS) -> None:
    """Print the adapter's answer to a prompt, or to each line of standard input.

    Raises JobFailed where there is no adapter, InvalidObject where it cannot be loaded here, as for want of memory,
    MissingExtra without the trainer's libraries.
    """
    extras.require("trainer", purpose="talking to an adapter on this machine")
    if job.status.adapter_uri is None:
        raise JobFailed(f"job {job.key} has no adapter yet: {job.status.summary or 'nothing has started'}")
    with tempfile.TemporaryDirectory(prefix="qlora-chat-") as scratch:
        adapter, verdict = Path(scratch) / "adapter", Path(scratch) / "verdict.json"
        stored_adapter.download(job.status.adapter_uri, adapter, job.status.adapter_digest)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(TASK_VARIABLE)}
        environment |= task_variables(_task(job).model_dump_json(by_alias=True))
        environment[TERMINATION_LOG_VARIABLE] = str(verdict)
        asked = [str(adapter), str(max_new_tokens), *([] if prompt is None else [prompt])]
        ended = subprocess.run([sys.executable, "-m", "qlora_trainer", "chat", *asked], env=environment, check=False)
        if ended.returncode != ExitCode.OK:
            raise _refusal(ended.returncode, verdict)


def _task(job: QLoRAJob) -> StageTask:
    return StageTask(
        stage="prepare",
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid="asked",
        attempt=1,
        spec=job.spec,
        store_uri="file:///dev/null",  # nothing is stored
        prepared=job.status.prepared,
    )


def _refusal(status: int, verdict: Path) -> Exception:
    try:
        failure = StageResult.from_termination_message(verdict.read_text()).failure
    except (OSError, ValidationError):
        failure = None
    if failure is None:
        return PermanentError(f"the trainer ended with status {status}")
    if status == ExitCode.USER_ERROR:
        return InvalidObject(failure.message)
    passes = status in (ExitCode.TRANSIENT_ERROR, ExitCode.CREDENTIALS_REFUSED)
    return (TransientError if passes else PermanentError)(failure.message)
