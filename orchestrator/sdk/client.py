"""Client: the service's verbs in Python.

    client = Client()
    job = client.submit("job.yaml")
    job.wait(timeout_seconds=3600)
    job.adapter(into="adapter")

Without arguments it is a client of the service that `Settings()` names: the embedded one of this machine, or one on a
cluster (`QLORA_CONTEXT`). Objects are checked here before they are stored, by the rules of the contract and by what
this machine can know.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TypeVar, cast

from orchestrator.adapters.job_store import model_config
from orchestrator.api.formats import ShownRecords
from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import MONTH_PATTERN, QLoRAQueue
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweep
from orchestrator.api.uris import file_path
from orchestrator.core.scheduling.ordering import permission_refusal, queue_specs
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.sweep.search import refusal, trial_job
from orchestrator.errors import AlreadyExists, Forbidden, InvalidObject, NotFound, ServiceNotRunning, WaitTimedOut
from orchestrator.sdk import first_job
from orchestrator.sdk.connection import Connection, connect, read_settings
from orchestrator.sdk.data_count import count_data
from orchestrator.sdk.explanation import NOT_RUNNING, read_snapshot
from orchestrator.sdk.handle import JobHandle, is_finished
from orchestrator.sdk.manifest import UserObject, load_manifest, parse_object
from orchestrator.sdk.notebook import JobList, jobs_html
from orchestrator.sdk.planned_start import settled_job
from orchestrator.sdk.planning import JobPlan, Known, plan_job, refuse_resources, undefined_words
from orchestrator.sdk.preflight import check_files, check_planned_model, check_webhooks
from orchestrator.sdk.records import Records, records_file
from orchestrator.sdk.shown import records_of_spec
from orchestrator.sdk.simulation import WhatIf, as_submitted, what_if, with_changes
from orchestrator.sdk.trace import TracePlayed, played, read_trace
from orchestrator.sdk.traced_here import traced_here
from orchestrator.sdk.uploading import check_upload, uploaded
from orchestrator.sdk.usage import UsageBy, UsageRow, usage_rows
from orchestrator.settings import Settings
from orchestrator.sizing import margins
from orchestrator.sizing.gpu_table import gpu_table

REPLACE_SECONDS = 60.0
"""How long a finished job may take to be gone; the controller may have to close its MLflow run first."""
JobLike = QLoRAJob | Mapping[str, object] | str | os.PathLike[str]
"""A job built in Python, its wire form, or the path of a manifest that holds exactly one."""
QueueLike = QLoRAQueue | Mapping[str, object] | str | os.PathLike[str]
SweepLike = QLoRASweep | Mapping[str, object] | str | os.PathLike[str]
SWEEP_STEP_SECONDS = 1.0
"""`wait_sweep` looks whether anybody is at work at least so often."""


class Client:
    """A client of one service; all methods raise OrchestratorError, and may be called from several threads."""

    def __init__(
        self, settings: Settings | None = None, *, namespace: str | None = None, connection: Connection | None = None
    ) -> None:
        self.settings = settings or read_settings()
        self.connection = connection or connect(self.settings, namespace)
        self.namespace = namespace or self.connection.namespace
        """Where jobs that name no namespace go, and where names are looked up."""

    def __repr__(self) -> str:
        where = self.settings.context or self.settings.home
        return f"Client({where}, namespace {self.namespace})"

    def _repr_html_(self) -> str:
        state = "up" if self.connection.is_running() else "down; start it: qlora up"
        return f"<p>{escape(repr(self))}: {state}</p>{jobs_html(self.list())}"

    def tune(
        self, model: str, data: Records, *, name: str | None = None, replace: bool = False, **spec: object
    ) -> JobHandle:
        """Fine-tune a model on a file, a list of records or a DataFrame, in one call; further fields of the spec as
        keywords. Without a name the job gets one of its own. Raises InvalidObject, AlreadyExists, ServiceNotRunning.

        >>> records = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 3 =", "completion": " 6"}]
        >>> client.tune("./model", records, name="sums", training={"epochs": 1}).state
        'New'
        """
        if not isinstance(data, str | os.PathLike):
            data = records_file(data, self.settings.home)
        return self.submit(first_job.document(os.fspath(data), model, name=name, spec=spec), replace=replace)

    def submit(self, job: JobLike, *, replace: bool = False, told: Callable[[str], None] | None = None) -> JobHandle:
        """Check and store a job, with `replace` in the place of a finished one of its name.

        What is replaced is removed as `delete` removes it. Data files of this machine are uploaded to the job's store
        where that is a bucket of a cluster's, and `told` hears how far. Raises InvalidObject, AlreadyExists,
        ServiceNotRunning.

        >>> client.submit("notes.yaml")
        JobHandle(default/notes)
        """
        checked = self.check(job, replace=replace)
        if not self.connection.is_running():
            raise ServiceNotRunning("the service is not running, so nothing would run the job; start it: qlora up")
        if not self.connection.is_local:
            checked = uploaded(checked, self.settings.store_uri, told or (lambda _: None))
        if (old := self._found(checked)) is not None and replace:
            self._handle(old).delete(wait_seconds=REPLACE_SECONDS)
        return self._handle(self.connection.store.create_job(checked))

    def check(self, job: JobLike, *, replace: bool = False) -> QLoRAJob:
        """The job as `submit` would store it; raises what `submit` would raise, and changes nothing."""
        checked = self._in_namespace(_one(job, QLoRAJob))
        if (old := self._found(checked)) is not None and not (replace and is_finished(old)):
            raise AlreadyExists(_how_to_go_on(checked, is_finished(old)))
        self._check_queue(checked)
        if self.connection.is_local:
            check_files(checked, self.settings.store_uri)
            check_webhooks(checked.spec.notifications, self.settings.webhook_allowed_hosts)
            self._check_size(checked)
        else:
            check_upload(checked, self.settings.store_uri)
        return checked

    def plan(self, job: JobLike) -> JobPlan:
        """What the job would take and where it would run; reads the model's config and a local data file's records,
        and changes nothing.

        >>> client.plan("notes.yaml").chosen.gpu_class
        '24Gi'
        """
        checked = self._in_namespace(_one(job, QLoRAJob))
        if self.connection.is_local:
            check_planned_model(checked.spec.model)
        checked, of_start = settled_job(checked, self.connection.store)
        config = model_config.read_config(checked.spec.model)
        facts = model_config.facts_in(config, checked.spec.model, checked.spec.adapter)
        facts, of_trace = traced_here(checked, facts, config)
        taught = self.connection.store.list_jobs(checked.metadata.namespace)
        table = gpu_table(self.settings.gpu_class_definitions)
        known = Known(prices=self.settings.gpu_prices, table=table, margins=margins.learned(taught))
        try:
            classes = self.connection.gpu_classes()
        except Forbidden:
            classes = None
        plan = plan_job(checked, facts, classes, known, count_data(checked.spec))
        of_classes = undefined_words((checked, *taught), table)
        notes = [words for words in (of_start, of_trace, of_classes) if words is not None]
        return replace(plan, notes=(*notes, *plan.notes))

    def records(self, job: JobLike, count: int = 3) -> ShownRecords:
        """The first training records with their masks, read on this machine as prepare would; changes nothing."""
        return records_of_spec(self._in_namespace(_one(job, QLoRAJob)), count)

    def calibration(self) -> Sequence[margins.Bound]:
        """What finished jobs have taught about the memory model, each namespace for itself."""
        return margins.bounds(self.connection.store.list_jobs())

    def usage(self, month: str = "", by: UsageBy = "user") -> Sequence[UsageRow]:
        """What was had of the GPUs in a month such as `2026-11` (UTC; by default this one), by user, queue or job."""
        month = month or f"{datetime.now(UTC):%Y-%m}"
        if re.fullmatch(MONTH_PATTERN, month) is None:
            raise InvalidObject(f"month {month}: must be a year and a month, such as 2026-11")
        jobs = self.connection.store.list_jobs() if by == "job" else ()
        return usage_rows(self.list_queues(), jobs, month, by)

    def simulate(self, *, gpus: Sequence[str] = (), quotas: Sequence[str] = (), jobs: Sequence[JobLike] = ()) -> WhatIf:
        """When each job is expected to start and end, as things are and with other numbers of GPUs (`48Gi=+2`,
        `24Gi=-1`, `48Gi=6`), other quotas (`research:48Gi=+2`) and jobs that are submitted now; changes nothing.
        Raises InvalidObject, AlreadyExists, NotFound, and Forbidden where other jobs, queues or nodes are not this
        account's to read.

        >>> handle = client.submit("notes.yaml")
        >>> client.simulate(gpus=["24Gi=+1"]).jobs[0].job
        'default/notes'
        """
        present = self._present()
        added = [as_submitted(self.check(job), self.plan(job), present.now) for job in jobs]
        found = what_if(present, gpus, quotas, added)
        return found if self.connection.is_running() else replace(found, notes=(*found.notes, NOT_RUNNING))

    def simulate_trace(self, trace: str | Path, *, gpus: Sequence[str] = (), quotas: Sequence[str] = ()) -> TracePlayed:
        """What would become of a file's jobs on the queues and cards that are here, and with others; changes nothing,
        and looks at no job that is here. Raises InvalidObject, which names the line, NotFound and Forbidden."""
        present = self._present()
        arrivals = read_trace(Path(trace), present)
        changed = with_changes(present, gpus, quotas) if gpus or quotas else None
        return played(present, changed, arrivals)

    def _present(self) -> Snapshot:
        try:
            return read_snapshot(self.connection, self.settings.policy())
        except Forbidden as error:
            raise Forbidden(
                "what would become of whom is not worked out here, since other jobs, queues or nodes are not this "
                "account's to read; ask whoever looks after the queues"
            ) from error

    def handle(self, name: str, *, namespace: str | None = None) -> JobHandle:
        """A handle on a job that exists; raises NotFound."""
        return self._handle(self.get(name, namespace=namespace))

    def get(self, name: str, *, namespace: str | None = None) -> QLoRAJob:
        """A job as it is now; raises NotFound."""
        return self.connection.store.get_job(namespace or self.namespace, name)

    def list(self, *, namespace: str | None = None, all_namespaces: bool = False) -> JobList:
        """Jobs, ordered by namespace and name; a notebook shows them as a table.

        >>> [job.metadata.name for job in client.list()]
        ['medical']
        """
        return JobList(self.connection.store.list_jobs(None if all_namespaces else namespace or self.namespace))

    def wait_all(
        self, handles: Iterable[JobHandle], timeout_seconds: float | None = None, *, progress: bool = False
    ) -> Sequence[QLoRAJob]:
        """The jobs once all have finished, well or not; raises WaitTimedOut, NotFound, ServiceNotRunning.

        >>> client.wait_all([client.handle("medical")])[0].status.summary
        'Succeeded: published as models:/medical/3'
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return [
            handle.wait(None if deadline is None else max(0.0, deadline - time.monotonic()), progress=progress)
            for handle in handles
        ]

    def delete(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a job; MLflow and the job's store keep what they have. Raises NotFound."""
        self.handle(name, namespace=namespace).delete()

    def promote(self, name: str, *, namespace: str | None = None, force: bool = False, reason: str = "") -> str:
        """Move the alias of spec.tracking.promote to a published job's version, and say what came of it.

        `JobHandle.promote` says more. Raises NotFound, InvalidObject where it is refused, WaitTimedOut,
        ServiceNotRunning.
        """
        return self.handle(name, namespace=namespace).promote(force=force, reason=reason)

    def sweep(self, sweep: SweepLike, *, told: Callable[[str], None] | None = None) -> QLoRASweep:
        """Check and store a sweep, whose trials are jobs `<name>-0`, `<name>-1`, ...

        Data files go where those of jobs go. Raises InvalidObject, AlreadyExists, ServiceNotRunning.
        """
        checked = self.check_sweep(sweep)
        if not self.connection.is_running():
            raise ServiceNotRunning("the service is not running, so nothing would run the trials; start it: qlora up")
        if not self.connection.is_local:
            trial = uploaded(trial_job(checked, 0), self.settings.store_uri, told or (lambda _: None)).spec
            start = checked.spec.job.adapter.model_copy(update={"start": trial.adapter.start})
            sources = {"model": trial.model, "dataset": trial.dataset, "adapter": start}
            spec = checked.spec.model_copy(update={"job": checked.spec.job.model_copy(update=sources)})
            checked = checked.model_copy(update={"spec": spec})
        return self.connection.store.create_sweep(checked)

    def check_sweep(self, sweep: SweepLike) -> QLoRASweep:
        """The sweep as `sweep` would store it; raises what that would raise, and changes nothing."""
        checked = _one(sweep, QLoRASweep)
        if "namespace" not in checked.metadata.model_fields_set:
            metadata = checked.metadata.model_copy(update={"namespace": self.namespace})
            checked = checked.model_copy(update={"metadata": metadata})
        name, namespace = checked.metadata.name, checked.metadata.namespace
        if any(known.metadata.name == name for known in self.list_sweeps(namespace=namespace)):
            raise AlreadyExists(
                f"sweep {checked.key} exists already; choose another name, or delete it first: "
                f"qlora sweeps delete {name}"
            )
        if (why := refusal(checked)) is not None:
            raise InvalidObject(f"{checked.kind} {name}: {why}")
        self.check(trial_job(checked, 0))
        return checked

    def list_sweeps(self, *, namespace: str | None = None, all_namespaces: bool = False) -> Sequence[QLoRASweep]:
        """Sweeps, ordered by namespace and name."""
        return self.connection.store.list_sweeps(None if all_namespaces else namespace or self.namespace)

    def get_sweep(self, name: str, *, namespace: str | None = None) -> QLoRASweep:
        """A sweep as it is now, with its trials in its status; raises NotFound."""
        for sweep in self.list_sweeps(namespace=namespace):
            if sweep.metadata.name == name:
                return sweep
        raise NotFound(f"there is no sweep {namespace or self.namespace}/{name}; list them with: qlora sweeps")

    def wait_sweep(
        self, name: str, timeout_seconds: float | None = None, *, namespace: str | None = None
    ) -> QLoRASweep:
        """The sweep once it is over and MLflow knows; raises WaitTimedOut, NotFound, ServiceNotRunning."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        cursor = ""
        while True:
            left = SWEEP_STEP_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            cursor = self.connection.store.wait_for_change(cursor, min(SWEEP_STEP_SECONDS, left) if cursor else 0)
            sweep = self.get_sweep(name, namespace=namespace)
            if is_settled(sweep):
                return sweep
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimedOut(f"sweep {sweep.key} is not over after {timeout_seconds:g} s: {sweep.status.summary}")
            if not self.connection.is_running():
                raise ServiceNotRunning(f"the service stopped before sweep {sweep.key} was over; start it: qlora up")

    def cancel_sweep(self, name: str, *, namespace: str | None = None) -> None:
        """End a sweep and its trials for good; what they have saved and published stays. Raises NotFound."""
        self.connection.store.cancel_sweep(namespace or self.namespace, name)

    def delete_sweep(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a sweep and its trials; MLflow and their store keep what they have. Raises NotFound."""
        self.connection.store.delete_sweep(namespace or self.namespace, name)

    def apply_queue(self, queue: QueueLike) -> QLoRAQueue:
        """Create or replace a queue; raises InvalidObject."""
        checked = _one(queue, QLoRAQueue)
        if self.connection.is_local:
            check_webhooks(checked.spec.notifications, self.settings.webhook_allowed_hosts)
        return self.connection.store.apply_queue(checked)

    def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        return self.connection.store.list_queues()

    def get_queue(self, name: str) -> QLoRAQueue:
        """A queue as it is now; raises NotFound."""
        for queue in self.list_queues():
            if queue.metadata.name == name:
                return queue
        raise NotFound(f"there is no queue {name}; list them with: qlora get queues")

    def hold_queue(self, name: str, *, hold: bool = True, drain: bool = False) -> QLoRAQueue:
        """Admit none of its jobs, or some again; those that run go on, unless it is drained. Raises NotFound."""
        queue = self.get_queue(name)
        stop_policy = ("HoldAndDrain" if drain else "Hold") if hold else "None"
        spec = queue.spec.model_copy(update={"stop_policy": stop_policy, "hold": False})
        return self.apply_queue(queue.model_copy(update={"spec": spec}))

    def delete_queue(self, name: str) -> None:
        """Remove a queue; jobs that name it wait until it is there again. Raises NotFound."""
        self.connection.store.delete_queue(name)

    def _handle(self, job: QLoRAJob) -> JobHandle:
        return JobHandle(self.connection, job, settings=self.settings)

    def _check_queue(self, job: QLoRAJob) -> None:
        """Refuse a queue that is there and not for this job, where queues may be read."""
        try:
            queues = self.connection.store.list_queues()
        except Forbidden:
            return
        refusal = permission_refusal(job, queue_specs(queues))
        if refusal is not None:
            field = "spec.queue" if refusal.reason is Reason.QUEUE_NOT_ALLOWED else "spec.priority"
            raise InvalidObject(f"{field}: {refusal.message}")

    def _check_size(self, job: QLoRAJob) -> None:
        """Refuse what can never run here, as far as that is known without fetching anything."""
        classes = self.connection.gpu_classes()
        if not self.settings.gpu_classes_are_fixed or not classes:
            return
        refusal = refuse_resources(job.spec, classes)
        if refusal is not None:
            raise InvalidObject(refusal)
        if file_path(job.spec.model.source) is None or job.spec.adapter.start is not None:
            return  # what it is, or what its adapter is, prepare will read
        plan = plan_job(job, model_config.read_facts(job.spec.model, job.spec.adapter), classes)
        if plan.refusal is not None and plan.guess is None:
            raise InvalidObject(f"the job fits no GPU here: {plan.refusal.message}")

    def _in_namespace(self, job: QLoRAJob) -> QLoRAJob:
        """The job in the client's namespace, unless it names its own."""
        if "namespace" in job.metadata.model_fields_set:
            return job
        metadata = job.metadata.model_copy(update={"namespace": self.namespace})
        return job.model_copy(update={"metadata": metadata})

    def _found(self, job: QLoRAJob) -> QLoRAJob | None:
        """The job that has this one's name already."""
        try:
            return self.connection.store.get_job(job.metadata.namespace, job.metadata.name)
        except NotFound:
            return None


def is_settled(sweep: QLoRASweep) -> bool:
    """Whether a sweep is over, and its run, where it has one, has its end."""
    has_run = any(trial.uid for trial in sweep.status.trials)
    return sweep.status.finish_time is not None and (not has_run or sweep.status.mlflow.run_status is not None)


def _how_to_go_on(job: QLoRAJob, finished: bool) -> str:
    """What to do about a name that is taken."""
    again = "run it anew with --replace" if finished else f"end it with: qlora cancel {job.metadata.name}"
    state = "and has finished" if finished else "and has not finished"
    return f"job {job.key} exists already {state}; choose another name with --name or metadata.name, or {again}"


_Kind = TypeVar("_Kind", QLoRAJob, QLoRAQueue, QLoRASweep)


def _one(source: object, kind: type[_Kind]) -> _Kind:
    """The one object of a kind behind a path, a mapping or an object; raises InvalidObject."""
    if isinstance(source, str | os.PathLike):
        path = cast("str | os.PathLike[str]", source)
        found = load_manifest(os.fspath(path))
        if len(found) != 1:
            raise InvalidObject(f"{os.fspath(path)} holds {len(found)} objects where one {kind.__name__} is wanted")
        item = found[0]
    else:
        item = parse_object(cast("UserObject | Mapping[str, object]", source))
    if not isinstance(item, kind):
        raise InvalidObject(f"{item.metadata.name} is a {item.kind} where a {kind.__name__} is wanted")
    return item
