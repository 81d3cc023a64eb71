"""Observe: read the present, all of it, into one snapshot. Nothing is remembered between two calls.

Stages are read before jobs: an attempt is on record before its stage exists, so a stage that the jobs of a snapshot do
not explain is really unwanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from orchestrator.core.snapshot import Policy, RunFact, Snapshot
from orchestrator.ports import StageRuntime, Store
from orchestrator.sizing.hardware import priced


def observe(
    store: Store,
    runtime: StageRuntime,
    runs: Mapping[str, RunFact],
    policy: Policy,
    now: datetime,
    clock_step_seconds: float = 0.0,
    refused: Mapping[str, str] | None = None,
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
        stages=stages,
        taken_names=runtime.taken_names(),
        gpu_classes=priced(runtime.gpu_classes(), policy.gpu_prices),
        runs={uid: fact for uid, fact in runs.items() if fact.job.key not in alone},
        refused=refused or {},
        unreadable=tuple(unreadable),
        policy=policy,
    )
