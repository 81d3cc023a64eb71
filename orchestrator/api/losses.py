"""The losses of a run, as its journal tells them: the one place that says what a training loss at the end is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from orchestrator.api.formats import JournalRecord, Metric

LOSSES_AVERAGED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of a run."""

    train_loss: float | None
    """Mean of the last `LOSSES_AVERAGED` steps."""
    eval_loss: float | None
    """Held-out loss of the adapter that the job ends with."""
    eval_loss_before: float | None
    """Held-out loss before the first step."""


def losses(records: Sequence[JournalRecord], *, keep_best: bool) -> Losses:
    """The losses in a journal; with `keep_best` the job ends with the best evaluation's adapter."""
    trained = values(records, Metric.TRAIN_LOSS)
    held_out = {
        record.step: record.metrics[Metric.EVAL_LOSS] for record in records if Metric.EVAL_LOSS in record.metrics
    }
    before = held_out.pop(0, None)
    after = list(held_out.values())
    return Losses(
        train_loss=mean(trained[-LOSSES_AVERAGED:]) if trained else None,
        eval_loss=(min(after) if keep_best else after[-1]) if after else None,
        eval_loss_before=before,
    )


def values(records: Sequence[JournalRecord], metric: Metric) -> list[float]:
    """Every value of a metric, oldest first."""
    return [record.metrics[metric] for record in records if metric in record.metrics]
