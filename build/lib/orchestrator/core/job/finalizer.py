"""What has to be settled before a job's object may go: a GPU that is held, a run that waits for its last status.

RELEASE_FINALIZER says so on the object. Stores put it on with the write that begins to owe something; it is off again
once a finished job owes nothing, so that what is finished can be deleted with no controller around. That a run has got
its last status needs no write of its own: the status names it when the job finishes, the finalizer says whether MLflow
has it.
"""

from __future__ import annotations

from orchestrator.api.job import RELEASE_FINALIZER, QLoRAJob, QLoRAJobStatus
from orchestrator.api.stage_name import STAGES_ON_GPU


def holds(status: QLoRAJobStatus) -> bool:
    """Whether a GPU is held, or an MLflow run is open."""
    attempt = status.active_attempt
    return (attempt is not None and attempt.stage in STAGES_ON_GPU) or status.mlflow.run_status == "RUNNING"


def owes_run_its_end(job: QLoRAJob) -> bool:
    """Whether a finished job's run may not have its last status yet."""
    finished = job.status.finish_time is not None and job.status.mlflow.run_id is not None
    return finished and RELEASE_FINALIZER in job.metadata.finalizers


def is_at_rest(job: QLoRAJob) -> bool:
    """Whether nothing outside would be forgotten with the object."""
    return job.status.active_attempt is None and not holds(job.status) and not owes_run_its_end(job)


def finalizers_with(job: QLoRAJob, status: QLoRAJobStatus) -> tuple[str, ...]:
    """The job's finalizers once it has this status."""
    may_be_open = status.mlflow.run_id is not None and job.status.mlflow.run_status in (None, "RUNNING")
    if (holds(status) or may_be_open) and RELEASE_FINALIZER not in job.metadata.finalizers:
        return (*job.metadata.finalizers, RELEASE_FINALIZER)
    if status.finish_time is not None and status.mlflow.run_id is None:
        return released(job)
    return job.metadata.finalizers


def released(job: QLoRAJob) -> tuple[str, ...]:
    """The job's finalizers without ours."""
    return tuple(finalizer for finalizer in job.metadata.finalizers if finalizer != RELEASE_FINALIZER)
