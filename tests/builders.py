"""Contract objects for tests, each made by one function whose arguments are what the test is about.

Fields that a test adds are `Any`: the models check them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    AdapterSpec,
    Attempt,
    CheckpointStatus,
    DatasetSource,
    MlflowStatus,
    ModelSource,
    ObjectMeta,
    QLoRAJob,
    QLoRAJobSpec,
    QLoRAJobStatus,
    ResourcesSpec,
    TrainingSpec,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec, Quota
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Failure, PrepareResult, ProgressReport, PublishResult, StageResult, TrainResult
from orchestrator.api.stage_name import StageKind
from orchestrator.api.sweep import QLoRASweep, QLoRASweepSpec, SweepMeta
from orchestrator.api.task import StageTask
from orchestrator.core.commands import Command, WriteStatus
from orchestrator.core.snapshot import Policy, RunFact, Snapshot, StageFact, StagePhase
from orchestrator.sizing.hardware import GpuClass, gpu_class

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64
POLICY = Policy(store_uri="file:///store")


def after(seconds: float) -> datetime:
    """So many seconds after the tests' present."""
    return NOW + timedelta(seconds=seconds)


# --- models ------------------------------------------------------------------------------------------------------


def model_facts(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool = False,
    model_type: str = "llama",
) -> ModelFacts:
    return ModelFacts(
        model_type=model_type,
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tied_embeddings=tied,
        revision="main",
    )


SMOLLM2_135M = model_facts(576, 1536, 30, 9, 3, 64, 49_152, tied=True)
LLAMA_3_8B = model_facts(4096, 14_336, 32, 32, 8, 128, 128_256)
LLAMA_2_13B = model_facts(5120, 13_824, 40, 40, 40, 128, 32_000)
LLAMA_3_70B = model_facts(8192, 28_672, 80, 64, 8, 128, 128_256)


# --- jobs --------------------------------------------------------------------------------------------------------


def make_spec(
    *,
    rank: int = 16,
    dropout: str = "0",
    use_dora: bool = False,
    sequence_length: int = 2048,
    global_batch_size: int = 16,
    packing: bool = False,
    optimizer: Any = "paged_adamw_8bit",
    deterministic: bool = True,
    vram: str = "auto",
    gpu_classes: tuple[str, ...] = (),
    class_change: Any = "auto",
    **fields: Any,
) -> QLoRAJobSpec:
    return QLoRAJobSpec(
        model=ModelSource(source="file:///model"),
        dataset=DatasetSource(source="file:///data.jsonl"),
        adapter=AdapterSpec(rank=rank, dropout=dropout, use_dora=use_dora),
        training=TrainingSpec(
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            packing=packing,
            optimizer=optimizer,
            deterministic=deterministic,
        ),
        resources=ResourcesSpec(vram=vram, gpu_classes=gpu_classes, class_change=class_change),
        **fields,
    )


def make_job(
    name: str = "job",
    *,
    status: QLoRAJobStatus | None = None,
    age_seconds: float = 0,
    cancelled: bool = False,
    deleted: bool = False,
    finalizers: tuple[str, ...] = (),
    **spec: Any,
) -> QLoRAJob:
    return QLoRAJob(
        metadata=ObjectMeta(
            name=name,
            uid=f"uid-{name}",
            resource_version="1",
            creation_timestamp=after(-age_seconds),
            deletion_timestamp=NOW if deleted else None,
            annotations={CANCEL_ANNOTATION: "true"} if cancelled else {},
            finalizers=finalizers,
        ),
        spec=make_spec(**spec),
        status=status or QLoRAJobStatus(),
    )


def make_attempt(stage: StageKind = "train", number: int = 2, **fields: Any) -> Attempt:
    fields.setdefault("created_time", after(-1000))
    if stage == "train":
        fields.setdefault("gpu_class", "24Gi")
    return Attempt(stage=stage, number=number, **fields)


def prepared_status(model: ModelFacts = SMOLLM2_135M, *, run_id: str | None = "run", **fields: Any) -> QLoRAJobStatus:
    """Prepared, and waiting for a GPU."""
    fields.setdefault("attempts_total", 1)
    return QLoRAJobStatus(prepared=prepare_result(model), mlflow=MlflowStatus(run_id=run_id), **fields)


def running_status(
    *,
    model: ModelFacts = SMOLLM2_135M,
    gpu_class: str = "24Gi",
    ran_seconds: float = 1000,
    checkpoint_age_seconds: float | None = None,
    stop_reason: Reason | None = None,
    number: int = 2,
    **fields: Any,
) -> QLoRAJobStatus:
    """Training for so long, optionally with a checkpoint of such an age, optionally asked to stop."""
    attempt = make_attempt(
        number=number,
        gpu_class=gpu_class,
        created_time=after(-ran_seconds),
        start_time=after(-ran_seconds),
        stop_time=NOW if stop_reason else None,
        stop_reason=stop_reason,
    )
    checkpoint = (
        None
        if checkpoint_age_seconds is None
        else CheckpointStatus(step=1, uri="file:///c", time=after(-checkpoint_age_seconds))
    )
    return prepared_status(model, attempts=(attempt,), attempts_total=number, checkpoint=checkpoint, **fields)


# --- queues, GPUs ------------------------------------------------------------------------------------------------


def make_queue(
    name: str,
    quotas: Mapping[str, int | tuple[int, int]] | None = None,
    *,
    cohort: str | None = None,
    **spec: Any,
) -> QLoRAQueue:
    """A queue; a quota is its nominal number of GPUs, or that and the borrowing limit."""
    listed = tuple(
        Quota(gpu_class=cls, nominal=q)
        if isinstance(q, int)
        else Quota(gpu_class=cls, nominal=q[0], borrowing_limit=q[1])
        for cls, q in (quotas or {}).items()
    )
    return QLoRAQueue(metadata=ObjectMeta(name=name), spec=QLoRAQueueSpec(quotas=listed, cohort=cohort, **spec))


def gpus(**capacity: int) -> tuple[GpuClass, ...]:
    """`gpus(_24Gi=2)`: two GPUs of class 24Gi."""
    return tuple(gpu_class(name.lstrip("_"), count) for name, count in capacity.items())


# --- stages ------------------------------------------------------------------------------------------------------


def stage(job: QLoRAJob, phase: StagePhase = StagePhase.RUNNING, **fields: Any) -> StageFact:
    """The stage of the job's active attempt."""
    attempt = job.status.active_attempt
    assert attempt is not None
    if phase is not StagePhase.PENDING:
        fields.setdefault("start_time", attempt.start_time or after(-500))
    if phase is StagePhase.EXITED:
        fields.setdefault("finish_time", NOW)
    return StageFact(
        namespace=job.metadata.namespace, name=job.stage_name(attempt), phase=phase, uid=job.metadata.uid, **fields
    )


def exited(job: QLoRAJob, exit_code: int | None, result: StageResult | None = None, **fields: Any) -> StageFact:
    return stage(job, StagePhase.EXITED, exit_code=exit_code, result=result, **fields)


def prepare_result(model: ModelFacts = SMOLLM2_135M) -> PrepareResult:
    return PrepareResult(
        digest=DIGEST,
        uri="file:///prepared",
        model=model,
        train_records=412,
        train_sequences=57,
        train_tokens=100_000,
        supervised_tokens=60_000,
        eval_records=0,
        eval_sequences=0,
        steps=120,
    )


def train_result(step: int = 120, *, complete: bool = True) -> StageResult:
    return StageResult(
        train=TrainResult(
            step=step,
            complete=complete,
            checkpoint_uri=f"file:///checkpoints/step-{step:08d}",
            adapter_uri="file:///adapter" if complete else None,
            adapter_digest=DIGEST if complete else None,
            train_loss=1.5,
        )
    )


PUBLISHED = StageResult(publish=PublishResult(registered_model="job", model_version="1", model_uri="models:/job/1"))


def failure(reason: Reason, message: str) -> StageResult:
    return StageResult(failure=Failure(reason=reason, message=message))


def progress(step: int, *, age_seconds: float = 0, **fields: Any) -> ProgressReport:
    return ProgressReport(stage="train", step=step, steps=120, time=after(-age_seconds), **fields)


# --- snapshots and what comes of them -----------------------------------------------------------------------------


def snapshot(
    *jobs: QLoRAJob,
    stages: tuple[StageFact, ...] = (),
    gpu_classes: tuple[GpuClass, ...] = (),
    queues: tuple[QLoRAQueue, ...] = (),
    runs: tuple[RunFact, ...] = (),
    policy: Policy = POLICY,
    now: datetime = NOW,
    clock_step_seconds: float = 0.0,
) -> Snapshot:
    return Snapshot(
        now=now,
        clock_step_seconds=clock_step_seconds,
        jobs=jobs,
        queues=queues,
        stages={fact.key: fact for fact in stages},
        gpu_classes=gpu_classes,
        runs={fact.job.metadata.uid: fact for fact in runs},
        policy=policy,
    )


def written(commands: tuple[Command, ...], name: str = "job") -> QLoRAJobStatus:
    """The one status that the commands write for a job."""
    [write] = [c for c in commands if isinstance(c, WriteStatus) and c.job.metadata.name == name]
    return write.status


# --- as a user submits them, for stores and runtimes


ON_THE_HUB: dict[str, Any] = {
    "model": ModelSource(source="hf://acme/tiny"),
    "dataset": DatasetSource(source="hf://acme/chats"),
}
"""Sources that a job on a cluster may name."""


def submitted_job(
    name: str = "medical", namespace: str = "team-a", *, meta: dict[str, Any] | None = None, **spec: Any
) -> QLoRAJob:
    """A job as a user would submit it."""
    metadata = ObjectMeta(name=name, namespace=namespace, **(meta or {}))
    sources: dict[str, Any] = {
        "model": ModelSource(source="file:///models/tiny"),
        "dataset": DatasetSource(source="file:///data/tiny.jsonl"),
    }
    return QLoRAJob(metadata=metadata, spec=QLoRAJobSpec(**{**sources, **spec}))


def submitted_sweep(name: str = "search", namespace: str = "team-a", **spec: Any) -> QLoRASweep:
    """A sweep as a user would submit it."""
    job = {
        "model": {"source": "hf://owner/model"},
        "dataset": {"source": "s3://bucket/train.jsonl", "evalFraction": "0.1"},
    }
    space = [
        {"field": "training.learningRate", "logUniform": {"min": "1e-5", "max": "1e-3"}},
        {"field": "adapter.rank", "choice": ["8", "16"]},
    ]
    fields = {"job": job, "space": space, "trials": 4, "parallel": 2, **spec}
    return QLoRASweep(metadata=SweepMeta(name=name, namespace=namespace), spec=QLoRASweepSpec.model_validate(fields))


def make_task(job: QLoRAJob, stage: Any = "train", attempt: int = 1, *, store: Path, **fields: Any) -> StageTask:
    """An attempt at a stage of a job."""
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0) if stage == "train" else None
    return StageTask(
        stage=stage,
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid=job.metadata.uid,
        attempt=attempt,
        spec=job.spec,
        store_uri=f"file://{store}",
        plan=plan,
        **fields,
    )
