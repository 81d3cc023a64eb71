"""The workers of webhooks: threads that tell them what is on record, while the loop goes on.

What is to be told is offered anew in every round, all of it: there is no queue that could run over or be lost. Rules:

- One request of a namespace, or of a queue's own webhooks, is under way at one time, and the namespaces take turns: one
  whose webhooks hang makes nobody wait for longer than the others take.
- A webhook that did not take something is left alone for a while, twice as long each time up to a bound, and after that
  comes first what has failed least often: one thing that it never takes holds up nothing else.
- What came of it is a fact for the next rounds, until the status has it on record. Facts live in memory only: whoever
  takes over sends the same again, under the same id.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.api.notification import OF_QUEUE
from orchestrator.controller.logs import about
from orchestrator.controller.throttle import Backoff
from orchestrator.core.commands import SendNotification
from orchestrator.core.snapshot import DeliveryFact
from orchestrator.errors import OrchestratorError, TransientError
from orchestrator.ports import Notifier

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""So often workers look whether a webhook's pause is over."""


@dataclass(frozen=True, slots=True)
class _Delivery:
    """Which notification goes to whom."""

    uid: str
    number: int
    recipient: str


class WebhookWorkers:
    """Tells webhooks things, several at one time."""

    def __init__(self, notifier: Notifier, backoff: Backoff, workers: int) -> None:
        self._notifier = notifier
        self._backoff = backoff
        self._changed = threading.Condition()
        self._offered: dict[str, list[SendNotification]] = {}
        """By whose turn it is; who had a turn goes to the end."""
        self._busy: set[str] = set()
        self._facts: dict[_Delivery, DeliveryFact] = {}
        self._failures: Counter[_Delivery] = Counter()
        for number in range(workers):
            threading.Thread(target=self._drive, name=f"webhook worker {number}", daemon=True).start()

    def deliveries(self) -> Mapping[str, tuple[DeliveryFact, ...]]:
        """What came of notifications and no status has on record yet, by the uid of the job."""
        found: dict[str, tuple[DeliveryFact, ...]] = {}
        with self._changed:
            for delivery, fact in self._facts.items():
                found[delivery.uid] = (*found.get(delivery.uid, ()), fact)
        return found

    def offer(self, commands: Sequence[SendNotification]) -> None:
        """All that is on record and not confirmed, as of this round. Does not wait."""
        offered: dict[str, list[SendNotification]] = {}
        for command in commands:
            offered.setdefault(_whose(command), []).append(command)
        asked = set(map(_delivery, commands))
        with self._changed:
            in_turn = [whose for whose in self._offered if whose in offered]
            self._offered = {whose: offered[whose] for whose in (*in_turn, *offered)}
            self._facts = {delivery: fact for delivery, fact in self._facts.items() if delivery in asked}
            self._failures = Counter({of: count for of, count in self._failures.items() if of in asked})
            self._backoff.forget_all_but(set(map(_webhook_key, commands)))
            if offered:
                self._changed.notify_all()

    def _drive(self) -> None:
        while True:
            command = self._next()
            fact = self._sent(command)
            with self._changed:
                self._busy.discard(_whose(command))
                self._facts[_delivery(command)] = fact
                if fact.outcome == "failed":
                    self._failures[_delivery(command)] += 1
                self._changed.notify_all()

    def _next(self) -> SendNotification:
        """Waits for something to tell; whose it is is busy from then on."""
        with self._changed:
            while True:
                for whose in self._offered:
                    command = self._first(whose)
                    if command is not None:
                        self._busy.add(whose)
                        self._offered[whose] = self._offered.pop(whose)  # to the end
                        return command
                self._changed.wait(LOOK_SECONDS if self._offered else None)

    def _first(self, whose: str) -> SendNotification | None:
        if whose in self._busy:
            return None
        ready = [command for command in self._offered[whose] if self._is_ready(command)]
        return min(ready, key=self._rank, default=None)

    def _is_ready(self, command: SendNotification) -> bool:
        fact = self._facts.get(_delivery(command))
        return (fact is None or fact.outcome == "failed") and self._backoff.ready(_webhook_key(command))

    def _rank(self, command: SendNotification) -> tuple[object, ...]:
        of = _delivery(command)
        return self._failures[of], command.notification.time, of.uid, of.number, of.recipient

    def _sent(self, command: SendNotification) -> DeliveryFact:
        number, recipient, key = command.notification.number, command.recipient, _webhook_key(command)
        if command.webhook is None:
            return DeliveryFact(number=number, recipient=recipient, outcome="delivered")  # there is nobody to tell
        namespace = None if recipient.startswith(OF_QUEUE) else command.job.metadata.namespace
        what = f"{command.notification.event} to {recipient}"
        try:
            self._notifier.send(command.job, command.notification, command.webhook, namespace)
        except OrchestratorError as error:
            outcome = "failed" if isinstance(error, TransientError) else "refused"
            seconds, message = self._backoff.failed(key), str(error)
            log.warning("%s is not told, %.0f s: %s", what, seconds, message, extra=about(command.job.key))
            return DeliveryFact(number=number, recipient=recipient, outcome=outcome, message=message)
        except Exception as error:
            # A defect, or an answer that no rule foresaw. Others must not suffer for it.
            message = f"sending failed unexpectedly ({type(error).__name__}); the controller's log has more"
            self._backoff.failed(key)
            log.exception("%s is not told", what, extra=about(command.job.key))
            return DeliveryFact(number=number, recipient=recipient, outcome="failed", message=message)
        self._backoff.succeeded(key)
        log.info("%s is told", what, extra=about(command.job.key))
        return DeliveryFact(number=number, recipient=recipient, outcome="delivered")


def _whose(command: SendNotification) -> str:
    """A namespace, or a queue: their webhooks take turns."""
    if command.recipient.startswith(OF_QUEUE):
        return f"queue {command.job.spec.queue}"
    return f"namespace {command.job.metadata.namespace}"


def _webhook_key(command: SendNotification) -> str:
    """A webhook, whoever's jobs it is told of: the same address is one."""
    return f"{_whose(command)} {command.webhook.url if command.webhook is not None else ''}"


def _delivery(command: SendNotification) -> _Delivery:
    return _Delivery(command.job.metadata.uid, command.notification.number, command.recipient)
