"""What MLflow has of a job: asked at most once an interval for a run, and waited for no longer than a bound.

A page is shown without the figures of an MLflow that does not answer; they come with the next look.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass

from orchestrator.adapters.mlflow.run_reader import RunFigures
from orchestrator.api.job import QLoRAJob
from orchestrator.errors import OrchestratorError

ReadRun = Callable[[QLoRAJob, str], RunFigures]


@dataclass(slots=True, kw_only=True)
class _Known:
    """What was found of a run, and what is on its way."""

    figures: RunFigures | None = None
    asked: float = float("-inf")
    answer: Future[RunFigures] | None = None


class Figures:
    """Of the runs that were looked at last."""

    def __init__(self, read: ReadRun, *, every_seconds: float, timeout_seconds: float, kept: int) -> None:
        self._read = read
        self._every_seconds = every_seconds
        self._timeout_seconds = timeout_seconds
        self._kept = kept
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def of(self, job: QLoRAJob) -> tuple[RunFigures, str]:
        """What its run said last, and why that is not what it says now, empty where it is."""
        run_id = job.status.mlflow.run_id
        if run_id is None:
            return RunFigures(), "MLflow has no run of the job yet." if job.status.finish_time is None else ""
        known, answer = self._asked(job, run_id)
        if answer is None:
            return known.figures or RunFigures(), ""
        try:
            known.figures = answer.result(self._timeout_seconds)
        except NotYet:
            return known.figures or RunFigures(), f"MLflow has not answered within {self._timeout_seconds:g} s."
        except OrchestratorError as error:
            return known.figures or RunFigures(), f"{error}."
        return known.figures, ""

    def _asked(self, job: QLoRAJob, run_id: str) -> tuple[_Known, Future[RunFigures] | None]:
        """The run, and the answer that is on its way; None where what is known is new enough."""
        with self._lock:
            known = self._runs.setdefault((job.metadata.uid, run_id), _Known())
            self._runs.move_to_end((job.metadata.uid, run_id))
            while len(self._runs) > self._kept:
                self._runs.popitem(last=False)
            is_open = known.answer is not None and not known.answer.done()
            if not is_open and time.monotonic() - known.asked >= self._every_seconds:
                known.asked, known.answer = time.monotonic(), Future()
                threading.Thread(target=self._ask, args=(job, run_id, known.answer), daemon=True).start()
            return known, known.answer

    def _ask(self, job: QLoRAJob, run_id: str, answer: Future[RunFigures]) -> None:
        try:
            answer.set_result(self._read(job, run_id))
        except Exception as error:  # noqa: BLE001 - raised again where somebody waits for it
            answer.set_exception(error)
