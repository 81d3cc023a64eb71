"""The controller's side of MLflow: a job's one run, found by its tag or created, the run's last status, and the alias
that a person asks for.

Calls may take long, and are safe from several threads. Trainers add metrics to the run; they never open or end it.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.adapters.mlflow.calls import MlflowCalls, TrackingSettings
from orchestrator.api.job import MlflowStatus, QLoRAJob
from orchestrator.api.mlflow_pages import EXPERIMENT_TAGS, run_tags
from orchestrator.api.ownership import (
    EXPERIMENT,
    NAMESPACE_TAG,
    REGISTERED_MODEL,
    belongs_to,
    experiment_name,
    refusal,
    registered_model_name,
)
from orchestrator.api.promotion import (
    COMPARED_TAG,
    GATE_TAG,
    PROMOTED_TAG,
    holder_changed,
    moved,
    stays,
    tag_value,
)
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Promotion
from orchestrator.api.sweep import QLoRASweep, TrialStatus
from orchestrator.api.words import on_one_line
from orchestrator.core.snapshot import SweepFact
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import InvalidObject

log = logging.getLogger(__name__)

JOB_TAG, UID_TAG, QUEUE_TAG = "qlora.dev/job", "qlora.dev/job-uid", "qlora.dev/queue"
PLAN_TAG, END_TAG, BEST_TAG = "qlora.dev/plan", "qlora.dev/end", "qlora.dev/best"
SWEEP_TAG, SWEEP_UID_TAG = "qlora.dev/sweep", "qlora.dev/sweep-uid"
"""The name of a run's sweep; and, of the sweep's own run alone, its uid."""
PARENT_TAG = "mlflow.parentRunId"
EXPERIMENTS_KNOWN = 1000
RUNS_LOOKED_AT = 1000
RUNS_OF_A_JOB = 100
TAGS_AT_ONCE = 100  # MLflow's bound
RUNNING = "RUNNING"
Answer = TypeVar("Answer")


class MlflowTracking:
    """`ports.Tracking` on an MLflow server or database."""

    def __init__(self, settings: TrackingSettings, user: str | None = None) -> None:
        """Runs are shown as made by `user`; by their namespace where there is no one person."""
        self._settings = settings
        self._user = user
        self._calls = MlflowCalls(settings)
        self._making_parent = threading.Lock()
        self._experiments: dict[tuple[str, str], str] = {}
        """Ids by namespace and name, of experiments that were there, and the namespace's, when they were last used."""

    @property
    def is_new(self) -> bool:
        """Whether the store is a database that nobody has made yet."""
        scheme, _, path = self._settings.tracking_uri.partition(":///")
        return scheme == "sqlite" and not Path(path).exists()

    def connect(self) -> None:
        """Import mlflow and touch the store, which makes the tables of a new database."""
        self._calls.answered(
            lambda: self._calls.connected().get_experiment_by_name("Default"), self._settings.tracking_start_seconds
        )

    def ensure_run(self, job: QLoRAJob) -> MlflowStatus:
        """The job's one run, set RUNNING. Raises InvalidObject for an experiment that is not the namespace's."""
        return self._calls.answered(lambda: self._ensure_run(job))

    def finish_run(self, job: QLoRAJob, run_status: str) -> None:
        """Give the job's run its last status."""
        self._calls.answered(lambda: self._finish_run(job, run_status))

    def promote(self, job: QLoRAJob, forced: str) -> Promotion:
        """Move the alias of spec.tracking.promote to the published job's version, once."""
        return self._calls.answered(lambda: self._promote(job, forced))

    def finish_sweep(self, sweep: QLoRASweep, run_status: str, promoted: TrialStatus | None) -> SweepFact:
        """Give a sweep's run its last status, and the alias of spec.promote to the trial's version."""
        return self._calls.answered(lambda: self._finish_sweep(sweep, run_status, promoted))

    def _ensure_run(self, job: QLoRAJob) -> MlflowStatus:
        experiment_id = self._ensure_experiment(job)
        run = self._find_run(job, experiment_id)
        if run is None:
            try:
                tags = self._tags(job)
                if job.sweep is not None:
                    parent = self._parent_run(job, experiment_id)
                    tags |= {PARENT_TAG: parent.info.run_id, SWEEP_TAG: job.sweep.name}
                run = self._calls.connected().create_run(experiment_id, run_name=job.metadata.name, tags=tags)
            except Exception:
                self._experiments.pop(_experiment_key(job), None)  # somebody may have deleted it
                raise
            log.info("created MLflow run %s for job %s", run.info.run_id, job.key)
        elif run.info.status != RUNNING:
            self._calls.connected().update_run(run.info.run_id, status=RUNNING)
        return _status(job, run, RUNNING)

    def _parent_run(self, job: QLoRAJob, experiment_id: str) -> Any:
        """The run of a trial's sweep, which its trials' are children of: found by its tag, or created, and RUNNING.

        One that has told its end stays ended: a trial that comes so late is of a sweep that is over.
        """
        assert job.sweep is not None, "only trials have one"
        with self._making_parent:
            found = self._runs_with(SWEEP_UID_TAG, job.sweep.uid, experiment_id)
            if not found:
                meta = job.metadata
                tags = {SWEEP_TAG: job.sweep.name, SWEEP_UID_TAG: job.sweep.uid, NAMESPACE_TAG: meta.namespace}
                tags |= run_tags(meta.namespace, job.sweep.name, self._user)
                return self._calls.connected().create_run(experiment_id, run_name=job.sweep.name, tags=tags)
            if found[0].info.status != RUNNING and END_TAG not in found[0].data.tags:
                self._calls.connected().update_run(found[0].info.run_id, status=RUNNING)
            return found[0]

    def _end_parent(self, job: QLoRAJob, experiment_id: str) -> None:
        """A trial is mostly deleted with its sweep, which then tells no end itself; one that goes on takes it back."""
        assert job.sweep is not None, "only trials have one"
        for run in self._runs_with(SWEEP_UID_TAG, job.sweep.uid, experiment_id):
            if run.info.status == RUNNING:
                self._calls.connected().set_terminated(run.info.run_id, status="KILLED")

    def _finish_sweep(self, sweep: QLoRASweep, run_status: str, promoted: TrialStatus | None) -> SweepFact:
        client = self._calls.connected()
        name = experiment_name(sweep.spec.job.tracking, sweep.metadata.namespace)
        experiment = client.get_experiment_by_name(name)
        promotion = None if promoted is None else self._promote_trial(sweep, promoted)
        with self._making_parent:
            found: Sequence[Any] = ()
            if experiment is not None:
                found = self._runs_with(SWEEP_UID_TAG, sweep.metadata.uid, experiment.experiment_id)
            if not found:  # no trial came so far as to have a run, or somebody deleted it
                return SweepFact(mlflow=MlflowStatus.model_validate({"run_status": run_status}), promotion=promotion)
            run, best = found[0], sweep.status.best
            self._say(run, {END_TAG: on_one_line(sweep.status.summary)})
            if best is not None:
                self._say(run, {BEST_TAG: best.job})
                client.log_metric(run.info.run_id, f"best/{sweep.spec.metric.name}", best.value, step=best.index)
            client.set_terminated(run.info.run_id, status=run_status)
        ended = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "run_status": run_status}
        return SweepFact(mlflow=MlflowStatus.model_validate(ended), promotion=promotion)

    def _promote_trial(self, sweep: QLoRASweep, promoted: TrialStatus) -> Promotion:
        """Give the alias to a trial's version, if it is that trial's in a model of the namespace's."""
        alias, version, client = sweep.spec.promote, promoted.model_version, self._calls.connected()
        assert alias is not None, "the sweep asks for it"
        job = trial_job(sweep, promoted.index)
        name = _registered_model_name(job)
        model = _unless_gone(lambda: client.get_registered_model(name))
        tags = None if version is None else _unless_gone(lambda: client.get_model_version(name, version).tags)
        if version is None or model is None or tags is None:
            gone = f"version {version} of {name} is not in the registry any more"
            return Promotion(promoted=False, reason=Reason.PROMOTION_REFUSED, message=gone)
        seen = {"metadata": job.metadata.model_copy(update={"uid": promoted.uid})}
        known = job.status.model_copy(update={"mlflow": MlflowStatus(model_version=version)})
        why = _not_its_own(job.model_copy(update={**seen, "status": known}), model.tags, tags)
        if why is not None:
            holder = str(model.aliases[alias]) if alias in model.aliases else None
            return stays(alias, holder, Reason.PROMOTION_REFUSED, why)
        client.set_registered_model_alias(name, alias, version)
        words = tag_value(f"the best of sweep {sweep.metadata.name}: {sweep.spec.metric.name} {promoted.value}")
        client.set_model_version_tag(name, version, f"{PROMOTED_TAG}/{alias}", words)
        return moved(alias, version, words)

    def _finish_run(self, job: QLoRAJob, run_status: str) -> None:
        run = self._known_run(job)
        if run is None:
            log.warning("the MLflow run of job %s is gone; it cannot be set to %s", job.key, run_status)
            return
        self._say(run, _last_words(job))
        if run.info.status != run_status:
            self._calls.connected().set_terminated(run.info.run_id, status=run_status)
        if job.sweep is not None and job.metadata.deletion_timestamp is not None:
            self._end_parent(job, run.info.experiment_id)
        for other in self._runs(job, run.info.experiment_id):
            if other.info.run_id != run.info.run_id:  # two controllers made one each at a time
                log.warning(
                    "deleting MLflow run %s: the run of job %s is %s", other.info.run_id, job.key, run.info.run_id
                )
                self._calls.connected().delete_run(other.info.run_id)

    def _promote(self, job: QLoRAJob, forced: str) -> Promotion:
        asked, version = job.spec.tracking.promote, job.status.mlflow.model_version
        assert asked is not None, "the job asks for it"
        assert version is not None, "the job is published"
        client, name = self._calls.connected(), _registered_model_name(job)
        model = _unless_gone(lambda: client.get_registered_model(name))
        tags = _unless_gone(lambda: client.get_model_version(name, version).tags)
        if model is None or tags is None:
            gone = f"version {version} of {name} is not in the registry any more; submit the job again"
            return Promotion(promoted=False, reason=Reason.PROMOTION_REFUSED, message=gone)
        why = _not_its_own(job, model.tags, tags)
        holder = str(model.aliases[asked.alias]) if asked.alias in model.aliases else None
        if why is not None:
            return stays(asked.alias, holder, Reason.PROMOTION_REFUSED, why)
        promoted = f"{PROMOTED_TAG}/{asked.alias}"
        if promoted in tags:
            return moved(asked.alias, version, tags[promoted])
        changed = holder_changed(asked, holder, tags.get(f"{COMPARED_TAG}/{asked.alias}"))
        if holder != version and changed is not None and not forced:
            return changed
        if holder != version:
            client.set_registered_model_alias(name, asked.alias, version)
        how, gate = f"forced ({forced})" if forced else "approved", tags.get(f"{GATE_TAG}/{asked.alias}")
        words = tag_value(how if gate is None else f"{how}; {gate}")
        client.set_model_version_tag(name, version, promoted, words)
        return moved(asked.alias, version, words)

    def _say(self, run: Any, words: dict[str, str]) -> None:
        entities: Any = importlib.import_module("mlflow.entities")
        news = [entities.RunTag(key, value) for key, value in words.items() if run.data.tags.get(key) != value]
        for start in range(0, len(news), TAGS_AT_ONCE):
            self._calls.connected().log_batch(run.info.run_id, tags=news[start : start + TAGS_AT_ONCE])

    def _known_run(self, job: QLoRAJob) -> Any:
        """The run that the job's status names or else the one with its tag; None where it is gone."""
        if job.status.mlflow.run_id is None:
            experiment = self._calls.connected().get_experiment_by_name(_experiment_name(job))
            return None if experiment is None else self._find_run(job, experiment.experiment_id)
        client = self._calls.connected()  # first, because no two threads may import parts of mlflow at one time
        exceptions: Any = importlib.import_module("mlflow.exceptions")
        try:
            run = client.get_run(job.status.mlflow.run_id)
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _tags(self, job: QLoRAJob) -> dict[str, str]:
        meta = job.metadata
        own = {JOB_TAG: meta.name, NAMESPACE_TAG: meta.namespace, UID_TAG: meta.uid, QUEUE_TAG: job.spec.queue}
        return own | run_tags(meta.namespace, meta.name, self._user)

    def _find_run(self, job: QLoRAJob, experiment_id: str) -> Any:
        """The run on record, or else the oldest, should there ever be two; None where there is none."""
        found = self._runs(job, experiment_id)
        on_record = (run for run in found if run.info.run_id == job.status.mlflow.run_id)
        return next(on_record, found[0] if found else None)

    def _runs(self, job: QLoRAJob, experiment_id: str) -> Sequence[Any]:
        """The runs with the job's tag in an experiment, the oldest first."""
        return self._runs_with(UID_TAG, job.metadata.uid, experiment_id)

    def _runs_with(self, tag: str, uid: str, experiment_id: str) -> Sequence[Any]:
        query, order = f"tags.`{tag}` = '{uid}'", ["attributes.start_time ASC"]
        return self._calls.connected().search_runs([experiment_id], query, max_results=RUNS_OF_A_JOB, order_by=order)

    def _ensure_experiment(self, job: QLoRAJob) -> str:
        key = _experiment_key(job)
        if key not in self._experiments:
            self._experiments[key] = self._find_or_create_experiment(job)
            while len(self._experiments) > EXPERIMENTS_KNOWN:
                self._experiments.pop(next(iter(self._experiments)), None)
        return self._experiments[key]

    def _find_or_create_experiment(self, job: QLoRAJob) -> str:
        name = _experiment_name(job)
        found = self._calls.connected().get_experiment_by_name(name) or self._create_experiment(name, job)
        self._own_experiment(found, job.metadata.namespace)
        if found.lifecycle_stage == "deleted":
            log.warning("MLflow experiment %s was deleted; job %s needs it and restores it", name, job.key)
            self._calls.connected().restore_experiment(found.experiment_id)
        for key, value in EXPERIMENT_TAGS.items():
            if key not in found.tags:  # a person's choice stays
                self._calls.connected().set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id

    def _create_experiment(self, name: str, job: QLoRAJob) -> Any:
        client = self._calls.connected()
        exceptions: Any = importlib.import_module("mlflow.exceptions")
        tags = {NAMESPACE_TAG: job.metadata.namespace, **EXPERIMENT_TAGS}
        try:
            client.create_experiment(name, artifact_location=self._artifact_location(name), tags=tags)
        except exceptions.MlflowException:
            if client.get_experiment_by_name(name) is None:  # otherwise somebody else was faster
                raise
        return client.get_experiment_by_name(name)

    def _own_experiment(self, found: Any, namespace: str) -> None:
        """Raise InvalidObject for somebody else's; one without an owner in which all is the namespace's becomes its."""
        if belongs_to(found.tags, namespace):
            return
        client = self._calls.connected()
        runs = client.search_runs([found.experiment_id], max_results=RUNS_LOOKED_AT)
        if NAMESPACE_TAG in found.tags or not all(belongs_to(run.data.tags, namespace) for run in runs):
            raise InvalidObject(refusal(EXPERIMENT, found.name, found.tags, namespace))
        if found.lifecycle_stage == "active":
            client.set_experiment_tag(found.experiment_id, NAMESPACE_TAG, namespace)

    def _artifact_location(self, name: str) -> str | None:
        """Where an experiment's artifacts go; a server knows that itself."""
        root = self._settings.artifact_root
        if root is None or self._settings.tracking_uri.startswith(("http://", "https://", "databricks")):
            return None
        return (root / name.replace("/", "_")).as_uri()


def _experiment_name(job: QLoRAJob) -> str:
    return experiment_name(job.spec.tracking, job.metadata.namespace)


def _experiment_key(job: QLoRAJob) -> tuple[str, str]:
    return job.metadata.namespace, _experiment_name(job)


def _registered_model_name(job: QLoRAJob) -> str:
    return registered_model_name(job.spec.tracking, job.metadata.namespace, job.metadata.name)


def _not_its_own(job: QLoRAJob, model: Mapping[str, str], version: Mapping[str, str]) -> str | None:
    """Why the version that the job's status names is not its to promote, by the tags of both: a stage named it, and
    stages are other people's programs."""
    name, namespace = _registered_model_name(job), job.metadata.namespace
    if not belongs_to(model, namespace):
        return refusal(REGISTERED_MODEL, name, model, namespace)
    if version.get(UID_TAG) != job.metadata.uid:
        return f"version {job.status.mlflow.model_version} of {name} is another job's; submit the job again"
    return None


def _unless_gone(look: Callable[[], Answer]) -> Answer | None:
    """What is there; None where it is not."""
    exceptions: Any = importlib.import_module("mlflow.exceptions")
    try:
        return look()
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _last_words(job: QLoRAJob) -> dict[str, str]:
    """What the run of a finished job says of its attempts and its end, whether or not a stage could tell MLflow."""
    trained = [attempt for attempt in job.status.attempts if attempt.plan is not None]
    plans = {f"{PLAN_TAG}/{each.number}": each.plan.model_dump_json(by_alias=True) for each in trained if each.plan}
    ends = {f"{END_TAG}/{each.number}": each.reason.value for each in trained if each.reason is not None}
    return {**plans, **ends, **({END_TAG: on_one_line(job.status.summary)} if job.status.summary else {})}


def _status(job: QLoRAJob, run: Any, run_status: str) -> MlflowStatus:
    found = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "run_status": run_status}
    return job.status.mlflow.model_copy(update=found)
