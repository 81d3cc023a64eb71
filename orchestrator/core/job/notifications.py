"""What is told about a job: which of its changes are, and what becomes of what was sent.

- What happens to a job is put on record as outstanding by the very write that makes it so: a controller that is killed
  leaves either both or neither.
- Whatever is on record is sent, again and again, until each webhook has confirmed it or it is given up. So a webhook
  may hear the same thing twice, with the same id, and misses nothing but what is given up; that is told by an event.
- No failure of a webhook changes what becomes of the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.api.base import MAX_SHORT_CHARACTERS
from orchestrator.api.job import QLoRAJobStatus
from orchestrator.api.notification import (
    MAX_OUTSTANDING,
    EventName,
    Notification,
    NotificationsStatus,
)
from orchestrator.api.reasons import ConditionType, Reason, Recovery
from orchestrator.api.words import on_one_line
from orchestrator.core.commands import Event
from orchestrator.core.job.finalizer import outstanding
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobEvent
from orchestrator.core.job.status_draft import Draft, Happening
from orchestrator.core.snapshot import DeliveryFact, Policy

NOTHING = NotificationsStatus()
_TOLD: Mapping[JobEvent, EventName] = {
    JobEvent.PREPARED: "job.queued",
    JobEvent.ADMITTED: "job.admitted",
    JobEvent.TRAIN_STARTED: "job.running",
    JobEvent.TRAINED: "job.trained",
    JobEvent.PUBLISHED: "job.succeeded",
    JobEvent.FAILED: "job.failed",
    JobEvent.CANCELLED: "job.cancelled",
}
_ENDED = frozenset({JobEvent.PREPARE_ENDED, JobEvent.TRAIN_ENDED, JobEvent.PUBLISH_ENDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A webhook and what it is told."""

    recipient: str
    """`job/` or `queue/` and its name."""
    events: tuple[EventName, ...]


def with_notifications(
    draft: Draft, status: QLoRAJobStatus, subscriptions: tuple[Subscription, ...]
) -> tuple[NotificationsStatus | None, tuple[Event, ...]]:
    """What is told of a job once it has a status: with what the draft has made happen. And what is given up for that,
    because more is outstanding than a status keeps."""
    known = status.notifications
    if not subscriptions:
        return known, ()
    told = known or NOTHING
    total, kept = told.total, list(told.outstanding)
    for event, reason, message in _news(draft, status):
        recipients = tuple(each.recipient for each in subscriptions if event in each.events)
        if not recipients:
            continue
        total += 1
        notification = Notification(
            number=total,
            event=event,
            time=draft.now,
            reason=reason,
            message=_short(message),
            attempt=status.attempts_total or None,
            recipients=recipients,
        )
        kept.append(notification)
    over = [] if len(kept) <= MAX_OUTSTANDING else kept[: len(kept) - MAX_OUTSTANDING]
    given_up = [n.model_copy(update={"failure": n.failure or f"{MAX_OUTSTANDING} later ones wait"}) for n in over]
    after = NotificationsStatus(
        total=total, outstanding=tuple(kept[len(over) :]), undelivered=told.undelivered + _deliveries(over)
    )
    return after, tuple(map(_undelivered, given_up))


def note_deliveries(draft: Draft, facts: Iterable[DeliveryFact], policy: Policy) -> Draft:
    """The draft with what became of what was sent, and without what is given up."""
    told = draft.status.notifications
    if told is None or not told.outstanding:
        return draft
    by_number: dict[int, list[DeliveryFact]] = {}
    for fact in facts:
        by_number.setdefault(fact.number, []).append(fact)
    left: list[Notification] = []
    given_up: list[Notification] = []
    for notification in told.outstanding:
        of_this = by_number.get(notification.number, ())
        noted = _noted(notification, of_this)
        refused = [f for f in of_this if f.outcome == "refused" and f.recipient in notification.recipients]
        given_up += [
            notification.model_copy(update={"recipients": (f.recipient,), "failure": f.message}) for f in refused
        ]
        if noted.recipients:
            (given_up if _is_too_old(noted, draft, policy) else left).append(noted)
    if tuple(left) == told.outstanding:
        return draft
    undelivered = told.undelivered + _deliveries(given_up)
    draft = draft.amend(notifications=told.model_copy(update={"outstanding": tuple(left), "undelivered": undelivered}))
    for notification in given_up:
        draft = draft.tell(_undelivered(notification))
    return draft


def gives_up_at(draft: Draft, policy: Policy) -> Iterator[datetime]:
    """When something is given up next, by time alone."""
    kept = outstanding(draft.status)
    if kept:
        yield min(each.time for each in kept) + timedelta(seconds=policy.webhook_limit_seconds)
    if kept and draft.status.release_since is not None:
        yield draft.status.release_since + timedelta(seconds=policy.release_limit_seconds)


def _news(draft: Draft, status: QLoRAJobStatus) -> Iterator[tuple[EventName, Reason, str]]:
    """What is worth telling of what has happened. An attempt whose end is the job's is told as that alone."""
    for happening in draft.happened:
        event = _TOLD.get(happening.event)
        if event is None and happening.event in _ENDED and draft.state not in TERMINAL_STATES:
            event = _of_end(happening)
        if event is not None:
            yield event, happening.reason, happening.message
    before, after = draft.job.status.condition(ConditionType.PROMOTED), status.condition(ConditionType.PROMOTED)
    if after is not None and (before is None or (before.status, before.reason) != (after.status, after.reason)):
        if after.status == "True":
            yield "job.promoted", after.reason, after.message
        else:
            waits = after.reason is Reason.AWAITING_APPROVAL
            yield "job.awaiting_approval" if waits else "job.not_promoted", after.reason, after.message


def _of_end(happening: Happening) -> EventName:
    moved = happening.event is JobEvent.TRAIN_ENDED and happening.reason.recovery is Recovery.RESUME
    return "job.preempted" if moved else "job.retrying"


def _noted(notification: Notification, facts: Iterable[DeliveryFact]) -> Notification:
    recipients, failure = notification.recipients, notification.failure
    for fact in facts:
        if fact.outcome == "failed":
            failure = fact.message
        else:
            recipients = tuple(each for each in recipients if each != fact.recipient)
    if recipients == notification.recipients and failure == notification.failure:
        return notification
    return notification.model_copy(update={"recipients": recipients, "failure": failure})


def _is_too_old(notification: Notification, draft: Draft, policy: Policy) -> bool:
    if (draft.now - notification.time).total_seconds() >= policy.webhook_limit_seconds:
        return True
    since = draft.status.release_since
    return since is not None and (draft.now - since).total_seconds() >= policy.release_limit_seconds


def _deliveries(notifications: Iterable[Notification]) -> int:
    return sum(len(notification.recipients) for notification in notifications)


def _short(message: str) -> str:
    """As much of it as is sent."""
    return on_one_line(message)[:MAX_SHORT_CHARACTERS]


def _undelivered(notification: Notification) -> Event:
    why = f": {notification.failure}" if notification.failure else ""
    message = f"{notification.event} is given up for {', '.join(notification.recipients)}{why}"
    return Event(reason=Reason.NOTIFICATION_UNDELIVERED, message=message, warning=True)
