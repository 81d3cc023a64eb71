"""Who is told of a job: the webhooks that the job names, and those of its queue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.api.job import QLoRAJob
from orchestrator.api.notification import OF_JOB, OF_QUEUE, Webhook
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.core.commands import SendNotification
from orchestrator.core.job.finalizer import outstanding
from orchestrator.core.job.notifications import Subscription
from orchestrator.core.scheduling.ordering import permission_refusal


def subscriptions_of(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> tuple[Subscription, ...]:
    """What each of them is told."""
    return tuple(Subscription(recipient=to, events=webhook.events) for to, webhook in _webhooks(job, queues))


def notification_commands(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> Iterator[SendNotification]:
    """What is on record of a job and not confirmed, for each who has not, oldest first."""
    webhooks = dict(_webhooks(job, queues))
    for notification in outstanding(job.status):
        for recipient in notification.recipients:
            yield SendNotification(
                job=job, notification=notification, recipient=recipient, webhook=webhooks.get(recipient)
            )


def _webhooks(job: QLoRAJob, queues: Mapping[str, QLoRAQueueSpec]) -> Iterator[tuple[str, Webhook]]:
    for webhook in job.spec.notifications:
        yield f"{OF_JOB}{webhook.name}", webhook
    queue = queues.get(job.spec.queue)
    if queue is None or not queue.notifications or permission_refusal(job, queues) is not None:
        return  # a queue that is not for the job is told nothing of it
    for webhook in queue.notifications:
        yield f"{OF_QUEUE}{webhook.name}", webhook
