"""What queues' statuses say: what their jobs have had (`core/scheduling/usage`), hold, and wait for.

Written when something else is so than the status says, or more is had, but seldom: every `usage_write_seconds`, and at
once only when a GPU comes free, since the job that had it may be deleted next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.api.queue import ClassUse, QLoRAQueue, QLoRAQueueStatus
from orchestrator.core.commands import WriteQueueStatus
from orchestrator.core.scheduling.index import Index
from orchestrator.core.scheduling.ordering import budget_use
from orchestrator.core.scheduling.usage import is_class
from orchestrator.core.snapshot import Snapshot

MAX_CLASSES = 64


def queue_statuses(index: Index, snapshot: Snapshot) -> Iterator[WriteQueueStatus]:
    """The writes that are due."""
    given_back = index.given_back()
    used: Mapping[str, Mapping[str, int]] | None = None
    for queue in snapshot.queues:
        at_once = index.shares.is_put(queue) or queue.metadata.name in given_back
        if not at_once and not index.shares.may_write(queue, snapshot.now):
            continue
        used = _by_queue(index.ledger.used) if used is None else used
        held = used.get(queue.metadata.name, {})
        told = _told(queue, held, index, snapshot)
        if at_once or index.shares.has_more(queue) or told != queue.status:
            counted = index.shares.counted_on(queue, snapshot.now)
            yield WriteQueueStatus(queue=queue, status=_told(_with(queue, counted), held, index, snapshot))


def _with(queue: QLoRAQueue, status: QLoRAQueueStatus) -> QLoRAQueue:
    return queue.model_copy(update={"status": status})


def _by_queue(used: Mapping[tuple[str, str], int]) -> Mapping[str, Mapping[str, int]]:
    """GPUs in use by queue, then by class."""
    found: dict[str, dict[str, int]] = {}
    for (queue, gpu_class), count in used.items():
        if count:
            found.setdefault(queue, {})[gpu_class] = count
    return found


def _told(queue: QLoRAQueue, held: Mapping[str, int], index: Index, snapshot: Snapshot) -> QLoRAQueueStatus:
    """The queue's status with what is so now; `held` are its GPUs in use, by class."""
    name, budget, status = queue.metadata.name, queue.spec.budget, queue.status
    pending = index.pending.get(name, {})
    classes = tuple(_classes(queue, held, index.lent()))
    return status.model_copy(
        update={
            "classes": classes,
            "running": sum(held.values()),
            "pending": len(pending),
            "pending_since": min(pending.values(), default=None),
            "budget": None if budget is None else budget_use(budget, status.months, snapshot.now),
        }
    )


def _classes(queue: QLoRAQueue, held: Mapping[str, int], lent: Mapping[tuple[str, str], int]) -> Iterator[ClassUse]:
    name = queue.metadata.name
    nominal = {quota.gpu_class: quota.nominal for quota in queue.spec.quotas}
    for gpu_class in sorted(nominal.keys() | set(filter(is_class, held)))[:MAX_CLASSES]:
        has, own = held.get(gpu_class, 0), nominal.get(gpu_class, 0)
        yield ClassUse(
            gpu_class=gpu_class,
            nominal=own,
            used=has,
            borrowed=max(0, has - own) if queue.spec.quotas else 0,
            lent=lent.get((name, gpu_class), 0),
        )
