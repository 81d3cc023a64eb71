"""Which evaluation was the best, and when training stops early: transformers' own callback is the judge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.trainer_callback import EarlyStoppingCallback

from orchestrator.api.formats import JournalRecord
from orchestrator.api.job import HELD_OUT_METRICS, EvaluationSpec, QLoRAJobSpec
from orchestrator.api.losses import Standing, losses

METRICS = sorted({metric for metrics in HELD_OUT_METRICS.values() for metric in metrics})
# Few values, so that ties and steps of exactly the least gain are common; each is a binary fraction.
FIGURES = st.integers(-8, 8).map(lambda eighths: eighths / 8)


def journal(metric: str, figures: list[float]) -> list[JournalRecord]:
    """An evaluation before the first step, better than any later one, and one after each step."""
    rest = {"eval/loss": 1.0} if metric != "loss" else {}
    before = JournalRecord(step=0, time_ms=0, metrics={**rest, f"eval/{metric}": 99.0})
    later = [
        JournalRecord(step=step, time_ms=step, metrics={**rest, f"eval/{metric}": figure})
        for step, figure in enumerate(figures, start=1)
    ]
    return [before, *later]


def last_by_transformers(figures: list[float], *, greater: bool, patience: int, least: float) -> int:
    """The step after which training stops: the last one where it does not."""
    arguments: Any = SimpleNamespace(metric_for_best_model="figure", greater_is_better=greater)
    control: Any = SimpleNamespace(should_training_stop=False)
    callback = EarlyStoppingCallback(patience, least)
    for step, figure in enumerate(figures, start=1):
        known = figures[: step - 1]  # `best_metric` is the trainer's, which takes whatever is better
        state: Any = SimpleNamespace(best_metric=(max if greater else min)(known) if known else None)
        callback.on_evaluate(arguments, state, control, {"eval_figure": figure})
        if control.should_training_stop:
            return step
    return len(figures)


@given(
    figures=st.lists(FIGURES, min_size=1, max_size=24),
    metric=st.sampled_from(METRICS),
    mode=st.sampled_from(["min", "max", None]),
    patience=st.integers(1, 4),
    least=st.sampled_from(["0", "0.125", "0.25", "1"]),
)
def test_the_best_step_and_the_last_are_transformers(
    figures: list[float], metric: str, mode: str | None, patience: int, least: str
) -> None:
    spec = EvaluationSpec.model_validate(
        {"metric": metric, "mode": mode, "early_stopping_patience": patience, "early_stopping_min_delta": least}
    )
    records = journal(metric, figures)
    standing, last = Standing(), 0
    for record in records:
        standing, last = standing.after(record, spec), record.step
        if standing.without_gain >= patience:
            break
    greater = (
        mode == "max"
        if mode is not None
        else metric.split("/")[-1] in ("chosen", "accuracies", "margins", "log_odds_ratio", "log_odds_chosen")
    )
    assert last == last_by_transformers(figures, greater=greater, patience=patience, least=float(least))
    seen = figures[:last]
    assert standing.best_step == 1 + seen.index(max(seen) if greater else min(seen))
    assert Standing.of(records[: last + 1], spec) == standing, "a resumed attempt finds it in the journal"


def test_what_is_no_number_is_never_the_best_and_no_gain() -> None:
    spec = EvaluationSpec(metric="perplexity", keep_best=True)
    records = [
        JournalRecord(step=step, time_ms=1, metrics={"eval/loss": loss, "eval/perplexity": figure})
        for step, loss, figure in [(1, 800.0, float("inf")), (2, 2.0, 7.4), (3, 801.0, float("inf"))]
    ]
    assert Standing.of(records[:1], spec) == Standing(without_gain=1)
    assert losses(records[:1], spec).eval_loss == 800.0, "the last adapter is kept where none is the best"
    assert Standing.of(records, spec) == Standing(best_step=2, best=7.4, without_gain=1)
    assert losses(records, spec).eval_loss == 2.0


def test_the_loss_of_a_job_that_keeps_the_best_is_of_the_adapter_that_had_the_best_metric() -> None:
    metrics = [{"eval/loss": 0.5, "eval/rewards/margins": 1.0}, {"eval/loss": 0.25, "eval/rewards/margins": 0.5}]
    records = [JournalRecord(step=step, time_ms=1, metrics=each) for step, each in enumerate(metrics, start=1)]
    by_margin = EvaluationSpec(metric="rewards/margins", keep_best=True)
    assert losses(records, by_margin).eval_loss == 0.5
    assert losses(records, by_margin.model_copy(update={"keep_best": False})).eval_loss == 0.25


@pytest.mark.parametrize(
    ("dataset", "training", "evaluation", "words"),
    [
        ({}, {}, {"metric": "rewards/margins"}, "of sft loss, perplexity; of dpo loss, rewards/chosen"),
        (
            {"format": "preference"},
            {"objective": {"type": "dpo"}},
            {"metric": "perplexity"},
            "of sft loss, perplexity; of dpo loss, rewards/chosen",
        ),
        ({"evalFraction": "0"}, {}, {"metric": "perplexity"}, "set dataset.evalSource or dataset.evalFraction"),
        ({}, {}, {"metric": "accuracy"}, "evaluation.metric"),
    ],
)
def test_a_metric_that_no_evaluation_shows_is_refused(
    dataset: dict[str, Any], training: dict[str, Any], evaluation: dict[str, Any], words: str
) -> None:
    fields = {
        "model": {"source": "hf://owner/model"},
        "dataset": {"source": "s3://bucket/a.jsonl", "evalFraction": "0.1", **dataset},
        "training": training,
        "evaluation": evaluation,
    }
    with pytest.raises(ValidationError, match=words):
        QLoRAJobSpec.model_validate(fields)
    QLoRAJobSpec.model_validate({**fields, "evaluation": {}})
