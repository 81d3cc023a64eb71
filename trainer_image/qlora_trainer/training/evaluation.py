"""The figures of held-out data: when they are taken, and how.

Whether an evaluation is due depends on the step and the journal alone, so an attempt that was stopped between a step
and its evaluation makes up for it when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from orchestrator.api.formats import JournalRecord, Metric
from orchestrator.api.job import EvaluationSpec
from qlora_trainer.data.micro_batch import PreparedRows, micro_batches
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.objectives.objective import Objective


def is_due(step: int, steps: int, spec: EvaluationSpec, records: Iterable[JournalRecord]) -> bool:
    """Before the first step (the base itself), every `everySteps`, and at the end; once each."""
    wanted = step % spec.every_steps == 0 or step == steps
    return wanted and not any(record.step == step and Metric.EVAL_LOSS in record.metrics for record in records)


@torch.no_grad()
def evaluate(
    model: TrainingModel,
    objective: Objective,
    data: PreparedRows,
    micro_batch_size: int,
    between: Callable[[], None],
) -> dict[str, float]:
    """The objective's figures over all held-out data, by name; `between` is called after every micro-batch."""
    rows = range(len(data))
    count = objective.count(data, rows)
    model.eval()
    # In double precision on the host: the means must not depend on how many numbers were added before.
    totals = [0.0] * len(objective.figures)
    for batch in micro_batches(data, rows, micro_batch_size):
        totals = [total + float(found) for total, found in zip(totals, objective.measure(batch).cpu(), strict=True)]
        between()
    return objective.held_out([total / count for total in totals])
