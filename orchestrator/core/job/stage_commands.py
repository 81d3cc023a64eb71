"""The stages outside: which commands make them what the stored status says.

Commands come from the *stored* status only, never from a draft, so whatever is created, stopped or deleted was written
down first. Repeating any of these commands changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from orchestrator.api.formats import CHECKPOINTS_FOLDER, checkpoint_folder
from orchestrator.api.job import Attempt, QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.api.stage_name import STAGES_ON_GPU
from orchestrator.api.task import StageTask
from orchestrator.core.commands import DeleteStage, EnsureStage, ReleaseUnreadable, StopStage
from orchestrator.core.job.setbacks import host_memory_factor
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.job.unreadable import job_key_of
from orchestrator.core.snapshot import Policy, Snapshot, StageFact, StagePhase, UnreadableJob


def stage_of(job: QLoRAJob, attempt: Attempt, snapshot: Snapshot) -> StageFact | None:
    """What the runtime knows of an attempt's stage; None where it does not exist, or another has its name."""
    fact = snapshot.stages.get(_key(job, attempt))
    return fact if fact is not None and _belongs(fact, job, attempt) else None


def claimant_of(job: QLoRAJob, attempt: Attempt, snapshot: Snapshot) -> StageFact | None:
    """What stands under the name of an attempt that has not been seen, and says that it is its stage.

    To ensure the stage is to be told whether it is: a controller may have been killed between making and seeing it.
    """
    fact = snapshot.stages.get(_key(job, attempt))
    is_open = fact is not None and attempt.seen_time is None and fact.uid == job.metadata.uid
    return fact if fact is not None and is_open and not _belongs(fact, job, attempt) else None


def _key(job: QLoRAJob, attempt: Attempt) -> str:
    return f"{job.metadata.namespace}/{job.stage_name(attempt)}"


def _belongs(fact: StageFact, job: QLoRAJob, attempt: Attempt) -> bool:
    """Whether the stage is the attempt's: not a deleted job's of the same name, and nothing that a stranger made."""
    if fact.uid and fact.uid != job.metadata.uid:
        return False
    if attempt.stage_uid is not None:
        return fact.stage_uid == attempt.stage_uid
    return fact.vouched or attempt.seen_time is not None  # it was seen by a version that kept no uid


def stage_commands(draft: Draft, snapshot: Snapshot) -> Iterator[EnsureStage | StopStage]:
    """What the job's stored active attempt asks of the runtime now."""
    attempt = draft.job.status.active_attempt
    if attempt is None:
        return
    fact = stage_of(draft.job, attempt, snapshot)
    if fact is None:
        if _still_wanted(draft, attempt) or claimant_of(draft.job, attempt, snapshot) is not None:
            yield ensure_stage(draft.job, attempt, snapshot.policy)
    elif fact.phase is not StagePhase.EXITED and attempt.stop_time is not None:
        yield StopStage(
            namespace=fact.namespace,
            name=fact.name,
            grace_seconds=snapshot.policy.grace_seconds,
            reason=attempt.stop_reason or Reason.CANCELLED,
        )


def _still_wanted(draft: Draft, stored: Attempt) -> bool:
    """Whether this pass neither ended the attempt, as it does where a stage that ran is gone, nor asked it to stop."""
    current = draft.attempt
    return current is not None and current.number == stored.number and current.stop_time is None


def ensure_stage(job: QLoRAJob, attempt: Attempt, policy: Policy) -> EnsureStage:
    """The command that starts an attempt's stage."""
    return EnsureStage(task=stage_task(job, attempt, policy), gpu_class=attempt.gpu_class)


def stage_task(job: QLoRAJob, attempt: Attempt, policy: Policy) -> StageTask:
    """All that the stage is told."""
    status, stage = job.status, attempt.stage
    return StageTask(
        stage=stage,
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid=job.metadata.uid,
        attempt=attempt.number,
        spec=job.settled_spec,
        store_uri=job_store_uri(job, policy),
        plan=attempt.plan if stage in STAGES_ON_GPU else None,
        prepared=None if stage == "prepare" else status.prepared,
        adapter_uri=status.adapter_uri if stage == "publish" else None,
        starting_job=status.starting_job if stage == "prepare" else None,
        run_id=None if stage == "prepare" else status.mlflow.run_id,
        grace_seconds=policy.grace_seconds,
        checkpoint_lag_seconds=policy.checkpoint_lag_seconds,
        threads=policy.trainer_threads,
        host_memory_factor=host_memory_factor(status.host_memory_escalations, policy),
        avoid_nodes=attempt.avoid_nodes,
    )


def job_store_uri(job: QLoRAJob, policy: Policy) -> str:
    """The job's own folder: `<store>/<namespace>/<job>-<uid>`."""
    store = job.spec.store.uri if job.spec.store else policy.store_uri
    return f"{store.rstrip('/')}/{job.metadata.namespace}/{job.metadata.name}-{job.metadata.uid}"


def checkpoint_uri(job: QLoRAJob, step: int, policy: Policy) -> str:
    """The folder of the checkpoint at a step."""
    return f"{job_store_uri(job, policy)}/{CHECKPOINTS_FOLDER}/{checkpoint_folder(step)}"


def leftover_commands(
    snapshot: Snapshot, unwanted: Iterable[str], jobs: Callable[[str], QLoRAJob | None]
) -> Iterator[StopStage | DeleteStage]:
    """Ends and forgets stages that no stored active attempt stands for, those of `unwanted` keys.

    Those are ended attempts, whose end the status records, and stages of jobs that are gone. A stage is created only
    after its attempt was stored, so an observer that lists stages before jobs never shows a wanted one here.
    """
    unreadable = {job.key: job for job in snapshot.unreadable}
    for key in sorted(unwanted):
        fact = snapshot.stages[key]
        owner = unreadable.get(job_key_of(fact.namespace, fact.name))
        if owner is not None and not _is_over(owner, fact, snapshot):
            continue
        if fact.phase is StagePhase.EXITED:
            yield DeleteStage(namespace=fact.namespace, name=fact.name, recorded=_is_recorded(fact, jobs))
        else:
            yield StopStage(
                namespace=fact.namespace,
                name=fact.name,
                grace_seconds=snapshot.policy.grace_seconds,
                reason=Reason.FENCED,
            )


def _is_recorded(fact: StageFact, jobs: Callable[[str], QLoRAJob | None]) -> bool:
    """Whether a stored status says that the stage's attempt has ended."""
    job = jobs(job_key_of(fact.namespace, fact.name))
    return job is not None and any(
        not attempt.active and _key(job, attempt) == fact.key and _belongs(fact, job, attempt)
        for attempt in job.status.attempts
    )


def _is_over(job: UnreadableJob, fact: StageFact, snapshot: Snapshot) -> bool:
    """Whether the stage of a job that does not parse is to end, or to be forgotten: its results wait for a version
    that reads them, as long as the job is there."""
    if fact.phase is StagePhase.EXITED:
        return job.deleted
    ran_seconds = (snapshot.now - fact.start_time).total_seconds() if fact.start_time is not None else 0.0
    return job.stop or (job.seconds_left is not None and ran_seconds >= job.seconds_left)


def release_commands(snapshot: Snapshot) -> Iterator[ReleaseUnreadable]:
    """Lets deleted jobs go that do not parse, once they have no stage."""
    leaving = [job for job in snapshot.unreadable if job.deleted and job.held]
    with_stages = (
        {job_key_of(fact.namespace, fact.name) for fact in snapshot.stages.values()} if leaving else set[str]()
    )
    for job in leaving:
        if job.key not in with_stages:
            yield ReleaseUnreadable(namespace=job.namespace, name=job.name, uid=job.uid)


def accounts_for(job: QLoRAJob, attempt: Attempt, fact: StageFact) -> bool:
    """Whether the attempt's own entry in the books is the stage's, or for what is about to stand in its place.

    One that has ended has none, so it does not account for a stage that runs on: its node was out of reach.
    """
    is_over = fact.phase is StagePhase.EXITED and fact.stage_uid == (attempt.stage_uid or "")
    return job.stage_name(attempt) == fact.name and (attempt.active or is_over)
