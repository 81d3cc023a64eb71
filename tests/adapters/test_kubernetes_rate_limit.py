"""The limit on requests to the API server."""

from __future__ import annotations

from itertools import pairwise

from orchestrator.adapters.kubernetes.api import NO_BOUND, RateLimiter


def test_after_a_pause_a_burst_goes_at_once_and_what_follows_at_the_rate() -> None:
    now = 100.0
    limiter = RateLimiter(50, 3, clock=lambda: now)
    waits = [limiter.seconds_to_wait("pods") for _ in range(6)]
    assert waits[:3] == [0, 0, 0]
    assert [round(wait, 9) for wait in waits[3:]] == [0.02, 0.04, 0.06]
    now += 1000  # however long the pause is, it earns one burst
    waits = [limiter.seconds_to_wait("pods") for _ in range(5)]
    assert [round(wait, 9) for wait in waits] == [0, 0, 0, 0.02, 0.04]


def test_whoever_waits_as_told_keeps_to_the_rate() -> None:
    now, sent = 0.0, list[float]()
    limiter = RateLimiter(10, 1, clock=lambda: now)
    for _ in range(20):
        now += limiter.seconds_to_wait("pods")
        sent.append(now)
    assert all(round(after - before, 9) == 0.1 for before, after in pairwise(sent))


def test_each_kind_of_object_has_a_limit_of_its_own() -> None:
    limiter = RateLimiter(1, 1, clock=lambda: 0.0)
    assert [limiter.seconds_to_wait(kind) for kind in ("pods", "qlorajobs", "pods")] == [0, 0, 1]


def test_without_a_bound_nobody_waits() -> None:
    assert {NO_BOUND.seconds_to_wait("pods") for _ in range(1000)} == {0.0}
