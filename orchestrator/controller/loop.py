"""The loop: observe, decide, act, and again when something changed or a tick has passed.

Level-triggered: a change only wakes it, and every round reads the present. A round that fails is logged and tried
again after a backoff; only RuntimeLost ends the loop, because then the process must start over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import quantiles

from orchestrator.controller.act import Actor, Backoff
from orchestrator.controller.observe import observe
from orchestrator.controller.ports import StageRuntime, Store, Tracking
from orchestrator.core.facts import Command, Policy, Snapshot
from orchestrator.errors import RuntimeLost, TransientError
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

ROUNDS_REMEMBERED = 1024
METRICS_EVERY_SECONDS = 60.0
ROUND_KEY = "round"

Decide = Callable[[Snapshot], tuple[Command, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The outside world of one controller."""

    store: Store
    runtime: StageRuntime
    tracking: Tracking


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of the last rounds, in seconds."""

    rounds: int
    decide_median_seconds: float
    decide_p99_seconds: float
    round_median_seconds: float
    round_p99_seconds: float


class Metrics:
    """How long rounds take, in memory, and now and then in the log."""

    def __init__(self) -> None:
        self._decide_seconds: deque[float] = deque(maxlen=ROUNDS_REMEMBERED)
        self._round_seconds: deque[float] = deque(maxlen=ROUNDS_REMEMBERED)
        self._rounds = 0
        self._logged = time.monotonic()

    def note(self, decide_seconds: float, round_seconds: float) -> None:
        """One more round."""
        self._rounds += 1
        self._decide_seconds.append(decide_seconds)
        self._round_seconds.append(round_seconds)
        if time.monotonic() - self._logged >= METRICS_EVERY_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self.latencies())

    def latencies(self) -> Latencies:
        """What is remembered; zeros before the first round."""
        decide, whole = _percentiles(self._decide_seconds), _percentiles(self._round_seconds)
        return Latencies(
            rounds=self._rounds,
            decide_median_seconds=decide[49],
            decide_p99_seconds=decide[98],
            round_median_seconds=whole[49],
            round_p99_seconds=whole[98],
        )


class Controller:
    """One controller; the caller sees to it that there is no other."""

    def __init__(self, settings: Settings, ports: Ports, decide: Decide) -> None:
        self._settings = settings
        self._ports = ports
        self._decide = decide
        self._policy: Policy = settings.policy()
        base, longest = settings.command_backoff_base_seconds, settings.command_backoff_max_seconds
        self._actor = Actor(ports.store, ports.runtime, ports.tracking, Backoff(base, longest))
        self._round_backoff = Backoff(base, longest)
        self.metrics = Metrics()

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
            ready()
            stop.wait(self._settings.tick_minimum_seconds)
            self._sleep(cursor, stop)

    def round(self) -> Sequence[Command]:
        """One observation, decision and action; the commands that were decided."""
        start = time.monotonic()
        snapshot = observe(self._ports.store, self._ports.runtime, self._policy, datetime.now(UTC))
        observed = time.monotonic()
        commands = self._decide(snapshot)
        decided = time.monotonic()
        for command in commands:
            log.debug("decided: %s", command)
        self._actor.act(commands)
        self.metrics.note(decided - observed, time.monotonic() - start)
        return commands

    def _sleep(self, cursor: str, stop: threading.Event) -> None:
        if stop.is_set():
            return
        try:
            self._ports.store.wait_for_change(cursor, self._settings.tick_seconds)
        except TransientError:  # the next round meets it, too, and backs off
            stop.wait(self._settings.tick_seconds)

    def _rest_after(self, error: Exception, stop: threading.Event) -> None:
        seconds = self._round_backoff.failed(ROUND_KEY)
        if isinstance(error, TransientError):
            log.warning("this round failed, the next is in %.1f s: %s", seconds, error)
        else:
            log.error("this round failed, the next is in %.1f s", seconds, exc_info=error)
        stop.wait(seconds)


def _percentiles(values: Sequence[float]) -> list[float]:
    """The 1st to 99th percentile."""
    if not values:
        return [0.0] * 99
    return quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
