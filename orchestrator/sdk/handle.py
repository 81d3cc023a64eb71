"""JobHandle: everything that can be done with one job that exists.

A handle stands for one job by its uid: if the job is deleted and another of its name created, the handle says so
instead of acting on the wrong one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.adapters.job_store import stored_adapter
from orchestrator.api.formats import JournalRecord, ShownRecords, formats_of
from orchestrator.api.job import CANCEL_ANNOTATION, PROMOTE_ANNOTATION, PublishFormat, QLoRAJob, QLoRAJobStatus
from orchestrator.api.losses import losses
from orchestrator.api.reasons import ConditionType, Refusal
from orchestrator.api.stage_name import StageKind
from orchestrator.api.words import on_one_line
from orchestrator.core.commands import Event
from orchestrator.core.job.promotion import MAX_REASON_CHARACTERS, PromotionRequest, answer_to, owed_promotion
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.errors import Conflict, InvalidObject, JobFailed, NotFound, ServiceNotRunning, WaitTimedOut
from orchestrator.sdk import extras
from orchestrator.sdk.chat import DEFAULT_ANSWER_TOKENS, chat
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.explanation import Explanation, explain_job
from orchestrator.sdk.logs import (
    FOLLOW_POLL_SECONDS,
    KeptLogs,
    LogLine,
    LogLines,
    LogQuery,
    follow_lines,
    last_lines,
    read_lines,
)
from orchestrator.sdk.notebook import jobs_html
from orchestrator.sdk.progress import News
from orchestrator.sdk.shown import records_of_job
from orchestrator.sdk.words import state_word
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingTypeStubs]  it has none

CHANGE_POLL_SECONDS = 1.0
"""Longest single wait for a change; bounds how late a stopped service or a deadline is noticed."""
SERVICE_ABSENCE_SECONDS = 15.0
"""A service may be away for so long, to be restarted, before whoever waits for a job is told."""
PROMOTE_SECONDS = 60.0
"""How long MLflow may take to move an alias before whoever asked for it is told that it takes longer."""
MAX_WRITE_ATTEMPTS = 8
"""Reads and writes again after losing to another writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a succeeded job leaves behind."""

    adapter_uri: str
    adapter_digest: str | None
    """SHA-256 of adapter_model.safetensors."""
    run_id: str | None
    experiment_id: str | None
    tracking_uri: str | None
    """Where run and model are: what MLflow must be told before it finds `model_uri`. None of a cluster whose MLflow has
    no known address here; set MLFLOW_TRACKING_URI."""
    registered_model: str | None
    model_version: str | None
    steps: int
    train_loss: float | None
    """Mean of the last ten steps."""
    eval_loss_before: float | None
    """Held-out loss before the first step; absent where nothing was held out."""
    eval_loss: float | None
    """Held-out loss of this adapter: of the last evaluation, or of the best where evaluation.keepBest is set."""
    formats: Mapping[PublishFormat, str] = field(default_factory=dict[PublishFormat, str])
    """Where the model is in the formats of publish.formats."""

    @property
    def model_uri(self) -> str | None:
        """How MLflow addresses the registered adapter."""
        if self.registered_model is None or self.model_version is None:
            return None
        return f"models:/{self.registered_model}/{self.model_version}"


def is_finished(job: QLoRAJob) -> bool:
    """Whether nothing will happen to the job any more."""
    return state_of(job.status) in TERMINAL_STATES


def succeeded(job: QLoRAJob) -> bool:
    """Whether the job finished with an adapter in the registry."""
    return state_of(job.status) is JobState.SUCCEEDED


class JobHandle:
    """One job of one service."""

    def __init__(self, connection: Connection, job: QLoRAJob, *, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self.namespace = job.metadata.namespace
        self.name = job.metadata.name
        self.uid = job.metadata.uid

    def __repr__(self) -> str:
        return f"JobHandle({self.namespace}/{self.name})"

    def _repr_html_(self) -> str:
        return jobs_html([self.object()])

    def object(self) -> QLoRAJob:
        """The job as it is now; raises NotFound."""
        job = self._connection.store.get_job(self.namespace, self.name)
        if job.metadata.uid != self.uid:
            raise NotFound(f"job {self.namespace}/{self.name} was deleted, and another one of its name was created")
        return job

    def status(self) -> QLoRAJobStatus:
        """What has come of the job so far."""
        return self.object().status

    @property
    def state(self) -> str:
        """Where the job is now, in the word that tables show; raises NotFound.

        >>> handle.state
        'Succeeded'
        """
        return state_word(self.object())

    def wait(self, timeout_seconds: float | None = None, *, progress: bool = False) -> QLoRAJob:
        """The job once it has finished, well or not; raises WaitTimedOut, NotFound, ServiceNotRunning.

        `progress`: print a line for what changes on the way.

        >>> job = handle.wait(timeout_seconds=3600, progress=True)
        medical: Succeeded
        """
        job, news = self.object(), News()
        for job in self.watch(timeout_seconds):
            if progress:
                news.tell(job)
        return job

    def watch(self, timeout_seconds: float | None = None) -> Iterator[QLoRAJob]:
        """The job now and after every change, until it has finished."""
        watch = self.start_watch(timeout_seconds)
        while not watch.ended:
            job = watch.step()
            if job is not None:
                yield job

    def start_watch(self, timeout_seconds: float | None = None) -> Watch:
        """`watch` for callers that take the steps themselves."""
        return Watch(handle=self, connection=self._connection, timeout_seconds=timeout_seconds)

    def logs(
        self,
        follow: bool = False,
        stage: StageKind | None = None,
        attempt: int | None = None,
        tail: int | None = None,
    ) -> LogLines:
        """Lines of the stages' logs in order; with `follow`, until the job has finished.

        `tail`: of what is there already, only so many of the last lines. As text they are as people read them.

        >>> print(handle.logs(stage="train", tail=1))
        12:03:11  the stage ended with OK (0)
        """
        return LogLines(self._log_lines(last_lines(self.log_steps(follow, stage, attempt), tail)))

    @staticmethod
    def _log_lines(steps: Iterator[LogLine | None]) -> Iterator[LogLine]:
        for line in steps:
            if line is None:
                time.sleep(FOLLOW_POLL_SECONDS)
            else:
                yield line

    def log_steps(self, follow: bool, stage: StageKind | None, attempt: int | None) -> Iterator[LogLine | None]:
        """`logs` for callers that do the pausing themselves: None where nothing is new."""
        query = LogQuery(namespace=self.namespace, job=self.name, stage=stage, attempt=attempt)
        logs = KeptLogs(self._connection.logs, self.object(), query)
        return follow_lines(logs, query, finished=self._is_finished) if follow else read_lines(logs, query)

    def cancel(self) -> QLoRAJob:
        """Ask for the job to be ended for good; what it has saved stays. No effect on a finished job."""
        return self._update(_with_cancel)

    def suspend(self) -> QLoRAJob:
        """Hold the job: a running stage saves a checkpoint and stops. No effect on a finished job."""
        return self._update(lambda job: _with_suspend(job, suspend=True))

    def resume(self) -> QLoRAJob:
        """Let a suspended job go on from its checkpoint."""
        return self._update(lambda job: _with_suspend(job, suspend=False))

    def check_promotion(self, *, force: bool = False, reason: str = "") -> str:
        """What `promote` would do, in a sentence; raises what it would raise at once, and changes nothing."""
        return _allowed(self.object(), _promotion_request(force, reason))

    def promote(self, *, force: bool = False, reason: str = "", timeout_seconds: float = PROMOTE_SECONDS) -> str:
        """Move the alias of spec.tracking.promote to the job's version: the approval of `approval: manual`.

        The controller does it; the answer says what came of it. With `force`, and a `reason` that is kept in the
        condition, an event and a tag of the version, whatever its gate found. Done once, however often it is asked for.
        Raises InvalidObject where it is refused, WaitTimedOut where MLflow takes longer, ServiceNotRunning.
        """
        request = _promotion_request(force, reason)
        job = self._write(lambda job: _with_promotion(job, request))
        deadline, cursor = time.monotonic() + timeout_seconds, ""
        while owed_promotion(job) is not None:
            if not self._connection.is_running():
                raise ServiceNotRunning(f"job {job.key} waits to be promoted by the service; start it: qlora up")
            if time.monotonic() >= deadline:
                raise WaitTimedOut(f"job {job.key} was not promoted after {timeout_seconds:g} s; the service goes on")
            cursor = self._connection.store.wait_for_change(cursor, CHANGE_POLL_SECONDS)
            job = self.object()
        found = job.status.condition(ConditionType.PROMOTED)
        assert found is not None, "it was there when the alias was asked for"
        if found.status != "True":
            raise InvalidObject(f"job {job.key} is not promoted: {found.reason.value}: {found.message}")
        return found.message

    def delete(self, *, wait_seconds: float = 0.0) -> None:
        """Remove the job; a running stage is stopped. MLflow and the job's store keep what they have.

        Where something has to end first, the job goes later; raises WaitTimedOut if it is there after `wait_seconds`
        above zero.
        """
        self.object()
        self._connection.store.delete_job(self.namespace, self.name)
        deadline, cursor = time.monotonic() + wait_seconds, ""
        while wait_seconds and self._is_there():
            if time.monotonic() >= deadline:
                raise WaitTimedOut(f"job {self.namespace}/{self.name} was not gone after {wait_seconds:g} s; try again")
            cursor = self._connection.store.wait_for_change(cursor, CHANGE_POLL_SECONDS)

    def _is_there(self) -> bool:
        try:
            self.object()
        except NotFound:
            return False
        return True

    def events(self) -> Sequence[tuple[str, Event]]:
        """What was decided about the job, with RFC 3339 times, oldest first."""
        return self._connection.store.list_events(self.namespace, self.name)

    def explain(self) -> Explanation:
        """Why the job is where it is, and what would change that."""
        return explain_job(self.object(), self._connection, self._settings.policy())

    def records(self) -> ShownRecords:
        """The first training records with their masks, as prepare kept them; raises NotFound before it has ended."""
        return records_of_job(self.object())

    def result(self) -> JobResult:
        """Where the adapter is, and how good it became; raises JobFailed unless the job has succeeded.

        >>> handle.result().eval_loss
        1.75
        """
        job = self.object()
        _require_success(job)
        status = job.status
        assert status.adapter_uri is not None, "a succeeded job has an adapter"
        records = _journal(status.adapter_uri)
        found = losses(records, job.spec.evaluation)
        return JobResult(
            adapter_uri=status.adapter_uri,
            adapter_digest=status.adapter_digest,
            run_id=status.mlflow.run_id,
            experiment_id=status.mlflow.experiment_id,
            tracking_uri=self._settings.known_tracking_uri,
            registered_model=status.mlflow.registered_model,
            model_version=status.mlflow.model_version,
            steps=max((record.step for record in records), default=0),
            train_loss=found.train_loss,
            eval_loss_before=found.eval_loss_before,
            eval_loss=found.eval_loss,
            formats=formats_of(job),
        )

    def metrics(self) -> DataFrame:
        """The job's figures as a pandas DataFrame: a row a step, a column a metric.

        They reach as far as a checkpoint is durable; step 0 is the evaluation before the first one. Raises NotFound
        before there is a checkpoint, MissingExtra without pandas.

        >>> handle.metrics()["eval/loss"].dropna().tolist()
        [3.5, 1.75]
        """
        extras.require("local", purpose="metrics() as a DataFrame")
        from pandas import DataFrame  # pyright: ignore[reportMissingTypeStubs]  it has none

        status = self.object().status
        uri = status.adapter_uri or (status.checkpoint.uri if status.checkpoint is not None else None)
        if uri is None:
            raise NotFound(f"job {self.namespace}/{self.name} has saved no checkpoint yet, so there are no figures")
        records = stored_adapter.read_journal(uri)
        rows = [{"time": _moment(record), **record.metrics} for record in records]
        return DataFrame(rows, index=[record.step for record in records])

    def adapter(self, into: Path | str) -> Path:
        """Download the adapter as the new folder `into`, every file verified against the manifest's sha256.

        A folder that holds exactly this adapter already is left as it is.

        >>> handle.adapter("medical-adapter")
        PosixPath('medical-adapter')
        """
        job = self.object()
        uri = job.status.adapter_uri
        if uri is None:
            raise JobFailed(f"job {job.key} has no adapter{_and_why(job)}")
        return stored_adapter.download(uri, Path(into), job.status.adapter_digest)

    def chat(self, prompt: str | None = None, *, max_new_tokens: int = DEFAULT_ANSWER_TOKENS) -> None:
        """Print the adapter's greedy answer to a prompt, or to each line of standard input; see `sdk.chat`."""
        chat(self.object(), prompt, max_new_tokens)

    def _is_finished(self) -> bool:
        return is_finished(self.object())

    def _update(self, change: Callable[[QLoRAJob], QLoRAJob]) -> QLoRAJob:
        """Apply a change to the newest version of the job; not at all where it is finished."""
        return self._write(lambda job: job if is_finished(job) else change(job))

    def _write(self, change: Callable[[QLoRAJob], QLoRAJob]) -> QLoRAJob:
        """Apply a change to the newest version of the job; not at all where it changes nothing."""
        for _ in range(MAX_WRITE_ATTEMPTS):
            job = self.object()
            changed = change(job)
            if changed == job:
                return job
            try:
                return self._connection.store.update_job(changed)
            except Conflict:
                continue
        raise Conflict(f"job {self.namespace}/{self.name} changes too often to be written; try again")


class Watch:
    """Follows one job in steps of bounded length, so that sync and async callers share it."""

    def __init__(self, *, handle: JobHandle, connection: Connection, timeout_seconds: float | None) -> None:
        self._handle = handle
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._service_seen = time.monotonic()
        self._cursor = ""
        self._version = ""
        self.ended = False

    def step(self) -> QLoRAJob | None:
        """The job if it changed within CHANGE_POLL_SECONDS, at once the first time."""
        self._cursor = self._connection.store.wait_for_change(self._cursor, self._patience_seconds())
        job = self._handle.object()
        changed = job.metadata.resource_version != self._version
        self._version = job.metadata.resource_version
        self.ended = is_finished(job)
        if not self.ended:
            self._check_deadline(job)
            self._check_service(job)
        return job if changed else None

    def _patience_seconds(self) -> float:
        if self._deadline is None:
            return CHANGE_POLL_SECONDS
        return min(CHANGE_POLL_SECONDS, max(0.0, self._deadline - time.monotonic()))

    def _check_deadline(self, job: QLoRAJob) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            state = job.status.summary or "nothing has happened yet"
            raise WaitTimedOut(f"job {job.key} had not finished after {self._timeout_seconds:g} s: {state}")

    def _check_service(self, job: QLoRAJob) -> None:
        now = time.monotonic()
        if self._connection.is_running():
            self._service_seen = now
        elif now - self._service_seen > SERVICE_ABSENCE_SECONDS:
            raise ServiceNotRunning(f"job {job.key} waits for the service, which is down; start it: qlora up")


def _moment(record: JournalRecord) -> datetime:
    return datetime.fromtimestamp(record.time_ms / 1000, UTC)


def _with_cancel(job: QLoRAJob) -> QLoRAJob:
    return _annotated(job, CANCEL_ANNOTATION, "true")


def _with_promotion(job: QLoRAJob, request: PromotionRequest) -> QLoRAJob:
    _allowed(job, request)
    is_done = job.status.is_true(ConditionType.PROMOTED)
    return job if is_done else _annotated(job, PROMOTE_ANNOTATION, request.annotation)


def _annotated(job: QLoRAJob, key: str, value: str) -> QLoRAJob:
    annotations = {**job.metadata.annotations, key: value}
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"annotations": annotations})})


def _promotion_request(force: bool, reason: str) -> PromotionRequest:
    reason = on_one_line(reason).strip()
    if force and not reason:
        raise InvalidObject("promote: to force it needs a reason, which is kept: --force --reason TEXT")
    if reason and not force:
        raise InvalidObject("promote: a reason is kept only of what is forced: --force --reason TEXT")
    if len(reason) > MAX_REASON_CHARACTERS:
        raise InvalidObject(f"promote: the reason must have at most {MAX_REASON_CHARACTERS} characters")
    return PromotionRequest(forced=reason)


def _allowed(job: QLoRAJob, request: PromotionRequest) -> str:
    """What would come of the request; raises InvalidObject where it is refused."""
    answer = answer_to(job, request)
    if isinstance(answer, Refusal):
        raise InvalidObject(f"job {job.key} cannot be promoted: {answer.message}")
    return answer


def _with_suspend(job: QLoRAJob, *, suspend: bool) -> QLoRAJob:
    return job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": suspend})})


def _require_success(job: QLoRAJob) -> None:
    if succeeded(job):
        return
    state = "has no result" if is_finished(job) else "has not finished"
    raise JobFailed(f"job {job.key} {state}{_and_why(job)}")


def _and_why(job: QLoRAJob) -> str:
    return f": {job.status.summary}" if job.status.summary else ""


def _journal(uri: str) -> tuple[JournalRecord, ...]:
    """The adapter's metrics; none where the store has been emptied since."""
    try:
        return stored_adapter.read_journal(uri)
    except NotFound:
        return ()
