"""An embedded service without a controller: the real SQLite store, and a hand that writes what a controller would.

Tests of the SDK and the CLI drive jobs through their lives with it, one status at a time, without Ray or a trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.local.processes import Process, write_durably
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.formats import CheckpointManifest, FileEntry, JournalRecord, Metric
from orchestrator.api.job import Attempt, Condition, MlflowStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import PrepareResult, ProgressReport, Promotion
from orchestrator.controller.supervisor import RECORD_NAME
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import summarize
from orchestrator.core.job.promotion import finding_of
from orchestrator.sdk.client import Client
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.logs import LogFolder
from orchestrator.settings import Settings
from orchestrator.sizing.hardware import GpuClass, gpu_class
from orchestrator.sizing.plan_search import choose_class
from orchestrator.sizing.step_time import Work

STEPS = 40
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def write_inputs(folder: Path) -> None:
    """A model folder `model/` with the shape of an 8B Llama, and `train.jsonl`."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    (model / "model.safetensors").write_bytes(b"stands for weights")
    (model / "tokenizer.json").write_text("{}")
    (folder / "train.jsonl").write_text('{"messages": []}\n')


def service_that_is_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service in an environment of its own, for commands: it counts as up for as long as this process lives."""
    write_inputs(folder)
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("QLORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("QLORA_HOME", str(folder / "home"))
    monkeypatch.setenv("QLORA_GPU_CLASSES", "24Gi=1")
    service = PaperService(folder)
    write_durably(service.settings.home / RECORD_NAME, {"process": Process.current()})
    return service


def job_document(name: str = "medical", **spec: Any) -> dict[str, Any]:
    """A job as a user writes it, its files beside it."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {"model": {"source": "file://./model"}, "dataset": {"source": "file://./train.jsonl"}, **spec},
    }


def gated_job_document(name: str = "medical", over: str = "holder") -> dict[str, Any]:
    """A job whose alias `champion` moves when somebody approves."""
    job = job_document(name, evaluation={"generation": {"metrics": ["f1"]}})
    job["spec"]["dataset"]["evalFraction"] = "0.1"
    rule = {"metric": "f1", "over": over, "atLeast": "0"}
    job["spec"]["tracking"] = {"promote": {"alias": "champion", "when": [rule], "approval": "manual"}}
    return job


@dataclass
class PaperService:
    """A service whose controller is the test."""

    folder: Path
    running: bool = True
    classes: tuple[GpuClass, ...] = field(default_factory=lambda: (gpu_class("24Gi", 1),))

    def __post_init__(self) -> None:
        self.settings = Settings(home=self.folder / "home", tracking_uri="sqlite:///unused.db")
        self.store = SqliteStore(self.settings)
        self.connection = Connection(
            store=self.store,
            is_running=lambda: self.running,
            gpu_classes=lambda: self.classes,
            logs=LogFolder(self.settings.logs_folder / "stages"),
        )
        self.client = Client(self.settings, connection=self.connection)

    def job(self, name: str = "medical") -> QLoRAJob:
        """The job as the store has it."""
        return self.store.get_job("default", name)

    def prepare(self, name: str = "medical") -> QLoRAJob:
        """Prepared, and waiting for a GPU."""
        job = self.job(name)
        facts = ModelFacts.from_config(LLAMA_8B, "main")
        estimate = choose_class(job.spec, facts, (gpu_class("24Gi", 1),), work=Work(steps=STEPS))
        assert isinstance(estimate, Estimate)
        prepared = PrepareResult(
            digest="sha256:" + "1" * 64,
            uri="file:///prepared",
            model=facts,
            train_records=600,
            train_sequences=64,
            train_tokens=120_000,
            supervised_tokens=60_000,
            eval_records=60,
            eval_sequences=8,
            steps=STEPS,
        )
        attempt = self.attempt("prepare", 1, finish_time=_now(), exit_code=0, reason=Reason.PREPARED)
        waiting = _condition(ConditionType.ADMITTED, "False", Reason.WAITING_FOR_GPU, "all 24Gi GPUs are taken")
        return self.write(
            job, prepared=prepared, estimate=estimate, attempts=(attempt,), attempts_total=1, conditions=(waiting,)
        )

    def train(self, name: str = "medical", step: int = 10) -> QLoRAJob:
        """Training, at a step."""
        job = self.job(name)
        attempts = (
            job.status.attempts if job.status.active_attempt else (*job.status.attempts, self.attempt("train", 2))
        )
        progress = ProgressReport(
            stage="train",
            step=step,
            steps=STEPS,
            loss=2.5,
            eval_loss=2.25,
            tokens_per_second=812.0,
            eta_seconds=75.0,
            time=_now(),
        )
        return self.write(job, attempts=attempts, attempts_total=2, progress=progress)

    def succeed(self, name: str = "medical") -> QLoRAJob:
        """Published: a real adapter folder, journal and manifest stand behind it."""
        job = self.job(name)
        uri, digest = self.write_adapter(job)
        done = _condition(ConditionType.FINISHED, "True", Reason.SUCCEEDED, "published as models:/medical/3")
        mlflow = MlflowStatus(
            run_id="run-1",
            experiment_id="7",
            registered_model="medical",
            model_version="3",
            run_status="FINISHED",
        )
        return self.write(
            job,
            attempts=_ended(job),
            adapter_uri=uri,
            adapter_digest=digest,
            mlflow=mlflow,
            conditions=(done,),
            finish_time=_now(),
            active_seconds=100.0,
        )

    def fail(self, name: str = "medical", message: str = "line 7 of train.jsonl is not JSON") -> QLoRAJob:
        """Failed for good."""
        job = self.job(name)
        failed = _condition(ConditionType.FINISHED, "True", Reason.USER_ERROR, message)
        self.store.record_event(job, Event(reason=Reason.USER_ERROR, message=message, warning=True))
        return self.write(job, attempts=_ended(job), conditions=(failed,), finish_time=_now())

    def cancel(self, name: str = "medical") -> QLoRAJob:
        """Cancelled, before anything of it ran."""
        cancelled = _condition(ConditionType.FINISHED, "True", Reason.CANCELLED, "cancelled on request")
        return self.write(self.job(name), conditions=(cancelled,), finish_time=_now())

    def judge(self, promotion: Promotion, name: str = "medical") -> QLoRAJob:
        """What came of the alias with a gate, by publish or by MLflow once somebody asked."""
        job, found = self.job(name), finding_of(promotion)
        said = _condition(found.kind, found.status, found.reason, found.message)
        others = (each for each in job.status.conditions if each.type is not found.kind)
        return self.write(job, conditions=(*others, said))

    def write_adapter(self, job: QLoRAJob) -> tuple[str, str]:
        """A complete adapter folder in the job's store; its URI and digest."""
        folder = self.folder / "store" / job.metadata.name / "adapter"
        folder.mkdir(parents=True)
        journal = (
            JournalRecord(step=0, time_ms=1, metrics={Metric.EVAL_LOSS: 3.5}),
            JournalRecord(step=1, time_ms=2, metrics={Metric.TRAIN_LOSS: 3.25}),
            JournalRecord(step=STEPS, time_ms=3, metrics={Metric.TRAIN_LOSS: 1.5, Metric.EVAL_LOSS: 1.75}),
        )
        contents = {
            "adapter_model.safetensors": b"weights " * 1000,
            "adapter_config.json": b"{}",
            "journal.jsonl": "".join(f"{r.model_dump_json(by_alias=True)}\n" for r in journal).encode(),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = tuple(
            FileEntry(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        )
        manifest = CheckpointManifest(
            step=STEPS, attempt=2, prepared="sha256:" + "1" * 64, complete=True, versions={}, files=files
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
        return f"file://{folder}", f"sha256:{files[0].sha256}"

    def write_log(self, stage: str, text: str, name: str = "medical") -> Path:
        """Append to a stage's log, where the local runtime puts it."""
        path = self.settings.logs_folder / "stages" / "default" / f"{name}-{stage}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(text)
        return path

    def write(self, job: QLoRAJob, **fields: Any) -> QLoRAJob:
        """Write a status the way a controller does."""
        status = QLoRAJobStatus.model_validate({**dict(job.status), **fields})
        return self.store.update_status(job, status.model_copy(update={"summary": summarize(status)}))

    def attempt(self, stage: Any, number: int, **fields: Any) -> Attempt:
        """An attempt that began a minute ago."""
        began = _now() - timedelta(seconds=60)
        gpu = "24Gi" if stage == "train" else None
        return Attempt(stage=stage, number=number, gpu_class=gpu, created_time=began, start_time=began, **fields)


def _ended(job: QLoRAJob) -> tuple[Attempt, ...]:
    ended = {"finish_time": _now(), "exit_code": 0}
    return tuple(a.model_copy(update=ended) if a.active else a for a in job.status.attempts)


def _condition(kind: ConditionType, status: Any, reason: Reason, message: str) -> Condition:
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=_now())


def _now() -> datetime:
    return datetime.now(UTC)
