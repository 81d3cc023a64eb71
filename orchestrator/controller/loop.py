"""The loop: observe, decide, act, and again when something changed or a tick has passed.

Level-triggered: a change only wakes it, and every round reads the present. A round that fails is logged and tried
again after a backoff; only RuntimeLost ends the loop, because then the process must start over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.controller.act import Actor, Bounds
from orchestrator.controller.clock import Clock
from orchestrator.controller.health import Health
from orchestrator.controller.metrics import Metrics
from orchestrator.controller.observe import Answers, observe
from orchestrator.controller.throttle import Backoff
from orchestrator.controller.webhook_workers import WebhookWorkers
from orchestrator.core.commands import Command
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.errors import RuntimeLost, TransientError
from orchestrator.ports import Notifier, StageRuntime, Store, Tracking
from orchestrator.settings import ServiceSettings

log = logging.getLogger(__name__)

ROUND_KEY = "round"

Decide = Callable[[Snapshot], tuple[Command, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The outside world of one controller."""

    store: Store
    runtime: StageRuntime
    tracking: Tracking
    notifier: Notifier


class Controller:
    """One controller; the caller sees to it that there is no other."""

    def __init__(
        self,
        settings: ServiceSettings,
        ports: Ports,
        decide: Decide,
        metrics: Metrics | None = None,
        health: Health | None = None,
        *,
        writers: int = 1,
    ) -> None:
        self._settings = settings
        self._ports = ports
        self._decide = decide
        self._policy: Policy = settings.policy()
        base, longest = settings.command_backoff_base_seconds, settings.command_backoff_max_seconds
        bounds = Bounds(
            writers=writers,
            seconds=settings.round_act_seconds,
            mlflow_workers=settings.mlflow_workers,
            words_per_second=settings.words_per_second,
        )
        patience = Backoff(settings.webhook_backoff_base_seconds, settings.webhook_backoff_max_seconds)
        webhooks = WebhookWorkers(ports.notifier, patience, settings.webhook_workers)
        self._actor = Actor(ports.store, ports.runtime, ports.tracking, webhooks, Backoff(base, longest), bounds)
        self._round_backoff = Backoff(base, longest)
        self._clock = Clock()
        self.metrics = metrics or Metrics()
        self._health = health or Health(settings.tick_seconds)

    def run(self, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Work until `stop` is set; tells `ready` after the first round that came through. Raises RuntimeLost."""
        while not stop.is_set():
            try:
                # Taken before the round reads anything: what changes during the round wakes the next one.
                cursor = self._ports.store.wait_for_change("", 0)
                self.round()
            except RuntimeLost:
                raise
            except Exception as error:  # noqa: BLE001 - logged there; the next round may well succeed
                self._rest_after(error, stop)
                continue
            self._round_backoff.succeeded(ROUND_KEY)
            self._health.round_done()
            ready()
            stop.wait(self._settings.tick_minimum_seconds)
            self._sleep(cursor, stop)

    def round(self) -> Sequence[Command]:
        """One observation, decision and action; the commands that were decided."""
        start = time.monotonic()
        self.metrics.round_begins()
        store, runtime = self._ports.store, self._ports.runtime
        answers = Answers(
            runs=self._actor.runs(),
            sweep_runs=self._actor.sweep_runs(),
            deliveries=self._actor.deliveries(),
            refused=self._actor.refused(),
        )
        now = self._clock.now()
        snapshot = observe(store, runtime, answers, self._policy, now, self._clock.step_seconds)
        observed = time.monotonic()
        commands = self._decide(snapshot)
        decided = time.monotonic()
        for command in commands:
            log.debug("decided: %s", command)
        self._actor.act(commands, decided - start)
        self._clock.step_is_told()
        self.metrics.round_done(snapshot, commands, decided - observed, start)
        return commands

    def _sleep(self, cursor: str, stop: threading.Event) -> None:
        if stop.is_set():
            return
        try:
            if self._ports.store.wait_for_change(cursor, self._settings.tick_seconds) != cursor:
                self.metrics.changed()
        except TransientError:  # the next round meets it, too, and backs off
            stop.wait(self._settings.tick_seconds)

    def _rest_after(self, error: Exception, stop: threading.Event) -> None:
        seconds = self._round_backoff.failed(ROUND_KEY)
        self.metrics.round_failed()
        self._health.round_failed(str(error))
        if isinstance(error, TransientError):
            log.warning("this round failed, the next is in %.1f s: %s", seconds, error)
        else:
            log.error("this round failed, the next is in %.1f s", seconds, exc_info=error)
        stop.wait(seconds)
