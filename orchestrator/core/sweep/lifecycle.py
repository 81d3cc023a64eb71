"""One sweep's life, from its status and the jobs of its trials: facts in, commands out.

1. What has become of the trials on record is read from their jobs; what has ended stays as it is on record.
2. Trials that early stopping ends, and new ones while there is room, go on record first.
3. Jobs are made and cancelled as the stored status says. Names and specs follow from the index, so that making one
   twice makes one: a controller may die at any instant, and whoever takes over does the same.
4. Once all trials have ended, the sweep has; then its MLflow run gets its end, and the best version the alias.
5. A sweep that is deleted is cancelled, and its object waits for 4 (`core/sweep/finalizer`), for a bounded time.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.api.job import RELEASE_FINALIZER, Condition, QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.sweep import ENDS, BestTrial, QLoRASweep, QLoRASweepStatus, TrialStatus
from orchestrator.core.commands import (
    CancelJob,
    CreateJob,
    Event,
    FinishSweep,
    ReleaseSweep,
    ReportDefect,
    WriteSweepStatus,
)
from orchestrator.core.job.conditions import Finding, clip, set_condition
from orchestrator.core.job.promotion import finding_of
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import Snapshot, SweepFact
from orchestrator.core.sweep.finalizer import finalizers_with
from orchestrator.core.sweep.halving import goes_on, is_better, metric_of, reached
from orchestrator.core.sweep.search import parameters, refusal, trial_job, trial_name

SweepCommand = WriteSweepStatus | CreateJob | CancelJob | FinishSweep | ReleaseSweep | ReportDefect
MESSAGE_CHARACTERS = 256


def sweep_commands(snapshot: Snapshot) -> Iterator[SweepCommand]:
    """All that is to be done about sweeps; what raises is one sweep's defect."""
    yield from _released(snapshot)
    if not snapshot.sweeps:
        return
    jobs = _Jobs({job.key: job for job in snapshot.jobs}, frozenset(job.key for job in snapshot.unreadable))
    for sweep in sorted(snapshot.sweeps, key=lambda each: each.key):
        try:
            yield from tuple(_commands(sweep, jobs, snapshot))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, other sweeps and all jobs go on
            yield ReportDefect(job=sweep, trace=traceback.format_exc())


@dataclass(frozen=True, slots=True)
class _Jobs:
    """The jobs that there are, by `namespace/name`."""

    known: Mapping[str, QLoRAJob]
    unreadable: frozenset[str]
    """Of another version: they are there, and nothing is known of them."""

    def of(self, sweep: QLoRASweep, trial: TrialStatus) -> QLoRAJob | None:
        """A trial's job, or whatever has its name."""
        return self.known.get(self._key(sweep, trial))

    def is_unreadable(self, sweep: QLoRASweep, trial: TrialStatus) -> bool:
        """Whether it is one of those."""
        return self._key(sweep, trial) in self.unreadable

    @staticmethod
    def _key(sweep: QLoRASweep, trial: TrialStatus) -> str:
        return f"{sweep.metadata.namespace}/{trial.job}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Why a sweep makes no more trials."""

    reason: Reason
    message: str


def _commands(sweep: QLoRASweep, jobs: _Jobs, snapshot: Snapshot) -> Iterator[SweepCommand]:
    if sweep.status.finish_time is not None:
        yield from _settle(sweep, jobs, snapshot)
        yield from _left_over(sweep, jobs)
        return
    trials = [_seen(sweep, trial, jobs) for trial in sweep.status.trials]
    trials = _stopped_early(sweep, trials, jobs)
    end = _end(sweep, trials, snapshot)
    if end is None:
        trials += _begun(sweep, trials)
    status = _status(sweep, trials, end, snapshot.now)
    if status != sweep.status or finalizers_with(sweep, status) != sweep.metadata.finalizers:
        yield WriteSweepStatus(sweep=sweep, status=status, events=_events(status))
    for trial in trials:
        job = jobs.of(sweep, trial)
        if trial.state in ENDS or jobs.is_unreadable(sweep, trial):
            continue
        if job is not None and (end is not None or trial.stopped_at is not None) and not job.cancelled:
            yield CancelJob(job=job)
        elif job is None and not trial.uid and end is None:
            yield CreateJob(sweep=sweep, job=trial_job(sweep, trial.index))


def _seen(sweep: QLoRASweep, trial: TrialStatus, jobs: _Jobs) -> TrialStatus:
    """A trial with what its job tells now."""
    if trial.state in ENDS or jobs.is_unreadable(sweep, trial):
        return trial
    job = jobs.of(sweep, trial)
    if job is None or (trial.uid and job.metadata.uid != trial.uid):
        return _ended(trial, "Cancelled", "its job was deleted") if trial.uid else trial
    if not _is_trial(job, sweep):
        return _ended(trial, "Failed", f"job {job.metadata.name} is there already, and no trial of this sweep")
    return _with_end(trial.model_copy(update={"uid": job.metadata.uid}), job, sweep)


def _is_trial(job: QLoRAJob, sweep: QLoRASweep) -> bool:
    return job.sweep is not None and job.sweep.uid == sweep.metadata.uid


def _with_end(trial: TrialStatus, job: QLoRAJob, sweep: QLoRASweep) -> TrialStatus:
    """The same once the job has finished."""
    if job.status.finish_time is None:
        return trial
    state, value = state_of(job.status), metric_of(job.status.progress, sweep.spec.metric)
    if value is not None:
        trial = trial.model_copy(update={"value": value})
    if state is JobState.SUCCEEDED:
        trial = trial.model_copy(update={"model_version": job.status.mlflow.model_version})
        if value is None:
            return _ended(trial, "Failed", f"it has succeeded, and never logged {sweep.spec.metric.name}")
        return _ended(trial, "Succeeded", "")
    if state is JobState.CANCELLED and trial.stopped_at is not None:
        return _ended(trial, "Stopped", f"not among the best at step {trial.stopped_at}")
    return _ended(trial, "Cancelled" if state is JobState.CANCELLED else "Failed", job.status.summary)


def _ended(trial: TrialStatus, state: str, message: str) -> TrialStatus:
    return trial.model_copy(update={"state": state, "message": clip(message)[:MESSAGE_CHARACTERS]})


def _stopped_early(sweep: QLoRASweep, trials: Sequence[TrialStatus], jobs: _Jobs) -> list[TrialStatus]:
    """The trials with the rungs they have passed, and which of them are to end there."""
    found = list(trials)
    for position, trial in enumerate(found):
        job = jobs.of(sweep, trial)
        if trial.state in ENDS or trial.stopped_at is not None or job is None:
            continue
        result = reached(sweep.spec, trial, job.status.progress)
        if result is None:
            continue
        stop = None if goes_on(sweep.spec, result, found) else result.step
        news = {"rungs": (*trial.rungs, result), "value": result.value, "stopped_at": stop}
        found[position] = trial.model_copy(update=news)
    return found


def _end(sweep: QLoRASweep, trials: Sequence[TrialStatus], snapshot: Snapshot) -> _End | None:
    """Why no more trials are made, while those that are there may still go on; None where more are to come."""
    if sweep.cancelled:
        return _End(reason=Reason.CANCELLED, message="cancelled by the user")
    if sweep.status.observed_generation != sweep.metadata.generation and (why := refusal(sweep)) is not None:
        return _End(reason=Reason.USER_ERROR, message=why)
    if (why := snapshot.refused.get(sweep.metadata.uid)) is not None:
        return _End(reason=Reason.ADMISSION_REFUSED, message=why)
    failed = [trial for trial in trials if trial.state == "Failed"]
    if len(failed) > sweep.spec.max_failures:
        message = f"{len(failed)} trials failed, of which spec.maxFailures allows {sweep.spec.max_failures}; the last: "
        return _End(reason=Reason.TOO_MANY_FAILURES, message=message + failed[-1].message)
    return None


def _begun(sweep: QLoRASweep, trials: Sequence[TrialStatus]) -> list[TrialStatus]:
    """The trials to be made now, in the order of their indices."""
    spec, known = sweep.spec, {trial.index for trial in trials}
    room = spec.parallel - sum(trial.state not in ENDS for trial in trials)
    wanted = [index for index in range(spec.trials) if index not in known][: max(0, room)]
    return [
        TrialStatus(index=index, job=trial_name(sweep, index), parameters=parameters(spec, index)) for index in wanted
    ]


def best_of(sweep: QLoRASweep, trials: Sequence[TrialStatus]) -> BestTrial | None:
    """The best of those that have succeeded; of equals the first."""
    best: TrialStatus | None = None
    for trial in trials:
        if trial.state != "Succeeded" or trial.value is None:
            continue
        if best is None or best.value is None or is_better(trial.value, best.value, sweep.spec.metric):
            best = trial
    return None if best is None or best.value is None else BestTrial(index=best.index, job=best.job, value=best.value)


def _status(sweep: QLoRASweep, trials: Sequence[TrialStatus], end: _End | None, now: datetime) -> QLoRASweepStatus:
    best = best_of(sweep, trials)
    counts = {state: sum(trial.state == state for trial in trials) for state in ("Running", *ENDS)}
    open_trials = counts["Running"]
    if end is not None:
        # What was on record, and never came to be a job, does not any more.
        open_trials = sum(trial.state == "Running" and bool(trial.uid) for trial in trials)
    # Why it is refused is asked again until its trials have ended.
    is_observed = end is None or end.reason is not Reason.USER_ERROR or not open_trials
    status = sweep.status.model_copy(
        update={
            "observed_generation": sweep.metadata.generation if is_observed else sweep.status.observed_generation,
            "trials": tuple(trials),
            "running": open_trials,
            "succeeded": counts["Succeeded"],
            "failed": counts["Failed"],
            "stopped": counts["Stopped"],
            "best": best,
            "summary": clip(_summary(sweep, trials, best, end)),
        }
    )
    if open_trials or (end is None and len(trials) < sweep.spec.trials):
        return status
    return _finished(sweep, status, end or _outcome(sweep, best), now)


def _outcome(sweep: QLoRASweep, best: BestTrial | None) -> _End:
    if best is None:
        return _End(reason=Reason.NO_TRIAL_SUCCEEDED, message="all trials have ended, and none has succeeded")
    figure = f"{sweep.spec.metric.name} {best.value:.6g}"
    return _End(reason=Reason.SUCCEEDED, message=f"trial {best.job} is the best: {figure}")


def _finished(sweep: QLoRASweep, status: QLoRASweepStatus, end: _End, now: datetime) -> QLoRASweepStatus:
    found = Finding(kind=ConditionType.FINISHED, status="True", reason=end.reason, message=end.message)
    conditions = _set(sweep, status, found, now)
    trials = tuple(
        trial if trial.state in ENDS else _ended(trial, "Cancelled", "the sweep ended before its job was made")
        for trial in status.trials
    )
    summary = clip(f"{end.reason.value}: {end.message}")
    update = {"conditions": conditions, "finish_time": now, "summary": summary, "trials": trials}
    return status.model_copy(update=update)


def _set(sweep: QLoRASweep, status: QLoRASweepStatus, found: Finding, now: datetime) -> tuple[Condition, ...]:
    return set_condition(status.conditions, found, now=now, generation=sweep.metadata.generation)


def _summary(sweep: QLoRASweep, trials: Sequence[TrialStatus], best: BestTrial | None, end: _End | None) -> str:
    ended = sum(trial.state in ENDS for trial in trials)
    so_far = f", best {best.job} with {sweep.spec.metric.name} {best.value:.6g}" if best is not None else ""
    what = "Running" if end is None else f"Stopping: {end.reason.value}"
    return f"{what}: {ended} of {sweep.spec.trials} trials have ended{so_far}"


def _events(status: QLoRASweepStatus) -> tuple[Event, ...]:
    """What is told in the log: the end."""
    finished = status.condition(ConditionType.FINISHED)
    if finished is None:
        return ()
    return (Event(reason=finished.reason, message=finished.message, warning=finished.reason is not Reason.SUCCEEDED),)


LAST_RUN_STATUS: Mapping[Reason, str] = {Reason.SUCCEEDED: "FINISHED", Reason.CANCELLED: "KILLED"}
"""What a sweep's MLflow run ends as; of every other end it has failed."""


def _released(snapshot: Snapshot) -> Iterator[ReleaseSweep]:
    """Lets deleted sweeps go that have waited long enough, and at once those of which nothing can be decided."""
    for unreadable in snapshot.unreadable_sweeps:
        meta = unreadable.metadata
        if meta.deletion_timestamp is not None and RELEASE_FINALIZER in meta.finalizers:
            message = (
                f"sweep {unreadable.key} is deleted, and this version cannot read it: its MLflow run (tag "
                f"qlora.dev/sweep-uid: {meta.uid}) may be left RUNNING; end it there"
            )
            yield ReleaseSweep(sweep=unreadable, message=message)
    limit = snapshot.policy.release_limit_seconds
    for sweep in snapshot.sweeps:
        since = sweep.metadata.deletion_timestamp
        is_held = since is not None and RELEASE_FINALIZER in sweep.metadata.finalizers
        if since is not None and is_held and (snapshot.now - since).total_seconds() >= limit:
            message = (
                f"sweep {sweep.key} was deleted, and {limit:.0f} s later (QLORA_RELEASE_LIMIT_SECONDS) its trials have "
                "not ended or MLflow has not taken the end of its run (tag qlora.dev/sweep-uid: "
                f"{sweep.metadata.uid}): end the run there"
            )
            yield ReleaseSweep(sweep=sweep, message=message)


def _settle(sweep: QLoRASweep, jobs: _Jobs, snapshot: Snapshot) -> Iterator[WriteSweepStatus | FinishSweep]:
    """The end of the sweep's run, and the alias of the best version."""
    finished = sweep.status.condition(ConditionType.FINISHED)
    if sweep.status.mlflow.run_status is not None or finished is None:
        if finalizers_with(sweep, sweep.status) != sweep.metadata.finalizers:
            yield WriteSweepStatus(sweep=sweep, status=sweep.status)  # who was to take it off was killed
        return
    fact = snapshot.sweep_runs.get(sweep.metadata.uid)
    if fact is not None:
        yield WriteSweepStatus(sweep=sweep, status=_settled(sweep, fact, snapshot.now))
    elif any(trial.uid for trial in sweep.status.trials) and not _may_open_run(sweep, jobs, snapshot):
        run_status = LAST_RUN_STATUS.get(finished.reason, "FAILED")
        yield FinishSweep(sweep=sweep, run_status=run_status, promoted=_promoted(sweep, finished.reason))


def _may_open_run(sweep: QLoRASweep, jobs: _Jobs, snapshot: Snapshot) -> bool:
    """Whether the run of a trial is still asked for, with which the sweep's would be open again."""
    for trial in sweep.status.trials:
        job = jobs.of(sweep, trial)
        if job is None or not _is_trial(job, sweep) or job.status.prepared is None:
            continue
        # An answer that is not on record is asked for again by whoever takes over.
        if job.status.mlflow.run_id is None and job.metadata.uid not in snapshot.refused:
            return True
    return False


def _promoted(sweep: QLoRASweep, reason: Reason) -> TrialStatus | None:
    best = sweep.status.best
    if sweep.spec.promote is None or best is None or reason is not Reason.SUCCEEDED:
        return None
    return next(trial for trial in sweep.status.trials if trial.index == best.index)


def _left_over(sweep: QLoRASweep, jobs: _Jobs) -> Iterator[CancelJob]:
    """Jobs that were seen too late: the server had made them, and its answer was lost."""
    for trial in sweep.status.trials:
        job = jobs.of(sweep, trial)
        is_open = job is not None and job.status.finish_time is None and not job.cancelled
        if job is not None and is_open and _is_trial(job, sweep):
            yield CancelJob(job=job)


def _settled(sweep: QLoRASweep, fact: SweepFact, now: datetime) -> QLoRASweepStatus:
    status = sweep.status.model_copy(update={"mlflow": fact.mlflow})
    if fact.promotion is None:
        return status
    return status.model_copy(update={"conditions": _set(sweep, status, finding_of(fact.promotion), now)})
