"""How long one decision over everything takes, and how that grows.

    python -m benchmarks.decide [--sizes 1000 10000 100000] [--repetitions 7] [--save decide]

A tenth as many jobs train as wait, on as many GPUs of four classes, for 50 queues in ten cohorts: every GPU is taken,
queues are over and under their quotas, and priorities differ, so that each decision chooses hundreds of victims.
The waiting jobs say already why they wait, as they do after the first round; a running job reports a new step each
time. Milliseconds of `orchestrator.core.decide.decide` on the processor, and the peak of memory that a decision takes
beside the snapshot: that is a decision over all of it, which no decision is kept for. What depends on a job's object
alone stays with the object (`core/job/revision`), so that is told three times: `first_ms` of the very first, which also
works out what each job fits; `just_read_ms` where every object has just been read, and nothing is known of it; and
`decision_ms` where the objects are those of a decision before, as they are in a controller until jobs are written.

Then the decisions of a controller that goes on, `orchestrator.core.decide.Decider`, once what there was to move has
moved, a second after each other: nothing has changed; a waiting job came, or went; one running job of all reports a
step; one ended, and the GPU goes to whoever is next; and a queue's weight changed, so that everybody's turn is another.
What is kept in memory between decisions is told, too.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from statistics import median

from benchmarks.report import argument_parser, emit
from orchestrator.api.job import CheckpointStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ExitCode
from orchestrator.core.commands import Command, DeleteStage, EnsureStage, StopStage, WriteQueueStatus, WriteStatus
from orchestrator.core.decide import Decider, decide
from orchestrator.core.snapshot import Policy, Snapshot, StagePhase
from orchestrator.sizing.hardware import gpu_class
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    after,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    progress,
    stage,
)

CLASSES = ("24Gi", "48Gi", "80Gi", "141Gi")
QUEUES, COHORTS = 50, 10
RANKS = (8, 16, 32, 64)
STAGE = "uid"
"""Of every stage, which nothing is told apart by here."""
MIB = 1 << 20
SECOND = timedelta(seconds=1)
MOST_ROUNDS = 100
INCREMENTAL_TIMES = 5
"""How much oftener an incremental decision is measured."""
Change = Callable[[Snapshot, int], Snapshot]


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
    new = busy_world(waiting)
    first, commands = timed(new)
    world = stored(new, commands)
    gc.collect()
    gc.freeze()
    seconds, just_read = list[float](), list[float]()
    for number in range(1, repetitions + 1):
        took, commands = timed(at(world, number))
        seconds.append(took)
        just_read.append(timed(read_anew(at(world, number)))[0])
    tracemalloc.start()
    decide(at(world, repetitions + 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gc.unfreeze()
    print(f"{waiting} waiting: a full decision takes {1000 * median(seconds):.1f} ms", flush=True)
    return {
        "running": waiting // 10,
        "gpus": sum(each.capacity for each in world.gpu_classes),
        "queues": QUEUES,
        "first_ms": round(1000 * first, 1),
        "just_read_ms": round(1000 * median(just_read), 1),
        "decision_ms": round(1000 * median(seconds), 1),
        "slowest_ms": round(1000 * max(seconds), 1),
        "peak_mib": round(peak / MIB, 1),
        "commands": len(commands),
        **going_on(world, repetitions),
    }


def timed(world: Snapshot) -> tuple[float, tuple[Command, ...]]:
    """Seconds of one decision, and what is decided."""
    began = time.process_time()
    commands = decide(world)
    return time.process_time() - began, commands


def going_on(world: Snapshot, repetitions: int) -> dict[str, object]:
    """Decisions that follow each other, with one job changed between them."""
    world = come_to_rest(world)
    gc.collect()
    tracemalloc.start()
    decider = Decider()
    decider.decide(world)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gc.freeze()
    found: dict[str, object] = {"kept_mib": round(kept / MIB, 1)}
    changes: Mapping[str, Change] = {
        "nothing": lambda world, _: world,
        "a_job_came": submitted,
        "a_job_went": withdrawn,
        "a_step": reported,
        "a_job_ended": ended,
        "a_queue_changed": reweighed,
    }
    for name, change in changes.items():
        seconds: list[float] = []
        for number in range(INCREMENTAL_TIMES * repetitions):
            world = replace(change(world, number), now=world.now + SECOND)
            began = time.process_time()
            commands = decider.decide(world)
            seconds.append(time.process_time() - began)
            if number == 0 and commands != decide(world):
                raise AssertionError(f"after {name} the decision is not the one from nothing")
            world = carried_out(world, commands)
        found[f"{name}_ms"] = round(1000 * median(seconds), 2)
    gc.unfreeze()
    return found


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
        stages={fact.key: fact for fact in (stage(job, stage_uid=STAGE, progress=progress(1)) for job in trains)},
        gpu_classes=tuple(gpu_class(name, each) for name in CLASSES),
        policy=Policy(store_uri="file:///store", words_limit=waiting),
    )


def _queue(number: int, each: int) -> QLoRAQueue:
    """Odd queues have a third of what they would need, even ones more than their jobs hold."""
    nominal = each // QUEUES if number % 2 else each // QUEUES + 1
    cohort = f"cohort-{number % COHORTS}"
    return make_queue(f"queue-{number}", dict.fromkeys(CLASSES, nominal), cohort=cohort, weight=1 + number % 3)


def _job(name: str, status: QLoRAJobStatus, seeded: random.Random) -> QLoRAJob:
    return make_job(
        name,
        status=status,
        age_seconds=seeded.uniform(0, 86_400),
        rank=seeded.choice(RANKS),
        sequence_length=seeded.choice((512, 1024, 2048)),
        packing=True,
        vram=seeded.choice(("auto", "48Gi")),
        queue=f"queue-{seeded.randrange(QUEUES)}",
        priority=seeded.choice((0, 0, 0, 10, 100)),
    )


def _waiting(number: int, seeded: random.Random) -> QLoRAJob:
    return _job(f"waiting-{number}", prepared_status(LLAMA_3_8B), seeded)


def _running(number: int, name: str, seeded: random.Random) -> QLoRAJob:
    began = after(-seeded.uniform(1_000, 40_000))
    attempt = make_attempt(gpu_class=name, created_time=began, start_time=began, seen_time=began, stage_uid=STAGE)
    checkpoint = CheckpointStatus(step=1, uri="file:///store/c", time=after(-seeded.uniform(0, 900)))
    status = prepared_status(LLAMA_3_8B, attempts=(attempt,), attempts_total=2, checkpoint=checkpoint)
    return _job(f"running-{number}", status, seeded)


def come_to_rest(world: Snapshot) -> Snapshot:
    """The world once everybody has moved who is to be moved, and everybody has heard why he waits."""
    decider = Decider()
    for _ in range(MOST_ROUNDS):
        commands = decider.decide(world)
        after_all = carried_out(world, commands)
        if all(isinstance(command, WriteQueueStatus) for command in commands):
            return after_all
        world = replace(after_all, now=world.now + SECOND)
    raise AssertionError("this world does not come to rest")


def carried_out(world: Snapshot, commands: Iterable[Command]) -> Snapshot:
    """The world with what is decided done at once: stages start, and those that are to stop end with a checkpoint."""
    changed: dict[str, QLoRAJob] = {}
    stages = dict(world.stages)
    told: dict[str, QLoRAQueue] = {}
    for command in commands:
        match command:
            case WriteStatus(job=job, status=status):
                changed[job.key] = job.model_copy(update={"status": status})
            case WriteQueueStatus(queue=queue, status=status):
                told[queue.metadata.name] = queue.model_copy(update={"status": status})
            case EnsureStage(task=task):
                fact = stage(changed[f"{task.namespace}/{task.job}"], stage_uid=STAGE)
                stages[fact.key] = fact
            case StopStage(namespace=namespace, name=name):
                key = f"{namespace}/{name}"
                stages[key] = replace(stages[key], phase=StagePhase.EXITED, exit_code=ExitCode.PREEMPTED)
            case DeleteStage(namespace=namespace, name=name):
                del stages[f"{namespace}/{name}"]
            case _:
                raise AssertionError(f"nothing here asks for {command}")
    if told:
        world = replace(world, queues=tuple(told.get(queue.metadata.name, queue) for queue in world.queues))
    if not changed and stages == world.stages:
        return world
    return replace(world, jobs=tuple(changed.get(job.key, job) for job in world.jobs), stages=stages)


def submitted(world: Snapshot, number: int) -> Snapshot:
    """A job more, prepared."""
    job = _job(f"late-{number}", prepared_status(LLAMA_3_8B), random.Random(number))
    return replace(world, jobs=(*world.jobs, job))


def withdrawn(world: Snapshot, number: int) -> Snapshot:
    """One of those that wait is deleted."""
    name = f"waiting-{number}"
    return replace(world, jobs=tuple(job for job in world.jobs if job.metadata.name != name))


def reported(world: Snapshot, number: int) -> Snapshot:
    """A running job has got a step further."""
    key = sorted(world.stages)[number % len(world.stages)]
    report = progress(2 + number, age_seconds=(NOW - world.now).total_seconds())
    return replace(world, stages={**world.stages, key: replace(world.stages[key], progress=report)})


def ended(world: Snapshot, number: int) -> Snapshot:
    """A running job's stage has ended for the platform's sake; the job goes back into the line."""
    key = sorted(world.stages)[number % len(world.stages)]
    gone = replace(world.stages[key], phase=StagePhase.EXITED, exit_code=ExitCode.PREEMPTED)
    return replace(world, stages={**world.stages, key: gone})


def reweighed(world: Snapshot, number: int) -> Snapshot:
    """A queue has another weight."""
    first, *others = world.queues
    spec = first.spec.model_copy(update={"weight": 1 + number % 2})
    return replace(world, queues=(first.model_copy(update={"spec": spec}), *others))


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


def read_anew(world: Snapshot) -> Snapshot:
    """The same world, of whose jobs every object is another."""
    return replace(world, jobs=tuple(job.model_copy() for job in world.jobs))


def at(world: Snapshot, seconds: int) -> Snapshot:
    """The world so many seconds later, in which every running job has got a step further."""
    report = progress(1 + seconds, age_seconds=-seconds)
    stages = {key: replace(fact, progress=report) for key, fact in world.stages.items()}
    return replace(world, now=after(seconds), stages=stages)


if __name__ == "__main__":
    main()
