"""A small world for the core to act upon: a store, a runtime, a clock and MLflow, all in memory.

`pass_once` runs `decide` and carries the commands out as the controller does, possibly only the first few of them,
as if the controller had been killed there. The rest happens outside: stages start, checkpoint, exit, are killed
or lost, cards come and go, users change their minds. After every pass `check` holds the world against its
invariants, by the world's own books and not by the core's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    MlflowStatus,
    ObjectMeta,
    QLoRAJob,
    QLoRAJobStatus,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.promotion import moved
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import ConditionType, ExitCode, Reason
from orchestrator.api.results import Failure, PublishResult, StageResult
from orchestrator.api.stage_name import StageKind, StageName
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus
from orchestrator.api.task import StageTask
from orchestrator.core.commands import (
    CancelJob,
    Command,
    CreateJob,
    DeleteJob,
    DeleteStage,
    EnsureRun,
    EnsureStage,
    FinishRun,
    FinishSweep,
    PromoteVersion,
    ReleaseJob,
    ReleaseSweep,
    ReleaseUnreadable,
    ReportDefect,
    SendNotification,
    StopStage,
    WriteQueueStatus,
    WriteStatus,
    WriteSweepStatus,
)
from orchestrator.core.decide import Decider, decide
from orchestrator.core.job.finalizer import finalizers_with, is_at_rest, released
from orchestrator.core.job.state_machine import JobState, state_of
from orchestrator.core.snapshot import DeliveryFact, Policy, RunFact, Snapshot, StageFact, StagePhase, SweepFact
from orchestrator.core.sweep import finalizer as of_sweeps
from orchestrator.sizing.hardware import GpuClass
from tests.builders import NOW, PUBLISHED, SMOLLM2_135M, failure, prepare_result, progress, train_result

TRAIN_STEPS = 6
FAKED_STEPS = 666
FAKED: Mapping[str, StageResult] = {
    "prepare": StageResult(prepare=prepare_result().model_copy(update={"steps": FAKED_STEPS})),
    "train": train_result(FAKED_STEPS),
    "publish": StageResult(
        publish=PublishResult(registered_model="faked", model_version="faked", model_uri="models:/faked/1")
    ),
}


@dataclass(slots=True)
class World:
    """What exists."""

    policy: Policy
    gpu_classes: list[GpuClass]
    queues: tuple[QLoRAQueue, ...] = ()
    sweeps: dict[str, QLoRASweep] = field(default_factory=dict[str, QLoRASweep])
    sweep_runs: dict[str, SweepFact] = field(default_factory=dict[str, SweepFact])
    """What the controller remembers of them; gone when it is killed."""
    parents: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """What the run of each sweep has been in MLflow, by the sweep's uid."""
    left_behind: list[str] = field(default_factory=list[str])
    """What was said of sweeps that were let go without."""
    eval_loss: Callable[[QLoRAJob, int], float] | None = None
    """What is logged of a job after a step."""
    models: dict[str, ModelFacts] = field(default_factory=dict[str, ModelFacts])
    """By job name; the others train the small one."""
    now: datetime = NOW
    jobs: dict[str, QLoRAJob] = field(default_factory=dict[str, QLoRAJob])
    stages: dict[str, StageFact] = field(default_factory=dict[str, StageFact])
    tasks: dict[str, StageTask] = field(default_factory=dict[str, StageTask])
    classes_of: dict[str, str | None] = field(default_factory=dict[str, str | None])
    stopping: set[str] = field(default_factory=set[str])
    steps: dict[str, int] = field(default_factory=dict[str, int])
    """Steps that are durable, by job."""
    ever_ended: set[str] = field(default_factory=set[str])
    mlflow_away: bool = False
    mlflow: dict[str, str] = field(default_factory=dict[str, str])
    """Status of each run that MLflow has, by the uid of its job."""
    promoted: dict[str, str] = field(default_factory=dict[str, str])
    """Why versions have got the alias, by the uid of their job: once each."""
    runs: dict[str, RunFact] = field(default_factory=dict[str, RunFact])
    """What the controller remembers of them; gone when it is killed."""
    told: list[tuple[str, int, str]] = field(default_factory=list[tuple[str, int, str]])
    """What webhooks have heard, in order: the job's key, the notification's number and its event."""
    webhooks_away: bool = False
    deliveries: dict[str, dict[int, DeliveryFact]] = field(default_factory=dict[str, dict[int, DeliveryFact]])
    """What the controller remembers of that, by the job's uid; gone when it is killed."""
    states: dict[str, list[JobState]] = field(default_factory=dict[str, list[JobState]])
    """What statuses have been, by the job's key."""
    versions: int = 1
    vouched: set[str] = field(default_factory=set[str])
    """Stages that the controller knows to have made, by their uid; forgotten when it is killed."""
    strangers: dict[str, StageFact] = field(default_factory=dict[str, StageFact])
    """What others have put under names of stages, saying that it is ours."""
    refused: dict[str, StageFact] = field(default_factory=dict[str, StageFact])
    """What the controller found there instead of its own."""
    dropped: set[str] = field(default_factory=set[str])
    """Jobs whose write of this pass was refused: nothing later about them is carried out in it."""
    decider: Decider = field(default_factory=Decider)
    """What the controller keeps between its decisions; gone when it is killed."""

    # --- the controller -----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot(
            now=self.now,
            jobs=tuple(self.jobs.values()),
            queues=self.queues,
            sweeps=tuple(self.sweeps.values()),
            sweep_runs=dict(self.sweep_runs),
            stages={
                **self.strangers,
                **{key: replace(fact, vouched=fact.stage_uid in self.vouched) for key, fact in self.stages.items()},
                **self.refused,
            },
            gpu_classes=tuple(self.gpu_classes),
            runs=dict(self.runs),
            deliveries={uid: tuple(facts.values()) for uid, facts in self.deliveries.items()},
            policy=self.policy,
        )

    def beat(self, *, ended: bool) -> None:
        """A pass whose controller is killed once it has written, and a stranger who is faster than the next one."""
        for command in self.decide():
            if isinstance(command, WriteStatus):
                self._act(command)
        self.forget()
        for key, job in list(self.jobs.items()):
            attempt = job.status.active_attempt
            if attempt is not None and attempt.seen_time is None:
                self.intrude(key, attempt.stage, 0, ended=ended)
        self.check()

    def forget(self) -> None:
        """The controller is killed."""
        self.runs.clear()
        self.sweep_runs.clear()
        self.deliveries.clear()
        self.vouched.clear()
        self.refused.clear()
        self.decider = Decider()

    def decide(self) -> tuple[Command, ...]:
        """What the controller decides, which is what anybody would who has never seen the world before."""
        seen = self.snapshot()
        commands = self.decider.decide(seen)
        assert commands == decide(seen), "a decision depends on those before"
        return commands

    def pass_once(self, commands_carried_out: int | None = None) -> tuple[Command, ...]:
        """One pass of the controller; returns what it decided."""
        commands = self.decide()
        writes = Counter(c.job.key for c in commands if isinstance(c, WriteStatus))
        assert all(count == 1 for count in writes.values()), "at most one status write a job"
        self._check_priority(commands)
        self.dropped.clear()
        for command in commands[:commands_carried_out]:
            if (
                not isinstance(command, EnsureStage)
                or f"{command.task.namespace}/{command.task.job}" not in self.dropped
            ):
                self._act(command)
        if commands_carried_out is not None:
            self.forget()
        self.check()
        return commands

    def _act(self, command: Command) -> None:
        match command:
            case ReportDefect():
                raise AssertionError(command.trace)
            case ReleaseUnreadable():
                raise AssertionError("every job of this world parses")
            case WriteStatus():
                self._write(command.job, command.status)
            case WriteQueueStatus(queue=queue, status=status):
                self._write_queue(queue, status)
            case WriteSweepStatus(sweep=sweep, status=status):
                self._write_sweep(sweep, status)
            case CreateJob(sweep=sweep, job=job):
                stored = self.sweeps[sweep.key].status
                assert job.metadata.name in {trial.job for trial in stored.trials}, "a trial is on record first"
                if job.key not in self.jobs:
                    self.versions += 1
                    meta = job.metadata.model_copy(update={"uid": f"uid-{self.versions}"})
                    self.submit(job.model_copy(update={"metadata": meta}))
            case CancelJob(job=job):
                self.cancel(job.key)
            case FinishSweep(sweep=sweep, run_status=run_status):
                if not self.mlflow_away:
                    assert not any(self._is_open(trial.job, sweep) for trial in sweep.status.trials)
                    if sweep.metadata.uid in self.parents:
                        self._set_parent(sweep.metadata.uid, run_status)
                    ended = MlflowStatus.model_validate({"run_id": "sweep", "run_status": run_status})
                    self.sweep_runs[sweep.metadata.uid] = SweepFact(mlflow=ended)
            case EnsureStage():
                self._ensure(command)
            case StopStage():
                if f"{command.namespace}/{command.name}" in self.stages:
                    self.stopping.add(f"{command.namespace}/{command.name}")
                self.strangers.pop(f"{command.namespace}/{command.name}", None)
            case DeleteStage():
                self._delete(f"{command.namespace}/{command.name}")
            case EnsureRun():
                if not self.mlflow_away:
                    uid = command.job.metadata.uid
                    self.mlflow[uid] = "RUNNING"
                    if command.job.sweep is not None:
                        self._set_parent(command.job.sweep.uid, "RUNNING")
                    found = MlflowStatus(run_id=f"run-of-{uid}", run_status="RUNNING")
                    self.runs[uid] = RunFact(job=command.job, mlflow=found)
            case FinishRun():
                if not self.mlflow_away:
                    self._finish_run(command)
            case PromoteVersion(job=job, forced=forced):
                if not self.mlflow_away:
                    uid = job.metadata.uid
                    words = self.promoted.setdefault(uid, forced or "approved")
                    found = moved("champion", "1", words)
                    self.runs[uid] = RunFact(job=job, mlflow=job.status.mlflow, promotion=found)
            case SendNotification():
                self._send(command)
            case ReleaseJob():
                job = self.jobs[command.job.key]
                self._replace(job, metadata=job.metadata.model_copy(update={"finalizers": released(job)}))
            case ReleaseSweep(sweep=sweep, message=message):
                deleted = sweep.metadata.deletion_timestamp
                assert deleted is not None
                assert (self.now - deleted).total_seconds() >= self.policy.release_limit_seconds
                self.left_behind.append(message)
                self._remove_sweep(self.sweeps[sweep.key])
            case DeleteJob():
                assert command.job.status.finish_time is not None, "only finished jobs may be deleted"
                if is_at_rest(self.jobs[command.job.key]):
                    self.jobs.pop(command.job.key)

    def _write(self, seen: QLoRAJob, status: QLoRAJobStatus) -> None:
        """As a store does: validate what comes over the wire, refuse what was decided on an older version."""
        stored = self.jobs.get(seen.key)
        if stored is None or stored.metadata.resource_version != seen.metadata.resource_version:
            self.dropped.add(seen.key)
            return
        parsed = QLoRAJobStatus.model_validate(status.to_wire())
        assert parsed == status, "a status must survive the store"
        finalizers = finalizers_with(stored, parsed)
        self._replace(stored, status=parsed, metadata=stored.metadata.model_copy(update={"finalizers": finalizers}))
        if parsed.mlflow.run_id is not None:
            self.runs.pop(stored.metadata.uid, None)
        states = self.states.setdefault(stored.key, [JobState.NEW])
        if states[-1] is not (state := state_of(parsed)):
            states.append(state)

    def _send(self, command: SendNotification) -> None:
        """As the workers of webhooks do, for one webhook."""
        uid, number = command.job.metadata.uid, command.notification.number
        known = self.deliveries.setdefault(uid, {}).get(number)
        if known is not None and known.outcome == "delivered":
            return
        fact = DeliveryFact(number=number, recipient=command.recipient, outcome="failed", message="answered 503")
        if not self.webhooks_away:
            assert command.webhook is not None
            self.told.append((command.job.key, number, command.notification.event))
            fact = replace(fact, outcome="delivered", message="")
        self.deliveries[uid][number] = fact

    def _write_queue(self, queue: QLoRAQueue, status: QLoRAQueueStatus) -> None:
        self.versions += 1
        meta = queue.metadata.model_copy(update={"resource_version": str(self.versions)})
        parsed = QLoRAQueueStatus.model_validate(status.to_wire())
        assert parsed == status, "a status must survive the store"
        self.queues = tuple(
            stored.model_copy(update={"metadata": meta, "status": parsed})
            if stored.metadata == queue.metadata  # or else somebody was faster
            else stored
            for stored in self.queues
        )

    def _write_sweep(self, seen: QLoRASweep, status: QLoRASweepStatus) -> None:
        stored = self.sweeps.get(seen.key)
        if stored is None or stored.metadata.resource_version != seen.metadata.resource_version:
            return
        self.versions += 1
        parsed = QLoRASweepStatus.model_validate(status.to_wire())
        assert parsed == status, "a status must survive the store"
        update = {"resource_version": str(self.versions), "finalizers": of_sweeps.finalizers_with(stored, parsed)}
        meta = stored.metadata.model_copy(update=update)
        written = stored.model_copy(update={"metadata": meta, "status": parsed})
        if meta.deletion_timestamp is not None and not meta.finalizers:
            self._remove_sweep(written)
        else:
            self.sweeps[seen.key] = written
        if parsed.mlflow.run_status is not None:
            self.sweep_runs.pop(stored.metadata.uid, None)

    def _set_parent(self, uid: str, status: str) -> None:
        seen = self.parents.setdefault(uid, [])
        if not seen or seen[-1] != status:
            assert seen == ([] if status == "RUNNING" else ["RUNNING"]), f"the sweep's run was {seen}, and is {status}"
            seen.append(status)

    def _is_open(self, name: str, sweep: QLoRASweep) -> bool:
        job = self.jobs.get(f"{sweep.metadata.namespace}/{name}")
        if job is None or job.sweep is None or job.sweep.uid != sweep.metadata.uid:
            return False
        return job.status.finish_time is None

    def _remove_sweep(self, sweep: QLoRASweep) -> None:
        """And what the garbage collector does then."""
        self.sweeps.pop(sweep.key)
        for key, job in list(self.jobs.items()):
            if job.sweep is not None and job.sweep.uid == sweep.metadata.uid:
                self.delete(key)

    def _finish_run(self, command: FinishRun) -> None:
        """As the MLflow workers do: in MLflow, then on the object, if it is still there."""
        uid = command.job.metadata.uid
        assert uid in self.mlflow, "only a run that exists can end"
        self.mlflow[uid] = command.run_status
        self.runs.pop(uid, None)
        job = self.jobs.get(command.job.key)
        if job is not None and job.metadata.uid == uid:
            self._replace(job, metadata=job.metadata.model_copy(update={"finalizers": released(job)}))

    def _replace(self, job: QLoRAJob, *, metadata: ObjectMeta | None = None, **changes: object) -> None:
        self.versions += 1
        newer = (metadata or job.metadata).model_copy(update={"resource_version": str(self.versions)})
        self.jobs[job.key] = job.model_copy(update={**changes, "metadata": newer})

    def _ensure(self, command: EnsureStage) -> None:
        task = command.task
        key = f"{task.namespace}/{task.stage_name}"
        stored = self.jobs[f"{task.namespace}/{task.job}"].status.active_attempt
        assert stored is not None, "the intent must be stored before the stage is created"
        assert (stored.stage, stored.number) == (task.stage, task.attempt), "the intent must be this attempt"
        if key in self.strangers:
            why = StageResult(failure=Failure(reason=Reason.NAME_TAKEN, message="it is a stranger's"))
            taken = replace(self.strangers[key], stage_uid="", vouched=True, phase=StagePhase.EXITED, exit_code=None)
            self.refused[key] = replace(taken, result=why, disruption=Reason.NAME_TAKEN)
            return
        if key not in self.stages:
            assert key not in self.ever_ended, "an ended stage must never be created again"
            assert stored.stop_time is None, "nothing is created that was called off"
            self.versions += 1
            fact = StageFact(
                namespace=task.namespace,
                name=key.split("/")[1],
                phase=StagePhase.PENDING,
                uid=task.uid,
                stage_uid=f"pod-{self.versions}",
            )
            self.stages[key], self.tasks[key], self.classes_of[key] = fact, task, command.gpu_class
        self.vouched.add(self.stages[key].stage_uid)

    def _delete(self, key: str) -> None:
        if self.refused.pop(key, None) is not None or self.strangers.pop(key, None) is not None:
            return
        fact = self.stages.pop(key, None)
        assert fact is None or fact.phase is StagePhase.EXITED, "only an ended stage may be forgotten"
        self.stopping.discard(key)

    # --- what happens outside -----------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def submit(self, job: QLoRAJob) -> None:
        assert job.key not in self.jobs
        self.versions += 1
        metadata = job.metadata.model_copy(
            update={"creation_timestamp": self.now, "resource_version": str(self.versions)}
        )
        self.jobs[job.key] = job.model_copy(update={"metadata": metadata})

    def suspend(self, key: str, suspended: bool) -> None:
        if key in self.jobs:
            job = self.jobs[key]
            self._replace(job, spec=job.spec.model_copy(update={"suspend": suspended}))

    def cancel(self, key: str) -> None:
        if key in self.jobs:
            job = self.jobs[key]
            annotated = job.metadata.model_copy(update={"annotations": {CANCEL_ANNOTATION: "true"}})
            self._replace(job, metadata=annotated)

    def delete(self, key: str) -> None:
        """Somebody deletes a job."""
        job = self.jobs[key]
        if is_at_rest(job):
            self.jobs.pop(key)
        elif job.metadata.deletion_timestamp is None:
            self._replace(job, metadata=job.metadata.model_copy(update={"deletion_timestamp": self.now}))

    def delete_sweep(self, key: str) -> None:
        """The same of a sweep."""
        sweep = self.sweeps[key]
        if not sweep.metadata.finalizers:
            self._remove_sweep(sweep)
        elif sweep.metadata.deletion_timestamp is None:
            self.versions += 1
            update = {"deletion_timestamp": self.now, "resource_version": str(self.versions)}
            self.sweeps[key] = sweep.model_copy(update={"metadata": sweep.metadata.model_copy(update=update)})

    def set_capacity(self, name: str, capacity: int) -> None:
        """Cards come or go; with a card goes what runs on it."""
        self.gpu_classes = [replace(c, capacity=capacity) if c.name == name else c for c in self.gpu_classes]
        on_class = [key for key in self.live_stages() if self.classes_of[key] == name]
        for key in sorted(on_class)[capacity:]:
            self._exit(key, 137, disruption=Reason.DISRUPTED)

    def live_stages(self) -> list[str]:
        return [key for key, fact in self.stages.items() if fact.phase is not StagePhase.EXITED]

    def intrude(self, key: str, stage: StageKind, ahead: int, *, ended: bool) -> None:
        """Somebody makes a pod under the name of one of the job's next attempts, which may end with a faked result."""
        job = self.jobs[key]
        name = StageName(job=job.metadata.name, stage=stage, attempt=job.status.attempts_total + ahead)
        where = f"{job.metadata.namespace}/{name}"
        if where in self.stages or where in self.refused:
            return
        self.versions += 1
        self.strangers[where] = StageFact(
            namespace=job.metadata.namespace,
            name=str(name),
            phase=StagePhase.EXITED if ended else StagePhase.RUNNING,
            start_time=self.now,
            finish_time=self.now if ended else None,
            exit_code=0 if ended else None,
            result=FAKED[stage] if ended else None,
            uid=job.metadata.uid,
            stage_uid=f"stranger-{self.versions}",
            vouched=False,
        )

    def run_stage(self, key: str) -> None:
        """Pending becomes running; running gets further, and in the end exits; stopping checkpoints and exits."""
        fact = self.stages[key]
        if fact.phase is StagePhase.EXITED:
            return
        if fact.phase is StagePhase.PENDING:
            if key in self.stopping:
                self.lose(key)
            else:
                self.stages[key] = replace(fact, phase=StagePhase.RUNNING, start_time=self.now)
        elif key in self.stopping:
            self._stopped(key)
        else:
            self._further(key)

    def fail_stage(self, key: str, code: int) -> None:
        if self.stages[key].phase is StagePhase.RUNNING:
            reason = Reason.OUT_OF_MEMORY if code == ExitCode.OUT_OF_MEMORY else Reason.TRANSIENT_ERROR
            self._exit(key, code, failure(reason, "something happened") if code > 0 else None)

    def lose(self, key: str) -> None:
        """The stage is gone without a word; if nobody saw it run, it may be created again."""
        self.stages.pop(key)
        self.stopping.discard(key)
        attempt = self.jobs[f"{self.tasks[key].namespace}/{self.tasks[key].job}"].status.active_attempt
        if attempt is None or attempt.start_time is not None:
            self.ever_ended.add(key)

    def _further(self, key: str) -> None:
        task, job = self.tasks[key], f"{self.tasks[key].namespace}/{self.tasks[key].job}"
        if task.stage == "prepare":
            self._exit(key, 0, StageResult(prepare=prepare_result(self.models.get(task.job, SMOLLM2_135M))))
        elif task.stage == "publish":
            self._exit(key, 0, PUBLISHED)
        elif self.steps.get(job, 0) + 1 >= TRAIN_STEPS:
            self._exit(key, 0, self._with_loss(train_result(TRAIN_STEPS), job, TRAIN_STEPS))
        else:
            self.steps[job] = self.steps.get(job, 0) + 1
            step = self.steps[job]
            report = progress(step, checkpoint_step=step, checkpoint_uri=f"file:///checkpoints/{step}")
            loss = None if self.eval_loss is None else self.eval_loss(self.jobs[job], step)
            told = report.model_copy(update={"time": self.now, "eval_loss": loss})
            self.stages[key] = replace(self.stages[key], progress=told)

    def _with_loss(self, result: StageResult, job: str, step: int) -> StageResult:
        if self.eval_loss is None or result.train is None or job not in self.jobs:
            return result
        train = result.train.model_copy(update={"eval_loss": self.eval_loss(self.jobs[job], step)})
        return result.model_copy(update={"train": train})

    def _stopped(self, key: str) -> None:
        task = self.tasks[key]
        step = self.steps.get(f"{task.namespace}/{task.job}", 0)
        if task.stage == "train":
            self._exit(key, ExitCode.PREEMPTED, train_result(step, complete=False))
        else:
            self._exit(key, 143)

    def _exit(self, key: str, code: int, result: StageResult | None = None, disruption: Reason | None = None) -> None:
        self.stages[key] = replace(
            self.stages[key],
            phase=StagePhase.EXITED,
            finish_time=self.now,
            exit_code=code,
            result=result,
            disruption=disruption,
        )
        self.ever_ended.add(key)

    # --- what must always hold ------------------------------------------------------------------------------------

    def check(self) -> None:
        self._check_gpus()
        self._check_one_stage_a_job()
        self._check_quotas()
        self._check_reasons()
        self._check_strangers()

    def _check_strangers(self) -> None:
        """Nothing that a stranger's pod says is ever taken."""
        for job in self.jobs.values():
            status = job.status
            assert status.prepared is None or status.prepared.steps != FAKED_STEPS
            assert status.checkpoint is None or status.checkpoint.step != FAKED_STEPS
            assert status.mlflow.model_version != "faked"
            assert not [a for a in status.attempts if (a.stage_uid or "").startswith("stranger")]

    def _check_gpus(self) -> None:
        """No GPU is given twice: neither in fact nor on record."""
        capacity = {c.name: c.capacity for c in self.gpu_classes}
        live = Counter(self.classes_of[key] or "" for key in self.live_stages() if self.tasks[key].stage == "train")
        for name, count in live.items():
            assert count <= capacity[name], f"{count} train stages on {capacity[name]} GPUs of {name}"

    def _check_one_stage_a_job(self) -> None:
        live = Counter((self.tasks[key].namespace, self.tasks[key].job) for key in self.live_stages())
        assert all(count == 1 for count in live.values()), f"two live stages of one job: {live}"

    def _check_quotas(self) -> None:
        used = self._held({})
        cohorts: Counter[tuple[str, str]] = Counter()
        for queue in self.queues:
            for quota in queue.spec.quotas:
                count = used[queue.metadata.name, quota.gpu_class]
                if queue.spec.cohort is None:
                    assert count <= quota.nominal
                else:
                    cohorts[queue.spec.cohort, quota.gpu_class] += count - quota.nominal
                    if quota.borrowing_limit is not None:
                        assert count <= quota.nominal + quota.borrowing_limit
        assert all(excess <= 0 for excess in cohorts.values()), f"a cohort uses more than it has: {cohorts}"

    def _check_reasons(self) -> None:
        """Whoever was looked at and does nothing says why, in words."""
        for job in self.jobs.values():
            status = job.status
            if not status.summary or status.active_attempt is not None:
                continue
            if status.finish_time is not None:
                kind = ConditionType.FINISHED
            elif status.adapter_uri is not None:
                kind = ConditionType.PUBLISHED
            else:
                kind = ConditionType.PREPARED if status.prepared is None else ConditionType.ADMITTED
            condition = status.condition(kind)
            assert condition is not None, f"{job.key} waits without {kind}"
            assert condition.message, f"{job.key} waits without a sentence"

    def _check_priority(self, commands: tuple[Command, ...]) -> None:
        """Nobody is admitted to a class while somebody of higher priority waits for a GPU that this one would be."""
        writes = {c.job.key: c.status for c in commands if isinstance(c, WriteStatus)}
        held = self._held(writes)
        admitted = {
            key: status.active_attempt
            for key, status in writes.items()
            if status.active_attempt is not None
            and status.active_attempt.stage == "train"
            and status.attempts_total > self.jobs[key].status.attempts_total
        }
        for key, attempt in admitted.items():
            for other in self.jobs.values():
                waits = self._waits_for_gpu(writes.get(other.key, other.status))
                higher = other.spec.priority > self.jobs[key].spec.priority
                could = (
                    self._could_use(other, attempt.gpu_class)
                    and self._may_hold_more(other, attempt.gpu_class, held)
                    and not self._is_users_limit_reached(other, writes)
                )
                owns = self._is_guaranteed(self.jobs[key], attempt.gpu_class, held)
                assert owns or not (waits and higher and could), f"{key} got {attempt.gpu_class} before {other.key}"

    @staticmethod
    def _waits_for_gpu(status: QLoRAJobStatus) -> bool:
        condition = status.condition(ConditionType.ADMITTED)
        reasons = (Reason.WAITING_FOR_GPU, Reason.WAITING_FOR_PREEMPTION)
        return (
            status.finish_time is None
            and status.active_attempt is None
            and condition is not None
            and condition.reason in reasons
        )

    def _held(self, writes: Mapping[str, QLoRAJobStatus]) -> Counter[tuple[str, str | None]]:
        """GPUs by queue and class, once these statuses are written."""
        return Counter(
            (job.spec.queue, attempt.gpu_class)
            for key, job in self.jobs.items()
            if (attempt := writes.get(key, job.status).active_attempt) is not None and attempt.stage == "train"
        )

    def _may_hold_more(self, job: QLoRAJob, gpu_class: str | None, held: Counter[tuple[str, str | None]]) -> bool:
        """Whether its queue has quota left, if it is one that borrows from nobody."""
        queue = next((queue for queue in self.queues if queue.metadata.name == job.spec.queue), None)
        if queue is None or queue.spec.cohort is not None or not queue.spec.quotas:
            return True
        nominal = {quota.gpu_class: quota.nominal for quota in queue.spec.quotas}
        return held[job.spec.queue, gpu_class] < nominal.get(gpu_class or "", 0)

    def _is_users_limit_reached(self, job: QLoRAJob, writes: Mapping[str, QLoRAJobStatus]) -> bool:
        """Whether its namespace has as many of its queue's GPUs as that lets one have, once these are written."""
        queue = next((queue for queue in self.queues if queue.metadata.name == job.spec.queue), None)
        limit = queue.spec.per_user.running if queue is not None else None
        theirs = (
            writes.get(key, other.status).active_attempt
            for key, other in self.jobs.items()
            if (other.metadata.namespace, other.spec.queue) == (job.metadata.namespace, job.spec.queue)
        )
        return limit is not None and sum(a is not None and a.stage == "train" for a in theirs) >= limit

    def _is_guaranteed(self, job: QLoRAJob, gpu_class: str | None, held: Counter[tuple[str, str | None]]) -> bool:
        """Whether the GPU that it got is within its queue's nominal quota, which comes before any priority."""
        queue = next((queue for queue in self.queues if queue.metadata.name == job.spec.queue), None)
        nominal = {quota.gpu_class: quota.nominal for quota in queue.spec.quotas} if queue is not None else {}
        return held[job.spec.queue, gpu_class] <= nominal.get(gpu_class or "", 0)

    def _could_use(self, job: QLoRAJob, gpu_class: str | None) -> bool:
        """By what the tests know of their models, not by the formula; a job that resumes keeps its class."""
        if job.status.estimate is not None and (job.status.checkpoint or job.status.step_ups):
            return job.status.estimate.gpu_class == gpu_class
        large = job.metadata.name in self.models
        return gpu_class in ("48Gi", "80Gi") if large else True
