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
from orchestrator.controller.logs import about
from orchestrator.controller.throttle import Backoff
from orchestrator.core.commands import EnsureRun, FinishRun, PromoteVersion
from orchestrator.core.snapshot import RunFact
from orchestrator.errors import InvalidObject, NotFound, OrchestratorError
from orchestrator.ports import Store, Tracking

log = logging.getLogger(__name__)

OfMlflow = EnsureRun | FinishRun | PromoteVersion
"""What they carry out."""
WAITING_LIMIT = 1000
"""Commands that wait for MLflow; what finds no room is decided again later."""
REFUSALS_KNOWN = 1000


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
        self._refused: dict[str, str] = {}
        for number in range(workers):
            threading.Thread(target=self._drive, name=f"mlflow worker {number}", daemon=True).start()

    def runs(self) -> Mapping[str, RunFact]:
        """What MLflow answered and no status has on record yet, by the uid of the job."""
        with self._lock:
            return dict(self._runs)

    def refused(self) -> Mapping[str, str]:
        """Why jobs can have no run, by their uid."""
        with self._lock:
            return dict(self._refused)

    def recorded(self, uid: str) -> None:
        """The job's status has on record what MLflow answered."""
        with self._lock:
            self._runs.pop(uid, None)

    def send(self, key: str, command: OfMlflow) -> None:
        """Put a command into the queue; `key` names it for its backoff. Does not wait."""
        uid = command.job.metadata.uid
        with self._lock:
            is_done = not isinstance(command, FinishRun) and uid in self._runs
            if is_done or uid in self._in_hand or self._waiting.full():
                return
            self._in_hand.add(uid)
        self._waiting.put((key, command))

    def _drive(self) -> None:
        while True:
            key, command = self._waiting.get()
            context = about(command.job.key)
            try:
                self._carry_out(command)
            except InvalidObject as error:
                self._note_refusal(command.job.metadata.uid, str(error))
                log.warning("%s waits %.1f s: %s", key, self._backoff.failed(key), error, extra=context)
            except OrchestratorError as error:
                log.warning("%s waits %.1f s: %s", key, self._backoff.failed(key), error, extra=context)
            except Exception:
                log.exception("%s failed unexpectedly; it waits %.1f s", key, self._backoff.failed(key), extra=context)
            else:
                self._backoff.succeeded(key)
            finally:
                with self._lock:
                    self._in_hand.discard(command.job.metadata.uid)

    def _note_refusal(self, uid: str, message: str) -> None:
        with self._lock:
            self._refused[uid] = message
            while len(self._refused) > REFUSALS_KNOWN:
                self._refused.pop(next(iter(self._refused)))

    def _carry_out(self, command: OfMlflow) -> None:
        job = command.job
        match command:
            case EnsureRun():
                self._found(RunFact(job=job, mlflow=self._tracking.ensure_run(job)))
            case PromoteVersion(forced=forced):
                promotion = self._tracking.promote(job, forced)
                self._found(RunFact(job=job, mlflow=job.status.mlflow, promotion=promotion))
            case FinishRun(run_status=run_status):
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
