"""A world to look at: so many jobs of every state on so many cards, in the real store of a service of its own."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import Attempt, Condition, MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import ClassUse, QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import ProgressReport
from orchestrator.core.job.conditions import summarize
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.logs import LogFolder
from orchestrator.settings import Settings
from orchestrator.sizing.hardware import GpuClass, gpu_class
from orchestrator.sizing.plan_search import choose_class
from orchestrator.sizing.step_time import Work
from tests.builders import LLAMA_3_8B, make_queue, prepare_result, submitted_job

CLASSES = ("24Gi", "48Gi", "80Gi", "141Gi")
NAMESPACES = tuple(f"team-{letter}" for letter in "abcdefgh")
QUEUES = 20
STEPS = 120


def _body(found: QLoRAJob | QLoRAQueue) -> str:
    return found.model_dump_json(by_alias=True, exclude_none=True)


class PaperWorld:
    """Its store, and the way to it."""

    def __init__(self, folder: Path, jobs: int = 20, cards: int = 8) -> None:
        self.settings = Settings(context="", home=folder / "home", tracking_uri=f"sqlite:///{folder}/mlflow.db")
        self.store = SqliteStore(self.settings)
        self.classes = tuple(gpu_class(name, cards // len(CLASSES)) for name in CLASSES)
        self.running = True
        self.connection = Connection(
            store=self.store,
            is_running=lambda: self.running,
            gpu_classes=lambda: self.classes,
            logs=LogFolder(self.settings.logs_folder / "stages"),
        )
        self.now = datetime.now(UTC)
        quotas: dict[str, int | tuple[int, int]] = dict.fromkeys(CLASSES, 1 + cards // 4)
        uses = tuple(ClassUse(gpu_class=each, nominal=1 + cards // 4, used=1, borrowed=1) for each in CLASSES)
        status = QLoRAQueueStatus(classes=uses, pending_since=self.now, pending=1)
        queues = [make_queue(f"queue-{number}", quotas, cohort="all") for number in range(QUEUES)]
        self._write("QLoRAQueue", [queue.model_copy(update={"status": status}) for queue in queues])
        self._write("QLoRAJob", [self.stored(*each) for each in self._jobs(jobs, cards, random.Random(jobs))])

    def stored(self, job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJob:
        """The job as the store has it in the end."""
        meta = {"uid": f"uid-{job.key}", "resource_version": "1", "creation_timestamp": self.now}
        status = status.model_copy(update={"summary": status.summary or summarize(status)})
        return job.model_copy(update={"metadata": job.metadata.model_copy(update=meta), "status": status})

    def put(self, job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJob:
        """Store one job, or another status of it."""
        found = self.stored(job, status)
        self._write("QLoRAJob", [found])
        return found

    def _write(self, kind: str, objects: Sequence[QLoRAJob | QLoRAQueue]) -> None:
        """All at once: one by one, as a service does it, a thousand take half a minute."""
        rows = [
            (kind, each.metadata.namespace if kind == "QLoRAJob" else "", each.metadata.name, _body(each))
            for each in objects
        ]
        with closing(sqlite3.connect(self.settings.database)) as database, database:
            database.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, 1, ?)", rows)

    def _jobs(self, count: int, cards: int, seeded: random.Random) -> Iterator[tuple[QLoRAJob, QLoRAJobStatus]]:
        for number in range(count):
            job = submitted_job(
                f"job-{number}",
                NAMESPACES[number % len(NAMESPACES)],
                queue=f"queue-{seeded.randrange(QUEUES)}",
                priority=seeded.choice((0, 0, 10)),
            )
            if number < cards:
                yield job, self.training(CLASSES[number % len(CLASSES)], seeded.randrange(1, STEPS))
            elif number < 0.7 * count:
                yield job, self.waiting()
            elif number < 0.8 * count:
                yield job, QLoRAJobStatus()
            else:
                yield job, self.finished(Reason.SUCCEEDED if number % 3 else Reason.USER_ERROR)

    def estimate(self, offered: GpuClass) -> Estimate:
        """What the jobs here take on a card of a class."""
        spec = submitted_job().spec
        found = choose_class(spec, LLAMA_3_8B, (offered,), work=Work(steps=STEPS))
        assert isinstance(found, Estimate)
        return found

    def attempt(self, stage: str, number: int, began_seconds_ago: float, **fields: object) -> Attempt:
        """An attempt at a stage."""
        began = self.now - timedelta(seconds=began_seconds_ago)
        return Attempt.model_validate(
            {"stage": stage, "number": number, "created_time": began, "start_time": began, **fields}
        )

    def prepared(self) -> Attempt:
        """The attempt that every job here begins with."""
        ended = self.now - timedelta(seconds=2900)
        return self.attempt("prepare", 1, 3000, finish_time=ended, exit_code=0, reason=Reason.PREPARED)

    def training(self, name: str, step: int, **fields: object) -> QLoRAJobStatus:
        """At a step, on a card of a class."""
        offered = next(each for each in self.classes if each.name == name)
        estimate = self.estimate(offered)
        attempt = self.attempt(
            "train",
            2,
            2000,
            gpu_class=name,
            plan=estimate.plan,
            predicted_bytes=estimate.predicted_bytes,
            measured_bytes=estimate.predicted_bytes - (1 << 26),
            progress_time=self.now,
        )
        report = ProgressReport(
            stage="train",
            step=step,
            steps=STEPS,
            loss=2.5,
            eval_loss=2.25,
            tokens_per_second=812.0,
            eta_seconds=60.0 * (STEPS - step),
            time=self.now,
        )
        found = QLoRAJobStatus(
            prepared=prepare_result(LLAMA_3_8B),
            estimate=estimate,
            attempts=(self.prepared(), attempt),
            attempts_total=2,
            progress=report,
            mlflow=MlflowStatus(run_id=f"run-{step}", experiment_id="7"),
        )
        return QLoRAJobStatus.model_validate({**dict(found), **fields})

    def waiting(self) -> QLoRAJobStatus:
        """Prepared, for want of a card."""
        words = "24 of 24 48Gi GPUs are in use; waits for one to come free, or add one"
        said = Condition(
            type=ConditionType.ADMITTED,
            status="False",
            reason=Reason.WAITING_FOR_GPU,
            message=words,
            last_transition_time=self.now,
        )
        return QLoRAJobStatus(
            prepared=prepare_result(LLAMA_3_8B), attempts=(self.prepared(),), attempts_total=1, conditions=(said,)
        )

    def finished(self, reason: Reason) -> QLoRAJobStatus:
        """Done for, or done."""
        done = self.training("24Gi", STEPS)
        ended = self.now - timedelta(seconds=60)
        attempts = tuple(each.model_copy(update={"finish_time": ended, "exit_code": 0}) for each in done.attempts)
        said = Condition(
            type=ConditionType.FINISHED, status="True", reason=reason, message="so it is", last_transition_time=ended
        )
        return done.model_copy(update={"attempts": attempts, "conditions": (said,), "finish_time": ended})
