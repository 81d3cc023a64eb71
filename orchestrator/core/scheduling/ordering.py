"""Whose turn it is: what the order of waiting jobs (`core/scheduling/line`) rests on.

Priority first, then fair share between queues (`core/scheduling/usage`), in a queue with `fairSharing: PerUser` then
fair share between its users, then age, then uid. The k-th job in a queue's, or a user's, own line counts as if those
before it had started, so they take turns even when nobody has run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from orchestrator.api.job import MIN_PRIORITY, QLoRAJob
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import Budget, BudgetUse, MonthlyUsage, QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal

DEFAULT_QUEUE = "default"
NO_QUEUE = ""
"""On whose account GPUs are that no queue has given."""
UNKNOWN_CLASS_GIB = 1  # weight of GPU time on a class that is not here any more
SECONDS_AN_HOUR = 3600.0
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Claim(NamedTuple):
    """A waiting job's claim on one GPU; a tuple, since thousands are made at once."""

    key: str
    uid: str
    queue: str
    priority: int
    since: datetime
    """What its age counts from."""
    estimates: tuple[Estimate, ...]
    """One for each class that would do, the preferred first."""
    classes: tuple[str, ...]
    """Their names: claims of one queue with the same fare alike."""
    user: str = ""
    """Whose it is, in a queue that tells its users apart; empty in others."""


_UNDESCRIBED = QLoRAQueueSpec()


def queue_specs(queues: Iterable[QLoRAQueue]) -> Mapping[str, QLoRAQueueSpec]:
    """The queues by name; `default` exists without being described."""
    return {DEFAULT_QUEUE: _UNDESCRIBED, **{queue.metadata.name: queue.spec for queue in queues}}


def closures(queues: Iterable[QLoRAQueue], now: datetime) -> Mapping[str, Refusal]:
    """The queues that admit nobody, and why."""
    found = ((queue.metadata.name, _closure(queue, now)) for queue in queues)
    return {name: refusal for name, refusal in found if refusal is not None}


def _closure(queue: QLoRAQueue, now: datetime) -> Refusal | None:
    name, spec = queue.metadata.name, queue.spec
    if spec.stops != "None":
        return Refusal(reason=Reason.QUEUE_HELD, message=f"queue {name} is held, until: qlora queue release {name}")
    if spec.budget is None or spec.budget.when_spent == "Warn":
        return None
    use = budget_use(spec.budget, queue.status.months, now)
    if not use.spent:
        return None
    bounds = (("GPU-hours", spec.budget.gpu_hours), ("dollars", spec.budget.dollars))
    told = " and ".join(f"{bound} {unit}" for unit, bound in bounds if bound is not None)
    message = f"queue {name} has spent its budget of {told} for {use.month}; waits for the next month, or raise it"
    return Refusal(reason=Reason.BUDGET_SPENT, message=message)


def budget_use(budget: Budget, months: Iterable[MonthlyUsage], now: datetime) -> BudgetUse:
    """What is spent of this month's budget, by what is counted."""
    month = f"{now.astimezone(UTC):%Y-%m}"
    had = [each for each in months if each.month == month]
    gpu_hours = sum(each.gpu_seconds for each in had) / SECONDS_AN_HOUR
    dollars = sum(each.dollars for each in had)
    is_spent = (budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours) or (
        budget.dollars is not None and dollars >= budget.dollars
    )
    return BudgetUse(month=month, gpu_hours=round(gpu_hours, 3), dollars=round(dollars, 2), spent=is_spent)


def user_of(namespace: str, spec: QLoRAQueueSpec | None) -> str:
    """The user whose job it is, in a queue that bounds its users' GPUs or shares them out; empty in others."""
    is_told_apart = spec is not None and (spec.per_user.running is not None or spec.fair_sharing == "PerUser")
    return namespace if is_told_apart else ""


def queue_refusal(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec], closed: Mapping[str, Refusal]) -> Refusal | None:
    """Why the job's queue does not admit it, if so; `closed` are those that admit nobody."""
    name = job.spec.queue
    spec = queues.get(name)
    if spec is None:
        return Refusal(
            reason=Reason.QUEUE_NOT_FOUND,
            message=(
                f"there is no queue {name}; make it (qlora queue create {name}) or "
                f"set spec.queue to one of {', '.join(sorted(queues))}"
            ),
        )
    return permission_refusal(job, queues) or closed.get(name)


def permission_refusal(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> Refusal | None:
    """Why the job may not use the queue that it names, if that is there and so strict."""
    name, namespace, priority = job.spec.queue, job.metadata.namespace, job.spec.priority
    spec = queues.get(name)
    if spec is None:
        return None
    if not _is_open_to(namespace, spec):
        others = ", ".join(sorted(other for other, its in queues.items() if _is_open_to(namespace, its)))
        return Refusal(
            reason=Reason.QUEUE_NOT_ALLOWED,
            message=(
                f"queue {name} is not for jobs of namespace {namespace}; "
                + (f"set spec.queue to one of {others}, or " if others else "")
                + f"have {namespace} added to the queue's spec.namespaces"
            ),
        )
    if spec.max_priority is not None and priority > spec.max_priority:
        return Refusal(
            reason=Reason.PRIORITY_TOO_HIGH,
            message=f"queue {name} takes no priority above {spec.max_priority}; lower spec.priority from {priority}",
        )
    return None


def account(namespace: str, queue: str, queues: Mapping[str, QLoRAQueueSpec]) -> str:
    """The queue on whose account a GPU of the namespace's is: none where it names one that is not for it."""
    spec = queues.get(queue)
    return queue if spec is None or _is_open_to(namespace, spec) else NO_QUEUE


def standing(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> int:
    """The priority with which a job holds its GPU: no higher than its queue allows, and the least in a queue that is
    not for it. Queue and priority may be changed while it runs."""
    if account(job.metadata.namespace, job.spec.queue, queues) == NO_QUEUE:
        return MIN_PRIORITY
    spec = queues.get(job.spec.queue)
    bound = spec.max_priority if spec is not None else None
    return job.spec.priority if bound is None else min(job.spec.priority, bound)


def _is_open_to(namespace: str, spec: QLoRAQueueSpec) -> bool:
    return not spec.namespaces or namespace in spec.namespaces


def created(job: QLoRAJob, now: datetime) -> datetime:
    """When the job was created; a job without that time is the youngest."""
    return job.metadata.creation_timestamp or now
