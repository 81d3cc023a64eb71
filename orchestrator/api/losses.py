"""What a run's journal says of its losses and evaluations: the one place that says what a training loss at the end is,
and which evaluation was the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from orchestrator.api.formats import EVALUATED, JournalRecord, Metric
from orchestrator.api.job import EvaluationSpec

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What evaluations have come to so far: it follows from the journal alone, so a resumed attempt finds it again."""

    best_step: int | None = None
    """The step whose adapter had the best `evaluation.metric`, the first of them."""
    best: float | None = None
    """The metric of that step."""
    without_gain: int = 0
    """Evaluations in a row that early stopping took for no better: as transformers' EarlyStoppingCallback counts them,
    against the best before each, however small the step to that was."""

    def after(self, record: JournalRecord, spec: EvaluationSpec) -> Standing:
        """With one more evaluation; what training began with is to be beaten, and is no result."""
        if Metric.EVAL_LOSS not in record.metrics or record.step == 0:
            return self
        found = record.metrics.get(f"{EVALUATED}/{spec.metric}")
        if found is None:  # no finite number
            gain = is_better = False
        elif self.best is None:
            gain = is_better = True
        else:
            by = self.best - found if spec.lower_is_better else found - self.best
            gain, is_better = by > float(spec.early_stopping_min_delta), by > 0
        return Standing(
            best_step=record.step if is_better else self.best_step,
            best=found if is_better else self.best,
            without_gain=0 if gain else self.without_gain + 1,
        )

    @classmethod
    def of(cls, records: Sequence[JournalRecord], spec: EvaluationSpec) -> Standing:
        """After all evaluations of a journal."""
        standing = cls()
        for record in records:
            standing = standing.after(record, spec)
        return standing


def losses(records: Sequence[JournalRecord], spec: EvaluationSpec) -> Losses:
    """The losses in a journal; with `keepBest` the job ends with the best evaluation's adapter."""
    trained = values(records, Metric.TRAIN_LOSS)
    held_out = {
        record.step: record.metrics[Metric.EVAL_LOSS] for record in records if Metric.EVAL_LOSS in record.metrics
    }
    before = held_out.pop(0, None)
    last = max(held_out, default=None)
    best = Standing.of(records, spec).best_step if spec.keep_best else None
    kept = last if best is None else best
    return Losses(
        train_loss=mean(trained[-LOSSES_AVERAGED:]) if trained else None,
        eval_loss=None if kept is None else held_out[kept],
        eval_loss_before=before,
    )


def values(records: Sequence[JournalRecord], metric: Metric) -> list[float]:
    """Every value of a metric, oldest first."""
    return [record.metrics[metric] for record in records if metric in record.metrics]
