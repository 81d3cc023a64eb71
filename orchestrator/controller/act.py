"""Act: carry commands out, each by one idempotent call to a port. No policy here.

Rules:

- In order for each job, and a job whose status could not be written gets no later command in the same round: nothing
  outside comes of an intent that was not recorded. Different jobs may be served at one time, since most of a round is
  waiting for answers, and those that come first are begun first.
- A round is over in time: what it has not begun by then is decided anew, with all that has become known meanwhile. So
  a new job need not wait until thousands of others have been told why they wait.
- Conflict and NotFound mean that the world has moved: the command is dropped, and the next round decides anew.
- A transient error makes that command wait, twice as long each time up to a bound; every other job goes on.
- MLflow and webhooks may take long to answer, so their commands go to workers of their own (`mlflow_workers`,
  `webhook_workers`).
- A status that the store refuses for good, and a stage that cannot be created however often it is tried, become a fact
  with its reason (`refused`): a job of which nothing can come claims nothing.
- What is only said about jobs that wait is written no faster than a setting allows: words must not crowd out deeds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.api.job import CANCEL_ANNOTATION, QLoRAJob
from orchestrator.controller.logs import about
from orchestrator.controller.mlflow_workers import MlflowWorkers, OfMlflow
from orchestrator.controller.throttle import Allowance, Backoff
from orchestrator.controller.webhook_workers import WebhookWorkers
from orchestrator.core.commands import (
    CancelJob,
    Command,
    CreateJob,
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    FinishRun,
    FinishSweep,
    PromoteVersion,
    ReleaseJob,
    ReleaseSweep,
    ReleaseUnreadable,
    ReportDefect,
    SendNotification,
    StopStage,
    WriteQueueStatus,
    WriteStatus,
    WriteSweepStatus,
)
from orchestrator.core.snapshot import DeliveryFact, RunFact, SweepFact
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    InvalidObject,
    NotFound,
    OrchestratorError,
    RuntimeLost,
    TransientError,
)
from orchestrator.ports import StageRuntime, Store, Tracking

log = logging.getLogger(__name__)

ACT_PER_LOOK = 4.0
"""Acting may take so many times as long as looking and deciding did, or thousands of jobs would be mostly looked at."""

TRIES_BEFORE_REFUSED = 5
"""So often a stage that cannot be created, for a reason that waiting does not change, is tried again."""

ByCall = (
    WriteStatus
    | WriteQueueStatus
    | WriteSweepStatus
    | CreateJob
    | CancelJob
    | EnsureStage
    | StopStage
    | DeleteStage
    | ReleaseJob
    | ReleaseSweep
    | DeleteJob
    | ReleaseUnreadable
)
"""Commands that one call to a port carries out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much a round may do."""

    writers: int = 1
    """Jobs that are served at one time; more than one needs a store and a runtime that bear it."""
    seconds: float = 86_400.0
    """After which nothing more is begun, unless looking took longer than a quarter of it."""
    mlflow_workers: int = 1
    """Commands that MLflow is asked to carry out at one time."""
    words_per_second: float = 1e9
    """Jobs that wait of which something new is said, in the long run."""


class Actor:
    """Carries out one round of commands after another."""

    def __init__(
        self,
        store: Store,
        runtime: StageRuntime,
        tracking: Tracking,
        webhooks: WebhookWorkers,
        backoff: Backoff,
        bounds: Bounds | None = None,
    ) -> None:
        self._bounds = bounds or Bounds()
        self._pool = ThreadPoolExecutor(self._bounds.writers, thread_name_prefix="act")
        self._store = store
        self._runtime = runtime
        self._webhooks = webhooks
        self._backoff = backoff
        self._refused: dict[str, str] = {}
        self._failed_tries: dict[str, int] = {}
        self._words = Allowance(self._bounds.words_per_second)
        self._mlflow_workers = MlflowWorkers(store, tracking, backoff, self._bounds.mlflow_workers)

    def runs(self) -> Mapping[str, RunFact]:
        """What MLflow answered and no status has on record yet, by the uid of the job."""
        return self._mlflow_workers.runs()

    def sweep_runs(self) -> Mapping[str, SweepFact]:
        """The same of sweeps that are over, by the uid of the sweep."""
        return self._mlflow_workers.sweep_runs()

    def deliveries(self) -> Mapping[str, tuple[DeliveryFact, ...]]:
        """What came of notifications and no status has on record yet, by the uid of the job."""
        return self._webhooks.deliveries()

    def refused(self) -> Mapping[str, str]:
        """Why nothing can come of a job, by its uid: its status is not taken, or no stage of it, or no run."""
        return {**self._mlflow_workers.refused(), **self._refused}

    def act(self, commands: Sequence[Command], looked_seconds: float = 0.0) -> None:
        """Carry out one decision, which took so long to make. Raises RuntimeLost: the process must start over."""
        over = time.monotonic() + max(self._bounds.seconds, ACT_PER_LOOK * looked_seconds)
        self._webhooks.offer([command for command in commands if isinstance(command, SendNotification)])
        by_job: dict[str, list[Command]] = {}
        for command in commands:
            if isinstance(command, SendNotification):
                continue
            by_job.setdefault(_job_key(command), []).append(command)
        if self._bounds.writers == 1:
            for of_job in by_job.values():
                self._act_on_job(of_job, over)
        else:
            for begun in [self._pool.submit(self._act_on_job, of_job, over) for of_job in by_job.values()]:
                begun.result()  # which raises what was raised there
        self._backoff.forget_all_but({_key(command) for command in commands})
        asked = {uid for command in commands if (uid := _recorded_uid(command)) is not None}
        self._refused = {uid: why for uid, why in self._refused.items() if uid in asked}
        self._failed_tries = {uid: tries for uid, tries in self._failed_tries.items() if uid in asked}

    def _act_on_job(self, commands: Sequence[Command], over: float) -> None:
        for command in commands:
            if time.monotonic() > over:
                return
            key = _key(command)
            done = self._backoff.ready(key) and self._carry_out(command, key)
            if not done and isinstance(command, WriteStatus | WriteSweepStatus):
                return

    def _carry_out(self, command: Command, key: str) -> bool:
        if isinstance(command, OfMlflow):
            self._mlflow_workers.send(key, command)
            return True
        assert not isinstance(command, SendNotification), "webhooks have workers of their own"
        if isinstance(command, ReportDefect):
            what = "the job failed, so the job does" if isinstance(command.job, QLoRAJob) else "the sweep failed"
            log.error("deciding about %s:\n%s", what, command.trace, extra=_about(command))
            return True
        if isinstance(command, WriteStatus) and command.words_only and not self._words.take():
            return False
        try:
            self._dispatch(command)
        except RuntimeLost:
            raise
        except (Conflict, NotFound) as error:
            log.info("%s is decided anew: %s", key, error, extra=_about(command))
            return False
        except TransientError as error:
            self._postpone(key, error, _about(command))
            return False
        except InvalidObject as error:
            self._note_refusal(command, error)
            self._postpone(key, error, _about(command))
            return False
        except Exception as error:
            # A defect, or a world that no rule foresaw. Other jobs must not suffer for it.
            self._note_refusal(command, error)
            self._postpone(key, error, _about(command))
            log.exception("%s failed unexpectedly", key, extra=_about(command))
            return False
        self._backoff.succeeded(key)
        return True

    def _dispatch(self, command: ByCall) -> None:
        match command:
            case WriteStatus(job=job, status=status, events=events):
                written = self._store.update_status(job, status)
                self._refused.pop(job.metadata.uid, None)
                if status.mlflow.run_id is not None:
                    self._mlflow_workers.recorded(job.metadata.uid)
                for event in events:
                    level = logging.WARNING if event.warning else logging.INFO
                    log.log(level, "%s: %s", event.reason, event.message, extra=_about(command))
                    self._store.record_event(written, event)
            case WriteQueueStatus(queue=queue, status=status):
                self._store.update_queue_status(queue, status)
            case WriteSweepStatus(sweep=sweep, status=status, events=events):
                self._store.update_sweep_status(sweep, status)
                if status.mlflow.run_status is not None:
                    self._mlflow_workers.recorded(sweep.metadata.uid)
                for event in events:
                    level = logging.WARNING if event.warning else logging.INFO
                    log.log(level, "%s: %s", event.reason, event.message, extra=_about(command))
            case CreateJob(job=job):
                self._create(job)
            case CancelJob(job=job):
                asked = {**job.metadata.annotations, CANCEL_ANNOTATION: "true"}
                metadata = job.metadata.model_copy(update={"annotations": asked})
                self._store.update_job(job.model_copy(update={"metadata": metadata}))
            case EnsureStage(task=task, gpu_class=gpu_class):
                self._runtime.ensure(task, gpu_class)
            case StopStage(namespace=namespace, name=name, grace_seconds=grace_seconds, reason=reason):
                self._runtime.stop(namespace, name, grace_seconds, reason)
            case DeleteStage(namespace=namespace, name=name, recorded=recorded):
                self._runtime.delete(namespace, name, recorded=recorded)
            case ReleaseUnreadable(namespace=namespace, name=name, uid=uid):
                self._store.release_unreadable(namespace, name, uid)
            case ReleaseJob(job=job, event=event):
                log.warning("%s: %s", event.reason, event.message, extra=_about(command))
                self._store.record_event(job, event)
                self._store.release(job)
            case ReleaseSweep(sweep=sweep, message=message):
                log.warning("%s", message, extra=_about(command))
                self._store.release_sweep(sweep)
            case DeleteJob(job=job):
                self._store.delete_job(job.metadata.namespace, job.metadata.name)

    def _create(self, job: QLoRAJob) -> None:
        try:
            self._store.create_job(job)
        except AlreadyExists:
            log.info("job %s is there already", job.key)  # whose it is, the next round sees

    def _note_refusal(self, command: ByCall, error: Exception) -> None:
        """A status is refused once and for all; a stage may have met something that passes."""
        match command:
            case WriteStatus(job=job) if isinstance(error, InvalidObject):
                self._refused[job.metadata.uid] = f"its status cannot be stored: {error}"
            case EnsureStage(task=task):
                self._note_try(task.uid, task.stage_name, error)
            case CreateJob(sweep=sweep, job=job):
                self._note_try(sweep.metadata.uid, f"job {job.metadata.name}", error)
            case _:
                pass

    def _note_try(self, uid: str, what: str, error: Exception) -> None:
        tries = self._failed_tries.get(uid, 0) + 1
        self._failed_tries[uid] = tries
        if tries >= TRIES_BEFORE_REFUSED:
            why = error if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
            self._refused[uid] = f"{what} cannot be created: {why}"

    def _postpone(self, key: str, error: Exception, context: Mapping[str, str | int]) -> None:
        log.warning("%s waits %.1f s: %s", key, self._backoff.failed(key), error, extra=context)


def _key(command: Command) -> str:
    """Names a command for its backoff: the same intent has the same key in every round."""
    kind = type(command).__name__
    match command:
        case StopStage(namespace=namespace, name=name) | DeleteStage(namespace=namespace, name=name):
            return f"{kind} {namespace}/{name}"
        case EnsureStage(task=task):
            return f"{kind} {task.namespace}/{task.stage_name}"
        case ReleaseUnreadable(namespace=namespace, name=name, uid=uid):
            return f"{kind} {namespace}/{name} {uid}"
        case WriteQueueStatus(queue=queue):
            return f"{kind} {queue.metadata.name} {queue.metadata.uid}"
        case CreateJob(sweep=sweep, job=job):
            return f"{kind} {job.key} {sweep.metadata.uid}"
        case WriteSweepStatus(sweep=sweep) | FinishSweep(sweep=sweep) | ReleaseSweep(sweep=sweep):
            return f"{kind} {sweep.key} {sweep.metadata.uid}"
        case (
            ReportDefect(job=job)
            | WriteStatus(job=job)
            | EnsureRun(job=job)
            | FinishRun(job=job)
            | PromoteVersion(job=job)
            | CancelJob(job=job)
            | SendNotification(job=job)
            | ReleaseJob(job=job)
            | DeleteJob(job=job)
        ):
            return f"{kind} {job.key} {job.metadata.uid}"


def _recorded_uid(command: Command) -> str | None:
    """The uid of the job that a write or a stage is of, or of the sweep."""
    match command:
        case CreateJob(sweep=sweep) | WriteSweepStatus(sweep=sweep):
            return sweep.metadata.uid
        case WriteStatus(job=job):
            return job.metadata.uid
        case EnsureStage(task=task):
            return task.uid
        case _:
            return None


def _job_key(command: Command) -> str:
    match command:
        case StopStage(namespace=namespace, name=name) | DeleteStage(namespace=namespace, name=name):
            return f"{namespace}/{name.rsplit('-', 2)[0]}"
        case EnsureStage(task=task):
            return f"{task.namespace}/{task.job}"
        case ReleaseUnreadable(namespace=namespace, name=name):
            return f"{namespace}/{name}"
        case WriteQueueStatus(queue=queue):
            return f"queue {queue.metadata.name}"  # which is no job's
        case (
            WriteSweepStatus(sweep=sweep)
            | FinishSweep(sweep=sweep)
            | ReleaseSweep(sweep=sweep)
            | CreateJob(sweep=sweep)
        ):
            return f"sweep {sweep.key}"  # nor that; a trial is made once it is on record
        case (
            ReportDefect(job=job)
            | WriteStatus(job=job)
            | EnsureRun(job=job)
            | FinishRun(job=job)
            | PromoteVersion(job=job)
            | CancelJob(job=job)
            | SendNotification(job=job)
            | ReleaseJob(job=job)
            | DeleteJob(job=job)
        ):
            return job.key


def _about(command: Command) -> Mapping[str, str | int]:
    """What a log line about the command says of job and attempt."""
    match command:
        case EnsureStage(task=task):
            return about(_job_key(command), task.attempt)
        case StopStage(name=name) | DeleteStage(name=name):
            number = name.rpartition("-")[2]
            return about(_job_key(command), int(number) if number.isdecimal() else None)
        case WriteStatus(status=status):
            return about(_job_key(command), status.attempts_total or None)
        case WriteQueueStatus():
            return {}
        case (
            WriteSweepStatus(sweep=sweep)
            | FinishSweep(sweep=sweep)
            | ReleaseSweep(sweep=sweep)
            | CreateJob(sweep=sweep)
        ):
            return about(sweep.key)
        case (
            EnsureRun()
            | FinishRun()
            | PromoteVersion()
            | CancelJob()
            | SendNotification()
            | ReleaseJob()
            | DeleteJob()
            | ReportDefect()
            | ReleaseUnreadable()
        ):
            return about(_job_key(command))
