"""Observe: read the present, all of it, into one snapshot. Nothing is remembered between two calls.

Stages are read before jobs: an attempt is on record before its stage exists, so a stage that the jobs of a snapshot do
not explain is really unwanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator.core.snapshot import DeliveryFact, Policy, RunFact, Snapshot, SweepFact
from orchestrator.ports import StageRuntime, Store
from orchestrator.sizing.hardware import priced


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came of commands whose answers are waited for elsewhere, by the jobs' uids."""

    runs: Mapping[str, RunFact]
    sweep_runs: Mapping[str, SweepFact]
    deliveries: Mapping[str, tuple[DeliveryFact, ...]]
    refused: Mapping[str, str]


def observe(
    store: Store, runtime: StageRuntime, answers: Answers, policy: Policy, now: datetime, clock_step_seconds: float
) -> Snapshot:
    """Everything that a decision may depend on. Raises if any part of it cannot be read; one object is no part."""
    stages = runtime.observe()
    jobs, unreadable = store.list_jobs(), store.list_unreadable()
    alone = {job.key for job in unreadable}
    return Snapshot(
        now=now,
        clock_step_seconds=clock_step_seconds,
        jobs=tuple(jobs),
        queues=tuple(store.list_queues()),
        sweeps=tuple(store.list_sweeps()),
        stages=stages,
        taken_names=runtime.taken_names(),
        gpu_classes=priced(runtime.gpu_classes(), policy.gpu_prices),
        runs={uid: fact for uid, fact in answers.runs.items() if fact.job.key not in alone},
        sweep_runs=answers.sweep_runs,
        deliveries=answers.deliveries,
        refused=answers.refused,
        unreadable=tuple(unreadable),
        unreadable_sweeps=tuple(store.list_unreadable_sweeps()),
        policy=policy,
    )
