"""What the loop asks of an objective, and which one a job has.

An objective makes figures of a micro-batch, of which the first is the loss. All of them are sums over what it counts
(tokens, pairs), over a divisor that the caller gives: the count of the whole step, so that how a step is split into
micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from orchestrator.api.job import ObjectiveSpec
from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.storage.tensors import Tensors
from qlora_trainer.training.objectives.dpo import DirectPreference
from qlora_trainer.training.objectives.orpo import OddsRatio
from qlora_trainer.training.objectives.sft import CrossEntropy


class Objective(Protocol):
    """One way to a loss."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of what it measures, as in the journal behind `train/`; the first is the loss."""
        ...

    def count(self, data: PreparedRows, rows: Sequence[int]) -> int:
        """How many tokens or pairs of these rows the figures are means over."""
        ...

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None]) -> Tensor:
        """The figures of a training micro-batch, float32; the loss's gradients are added to the adapter's.

        `between` is called between both passes. Good until the next call.
        """
        ...

    def measure(self, batch: MicroBatch) -> Tensor:
        """The sums of the figures of a held-out micro-batch, float32; to be asked without gradients."""
        ...

    def held_out(self, means: Sequence[float]) -> dict[str, float]:
        """What an evaluation shows of the means of the figures, by name: `HELD_OUT_METRICS` of the API."""
        ...

    def memory(self) -> Tensors | None:
        """What a resumed attempt must know to go on bit for bit."""
        ...


def objective_of(
    spec: ObjectiveSpec,
    model: TrainingModel,
    train_rows: PreparedRows,
    eval_rows: PreparedRows | None,
    memory: Tensors | None,
) -> Objective:
    """The job's objective, with the `memory` of the attempt that it resumes."""
    if spec.type == "sft":
        return CrossEntropy(model)
    if spec.type == "orpo":
        return OddsRatio(spec, model)
    return DirectPreference(spec, model, train_rows, eval_rows, memory or {})
