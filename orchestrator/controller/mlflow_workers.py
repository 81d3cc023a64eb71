"""MLflow's workers: threads that carry out what is asked of MLflow, which may take long to answer.

Each worker carries out one command at a time, and at most one command of a job is waiting or in hand. A run that MLflow
has, or what came of a request to promote, is a fact for the next round, which puts it on record; a run that has got its
last status releases its job. Facts live in memory only: whoever takes over asks again, and finds the same by its tag.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping

from orchestrator.api.job import QLoRAJob
from orchestrator.api.sweep import QLoRASweep
from orchestrator.controller.logs import about
from orchestrator.controller.throttle import Backoff
from orchestrator.core.commands import EnsureRun, FinishRun, FinishSweep, PromoteVersion
from orchestrator.core.snapshot import RunFact, SweepFact
from orchestrator.errors import InvalidObject, NotFound, OrchestratorError
from orchestrator.ports import Store, Tracking

log = logging.getLogger(__name__)

OfMlflow = EnsureRun | FinishRun | PromoteVersion | FinishSweep
"""What they carry out."""
WAITING_LIMIT = 1000
"""Commands that wait for MLflow; what finds no room is decided again later."""
REFUSALS_KNOWN = SWEEPS_KNOWN = 1000


class MlflowWorkers:
    """Carries out what concerns MLflow runs, several at one time."""

    def __init__(self, store: Store, tracking: Tracking, backoff: Backoff, workers: int) -> None:
        self._store = store
        self._tracking = tracking
        self._backoff = backoff
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[str, OfMlflow]] = queue.Queue(WAITING_LIMIT)
        self._in_hand: set[str] = set()
        self._runs: dict[str, RunFact] = {}
        self._sweep_runs: dict[str, SweepFact] = {}
        self._refused: dict[str, str] = {}
        for number in range(workers):
            threading.Thread(target=self._drive, name=f"mlflow worker {number}", daemon=True).start()

    def runs(self) -> Mapping[str, RunFact]:
        """What MLflow answered and no status has on record yet, by the uid of the job."""
        with self._lock:
            return dict(self._runs)

    def sweep_runs(self) -> Mapping[str, SweepFact]:
        """The same of sweeps that are over, by the uid of the sweep."""
        with self._lock:
            return dict(self._sweep_runs)

    def refused(self) -> Mapping[str, str]:
        """Why jobs can have no run, by their uid."""
        with self._lock:
            return dict(self._refused)

    def recorded(self, uid: str) -> None:
        """The status of the job, or the sweep, has on record what MLflow answered."""
        with self._lock:
            self._runs.pop(uid, None)
            self._sweep_runs.pop(uid, None)

    def send(self, key: str, command: OfMlflow) -> None:
        """Put a command into the queue; `key` names it for its backoff. Does not wait."""
        uid = _subject(command).metadata.uid
        with self._lock:
            is_done = not isinstance(command, FinishRun) and (uid in self._runs or uid in self._sweep_runs)
            if is_done or uid in self._in_hand or self._waiting.full():
                return
            self._in_hand.add(uid)
        self._waiting.put((key, command))

    def _drive(self) -> None:
        while True:
            key, command = self._waiting.get()
            subject = _subject(command)
            context = about(subject.key)
            try:
                self._carry_out(command)
            except InvalidObject as error:
                self._note_refusal(subject.metadata.uid, str(error))
                log.warning("%s waits %.1f s: %s", key, self._backoff.failed(key), error, extra=context)
            except OrchestratorError as error:
                log.warning("%s waits %.1f s: %s", key, self._backoff.failed(key), error, extra=context)
            except Exception:
                log.exception("%s failed unexpectedly; it waits %.1f s", key, self._backoff.failed(key), extra=context)
            else:
                self._backoff.succeeded(key)
            finally:
                with self._lock:
                    self._in_hand.discard(subject.metadata.uid)

    def _note_refusal(self, uid: str, message: str) -> None:
        with self._lock:
            self._refused[uid] = message
            while len(self._refused) > REFUSALS_KNOWN:
                self._refused.pop(next(iter(self._refused)))

    def _carry_out(self, command: OfMlflow) -> None:
        match command:
            case FinishSweep(sweep=sweep, run_status=run_status, promoted=promoted):
                fact = self._tracking.finish_sweep(sweep, run_status, promoted)
                with self._lock:
                    self._sweep_runs[sweep.metadata.uid] = fact
                    while len(self._sweep_runs) > SWEEPS_KNOWN:  # some were deleted meanwhile
                        self._sweep_runs.pop(next(iter(self._sweep_runs)))
            case EnsureRun(job=job):
                self._found(RunFact(job=job, mlflow=self._tracking.ensure_run(job)))
            case PromoteVersion(job=job, forced=forced):
                promotion = self._tracking.promote(job, forced)
                self._found(RunFact(job=job, mlflow=job.status.mlflow, promotion=promotion))
            case FinishRun(job=job, run_status=run_status):
                self._finish(job, run_status)

    def _found(self, fact: RunFact) -> None:
        with self._lock:
            self._runs[fact.job.metadata.uid] = fact

    def _finish(self, job: QLoRAJob, run_status: str) -> None:
        self._tracking.finish_run(job, run_status)
        try:
            self._store.release(job)
        except NotFound:
            log.info("the job is gone, and its run is %s", run_status, extra=about(job.key))
        self.recorded(job.metadata.uid)


def _subject(command: OfMlflow) -> QLoRAJob | QLoRASweep:
    """What it is about."""
    return command.sweep if isinstance(command, FinishSweep) else command.job
