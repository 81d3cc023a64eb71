"""Training records with their masks: of a job's manifest, read on this machine, or of a job, from its store."""

from __future__ import annotations

import os
import subprocess
import sys

from pydantic import ValidationError

from orchestrator.adapters.job_store import stored_adapter
from orchestrator.api.formats import MAX_SHOWN_RECORDS, SHOWN_NAME, ShownRecords
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult
from orchestrator.api.task import TASK_VARIABLE, StageTask, task_variables
from orchestrator.errors import InvalidObject, NotFound, PermanentError, TransientError
from orchestrator.sdk import extras

TIMEOUT_SECONDS = 600.0
"""Fetching a tokenizer and the beginning of a data set takes no longer."""


def records_of_spec(job: QLoRAJob, count: int) -> ShownRecords:
    """The first training records, read, rendered and masked here as the job's prepare would.

    Raises InvalidObject with what prepare would refuse, MissingExtra without the trainer's libraries.
    """
    if not 1 <= count <= MAX_SHOWN_RECORDS:
        raise InvalidObject(f"between 1 and {MAX_SHOWN_RECORDS} records can be shown, not {count}")
    extras.require("trainer", purpose="reading records on this machine")
    task = StageTask(
        stage="prepare",
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid="shown",
        attempt=1,
        spec=job.spec,
        store_uri="file:///dev/null",  # nothing is stored
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(TASK_VARIABLE)}
    command = [sys.executable, "-m", "qlora_trainer", "show", str(count)]
    try:
        ended = subprocess.run(
            command,
            env=environment | task_variables(task.model_dump_json(by_alias=True)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransientError(f"the first records were not read within {TIMEOUT_SECONDS:.0f} s; try again") from error
    if ended.returncode != ExitCode.OK:
        raise _refusal(ended)
    return ShownRecords.model_validate_json(ended.stdout)


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


def records_of_job(job: QLoRAJob) -> ShownRecords:
    """The records that the job's prepare kept to be looked at; raises NotFound where it has not ended."""
    prepared = job.status.prepared
    if prepared is None:
        raise NotFound(f"job {job.key} is not prepared yet ({job.status.summary or 'nothing has started'}); try later")
    try:
        content = stored_adapter.read_file(prepared.uri, SHOWN_NAME)
    except PermanentError as error:
        raise PermanentError(
            f"the records of {job.key} cannot be read from here: {error}. They are also in its log "
            f"(qlora logs {job.metadata.name} --stage prepare) and, once it is published, in its MLflow run"
        ) from error
    return ShownRecords.model_validate_json(content)
