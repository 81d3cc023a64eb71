"""Notifications: what is told about jobs, whom, and in which words; docs/notifications.md explains it.

What is sent follows Standard Webhooks 1.0.0 (github.com/standard-webhooks/standard-webhooks,
spec/standard-webhooks.md): a JSON body of `type`, `timestamp` and `data`, and the headers webhook-id, webhook-timestamp
and webhook-signature.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from orchestrator.api.base import Count, DnsLabel, JobName, Model, PositiveCount, Sentence, ShortText, Time
from orchestrator.api.reasons import Reason

WEBHOOK_URL_PATTERN = (
    r"^https?://([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?][!\"$-~]*)?$"
)
"""A host, perhaps a port, and a path: no name or password before the host, and no fragment."""
WebhookUrl = Annotated[str, StringConstraints(pattern=WEBHOOK_URL_PATTERN, max_length=1024)]
EventName = Literal[
    "job.queued",
    "job.admitted",
    "job.running",
    "job.preempted",
    "job.retrying",
    "job.trained",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.promoted",
    "job.not_promoted",
    "job.awaiting_approval",
]
ENDS: tuple[EventName, ...] = ("job.succeeded", "job.failed", "job.cancelled")
EVENT_MEANINGS: dict[EventName, str] = {
    "job.queued": "its data are prepared, and it waits for a GPU",
    "job.admitted": "it has got a GPU; the message names the class",
    "job.running": "its train stage runs",
    "job.preempted": "it had to give its GPU back, through no fault of its own, and goes on from its checkpoint later",
    "job.retrying": "a stage of it failed, and is tried again",
    "job.trained": "the adapter is in the job's store, and the GPU is free",
    "job.succeeded": "the adapter is published; the end",
    "job.failed": "the end, without a result",
    "job.cancelled": "the end: somebody cancelled or deleted it",
    "job.promoted": "spec.tracking.promote's alias has moved to its version",
    "job.not_promoted": "the alias stays where it is",
    "job.awaiting_approval": "the gate is passed, and somebody has to approve",
}
"""What has happened to the job when it is told."""
MAX_WEBHOOKS = 8
WEBHOOKS_HAVE_NAMES = "notifications must give each webhook a name of its own"
OF_JOB, OF_QUEUE = "job/", "queue/"
"""What stands before a webhook's name in a status: where it is described."""
Recipient = Annotated[str, StringConstraints(pattern=r"^(job|queue)/[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=70)]
MAX_OUTSTANDING = 32


class Webhook(Model):
    """An address that is told about jobs, by POST requests signed as Standard Webhooks says."""

    name: DnsLabel
    """Tells it from the others, and names the secret that its requests are signed with: a key of the namespace's Secret
    of webhooks; on one machine the variable `QLORA_WEBHOOK_<NAME>_SECRET` of the service."""
    url: WebhookUrl
    """`https://`, of a public address, unless an operator allows the host (`QLORA_WEBHOOK_ALLOWED_HOSTS`)."""
    events: Annotated[tuple[EventName, ...], Field(min_length=1, max_length=16)] = ENDS
    """What it is told; by default how jobs end."""


Webhooks = Annotated[tuple[Webhook, ...], Field(max_length=MAX_WEBHOOKS)]


def names_are_unique(webhooks: tuple[Webhook, ...]) -> bool:
    """Whether a name stands for one webhook."""
    return len({webhook.name for webhook in webhooks}) == len(webhooks)


class Notification(Model):
    """Something that has happened to a job, as long as not all who are to be told have confirmed it."""

    number: PositiveCount
    """Counts what is told of the job, from 1; the webhook-id is made of it and the job's uid."""
    event: EventName
    time: Time
    """When it happened, by the controller's clock."""
    reason: Reason
    message: ShortText = ""
    attempt: PositiveCount | None = None
    """The latest attempt then."""
    recipients: Annotated[tuple[Recipient, ...], Field(max_length=2 * MAX_WEBHOOKS)]
    """Webhooks that have not confirmed it: `job/` or `queue/` and the name."""
    failure: ShortText = ""
    """What the latest try came to that did not succeed."""


class NotificationsStatus(Model):
    """What is told of the job: on record with what it tells of, so it is told whatever becomes of a controller."""

    total: Count = 0
    """The number of the latest notification."""
    outstanding: Annotated[tuple[Notification, ...], Field(max_length=MAX_OUTSTANDING)] = ()
    """Not yet confirmed by everybody, oldest first."""
    undelivered: Count = 0
    """Deliveries that were given up."""


def webhook_id(uid: str, number: int) -> str:
    """The id of a notification, the same however often and to whomever it is sent; it has no full stop in it."""
    return f"{uid.replace('.', '-')}_{number}"


class NotifiedMlflow(Model):
    """Where the job's results are in MLflow, as far as there are any when the request is sent."""

    run_id: ShortText | None = None
    experiment_id: ShortText | None = None
    run_url: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """The run's page, where MLflow is a server."""
    registered_model: ShortText | None = None
    model_version: ShortText | None = None
    model_uri: Annotated[str, StringConstraints(max_length=600)] | None = None
    """`models:/name/version`, as MLflow's clients load it."""


class NotifiedJob(Model):
    """What happened to which job."""

    namespace: DnsLabel
    name: JobName
    uid: ShortText
    queue: DnsLabel
    reason: Reason
    """Why: docs/reference/reasons.md lists them."""
    message: Sentence = ""
    attempt: PositiveCount | None = None
    mlflow: NotifiedMlflow


class NotificationBody(Model):
    """The body of a request to a webhook."""

    type: EventName
    timestamp: Time
    """When it happened, not when it was sent."""
    data: NotifiedJob
