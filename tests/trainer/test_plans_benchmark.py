"""`benchmarks.plans` on the CPU, and what it makes of the times that it took."""

from __future__ import annotations

import importlib
import time
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which allows random weights for good when it is imported; the tests after it must not."""
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    return importlib.import_module("benchmarks.plans")


def row(seconds: float | None, micro_batch_size: int = 1) -> dict[str, Any]:
    found = {"error": "out of memory"} if seconds is None else {"step_seconds": seconds}
    return {"plan": {"microBatchSize": micro_batch_size}, "peak_allocated_bytes": 1, **found}


def test_the_chosen_plan_is_held_against_the_fastest_that_ran(plans: ModuleType) -> None:
    answer = plans.judge([row(1.1), row(1.0, 2), row(None, 4), row(1.4, 8)])
    assert answer["chosen_over_fastest"] == 1.1
    assert [each.get("step_seconds") for each in answer["plans"]] == [1.1, 1.0, None, 1.4]


def test_a_question_without_a_rival_or_a_time_of_the_chosen_plan_does_not_count(plans: ModuleType) -> None:
    unanswered = {
        "alone": plans.judge([row(1.0), row(None, 2)]),
        "failed": plans.judge([row(None), row(1.0), row(1.1)]),
    }
    good, bad = plans.judge([row(1.04), row(1.0)]), plans.judge([row(1.06), row(1.0)])
    told = plans.report({**unanswered, "good": good, "bad": bad})
    assert (told["questions"], told["within_5_percent"], told["worst"]) == (2, 1, 1.06)


def test_a_question_runs_the_chosen_plan_and_its_rivals(plans: ModuleType) -> None:
    question = plans.Question(model="tiny", sequence_length=64, global_batch_size=2, class_name="16Gi")
    answer = plans.ask(question, time.monotonic() + 300)
    assert len(answer["plans"]) >= 3
    assert all(each["step_seconds"] > 0 for each in answer["plans"])
    assert answer["chosen_over_fastest"] >= 1


def test_a_question_for_which_no_time_is_left_is_not_asked(plans: ModuleType) -> None:
    question = plans.Question(model="tiny", sequence_length=64, global_batch_size=2, class_name="16Gi")
    assert plans.ask(question, time.monotonic()) == {"plans": []}
