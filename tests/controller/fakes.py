"""Small real implementations of the ports, with a slot for the next error; stages end when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from orchestrator.api.job import MlflowStatus, QLoRAJob
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.notification import Notification, Webhook
from orchestrator.api.promotion import moved
from orchestrator.api.reasons import Reason
from orchestrator.api.results import PrepareResult, Promotion, PublishResult, StageResult, TrainResult
from orchestrator.api.sweep import QLoRASweep, TrialStatus
from orchestrator.api.task import StageTask
from orchestrator.core.snapshot import StageFact, StagePhase, SweepFact
from orchestrator.sizing.hardware import GpuClass, gpu_class

DIGEST = "sha256:" + "0" * 64
MODEL = ModelFacts(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=256,
    tied_embeddings=True,
    revision="r",
)
RESULTS = {
    "prepare": StageResult(
        prepare=PrepareResult(
            digest=DIGEST,
            uri="file:///prepared",
            model=MODEL,
            train_records=1,
            train_sequences=1,
            train_tokens=1,
            supervised_tokens=1,
            eval_records=0,
            eval_sequences=0,
            steps=10,
        )
    ),
    "train": StageResult(
        train=TrainResult(step=10, complete=True, adapter_uri="file:///adapter", adapter_digest=DIGEST)
    ),
    "publish": StageResult(
        publish=PublishResult(registered_model="medical", model_version="1", model_uri="models:/medical/1")
    ),
}


@dataclass
class FakeRuntime:
    """Stages in a dictionary."""

    stages: dict[str, StageFact] = field(default_factory=dict[str, StageFact])
    calls: list[str] = field(default_factory=list[str])
    error: Callable[[str], Exception | None] = lambda call: None
    """What the next call raises."""

    def _note(self, call: str) -> None:
        self.calls.append(call)
        error = self.error(call)
        if error is not None:
            raise error

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        name = task.stage_name
        self._note(f"ensure {name}")
        fact = StageFact(
            namespace=task.namespace, name=name, uid=task.uid, phase=StagePhase.RUNNING, start_time=datetime.now(UTC)
        )
        self.stages.setdefault(fact.key, fact)

    def observe(self) -> Mapping[str, StageFact]:
        error = self.error("observe")
        if error is not None:
            raise error
        return dict(self.stages)

    def taken_names(self) -> frozenset[str]:
        return frozenset()

    def stop(self, namespace: str, name: str, grace_seconds: int, reason: Reason) -> None:
        self._note(f"stop {name}")

    def delete(self, namespace: str, name: str, *, recorded: bool = False) -> None:
        self._note(f"delete {name}{' recorded' if recorded else ''}")
        self.stages.pop(f"{namespace}/{name}", None)

    def gpu_classes(self) -> Sequence[GpuClass]:
        return [gpu_class("24Gi", 1)]

    def finish(self, exit_code: int = 0) -> None:
        """End every stage that runs, the way its kind ends."""
        for key, fact in self.stages.items():
            if fact.phase is StagePhase.RUNNING:
                result = RESULTS[fact.name.split("-")[-2]] if exit_code == 0 else None
                self.stages[key] = replace(
                    fact, phase=StagePhase.EXITED, exit_code=exit_code, result=result, finish_time=datetime.now(UTC)
                )


@dataclass
class FakeNotifier:
    """Notes who is told what."""

    told: list[tuple[str, str, int, str]] = field(default_factory=list[tuple[str, str, int, str]])
    """Job, event, number and the webhook's name."""
    error: Exception | None = None

    def send(self, job: QLoRAJob, notification: Notification, webhook: Webhook, namespace: str | None) -> None:
        if self.error is not None:
            raise self.error
        self.told.append((job.metadata.name, notification.event, notification.number, webhook.name))


@dataclass
class FakeTracking:
    """Runs in a dictionary, by job uid."""

    runs: dict[str, str] = field(default_factory=dict[str, str])
    promoted: dict[str, str] = field(default_factory=dict[str, str])
    error: Exception | None = None
    open: threading.Event = field(default_factory=threading.Event)
    """While it is cleared, calls wait."""
    held: str = ""
    """The job whose calls wait; all of them where it is empty."""

    def __post_init__(self) -> None:
        self.open.set()

    def ensure_run(self, job: QLoRAJob) -> MlflowStatus:
        return self._set(job, "RUNNING")

    def finish_run(self, job: QLoRAJob, run_status: str) -> None:
        self._set(job, run_status)

    def promote(self, job: QLoRAJob, forced: str) -> Promotion:
        """Once a job: `promoted` keeps the reasons."""
        if self.error is not None:
            raise self.error
        self.promoted.setdefault(job.metadata.uid, forced)
        return moved("champion", "1", self.promoted[job.metadata.uid] or "approved")

    def finish_sweep(self, sweep: QLoRASweep, run_status: str, promoted: TrialStatus | None) -> SweepFact:
        if self.error is not None:
            raise self.error
        self.runs[sweep.metadata.uid] = run_status
        promotion = None if promoted is None else moved("champion", "1", promoted.job)
        return SweepFact(mlflow=MlflowStatus.model_validate({"run_status": run_status}), promotion=promotion)

    def _set(self, job: QLoRAJob, run_status: str) -> MlflowStatus:
        if self.held in ("", job.metadata.name):
            assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        self.runs[job.metadata.uid] = run_status
        found = {"run_id": f"run-of-{job.metadata.name}", "experiment_id": "1", "run_status": run_status}
        return job.status.mlflow.model_copy(update=found)
