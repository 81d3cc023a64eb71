"""How often a job may be moved for others' sake: `spec.evictionBudget`, or the service's default.

What counts are the scheduler's own choices (`VOLUNTARY_EVICTIONS`), by the time at which the job was asked to stop.
Whoever has been moved as often as it may is chosen as nobody's victim until an eviction counts no more (the window), or
until it has run for `eviction_protection_seconds` on the GPU that it has: then it may be moved once more, though its
budget is spent. So a budget bounds how often a job is moved, and no budget keeps a GPU from whoever has a right to it
for longer than that. What is the platform's, the job's own or its owner's doing asks no budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.api.job import MAX_EVICTIONS, EvictionBudgetStatus, QLoRAJobSpec, QLoRAJobStatus
from orchestrator.core.job.state_machine import GPU_STATES, TERMINAL_STATES
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Policy

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """So many evictions within so long; without a window, in all."""

    most: int
    window: timedelta | None

    def counted(self, times: Sequence[datetime], now: datetime) -> Sequence[datetime]:
        """Those that count."""
        return times if self.window is None else [time for time in times if time + self.window > now]


def budget_of(spec: QLoRAJobSpec, policy: Policy) -> Budget | None:
    """The job's own, or the service's; None where there is none."""
    own = spec.eviction_budget
    if own is not None:
        window = own.window_seconds
        return Budget(most=own.max_evictions, window=None if window is None else timedelta(seconds=window))
    if policy.max_evictions == 0:
        return None
    return Budget(most=policy.max_evictions, window=timedelta(seconds=policy.eviction_window_seconds))


def budget_words(spec: QLoRAJobSpec, policy: Policy) -> str:
    """The budget, for people; empty where there is none."""
    budget = budget_of(spec, policy)
    if budget is None:
        return ""
    within = "" if budget.window is None else f" within {budget.window.total_seconds() / SECONDS_AN_HOUR:.3g} hours"
    return f"{budget.most} eviction{'' if budget.most == 1 else 's'}{within}"


def protection_of(draft: Draft, policy: Policy) -> datetime | None:
    """Until when a job is nobody's victim from now on, since its budget is spent; None where it may be one."""
    until = protected_until(draft.job.spec, draft.status, policy) if draft.state in GPU_STATES else None
    return until if until is not None and until > draft.now else None


def protected_until(spec: QLoRAJobSpec, status: QLoRAJobStatus, policy: Policy) -> datetime | None:
    """Until when a job that has a GPU keeps it, since its budget is spent; None where it is not, or not any more."""
    known, attempt = status.eviction_budget, status.active_attempt
    budget = budget_of(spec, policy) if known is not None and attempt is not None else None
    if known is None or attempt is None or budget is None or len(known.times) < budget.most:
        return None
    since = attempt.start_time or attempt.created_time
    longest = since + timedelta(seconds=policy.eviction_protection_seconds)
    return longest if budget.window is None else min(longest, known.times[-budget.most] + budget.window)


def protected_seconds(spec: QLoRAJobSpec, status: QLoRAJobStatus, policy: Policy, now: datetime) -> float:
    """For how long that is; 0 where it is over."""
    until = protected_until(spec, status, policy)
    return 0.0 if until is None else max(0.0, (until - now).total_seconds())


def spend_eviction(draft: Draft, asked: datetime, policy: Policy) -> Draft:
    """The draft of a job that has made way for another."""
    known = draft.status.eviction_budget or EvictionBudgetStatus()
    times = (*known.times, asked)[-MAX_EVICTIONS:]
    return with_eviction_budget(draft.amend(eviction_budget=EvictionBudgetStatus(times=times)), policy)


def with_eviction_budget(draft: Draft, policy: Policy) -> Draft:
    """The draft whose status says what is left by now; a job that is over keeps what it had."""
    known = draft.status.eviction_budget
    if known is None or draft.state in TERMINAL_STATES:
        return draft
    budget = budget_of(draft.job.spec, policy)
    if budget is None:
        left, renewed = None, None
    else:
        counted = budget.counted(known.times, draft.now)
        left = max(0, budget.most - len(counted))
        renewed = counted[0] + budget.window if counted and budget.window is not None else None
    if (known.left, known.renew_time) == (left, renewed):
        return draft
    return draft.amend(eviction_budget=known.model_copy(update={"left": left, "renew_time": renewed}))
