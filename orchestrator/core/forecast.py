"""When jobs are expected to start and to end: the decisions themselves, run ahead of time.

The world of a snapshot goes on by itself. Stages that train end once their remaining steps are made, those that are
asked to stop do so, and the decider decides after each of these as it will then. Nothing fails, and jobs that are not
prepared stay so: nobody knows yet what they need. Nothing arrives, or, to tell how late it may get, the same again that
arrived lately.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count

from orchestrator.api.job import CheckpointStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import StageResult, TrainResult
from orchestrator.core.commands import DeleteStage, EnsureStage, StopStage, WriteQueueStatus, WriteStatus
from orchestrator.core.decide import Decider
from orchestrator.core.job.remaining import MOST_SECONDS, remaining_seconds
from orchestrator.core.scheduling.ordering import queue_specs
from orchestrator.core.scheduling.turns import turn_length
from orchestrator.core.snapshot import Snapshot, StageFact, StagePhase

MOST_EVENTS = 500
"""A forecast looks no further than so many stages that end, which bounds its time."""
EARLY, LATE = 0.8, 3.0
"""Factors of a wait between which four of five starts come: plans are a little off, and who arrives comes in bursts
(`benchmarks.forecasts`)."""
AGAIN_NAME = 50
"""Letters kept of the name of a job that comes again, which then is no longer than names may be."""
MOST_ROUNDS = 16
"""Decisions about one moment come to rest after two or three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What is expected of one job."""

    start: datetime | None = None
    """When it gets its next GPU; None where it has one, or gets none within the forecast."""
    gpu_class: str | None = None
    """Of which class."""
    end: datetime | None = None
    """When its last step is made; None where nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is expected of everybody."""

    jobs: Mapping[str, Expectation]
    """By key: of those that have a GPU or get one."""
    until: datetime
    """What comes after this was not looked at."""
    is_cut: bool
    """Whether something would still have happened then."""
    endless: tuple[str, ...]
    """Jobs that hold a GPU for a time that nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What one job is told."""

    expected: Expectation | None
    """None where its turn does not come within the forecast."""
    early: datetime | None = None
    late: datetime | None = None
    """Between these it starts; `late` is absent where that is beyond the forecast."""
    until: datetime
    """What comes after this was not looked at."""
    endless: tuple[str, ...]
    """As `Forecast` has it."""


def outlook(snapshot: Snapshot, key: str, *, most_events: int = MOST_EVENTS) -> Outlook:
    """When the job starts and ends; the range of its start counts what a plan may be off, and on what may arrive."""
    ahead = forecast(snapshot, about=key, most_events=most_events)
    expected = ahead.jobs.get(key)
    told = Outlook(expected=expected, until=ahead.until, endless=ahead.endless)
    if expected is None or expected.start is None or expected.start <= snapshot.now:
        return told
    waits = expected.start - snapshot.now
    worse = forecast(snapshot, about=key, most_events=most_events, again=waits)
    found = worse.jobs.get(key, Expectation()).start
    late = None if found is None else snapshot.now + LATE * (max(found, expected.start) - snapshot.now)
    return replace(told, early=snapshot.now + EARLY * waits, late=late)


def forecast(
    snapshot: Snapshot, *, about: str | None = None, most_events: int = MOST_EVENTS, again: timedelta | None = None
) -> Forecast:
    """Run ahead until nobody waits any more whose turn would come; with `about`, until that job has a GPU.

    What arrived within `again` before the snapshot then arrives once more.
    """
    course = Course.of(snapshot)
    if again is not None:
        course.expect_again(again)
    course.decide()
    while most_events > 0 and course.events and about not in course.expected:
        most_events -= course.go_on()
        course.decide()
    return Forecast(
        jobs=course.expected, until=course.now, is_cut=bool(course.events), endless=tuple(sorted(course.endless))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What of a job is still to be done, by its trainer or its plan."""

    seconds: float
    estimate: Estimate | None
    """Where it takes so long."""

    def seconds_on(self, estimate: Estimate | None) -> float:
        """The same on another card, if the speed of both is known."""
        here, there = (each.step_seconds if each is not None else None for each in (self.estimate, estimate))
        return self.seconds * there / here if here and there else self.seconds


@dataclass(slots=True)
class Course:
    """The world on its way."""

    now: datetime
    jobs: dict[str, QLoRAJob]
    queues: dict[str, QLoRAQueue]
    stages: dict[str, StageFact]
    template: Snapshot
    decider: Decider = field(default_factory=Decider)
    events: list[tuple[datetime, int, str, str]] = field(default_factory=list[tuple[datetime, int, str, str]])
    expected: dict[str, Expectation] = field(default_factory=dict[str, Expectation])
    endless: set[str] = field(default_factory=set[str])
    job_of: dict[str, str] = field(default_factory=dict[str, str])
    """The key of the job, by that of its stage."""
    stopping: set[str] = field(default_factory=set[str])
    work: dict[str, _Work] = field(default_factory=dict[str, _Work])
    """What was left when it last started or stopped, by the job's key: of those whose time is known."""
    coming: dict[str, QLoRAJob] = field(default_factory=dict[str, QLoRAJob])
    """Who is to arrive, by key."""
    moves: Counter[str] = field(default_factory=Counter[str])
    """How often each job made way, by its key."""
    held_seconds: Counter[str] = field(default_factory=Counter[str])
    """GPU seconds that were had and are over, by class."""
    _held: dict[str, tuple[datetime, str]] = field(default_factory=dict[str, tuple[datetime, str]])
    """Since when a train stage has its GPU, and of which class."""
    _order: count[int] = field(default_factory=count)

    @classmethod
    def of(cls, snapshot: Snapshot) -> Course:
        """As it is now."""
        course = cls(
            now=snapshot.now,
            jobs={job.key: job for job in snapshot.jobs},
            queues={queue.metadata.name: queue for queue in snapshot.queues},
            stages={key: replace(fact, progress=None) for key, fact in snapshot.stages.items()},
            template=replace(snapshot, policy=replace(snapshot.policy, has_agents=False)),  # silence says nothing here
        )
        for job in snapshot.jobs:
            attempt = job.status.active_attempt
            if attempt is not None and attempt.stage == "train":
                course._runs(f"{job.metadata.namespace}/{job.stage_name(attempt)}", job)
            retry = job.status.retry_after
            if retry is not None and 0 < (retry - snapshot.now).total_seconds() <= MOST_SECONDS:
                course._at(retry, "look", job.key)
        return course

    def expect_again(self, lately: timedelta) -> None:
        """What came lately comes again, prepared as it was."""
        for job in self.template.jobs:
            came = job.metadata.creation_timestamp
            if came is None or job.status.prepared is None or not self.now - lately <= came <= self.now:
                continue
            name = f"{job.metadata.name[:AGAIN_NAME]}-again"
            meta = {"name": name, "uid": f"{job.metadata.uid}-again", "creation_timestamp": came + lately}
            status = QLoRAJobStatus(prepared=job.status.prepared, mlflow=job.status.mlflow, attempts_total=1)
            metadata = job.metadata.model_copy(update={**meta, "annotations": {}, "deletion_timestamp": None})
            copy = job.model_copy(update={"metadata": metadata, "status": status})
            self.coming[copy.key] = copy
            self._at(came + lately, "come", copy.key)

    def expect(self, job: QLoRAJob, come: datetime, seconds: float) -> None:
        """Somebody arrives, prepared, who has to train for so long."""
        self.coming[job.key] = job
        self.work[job.key] = _Work(seconds=seconds, estimate=None)
        self._at(come, "come", job.key)

    def go_on(self) -> int:
        """To the next moment at which something happens; how many stages end then."""
        self.now = max(self.now, self.events[0][0])
        ended = 0
        while self.events and self.events[0][0] <= self.now:
            _, _, what, key = heapq.heappop(self.events)
            if what == "come":
                self.jobs[key] = self.coming[key]
            elif what == "end":
                ended += self._end(key)
            elif what == "stop":
                self._stop(key)
                ended += 1
            elif what == "turn":
                self._save(key)
        return ended

    def decide(self) -> None:
        """Round after round, until nothing follows any more."""
        for _ in range(MOST_ROUNDS):
            seen = replace(
                self.template,
                now=self.now,
                clock_step_seconds=0.0,
                jobs=tuple(self.jobs.values()),
                queues=tuple(self.queues.values()),
                stages=self.stages,
            )
            self.stages = dict(self.stages)
            changed = False
            for command in self.decider.decide(seen):
                match command:
                    case WriteStatus(job=job, status=status):
                        changed = True
                        self.jobs[job.key] = job.model_copy(update={"status": status})
                    case WriteQueueStatus(queue=queue, status=had):
                        self.queues[queue.metadata.name] = queue.model_copy(update={"status": had})
                    case EnsureStage():
                        changed |= self._start(command)
                    case StopStage(namespace=namespace, name=name):
                        self._ask_to_stop(f"{namespace}/{name}")
                    case DeleteStage(namespace=namespace, name=name):
                        changed |= self.stages.pop(f"{namespace}/{name}", None) is not None
                    case _:  # runs, objects that go and defects hold no GPU
                        pass
            if not changed:
                return

    def _start(self, command: EnsureStage) -> bool:
        task = command.task
        key, job = f"{task.namespace}/{task.stage_name}", self.jobs[f"{task.namespace}/{task.job}"]
        if key in self.stages:
            return False
        train = task.stage == "train"
        self.stages[key] = StageFact(
            namespace=task.namespace,
            name=str(task.stage_name),
            phase=StagePhase.RUNNING,
            start_time=self.now,
            uid=task.uid,
        )
        if train and key not in self.job_of:
            known = self.expected.get(job.key, Expectation())
            started = replace(known, start=self.now, gpu_class=command.gpu_class) if known.start is None else known
            self.expected[job.key] = started
            self._held[key] = self.now, command.gpu_class or ""
            self._runs(key, job)
            self._at(self.now + timedelta(seconds=self.template.policy.minimum_run_seconds + 1), "look", job.key)
        return True

    def _runs(self, stage: str, job: QLoRAJob) -> None:
        """A job has a GPU until its steps are made."""
        self.job_of[stage] = job.key
        began = job.status.active_attempt.start_time if job.status.active_attempt is not None else None
        turn = turn_length(queue_specs(self.queues.values()).get(job.spec.queue), self.template.policy)
        if turn is not None:
            self._at(max(self.now, (began or self.now) + turn), "turn", stage)
        known, left = self.expected.get(job.key, Expectation()), self.work.get(job.key)
        if left is None:
            seconds = remaining_seconds(job.status, self.template.policy, self.now)
        else:  # it was stopped on the way
            left = _Work(seconds=left.seconds_on(job.status.estimate), estimate=job.status.estimate)
            seconds = self.template.policy.restart_cost_seconds + left.seconds
        if seconds is None:
            self.expected[job.key] = known
            self.endless.add(job.key)
        else:
            seconds = max(0.0, seconds)
            self.work[job.key] = left or _Work(seconds=seconds, estimate=job.status.estimate)
            end = self.now + timedelta(seconds=seconds)
            self.expected[job.key] = replace(known, end=end)
            self._at(end, "end", stage)

    def _ask_to_stop(self, stage: str) -> None:
        if stage in self.stopping or stage not in self.job_of:
            return
        self.stopping.add(stage)
        self._at(self.now + timedelta(seconds=self.template.policy.stop_cost_seconds), "stop", stage)

    def _end(self, stage: str) -> int:
        """The job has made its last step, and holds no GPU any more."""
        key = self.job_of[stage]
        if stage in self.stopping or self.stages.pop(stage, None) is None:
            return 0
        self._release(stage)
        self.jobs.pop(key, None)
        return 1

    def _stop(self, stage: str) -> None:
        """A stage has stopped after a checkpoint."""
        fact, job = self.stages.get(stage), self.jobs.get(self.job_of[stage])
        if fact is None or job is None:
            return
        self._release(stage)
        self.moves[job.key] += 1
        end, left = self.expected[job.key].end, self.work.get(job.key)
        if end is not None and left is not None:
            seconds = min(left.seconds, (end - self.now).total_seconds() + self.template.policy.stop_cost_seconds)
            self.work[job.key] = replace(left, seconds=seconds)
        done = TrainResult(step=self._steps_done(job), complete=False, checkpoint_uri=_checkpoint_uri(job))
        self.endless.discard(job.key)
        self.expected[job.key] = replace(self.expected[job.key], end=None)
        self.stages[stage] = replace(
            fact,
            phase=StagePhase.EXITED,
            finish_time=self.now,
            exit_code=ExitCode.PREEMPTED,
            result=StageResult(train=done),
        )

    def _release(self, stage: str) -> None:
        """The stage has had its GPU."""
        since, gpu_class = self._held.pop(stage, (self.now, ""))
        self.held_seconds[gpu_class] += round((self.now - since).total_seconds())

    def _save(self, stage: str) -> None:
        """A checkpoint at the end of a job's turn, without which it does not yield: it saves them all the time."""
        job = self.jobs.get(self.job_of[stage])
        attempt = job.status.active_attempt if job is not None else None
        if job is None or attempt is None or stage in self.stopping or stage not in self.stages:
            return
        saved = CheckpointStatus(
            step=self._steps_done(job), uri=_checkpoint_uri(job), time=self.now, attempt=attempt.number
        )
        self.jobs[job.key] = job.model_copy(update={"status": job.status.model_copy(update={"checkpoint": saved})})

    def _steps_done(self, job: QLoRAJob) -> int:
        """Those in the checkpoint that a stage has just written, by the time that is left."""
        status, left = job.status, self.work.get(job.key)
        durable = status.checkpoint.step if status.checkpoint is not None else 0
        estimate = status.estimate
        if left is None or estimate is None or not estimate.step_seconds:
            return durable
        made = estimate.steps - left.seconds / estimate.step_seconds  # no number, where a step takes no time at all
        return round(min(max(durable, made), estimate.steps))

    def _at(self, time: datetime, what: str, key: str) -> None:
        heapq.heappush(self.events, (time, next(self._order), what, key))


def _checkpoint_uri(job: QLoRAJob) -> str:
    return job.status.checkpoint.uri if job.status.checkpoint is not None else job.status.store_uri or "file:///"
