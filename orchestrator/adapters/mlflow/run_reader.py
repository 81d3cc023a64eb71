"""What a job's MLflow run says, for people to look at: curves, the last figures, and answers to held-out prompts.

Nothing here writes. A job's status names its run on the word of a stage, which is somebody else's program, so a run
counts only where its own tag names the job.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator.adapters.mlflow.calls import MlflowCalls, TrackingSettings
from orchestrator.adapters.mlflow.tracking import UID_TAG
from orchestrator.api.formats import Metric
from orchestrator.api.job import QLoRAJob
from orchestrator.api.mlflow_pages import ANSWERS_PATH, SCORES_PATH
from orchestrator.errors import NotFound, TrackingUnavailable

CURVES = (Metric.TRAIN_LOSS, Metric.EVAL_LOSS, Metric.TOKENS_PER_SECOND, Metric.VRAM_ALLOCATED_BYTES)
MAX_TABLE_BYTES = 4 << 20
"""Longer tables are looked at in MLflow."""
Curve = tuple[tuple[int, float], ...]
"""Step and value, by step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts among a run's artifacts; empty where there is none."""

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a run says."""

    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    """By metric, of those in CURVES that it has."""
    last: Mapping[str, float] = field(default_factory=dict[str, float])
    """Every metric's last value."""
    scores: Table = Table()
    """What answers to held-out prompts are worth."""
    answers: Table = Table()


class RunReader:
    """Reads runs of one MLflow server or database."""

    def __init__(self, settings: TrackingSettings) -> None:
        self._calls = MlflowCalls(settings)
        self._timeout_seconds = settings.tracking_timeout_seconds

    def warm(self, start_seconds: float) -> None:
        """Import mlflow, which takes seconds, before anybody waits for it; raises TrackingUnavailable."""
        self._calls.answered(self._calls.connected, start_seconds)

    def read(self, job: QLoRAJob, run_id: str) -> RunFigures:
        """What the run says of the job; raises TrackingUnavailable, and NotFound where it is none of the job's."""
        found = self._calls.answered(lambda: self._read(job, run_id))
        if found is None:
            raise NotFound(f"MLflow has no run {run_id} of job {job.key}; it may have been deleted there")
        return found

    def _read(self, job: QLoRAJob, run_id: str) -> RunFigures | None:
        client = self._calls.connected()
        exceptions: Any = importlib.import_module("mlflow.exceptions")
        try:
            run = client.get_run(run_id)
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.data.tags.get(UID_TAG) != job.metadata.uid:
            return None
        last: Mapping[str, float] = {str(name): float(value) for name, value in run.data.metrics.items()}
        curves = {name.value: _curve(client, run_id, name.value) for name in CURVES if name.value in last}
        sizes = {
            entry.path: entry.file_size or 0 for entry in client.list_artifacts(run_id, ANSWERS_PATH.partition("/")[0])
        }
        scores, answers = (_table(client, run_id, path, sizes) for path in (SCORES_PATH, ANSWERS_PATH))
        return RunFigures(curves=curves, last=last, scores=scores, answers=answers)


def _curve(client: Any, run_id: str, name: str) -> Curve:
    points = {int(point.step): float(point.value) for point in client.get_metric_history(run_id, name)}
    return tuple(sorted(points.items()))


def _table(client: Any, run_id: str, path: str, sizes: Mapping[str, int]) -> Table:
    if not 0 < sizes.get(path, 0) <= MAX_TABLE_BYTES:
        return Table()
    with tempfile.TemporaryDirectory(prefix="qlora-page-") as into:
        text = Path(client.download_artifacts(run_id, path, into)).read_text()
    try:
        found = cast(dict[str, list[Any]], json.loads(text))
        columns = tuple(str(name) for name in found["columns"])
        return Table(columns=columns, rows=tuple(tuple(str(cell) for cell in row) for row in found["data"]))
    except (ValueError, TypeError, KeyError) as error:
        raise TrackingUnavailable(f"{path} of run {run_id} does not parse: {error}") from error
