"""How long one decision over everything takes, and how that grows.

    python -m benchmarks.decide [--sizes 1000 10000 100000] [--repetitions 7] [--save decide]

A tenth as many jobs train as wait, on as many GPUs of four classes, for 50 queues in ten cohorts: every GPU is taken,
queues are over and under their quotas, and priorities differ, so that each decision chooses hundreds of victims.
The waiting jobs say already why they wait, as they do after the first round; a running job reports a new step each
time. Milliseconds of `orchestrator.core.decide.decide` on the processor, after a first round that loads and warms, and
the peak of memory that a decision takes beside the snapshot.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from statistics import median

from benchmarks.report import argument_parser, emit
from orchestrator.api.job import (
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
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec, Quota
from orchestrator.api.results import PrepareResult, ProgressReport
from orchestrator.core.commands import Command, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.snapshot import Policy, Snapshot, StageFact, StagePhase
from orchestrator.sizing.hardware import gpu_class

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CLASSES = ("24Gi", "48Gi", "80Gi", "141Gi")
QUEUES, COHORTS = 50, 10
RANKS = (8, 16, 32, 64)
MIB = 1 << 20
FACTS = ModelFacts(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
    tied_embeddings=False,
    revision="main",
)
PREPARED = PrepareResult(
    digest="sha256:" + "0" * 64,
    uri="file:///store/prepared",
    model=FACTS,
    train_records=412,
    train_sequences=57,
    train_tokens=100_000,
    supervised_tokens=60_000,
    eval_records=0,
    eval_sequences=0,
    steps=120,
)


def main() -> None:
    """Measure each size, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    found = {f"{size}_waiting": measure(size, arguments.repetitions) for size in arguments.sizes}
    emit(dict(found), save=arguments.save)


def measure(waiting: int, repetitions: int) -> dict[str, object]:
    """A world with so many waiting jobs, decided again and again."""
    world = settled(busy_world(waiting))
    gc.collect()
    gc.freeze()
    seconds: list[float] = []
    commands: tuple[Command, ...] = ()
    for number in range(1, repetitions + 1):
        later = at(world, number)
        began = time.process_time()
        commands = decide(later)
        seconds.append(time.process_time() - began)
    tracemalloc.start()
    decide(at(world, repetitions + 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gc.unfreeze()
    return {
        "running": waiting // 10,
        "gpus": sum(each.capacity for each in world.gpu_classes),
        "queues": QUEUES,
        "decision_ms": round(1000 * median(seconds), 1),
        "slowest_ms": round(1000 * max(seconds), 1),
        "peak_mib": round(peak / MIB, 1),
        "commands": len(commands),
    }


def busy_world(waiting: int) -> Snapshot:
    """Jobs that wait and jobs that train, of 50 queues."""
    seeded = random.Random(waiting)
    running = waiting // 10
    each = max(1, running // len(CLASSES))
    queues = tuple(_queue(number, each) for number in range(QUEUES))
    jobs = [_waiting(number, seeded) for number in range(waiting)]
    trains = [_running(number, CLASSES[number % len(CLASSES)], seeded) for number in range(each * len(CLASSES))]
    return Snapshot(
        now=NOW,
        jobs=(*jobs, *trains),
        queues=queues,
        stages={fact.key: fact for fact in map(_stage, trains)},
        gpu_classes=tuple(gpu_class(name, each) for name in CLASSES),
        policy=Policy(store_uri="file:///store", words_limit=waiting),
    )


def _queue(number: int, each: int) -> QLoRAQueue:
    """Odd queues have a third of what they would need, even ones more than their jobs hold."""
    nominal = each // QUEUES if number % 2 else each // QUEUES + 1
    quotas = tuple(Quota(gpu_class=name, nominal=nominal) for name in CLASSES)
    spec = QLoRAQueueSpec(cohort=f"cohort-{number % COHORTS}", quotas=quotas, weight=1 + number % 3)
    return QLoRAQueue(metadata=ObjectMeta(name=f"queue-{number}"), spec=spec)


def _spec(seeded: random.Random) -> QLoRAJobSpec:
    return QLoRAJobSpec(
        model=ModelSource(source="file:///store/model"),
        dataset=DatasetSource(source="file:///store/data.jsonl"),
        adapter=AdapterSpec(rank=seeded.choice(RANKS)),
        training=TrainingSpec(sequence_length=seeded.choice((512, 1024, 2048))),
        resources=ResourcesSpec(vram=seeded.choice(("auto", "48Gi"))),
        queue=f"queue-{seeded.randrange(QUEUES)}",
        priority=seeded.choice((0, 0, 0, 10, 100)),
    )


def _metadata(name: str, seeded: random.Random) -> ObjectMeta:
    created = NOW - timedelta(seconds=seeded.uniform(0, 86_400))
    return ObjectMeta(name=name, uid=f"uid-{name}", resource_version="1", creation_timestamp=created, generation=1)


def _waiting(number: int, seeded: random.Random) -> QLoRAJob:
    status = QLoRAJobStatus(prepared=PREPARED, mlflow=MlflowStatus(run_id="run"), attempts_total=1)
    return QLoRAJob(metadata=_metadata(f"waiting-{number}", seeded), spec=_spec(seeded), status=status)


def _running(number: int, name: str, seeded: random.Random) -> QLoRAJob:
    began = NOW - timedelta(seconds=seeded.uniform(1_000, 40_000))
    attempt = Attempt(
        stage="train", number=2, gpu_class=name, created_time=began, start_time=began, seen_time=began, stage_uid="uid"
    )
    status = QLoRAJobStatus(
        prepared=PREPARED,
        mlflow=MlflowStatus(run_id="run"),
        attempts=(attempt,),
        attempts_total=2,
        checkpoint=CheckpointStatus(
            step=1, uri="file:///store/c", time=NOW - timedelta(seconds=seeded.uniform(0, 900))
        ),
    )
    return QLoRAJob(metadata=_metadata(f"running-{number}", seeded), spec=_spec(seeded), status=status)


def _stage(job: QLoRAJob) -> StageFact:
    attempt = job.status.active_attempt
    assert attempt is not None, "made with one"
    return StageFact(
        namespace=job.metadata.namespace,
        name=job.stage_name(attempt),
        phase=StagePhase.RUNNING,
        uid=job.metadata.uid,
        stage_uid="uid",
        start_time=attempt.start_time,
        progress=ProgressReport(stage="train", step=1, steps=120, time=NOW),
    )


def settled(world: Snapshot) -> Snapshot:
    """The world once what a first decision writes about waiting jobs is stored."""
    return stored(world, decide(world))


def stored(world: Snapshot, commands: Iterable[Command]) -> Snapshot:
    """The world with what the commands write about jobs that go on waiting."""
    written = {
        command.job.key: command.status
        for command in commands
        if isinstance(command, WriteStatus) and command.job.metadata.name.startswith("waiting")
    }
    jobs = tuple(
        job.model_copy(update={"status": written[job.key]}) if job.key in written else job for job in world.jobs
    )
    return replace(world, jobs=jobs)


def at(world: Snapshot, seconds: int) -> Snapshot:
    """The world so many seconds later, in which every running job has got a step further."""
    now = NOW + timedelta(seconds=seconds)
    report = ProgressReport(stage="train", step=1 + seconds, steps=120, time=now)
    stages = {key: replace(fact, progress=report) for key, fact in world.stages.items()}
    return replace(world, now=now, stages=stages)


if __name__ == "__main__":
    main()
