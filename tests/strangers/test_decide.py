"""Whatever a status, a stage or a result says: one decision about everybody, and the healthy job's part of it as ever.

A tenant with rights to the status writes what the schema allows; a stage tells what it likes. `QLORA_FUZZ` says how
many such jobs there are.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

from prometheus_client import generate_latest
from pydantic import ValidationError

from orchestrator.api.base import MAX_COUNT
from orchestrator.api.job import CANCEL_ANNOTATION, PROMOTE_ANNOTATION, RELEASE_FINALIZER, QLoRAJob, QLoRAJobStatus
from orchestrator.api.results import ProgressReport, StageResult
from orchestrator.cli.tables import simulation_table
from orchestrator.controller.metrics import Metrics
from orchestrator.core.commands import Command, DeleteJob, EnsureStage, ReportDefect, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.explain import explain
from orchestrator.core.job.finalizer import finalizers_with
from orchestrator.core.snapshot import Snapshot, StageFact, StagePhase, UnreadableJob
from orchestrator.sdk.simulation import what_if
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    exited,
    gpus,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    snapshot,
)
from tests.strangers.generate import TIMES, instance
from tests.strangers.harm import harmful
from tests.strangers.test_fuzz import ROUNDS, SEED

TOGETHER = 25
"""Poison jobs of one decision."""


def a_status(dice: random.Random) -> QLoRAJobStatus:
    """One that the schema allows."""
    while True:
        wire = instance(dice, QLoRAJobStatus, likely=dice.choice([0.2, 0.5, 0.9]))
        if (estimate := wire.get("estimate")) is not None:
            estimate["items"] = estimate["items"] or [{"name": "a", "bytes": 1}]
            estimate["peakBytes"] = sum(item["bytes"] for item in estimate["items"])
        if dice.random() < 0.5:
            wire.pop("finishTime", None)
        try:
            return QLoRAJobStatus.model_validate(wire)
        except ValidationError:
            continue


def a_job(dice: random.Random, name: str) -> QLoRAJob:
    """A poison job."""
    job = make_job(name, status=a_status(dice), priority=dice.choice([-1, 0, 0]), suspend=dice.random() < 0.2)
    times = [None, *TIMES]
    meta: dict[str, Any] = {
        **job.metadata.model_dump(),
        "creation_timestamp": dice.choice(times),
        "deletion_timestamp": dice.choice([None, None, *times]),
        "finalizers": dice.choice([(), (RELEASE_FINALIZER,), ("foreign.example/held",)]),
        "annotations": dice.choice([{}, {CANCEL_ANNOTATION: "true"}, {PROMOTE_ANNOTATION: "forced: it is ours"}]),
    }
    spec = job.spec.model_copy(
        update={
            "active_deadline_seconds": dice.choice([None, 1, 31_536_000]),
            "ttl_seconds_after_finished": dice.choice([None, 0, 31_536_000]),
            "queue": dice.choice(["default", "team-a", "none"]),
        }
    )
    wire = job.model_copy(update={"spec": spec}).model_dump_json(by_alias=True)
    return QLoRAJob.model_validate({**QLoRAJob.model_validate_json(wire).model_dump(), "metadata": meta})


def a_stage(dice: random.Random, job: QLoRAJob) -> StageFact | None:
    """What the runtime says of its active attempt's stage."""
    attempt = job.status.active_attempt
    if attempt is None or dice.random() < 0.2:
        return None

    def time() -> Any:
        return a_time.time if (a_time := _report(dice)) and dice.random() < 0.8 else None

    return StageFact(
        namespace=job.metadata.namespace,
        name=job.stage_name(attempt),
        uid=dice.choice(["", job.metadata.uid, "another"]),
        phase=dice.choice(list(StagePhase)),
        start_time=time(),
        finish_time=time(),
        exit_code=dice.choice([None, 0, 0, 1, 80, 81, 82, 83, 84, 137, 143, -9, 2**31]),
        result=StageResult.model_validate(instance(dice, StageResult)) if dice.random() < 0.8 else None,
        disruption=None,
        progress=_report(dice),
    )


def _report(dice: random.Random) -> ProgressReport:
    return ProgressReport.model_validate(instance(dice, ProgressReport))


def poisoned(dice: random.Random, healthy: tuple[QLoRAJob, ...]) -> Snapshot:
    """Healthy jobs among others."""
    jobs = [a_job(dice, f"poison-{number}") for number in range(TOGETHER)]
    stages = tuple(fact for job in jobs if (fact := a_stage(dice, job)) is not None)
    alone = UnreadableJob(namespace="default", name="odd", stage="odd-train-1", gpu_class="no such class", held=True)
    found = snapshot(*healthy, *jobs, stages=stages, gpu_classes=gpus(_24Gi=1000), queues=(make_queue("team-a"),))
    return replace(found, unreadable=(alone,), policy=replace(found.policy, cpu_stages_limit=1000))


def of_healthy(commands: tuple[Command, ...]) -> list[tuple[str, str]]:
    """What is done about the healthy jobs: the kind of the command, and the state that is written."""
    return [
        (type(command).__name__, command.job.metadata.name if isinstance(command, WriteStatus) else command.task.job)
        for command in commands
        if (isinstance(command, WriteStatus) and command.job.metadata.name.startswith("healthy"))
        or (isinstance(command, EnsureStage) and command.task.job.startswith("healthy"))
    ]


def test_one_decision_about_everybody_whatever_some_of_them_say() -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    ready = prepared_status(LLAMA_3_8B)
    healthy = (make_job("healthy-new", priority=10), make_job("healthy-ready", priority=10, status=ready))
    alone = of_healthy(decide(snapshot(*healthy, gpu_classes=gpus(_24Gi=1000))))
    assert len(alone) == 4, "both are written and started"
    for _ in range(max(20, ROUNDS // TOGETHER)):
        found = poisoned(dice, healthy)
        commands = decide(found)
        assert sorted(of_healthy(commands)) == sorted(alone)
        seen.update(type(command).__name__ for command in commands)
        for command in commands:
            if isinstance(command, WriteStatus):
                text = command.status.model_dump_json(by_alias=True)
                assert QLoRAJobStatus.model_validate_json(text) == command.status
                assert harmful(command.status.summary) == []
                finalizers_with(command.job, command.status)
        assert harmful("".join(explain(found, dice.choice(found.jobs).key))) == []
        told = what_if(found, ("24Gi=+1",), ("team-a:24Gi=1",), ())
        table = "".join(map(str, simulation_table(told.simulation, 100).lines(80)))
        assert harmful(f"{table}{json.dumps(told.to_wire(), ensure_ascii=False)}") == []
        metrics = Metrics()
        metrics.round_done(replace(found, jobs=healthy), (), 0.1, 0.0)
        metrics.round_done(found, commands, 0.1, 0.0)
        assert generate_latest(metrics.registry)
    assert {"WriteStatus", "EnsureStage", "StopStage", "DeleteStage", "DeleteJob"} <= set(seen)


def test_a_status_that_no_next_one_can_follow_is_explained_in_words() -> None:
    attempt = make_attempt("prepare", 1, start_time=NOW, created_time=NOW)
    status = QLoRAJobStatus(attempts=(attempt,), attempts_total=1, failures_total=MAX_COUNT)
    job = make_job(status=status)
    found = snapshot(job, stages=(exited(job, 1),))
    assert "its status cannot be written, so it fails" in explain(found, job.key)[0]
    assert any(isinstance(command, ReportDefect) for command in decide(found))


def test_deleted_jobs_with_others_finalizers_are_let_go() -> None:
    """The object stays for whoever holds it; nothing of ours does."""
    job = make_job("held", deleted=True, finalizers=("foreign.example/held",))
    [write] = decide(snapshot(job))
    assert isinstance(write, WriteStatus)
    gone = job.model_copy(update={"status": write.status})
    assert [type(command) for command in decide(snapshot(gone, now=NOW))] == [DeleteJob]
