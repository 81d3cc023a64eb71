"""Training records with their masks: of a job's manifest, read on this machine, or of a job, from its store."""

from __future__ import annotations

from orchestrator.adapters.job_store import stored_adapter
from orchestrator.api.formats import MAX_SHOWN_RECORDS, SHOWN_NAME, ShownRecords
from orchestrator.api.job import QLoRAJob
from orchestrator.errors import InvalidObject, NotFound, PermanentError
from orchestrator.sdk import extras
from orchestrator.sdk.trainer_answers import ask_trainer

TIMEOUT_SECONDS = 600.0
"""Fetching a tokenizer and the beginning of a data set takes no longer."""


def records_of_spec(job: QLoRAJob, count: int) -> ShownRecords:
    """The first training records, read, rendered and masked here as the job's prepare would.

    Raises InvalidObject with what prepare would refuse, MissingExtra without the trainer's libraries.
    """
    if not 1 <= count <= MAX_SHOWN_RECORDS:
        raise InvalidObject(f"between 1 and {MAX_SHOWN_RECORDS} records can be shown, not {count}")
    extras.require("trainer", purpose="reading records on this machine")
    answered = ask_trainer(["show", str(count)], job, timeout_seconds=TIMEOUT_SECONDS)
    return ShownRecords.model_validate_json(answered)


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
