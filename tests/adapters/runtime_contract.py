"""What every StageRuntime must do, wherever its stages run.

Each backend's test module inherits it and says how to get at the runtime (one GPU slot of class `24Gi`). Stages are
run by `fake_trainer.py`, whose doings are read from the job's store.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

from orchestrator.api.job import DatasetSource
from orchestrator.api.reasons import Reason
from orchestrator.api.task import StageTask
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.ports import StageRuntime
from tests.builders import make_task, submitted_job

TIMEOUT_SECONDS = 90.0
STEPS = 50  # of 20 ms


class RuntimeContract(ABC):
    """Inherit, and give the runtime and a folder for stores."""

    runtime: StageRuntime
    stores: Path

    @abstractmethod
    def test_everything_ends(self) -> None:
        """Backends add what only they can check about being shut down."""

    # helpers

    def task(self, script: str = "ok", *, stage: str = "train", attempt: int = 1, name: str | None = None) -> StageTask:
        name = name or f"job-{uuid4().hex[:8]}"
        job = submitted_job(
            name,
            meta={"uid": f"uid-of-{name}"},
            dataset=DatasetSource(source=f"file:///{script}"),
            training={"max_steps": STEPS},
        )
        return make_task(job, stage, attempt, store=self.stores / name, grace_seconds=5)

    def key(self, task: StageTask) -> str:
        return f"{task.namespace}/{task.stage_name}"

    def until(self, task: StageTask, condition: Callable[[StageFact], object]) -> StageFact:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            fact = self.runtime.observe().get(self.key(task))
            if fact is not None and condition(fact):
                return fact
            time.sleep(0.05)
        raise TimeoutError(f"waited {TIMEOUT_SECONDS} s for {self.key(task)}: {self.runtime.observe()}")

    def ended(self, task: StageTask) -> StageFact:
        return self.until(task, lambda fact: fact.phase is StagePhase.EXITED)

    def starts(self, task: StageTask) -> list[str]:
        log = self.stores / task.job / "starts.log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def forget(self, task: StageTask) -> None:
        self.runtime.delete(task.namespace, task.stage_name)

    def stop(self, task: StageTask, reason: Reason = Reason.PREEMPTED, grace_seconds: int = 5) -> None:
        self.runtime.stop(task.namespace, task.stage_name, grace_seconds, reason)

    # contract

    def test_a_train_stage_reports_progress_and_its_result(self) -> None:
        task = self.task()
        self.runtime.ensure(task, "24Gi")
        seen = self.until(task, lambda fact: fact.progress is not None)
        assert seen.progress is not None
        assert 1 <= seen.progress.step <= STEPS
        fact = self.ended(task)
        assert fact.exit_code == 0
        assert fact.result is not None
        assert fact.result.train is not None
        assert fact.result.train.step == STEPS == int((self.stores / task.job / "step").read_text())
        assert fact.uid == task.uid
        self.forget(task)

    def test_prepare_and_publish_need_no_gpu(self) -> None:
        holder, prepare = self.task("stubborn"), self.task(stage="prepare")
        self.runtime.ensure(holder, "24Gi")
        self.until(holder, lambda fact: fact.phase is StagePhase.RUNNING)
        self.runtime.ensure(prepare, None)
        fact = self.ended(prepare)
        assert fact.exit_code == 0
        assert fact.result is not None
        assert fact.result.prepare is not None
        self.stop(holder, grace_seconds=1)
        self.ended(holder)
        self.forget(holder)
        self.forget(prepare)

    def test_ensure_is_idempotent_at_every_time(self) -> None:
        task = self.task()
        for _ in range(3):
            self.runtime.ensure(task, "24Gi")
        self.until(task, lambda fact: fact.phase is StagePhase.RUNNING)
        self.runtime.ensure(task, "24Gi")
        self.ended(task)
        self.runtime.ensure(task, "24Gi")
        time.sleep(0.5)
        assert self.runtime.observe()[self.key(task)].phase is StagePhase.EXITED
        assert self.starts(task) == [self.key(task).partition("/")[2]]
        self.forget(task)

    def test_a_gpu_runs_one_stage_at_a_time(self) -> None:
        tasks = [self.task() for _ in range(3)]
        for task in tasks:
            self.runtime.ensure(task, "24Gi")
        most = 0
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            phases = [self.runtime.observe()[self.key(task)].phase for task in tasks]
            most = max(most, phases.count(StagePhase.RUNNING))
            if phases.count(StagePhase.EXITED) == len(tasks):
                break
            time.sleep(0.02)
        facts = sorted((self.ended(task) for task in tasks), key=lambda fact: str(fact.start_time))
        assert most == 1
        for before, after in pairwise(facts):
            assert before.finish_time is not None
            assert after.start_time is not None
            assert before.finish_time <= after.start_time
        for task in tasks:
            self.forget(task)

    def test_a_stop_ends_in_a_durable_checkpoint(self) -> None:
        task = self.task()
        self.runtime.ensure(task, "24Gi")
        step = self.stores / task.job / "step"
        self.until(task, lambda _: step.exists())
        self.stop(task)
        self.stop(task)
        fact = self.ended(task)
        assert fact.exit_code == 85
        assert fact.result is not None
        assert fact.result.train is not None
        assert fact.result.train.step == int(step.read_text()) < STEPS
        self.forget(task)

    def test_the_next_attempt_goes_on_from_the_checkpoint(self) -> None:
        first = self.task()
        self.runtime.ensure(first, "24Gi")
        step = self.stores / first.job / "step"
        self.until(first, lambda _: step.exists())
        self.stop(first)
        self.ended(first)
        second = self.task(name=first.job, attempt=2)
        self.runtime.ensure(second, "24Gi")
        fact = self.ended(second)
        assert fact.result is not None
        assert fact.result.train is not None
        assert fact.result.train.complete
        assert self.starts(first) == [f"{first.job}-train-1", f"{first.job}-train-2"]
        self.forget(first)
        self.forget(second)

    def test_a_stage_that_does_not_obey_is_killed_after_its_grace(self) -> None:
        task = self.task("stubborn")
        self.runtime.ensure(task, "24Gi")
        self.until(task, lambda _: self.starts(task))
        time.sleep(0.3)  # until it ignores SIGTERM
        self.stop(task, grace_seconds=1)
        fact = self.ended(task)
        assert fact.exit_code in (-9, 137)
        self.forget(task)

    def test_a_waiting_stage_can_be_stopped_and_never_starts(self) -> None:
        holder, waiting = self.task("stubborn"), self.task()
        self.runtime.ensure(holder, "24Gi")
        self.until(holder, lambda fact: fact.phase is StagePhase.RUNNING)
        self.runtime.ensure(waiting, "24Gi")
        assert self.until(waiting, lambda _: True).phase is StagePhase.PENDING
        self.stop(waiting)
        self.ended(waiting)
        self.stop(holder, grace_seconds=1)
        self.ended(holder)
        time.sleep(0.5)
        assert self.starts(waiting) == []
        self.forget(waiting)
        self.forget(holder)

    def test_a_failure_keeps_its_exit_code_and_words(self) -> None:
        task = self.task("exit-80")
        self.runtime.ensure(task, "24Gi")
        fact = self.ended(task)
        assert fact.exit_code == 80
        assert fact.result is not None
        assert fact.result.failure is not None
        assert fact.result.failure.message == "line 7 is broken"
        self.forget(task)

    def test_a_deleted_stage_is_gone_and_a_running_one_is_not_deleted(self) -> None:
        task = self.task()
        self.runtime.ensure(task, "24Gi")
        self.until(task, lambda fact: fact.phase is StagePhase.RUNNING)
        self.forget(task)
        self.ended(task)
        self.forget(task)
        self.forget(task)
        assert self.key(task) not in self.runtime.observe()

    def test_unknown_stages_are_ignored(self) -> None:
        self.runtime.stop("team-a", "nobody-train-1", 5, Reason.CANCELLED)
        self.runtime.delete("team-a", "nobody-train-1")
        assert "team-a/nobody-train-1" not in self.runtime.observe()

    def test_gpu_classes_say_what_there_is(self) -> None:
        classes = {known.name: known for known in self.runtime.gpu_classes()}
        assert set(classes) == {"24Gi"}
        assert classes["24Gi"].capacity == 1
        assert classes["24Gi"].marketed_gib == 24
        assert 20 * 2**30 < classes["24Gi"].usable_bytes < 24 * 2**30
