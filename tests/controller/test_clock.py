"""The controller's clock tells what it was put by, and nothing else."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator.controller.clock import Clock
from tests.builders import NOW


class Machine:
    """Two clocks, of which one can be put."""

    def __init__(self) -> None:
        self.wall, self.steady = NOW, 100.0
        self.clock = Clock(wall=lambda: self.wall, steady=lambda: self.steady)

    def run(self, seconds: float, put_seconds: float = 0.0) -> float:
        self.steady += seconds
        self.wall += timedelta(seconds=seconds + put_seconds)
        assert self.clock.now() == self.wall
        return self.clock.step_seconds


@pytest.mark.parametrize("seconds", [7200.0, -7200.0])
def test_a_step_is_told_until_it_was_taken_into_account(seconds: float) -> None:
    machine = Machine()
    assert machine.run(3600) == 0
    assert machine.run(5, put_seconds=seconds) == pytest.approx(seconds)
    assert machine.run(5) == pytest.approx(seconds), "a round that failed has not told of it"
    machine.clock.step_is_told()
    assert machine.run(5) == 0


def test_a_clock_that_is_slewed_makes_no_step() -> None:
    machine = Machine()
    assert [machine.run(60, put_seconds=0.03) for _ in range(1000)] == [0.0] * 1000
