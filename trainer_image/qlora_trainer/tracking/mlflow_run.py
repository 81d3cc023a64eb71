"""The job's MLflow run, which follows the journal. The rules:

- The controller creates the run and gives it its status; the trainer finds it and only adds to it.
- The journal is the truth. Before anything is logged the run is asked which steps of a metric it has, so that each is
  there once, whatever was killed, repeated or lost on the way.
- Training never waits for MLflow: a thread mirrors the journal, the journal is its queue, and what it could not
  deliver is left to `reconcile`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from orchestrator.api.formats import JournalRecord
from orchestrator.api.mlflow_pages import ANSWERS_PATH, EXPERIMENT_TAGS, SAMPLES_PATH, SCORES_PATH, run_tags
from orchestrator.api.ownership import EXPERIMENT, NAMESPACE_TAG, belongs_to, experiment_name, refusal
from orchestrator.api.task import TRACKING_URI_VARIABLE, StageTask
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.backoff import Backoff
from qlora_trainer.storage.journal import Journal
from qlora_trainer.tracking.answers_page import answers_table, sampled, samples_table, scores_table
from qlora_trainer.tracking.mlflow_client import PUBLISH_BACKOFF, first_line, insist, open_client
from qlora_trainer.tracking.records_page import PAGE_PATH, TABLE_PATH, records_page, records_table
from qlora_trainer.tracking.run_page import (
    CARD_NAME,
    JOB_UID_TAG,
    Results,
    attempt_tags,
    data_sets,
    page_tags,
    parameters,
    tags,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
log = logging.getLogger(__name__)

DELETED = "deleted"
"""MLflow's lifecycle stage of what its UI has deleted and can restore."""
BATCH_METRICS = 1000
"""MLflow's bound on the metrics of one call."""
BATCH_PARAMETERS = 100
"""MLflow's bound on the parameters, and on the tags, of one call."""
MAX_RUNS_LOOKED_AT = 1000
MIRROR_BACKOFF = Backoff(first_pause_seconds=1.0)

T = TypeVar("T")


def find_run(client: MlflowClient, task: StageTask) -> str | None:
    """The id of the job's run: as the task says, or found by the job's uid."""
    if task.run_id is not None:
        return task.run_id
    experiment = client.get_experiment_by_name(experiment_name(task.spec.tracking, task.namespace))
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], f"tags.`{JOB_UID_TAG}` = '{task.uid}'", max_results=1)
    return found[0].info.run_id if found else None


class RunMirror:
    """Brings one run up to the journal. After an error it is thrown away: what the run has must be asked anew."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._logged_steps: dict[str, set[int]] = {}

    def describe(self, task: StageTask, attempts: Mapping[str, str], results: Results | None = None) -> None:
        """Add what the run lacks of parameters, data sets and description, set the tags of job and attempts.

        The results are logged anew each time; a description that a person wrote stays.
        """
        from mlflow.entities import Param, RunTag

        run = self._client.get_run(self._run_id)
        missing = [Param(key, value) for key, value in parameters(task).items() if key not in run.data.params]
        for batch in _batched(missing, BATCH_PARAMETERS):  # they can be set once
            self._client.log_batch(self._run_id, params=batch)
        known_inputs = run.inputs.dataset_inputs if run.inputs else []
        if not known_inputs and (inputs := data_sets(task)):
            self._client.log_inputs(self._run_id, inputs)
        if results is not None:
            self._client.log_text(self._run_id, results.card, CARD_NAME)
        if results is not None and results.records is not None:
            self._client.log_text(self._run_id, records_page(results.records), PAGE_PATH)
            self._client.log_dict(self._run_id, records_table(results.records), TABLE_PATH)
        if results is not None and results.answers is not None:
            self._client.log_dict(self._run_id, scores_table(results.answers), SCORES_PATH)
            self._client.log_dict(self._run_id, answers_table(results.answers), ANSWERS_PATH)
        if results is not None and results.samples:
            self.show(results.samples)
        own = {**attempts, **tags(task), **page_tags(task, results, run.data.tags)}
        for batch in _batched([RunTag(key, value) for key, value in own.items()], BATCH_PARAMETERS):
            self._client.log_batch(self._run_id, tags=batch)

    def log(self, records: Iterable[JournalRecord]) -> None:
        """Log what the run does not have yet."""
        from mlflow.entities import Metric

        missing = [
            Metric(key, value, record.time_ms, record.step)
            for record in records
            for key, value in record.metrics.items()
            if record.step not in self._steps(key)
        ]
        for batch in _batched(missing, BATCH_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)
            for metric in batch:
                self._steps(metric.key).add(metric.step)

    def show(self, sampled: Sequence[JournalRecord]) -> None:
        """Show what was answered at all evaluations so far, in place of what was shown before."""
        self._client.log_dict(self._run_id, samples_table(sampled), SAMPLES_PATH)

    def _steps(self, key: str) -> set[int]:
        if key not in self._logged_steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._logged_steps[key] = {metric.step for metric in history}
        return self._logged_steps[key]


class RunLogger:
    """A thread that mirrors a growing journal into the job's run while training goes on."""

    def __init__(
        self,
        task: StageTask,
        journal: Journal,
        *,
        interval_seconds: float = 1.0,
        backoff: Backoff = MIRROR_BACKOFF,
    ) -> None:
        """The journal is looked at every `interval_seconds`; `backoff` is for an MLflow that is away."""
        self._task = task
        self._journal = journal
        self._interval_seconds = interval_seconds
        self._backoff = backoff
        self._mirrored = 0
        self._mirror: RunMirror | None = None
        self._away_since: float | None = None
        self._closing = Event()
        self._thread = Thread(target=self._run, name="run-logger", daemon=True)
        if os.environ.get(TRACKING_URI_VARIABLE):
            self._thread.start()
        else:
            log.warning("%s is not set: metrics stay in the journal", TRACKING_URI_VARIABLE)

    def close(self, timeout_seconds: float) -> int:
        """Deliver what can be delivered in the given time; returns how many records are left to publish."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        left = len(self._journal) - self._mirrored
        if left:
            log.warning("%d of %d journal records are not in MLflow yet; publish adds them", left, len(self._journal))
        return left

    def _run(self) -> None:
        while not len(self._journal) and not self._closing.wait(self._interval_seconds):
            pass  # importing mlflow takes seconds of the interpreter, which the first step needs
        pauses = self._backoff.pauses()
        while not self._is_done():
            if self._catch_up():
                pauses = self._backoff.pauses()
                self._closing.wait(self._interval_seconds)
            elif self._closing.wait(next(pauses)):
                return  # MLflow is away, and nobody waits for it any more

    def _is_done(self) -> bool:
        return self._closing.is_set() and self._mirror is not None and self._mirrored == len(self._journal)

    def _catch_up(self) -> bool:
        """Mirror the new records; False where MLflow does not answer or has no run for the job yet."""
        try:
            if self._mirror is None:
                self._mirror = self._open()
            if self._mirror is None:
                return False
            known = self._journal.records()
            records = known[self._mirrored :]
            self._mirror.log(records)
            if any(record.samples for record in records):
                self._mirror.show(sampled(known))
            self._mirrored += len(records)
        except Exception as error:  # noqa: BLE001 - whatever MLflow does, training goes on
            self._mirror = None
            self._note_absence(error)
            return False
        self._note_return()
        return True

    def _open(self) -> RunMirror | None:
        client = open_client()
        run_id = find_run(client, self._task)
        if run_id is None:
            return None
        mirror = RunMirror(client, run_id)
        mirror.describe(self._task, attempt_tags(self._task))
        return mirror

    def _note_absence(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = monotonic()
            log.warning("MLflow is away; training goes on and the metrics follow later: %s", first_line(error))

    def _note_return(self) -> None:
        if self._away_since is not None:
            log.info("MLflow is back after %.0f s; all metrics are there", monotonic() - self._away_since)
            self._away_since = None


def ensure_run(task: StageTask, backoff: Backoff = PUBLISH_BACKOFF) -> str:
    """The id of the job's run, alive: what people deleted meanwhile is restored, and what is gone is made anew."""
    return insist("find the run", lambda client: _live_run(client, task), backoff)


def _live_run(client: MlflowClient, task: StageTask) -> str:
    run = _present_run(client, task.run_id) or _run_of_job(client, task)
    if run is None:
        return _make_run(client, task)
    if client.get_experiment(run.info.experiment_id).lifecycle_stage == DELETED:
        client.restore_experiment(run.info.experiment_id)
        run = client.get_run(run.info.run_id)
    if run.info.lifecycle_stage == DELETED:
        client.restore_run(run.info.run_id)
        log.warning("somebody deleted the run %s; it is restored", run.info.run_id)
    return run.info.run_id


def _present_run(client: MlflowClient, run_id: str | None) -> Run | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _run_of_job(client: MlflowClient, task: StageTask) -> Run | None:
    """The oldest run with the job's uid, deleted ones included."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(experiment_name(task.spec.tracking, task.namespace))
    if experiment is None:
        return None
    condition = f"tags.`{JOB_UID_TAG}` = '{task.uid}'"
    order = ["attributes.start_time ASC"]
    found = client.search_runs([experiment.experiment_id], condition, ViewType.ALL, max_results=1, order_by=order)
    return found[0] if found else None


def _make_run(client: MlflowClient, task: StageTask) -> str:
    """A run in place of one that is gone for good. Training is over, and so is the run, but for what is added to it."""
    name = experiment_name(task.spec.tracking, task.namespace)
    experiment = refuse_foreign_experiment(client, task)
    if experiment is not None and experiment.lifecycle_stage == DELETED:
        client.restore_experiment(experiment.experiment_id)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        experiment_id = client.create_experiment(name, tags={NAMESPACE_TAG: task.namespace, **EXPERIMENT_TAGS})
    own = {**tags(task), **run_tags(task.namespace, task.job)}
    made = client.create_run(experiment_id, tags=own, run_name=task.job)
    # Somebody else may have made one meanwhile: the oldest is the job's.
    run = _run_of_job(client, task) or made
    if run.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    client.set_terminated(run.info.run_id)
    log.warning("the run of the job is gone; %s takes its place", run.info.run_id)
    return run.info.run_id


def refuse_foreign_experiment(client: MlflowClient, task: StageTask) -> Experiment | None:
    """The experiment of the job's run, if there is one; raises UserError where it is not the namespace's."""
    experiment = client.get_experiment_by_name(experiment_name(task.spec.tracking, task.namespace))
    if experiment is None or belongs_to(experiment.tags, task.namespace):
        return experiment
    runs = client.search_runs([experiment.experiment_id], max_results=MAX_RUNS_LOOKED_AT)
    if NAMESPACE_TAG in experiment.tags or not all(belongs_to(run.data.tags, task.namespace) for run in runs):
        raise UserError(refusal(EXPERIMENT, experiment.name, experiment.tags, task.namespace))
    return experiment


def describe(
    task: StageTask,
    run_id: str,
    attempts: Mapping[str, str],
    results: Results | None = None,
    backoff: Backoff = PUBLISH_BACKOFF,
) -> None:
    """Give the run all that it says of job, attempts and results, as far as it lacks it."""
    insist("describe the run", lambda client: RunMirror(client, run_id).describe(task, attempts, results), backoff)


def reconcile(run_id: str, records: Sequence[JournalRecord], backoff: Backoff = PUBLISH_BACKOFF) -> None:
    """Bring the run up to the journal, each metric once a step; Transient if MLflow stays away."""
    insist("bring the metrics up to date", lambda client: RunMirror(client, run_id).log(records), backoff)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
