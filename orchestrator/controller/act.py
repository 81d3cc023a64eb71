"""Act: carry commands out, each by one idempotent call to a port. No policy here.

The loop hands in what `decide` returned. Rules:

- In order for each job, and a job whose status could not be written gets no later command in the same round: nothing
  outside comes of an intent that was not recorded. Different jobs may be served at one time, since most of a round is
  waiting for answers, and those that come first are begun first.
- A round is over in time: what it has not begun by then is decided anew, with all that has become known meanwhile. So
  a new job need not wait until thousands of others have been told why they wait.
- Conflict and NotFound mean that the world has moved: the command is dropped, and the next round decides anew.
- A transient error makes that command wait, twice as long each time up to a bound; every other job goes on.
- MLflow may take long to answer, so its commands go down the slow lane, a thread of its own. One command a job is in
  it at a time; what came of it is recorded on the newest status, and found there by the next round.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.api.job import MlflowStatus, QLoRAJob
from orchestrator.controller.logs import about
from orchestrator.controller.ports import StageRuntime, Store, Tracking
from orchestrator.core.facts import (
    Command,
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    FinishRun,
    StopStage,
    WriteStatus,
)
from orchestrator.errors import Conflict, NotFound, OrchestratorError, RuntimeLost, TransientError

log = logging.getLogger(__name__)

SLOW_LANE_LIMIT = 1000
"""Commands that wait for MLflow; what finds no room is decided again later."""
RECORD_TRIES = 10
"""Attempts to record what came of a slow command while others write the same status."""
LOST_RUN_STATUS = "KILLED"


class Backoff:
    """Which commands have to wait, and how long."""

    def __init__(self, base_seconds: float, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_seconds = base_seconds
        self._max_seconds = max_seconds
        self._clock = clock
        self._failures: dict[str, tuple[int, float]] = {}

    def ready(self, key: str) -> bool:
        """Whether the command may be tried now."""
        return self._clock() >= self._failures.get(key, (0, 0.0))[1]

    def failed(self, key: str) -> float:
        """Note a failure; the seconds to wait."""
        count = self._failures.get(key, (0, 0.0))[0]
        seconds = min(self._base_seconds * 2.0 ** min(count, 30), self._max_seconds)
        self._failures[key] = (count + 1, self._clock() + seconds)
        return seconds

    def succeeded(self, key: str) -> None:
        """Forget earlier failures."""
        self._failures.pop(key, None)

    def forget_all_but(self, keys: set[str]) -> None:
        """Keep only what is still asked for, and what still has to wait."""
        now = self._clock()
        self._failures = {key: failure for key, failure in self._failures.items() if key in keys or failure[1] > now}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much a round may do."""

    writers: int = 1
    """Jobs that are served at one time; more than one needs a store and a runtime that bear it."""
    seconds: float = 86_400.0
    """After which nothing more is begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """A command in the slow lane."""

    key: str
    job: QLoRAJob
    call: Callable[[], MlflowStatus]


class Actor:
    """Carries out one round of commands after another."""

    def __init__(
        self, store: Store, runtime: StageRuntime, tracking: Tracking, backoff: Backoff, bounds: Bounds | None = None
    ) -> None:
        self._bounds = bounds or Bounds()
        self._pool = ThreadPoolExecutor(self._bounds.writers, thread_name_prefix="act")
        self._store = store
        self._runtime = runtime
        self._tracking = tracking
        self._backoff = backoff
        self._lock = threading.Lock()
        self._lane: queue.Queue[Slow] = queue.Queue(SLOW_LANE_LIMIT)
        self._in_lane: set[str] = set()
        threading.Thread(target=self._drive_slow_lane, name="slow lane", daemon=True).start()

    def act(self, commands: Sequence[Command]) -> None:
        """Carry out one decision. Raises RuntimeLost, after which the process must start over."""
        over = time.monotonic() + self._bounds.seconds
        by_job: dict[str, list[Command]] = {}
        for command in commands:
            by_job.setdefault(_job_key(command), []).append(command)
        if self._bounds.writers == 1:
            for of_job in by_job.values():
                self._act_on_job(of_job, over)
        else:
            for begun in [self._pool.submit(self._act_on_job, of_job, over) for of_job in by_job.values()]:
                begun.result()  # which raises what was raised there
        with self._lock:
            self._backoff.forget_all_but({_key(command) for command in commands})

    def _act_on_job(self, commands: Sequence[Command], over: float) -> None:
        for command in commands:
            if time.monotonic() > over:
                return
            key = _key(command)
            done = self._ready(key) and self._carry_out(command, key)
            if not done and isinstance(command, WriteStatus):
                return

    def _carry_out(self, command: Command, key: str) -> bool:
        try:
            self._dispatch(command, key)
        except RuntimeLost:
            raise
        except (Conflict, NotFound) as error:
            log.info("%s is decided anew: %s", key, error, extra=_about(command))
            return False
        except TransientError as error:
            self._postpone(key, error, _about(command))
            return False
        except Exception as error:
            # A defect, or a world that no rule foresaw. Other jobs must not suffer for it.
            self._postpone(key, error, _about(command))
            log.exception("%s failed unexpectedly", key, extra=_about(command))
            return False
        with self._lock:
            self._backoff.succeeded(key)
        return True

    def _dispatch(self, command: Command, key: str) -> None:
        match command:
            case WriteStatus(job=job, status=status, events=events):
                written = self._store.update_status(job, status)
                for event in events:
                    level = logging.WARNING if event.warning else logging.INFO
                    log.log(level, "%s: %s", event.reason, event.message, extra=_about(command))
                    self._store.record_event(written, event)
            case EnsureStage(task=task, gpu_class=gpu_class):
                self._runtime.ensure(task, gpu_class)
            case StopStage(namespace=namespace, name=name, grace_seconds=grace_seconds, reason=reason):
                self._runtime.stop(namespace, name, grace_seconds, reason)
            case DeleteStage(namespace=namespace, name=name, recorded=recorded):
                self._runtime.delete(namespace, name, recorded=recorded)
            case EnsureRun(job=job):
                self._go_slowly(Slow(key=key, job=job, call=lambda: self._tracking.ensure_run(job)))
            case FinishRun(job=job, run_status=run_status):
                self._go_slowly(Slow(key=key, job=job, call=lambda: self._tracking.finish_run(job, run_status)))
            case DeleteJob(job=job):
                self._store.delete_job(job.metadata.namespace, job.metadata.name)

    # the slow lane

    def _go_slowly(self, slow: Slow) -> None:
        with self._lock:
            if slow.job.key in self._in_lane or self._lane.full():
                return
            self._in_lane.add(slow.job.key)
        self._lane.put(slow)

    def _drive_slow_lane(self) -> None:
        while True:
            slow = self._lane.get()
            try:
                self._record_run(slow.job, slow.call())
            except NotFound:
                log.info("the job is gone; what came of %s is not recorded", slow.key, extra=about(slow.job.key))
            except OrchestratorError as error:
                self._postpone(slow.key, error, about(slow.job.key))
            except Exception as error:
                self._postpone(slow.key, error, about(slow.job.key))
                log.exception("%s failed unexpectedly", slow.key, extra=about(slow.job.key))
            else:
                with self._lock:
                    self._backoff.succeeded(slow.key)
            finally:
                with self._lock:
                    self._in_lane.discard(slow.job.key)

    def _record_run(self, job: QLoRAJob, run: MlflowStatus) -> None:
        """Record what the controller owns of a run on the newest status, whatever else has changed in it."""
        known = {"run_id": run.run_id, "experiment_id": run.experiment_id, "run_status": run.run_status}
        for _ in range(RECORD_TRIES):
            current = self._current(job)
            if current is None:
                self._tracking.finish_run(job, LOST_RUN_STATUS)
                return
            status = current.status
            try:
                self._store.update_status(
                    current, status.model_copy(update={"mlflow": status.mlflow.model_copy(update=known)})
                )
            except Conflict:
                continue
            return
        raise Conflict(f"the status of job {job.key} changes faster than its MLflow run can be recorded")

    def _current(self, job: QLoRAJob) -> QLoRAJob | None:
        """The job as it is now; None if it was deleted, or replaced by another of its name."""
        try:
            current = self._store.get_job(job.metadata.namespace, job.metadata.name)
        except NotFound:
            return None
        return current if current.metadata.uid == job.metadata.uid else None

    # waiting

    def _ready(self, key: str) -> bool:
        with self._lock:
            return self._backoff.ready(key)

    def _postpone(self, key: str, error: Exception, context: Mapping[str, str | int]) -> None:
        with self._lock:
            seconds = self._backoff.failed(key)
        log.warning("%s waits %.1f s: %s", key, seconds, error, extra=context)


def _key(command: Command) -> str:
    """Names a command for its backoff: the same intent has the same key in every round."""
    kind = type(command).__name__
    match command:
        case StopStage(namespace=namespace, name=name) | DeleteStage(namespace=namespace, name=name):
            return f"{kind} {namespace}/{name}"
        case EnsureStage(task=task):
            return f"{kind} {task.namespace}/{task.job}-{task.stage}-{task.attempt}"
        case WriteStatus(job=job) | EnsureRun(job=job) | FinishRun(job=job) | DeleteJob(job=job):
            return f"{kind} {job.key} {job.metadata.uid}"


def _job_key(command: Command) -> str:
    match command:
        case StopStage(namespace=namespace, name=name) | DeleteStage(namespace=namespace, name=name):
            return f"{namespace}/{name.rsplit('-', 2)[0]}"
        case EnsureStage(task=task):
            return f"{task.namespace}/{task.job}"
        case WriteStatus(job=job) | EnsureRun(job=job) | FinishRun(job=job) | DeleteJob(job=job):
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
        case EnsureRun() | FinishRun() | DeleteJob():
            return about(_job_key(command))
