"""Turns: in a queue with `turnSeconds`, a running job yields to equals that wait, and waits behind them.

Round robin with checkpoints. An equal is a job of the same queue whose priority is no lower. Rules:

- A turn is over once `turnSeconds` have passed since the stage began to run (no less than the minimum run), and a
  checkpoint of this attempt is in the store: every turn brings a job further, so no cycle goes without progress,
  whatever a stop may then lose.
- Who has had a turn waits from its end on, behind everybody who was waiting then. So whoever somebody yields to goes
  first, and of `n` jobs on `m` cards nobody waits for more than `n / m` turns, rounded up.
- Nobody yields a card that would be another's: of another queue that is next for it.

What it costs is bounded: at most one stop and one start a turn, and no step is made twice where the checkpoint that is
asked for is acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason
from orchestrator.core.job.state_machine import JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.ordering import created
from orchestrator.core.snapshot import Policy, Snapshot


def turn_length(spec: QLoRAQueueSpec | None, policy: Policy) -> timedelta | None:
    """How long a job may run before it yields; None where its queue gives no turns."""
    if spec is None or spec.turn_seconds is None:
        return None
    return timedelta(seconds=max(spec.turn_seconds, policy.minimum_run_seconds))


def turn_ends(draft: Draft, queues: Mapping[str, QLoRAQueueSpec], policy: Policy) -> datetime | None:
    """When the time of a running job's turn is over, or was; None where its queue gives no turns."""
    length, attempt = turn_length(queues.get(draft.job.spec.queue), policy), draft.attempt
    if length is None or draft.state is not JobState.TRAINING:
        return None
    assert attempt is not None, "a job that trains has an attempt"
    assert attempt.start_time is not None, "and was seen to"
    return attempt.start_time + length


def is_turn_over(draft: Draft, queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot) -> bool:
    """Whether a running job yields now: its time is over, and this attempt has brought it further for good."""
    ends = turn_ends(draft, queues, snapshot.policy)
    return ends is not None and ends <= snapshot.now and has_advanced(draft)


def has_advanced(draft: Draft) -> bool:
    """Whether a checkpoint of the active attempt is in the store."""
    attempt, checkpoint = draft.attempt, draft.status.checkpoint
    return attempt is not None and checkpoint is not None and checkpoint.attempt == attempt.number


def waits_since(job: QLoRAJob, status: QLoRAJobStatus, now: datetime, spec: QLoRAQueueSpec | None) -> datetime:
    """What the age of a waiting job counts from: its creation or, in a queue with turns, the end of its last turn.

    Whatever else ended an attempt costs nobody his place. Where only later attempts are on record than that of the last
    turn, it is the first of those.
    """
    since = created(job, now)
    if spec is None or spec.turn_seconds is None or Reason.TURN_ENDED.value not in status.evictions:
        return since
    attempts = status.attempts
    ended = (each.finish_time for each in reversed(attempts) if each.reason is Reason.TURN_ENDED)
    return next(ended, None) or (attempts[0].created_time if attempts else since)
