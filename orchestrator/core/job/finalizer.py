"""What has to be settled before a job's object may go: a GPU that is held, a run that waits for its last status,
somebody who is to be told of the job.

RELEASE_FINALIZER says so of the first two, NOTIFY_FINALIZER of the last. Stores put them on with the write that begins
to owe something; they are off again once a finished job owes nothing, so that what is finished can be deleted with no
controller around. That a run has got its last status needs no write of its own: the status names it when the job
finishes, RELEASE_FINALIZER says whether MLflow has it.
"""

from __future__ import annotations

from collections.abc import Collection

from orchestrator.api.job import NOTIFY_FINALIZER, RELEASE_FINALIZER, QLoRAJob, QLoRAJobStatus
from orchestrator.api.notification import Notification
from orchestrator.api.stage_name import STAGES_ON_GPU

FINALIZERS = (RELEASE_FINALIZER, NOTIFY_FINALIZER)
"""Ours."""


def holds(status: QLoRAJobStatus) -> bool:
    """Whether a GPU is held, or an MLflow run is open."""
    attempt = status.active_attempt
    return (attempt is not None and attempt.stage in STAGES_ON_GPU) or status.mlflow.run_status == "RUNNING"


def owes_run_its_end(job: QLoRAJob) -> bool:
    """Whether a finished job's run may not have its last status yet."""
    finished = job.status.finish_time is not None and job.status.mlflow.run_id is not None
    return finished and RELEASE_FINALIZER in job.metadata.finalizers


def outstanding(status: QLoRAJobStatus) -> tuple[Notification, ...]:
    """What is told of the job, and not yet confirmed by everybody."""
    return () if status.notifications is None else status.notifications.outstanding


def is_at_rest(job: QLoRAJob) -> bool:
    """Whether nothing outside would be forgotten with the object."""
    owes_words = NOTIFY_FINALIZER in job.metadata.finalizers and _tells(job.status)
    return job.status.active_attempt is None and not holds(job.status) and not owes_run_its_end(job) and not owes_words


def finalizers_with(job: QLoRAJob, status: QLoRAJobStatus) -> tuple[str, ...]:
    """The job's finalizers once it has this status."""
    held = job.metadata.finalizers
    may_be_open = status.mlflow.run_id is not None and job.status.mlflow.run_status in (None, "RUNNING")
    owes_nothing = status.finish_time is not None and status.mlflow.run_id is None
    is_released = RELEASE_FINALIZER not in held or owes_nothing
    wanted = {RELEASE_FINALIZER: holds(status) or may_be_open or not is_released, NOTIFY_FINALIZER: _tells(status)}
    kept = (finalizer for finalizer in held if wanted.get(finalizer, True))
    return (*kept, *(finalizer for finalizer, is_wanted in wanted.items() if is_wanted and finalizer not in held))


def released(job: QLoRAJob) -> tuple[str, ...]:
    """The job's finalizers without RELEASE_FINALIZER."""
    return without(job, {RELEASE_FINALIZER})


def without(job: QLoRAJob, gone: Collection[str]) -> tuple[str, ...]:
    """The job's finalizers but for some."""
    return tuple(finalizer for finalizer in job.metadata.finalizers if finalizer not in gone)


def _tells(status: QLoRAJobStatus) -> bool:
    """Whether somebody is still to be told something of the job, its end at the latest."""
    return status.notifications is not None and (status.finish_time is None or bool(status.notifications.outstanding))
