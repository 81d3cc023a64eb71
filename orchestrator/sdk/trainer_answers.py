"""Questions about a job that the trainer answers on this machine, in a process of its own: libraries of gigabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult
from orchestrator.api.task import TASK_VARIABLE, StageTask, task_variables
from orchestrator.errors import InvalidObject, PermanentError, TransientError


def ask_trainer(command: Sequence[str], job: QLoRAJob, *, timeout_seconds: float, said: str = "") -> str:
    """What `python -m qlora_trainer` prints, asked about the job's prepare; `said` is what it reads.

    Raises InvalidObject with what prepare would refuse, TransientError and PermanentError otherwise.
    """
    task = StageTask(
        stage="prepare",
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid="asked",
        attempt=1,
        spec=job.spec,
        store_uri="file:///dev/null",  # nothing is stored
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(TASK_VARIABLE)}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "qlora_trainer", *command],
            env=environment | task_variables(task.model_dump_json(by_alias=True)),
            input=said,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransientError(f"the trainer did not answer within {timeout_seconds:.0f} s; try again") from error
    if ended.returncode != ExitCode.OK:
        raise _refusal(ended)
    return ended.stdout


def _refusal(ended: subprocess.CompletedProcess[str]) -> Exception:
    try:
        failure = StageResult.model_validate_json(ended.stdout).failure
    except ValidationError:
        failure = None
    if failure is None:
        said = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return PermanentError(f"the trainer ended with status {ended.returncode}: {said[0]}")
    if ended.returncode == ExitCode.USER_ERROR:
        return InvalidObject(failure.message)
    passes = ended.returncode in (ExitCode.TRANSIENT_ERROR, ExitCode.CREDENTIALS_REFUSED)
    kind = TransientError if passes else PermanentError
    return kind(failure.message)
