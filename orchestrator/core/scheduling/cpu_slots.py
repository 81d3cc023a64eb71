"""Who prepares and publishes now: the slots for stages that need no GPU, shared between namespaces.

- A namespace with fewer stages goes first, then the one that has waited longer: served or newly come, it goes to the
  end of the line. Within a namespace it is priority, then the same: a job that was tried goes to the end.
- A namespace that has no stage may take one slot beyond the limit: nobody can hold all there are.
- A stage that has not started after `cpu_start_seconds` uses no CPU and holds no slot, but counts as its namespace's.
- How long a stage may hold a slot is bounded by its deadline (`core/job/lifecycle`). So whatever others submit, a job
  that is first in its namespace waits for no more than one stage of each other namespace.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator.core.job.stage_commands import stage_of
from orchestrator.core.job.state_machine import JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.ordering import created
from orchestrator.core.snapshot import Snapshot, StagePhase

GUARANTEED_SLOTS = 1
"""Slots beyond the limit for namespaces without a stage."""
IN_CPU_STAGE = frozenset({JobState.PREPARING, JobState.PUBLISHING})


@dataclass(slots=True, kw_only=True)
class CpuSlots:
    """The books of one decision."""

    limit: int
    taken: int
    """Slots in use."""
    stages: Counter[str]
    """Stages of each namespace, those without a slot included."""

    @classmethod
    def of(cls, drafts: Iterable[Draft], snapshot: Snapshot) -> CpuSlots:
        """As the drafts have them."""
        active = [draft for draft in drafts if draft.state in IN_CPU_STAGE]
        return cls(
            limit=snapshot.policy.cpu_stages_limit,
            taken=sum(_holds_slot(draft, snapshot) for draft in active),
            stages=Counter(draft.job.metadata.namespace for draft in active),
        )

    def take(self, namespace: str) -> str:
        """Take a slot for a namespace's stage: empty, or why there is none."""
        held = self.stages[namespace]
        if self.taken >= self.limit + (GUARANTEED_SLOTS if held == 0 else 0):
            return f"all {self.limit} slots for prepare and publish stages are in use; waits for one"
        if held >= self.limit:
            return (
                f"namespace {namespace} has {held} prepare and publish stages, as many as it may; waits for one to end"
            )
        self.taken += 1
        self.stages[namespace] += 1
        return ""


def in_turn(ready: Iterable[Draft], served: Mapping[str, datetime], slots: CpuSlots) -> list[Draft]:
    """The jobs that are ready for a CPU stage, in the order in which they are to get one.

    `served` says when each namespace last began one, as far as its jobs tell.
    """
    lines: defaultdict[str, list[Draft]] = defaultdict(list)
    for draft in ready:
        lines[draft.job.metadata.namespace].append(draft)
    ranked: list[tuple[tuple[int, datetime, bool, str], Draft]] = []
    for namespace, line in lines.items():
        line.sort(key=lambda draft: (-draft.job.spec.priority, _waits_since(draft), draft.job.metadata.uid))
        for place, draft in enumerate(line):
            since = _waits_since(draft)
            was_served = served.get(namespace, since) >= since and namespace in served
            turn = max(since, served.get(namespace, since)) if place == 0 else draft.now
            ranked.append(((slots.stages[namespace] + place, turn, was_served, draft.job.metadata.uid), draft))
    return [draft for _, draft in sorted(ranked, key=lambda pair: pair[0])]


def _holds_slot(draft: Draft, snapshot: Snapshot) -> bool:
    attempt = draft.attempt
    assert attempt is not None, "a job in a stage has an active attempt"
    fact = stage_of(draft.job, attempt, snapshot)
    if fact is not None and fact.phase is not StagePhase.PENDING:
        return True
    return (draft.now - attempt.created_time).total_seconds() < snapshot.policy.cpu_start_seconds


def _waits_since(draft: Draft) -> datetime:
    """Since when the job is in the line: its creation, or the end of its last attempt."""
    attempts = draft.status.attempts
    last = attempts[-1] if attempts else None
    came = created(draft.job, draft.now)
    return came if last is None else min(max(came, last.finish_time or last.created_time), draft.now)


def last_served(draft: Draft) -> datetime | None:
    """When the job last began a CPU stage, if ever."""
    return max((a.created_time for a in draft.status.attempts if a.stage != "train"), default=None)
