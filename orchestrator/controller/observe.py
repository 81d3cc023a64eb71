"""Observe: read the present, all of it, into one snapshot. Nothing is remembered between two calls.

Stages are read before jobs: an attempt is on record before its stage exists, so a stage that the jobs of a snapshot do
not explain is really unwanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from orchestrator.core.snapshot import Policy, RunFact, Snapshot, StageFact
from orchestrator.ports import StageRuntime, Store
from orchestrator.sizing.hardware import priced


def observe(
    store: Store, runtime: StageRuntime, runs: Mapping[str, RunFact], policy: Policy, now: datetime
) -> Snapshot:
    """Everything that a decision may depend on. Raises if any part of it cannot be read."""
    stages = runtime.observe()
    jobs, unreadable = store.list_jobs(), store.list_unreadable()
    return Snapshot(
        now=now,
        jobs=tuple(jobs),
        queues=tuple(store.list_queues()),
        stages=_without_unreadable(stages, unreadable),
        gpu_classes=priced(runtime.gpu_classes(), policy.gpu_prices),
        runs={uid: fact for uid, fact in runs.items() if fact.job.key not in unreadable},
        policy=policy,
    )


def _without_unreadable(stages: Mapping[str, StageFact], unreadable: Sequence[str]) -> Mapping[str, StageFact]:
    """Stages but for those of jobs that do not parse: whose fate nobody here can know is left alone."""
    if not unreadable:
        return stages
    return {key: fact for key, fact in stages.items() if _job_key(fact) not in unreadable}


def _job_key(fact: StageFact) -> str:
    return f"{fact.namespace}/{fact.name.rsplit('-', 2)[0]}"
