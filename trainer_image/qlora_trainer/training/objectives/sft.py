"""Supervised fine-tuning: the mean cross-entropy of the tokens that carry loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows, supervised_tokens
from qlora_trainer.model.training_model import TrainingModel

LARGEST_EXPONENT = math.log(sys.float_info.max)


class CrossEntropy:
    """See `objective.Objective`."""

    figures = ("loss",)

    def __init__(self, model: TrainingModel) -> None:
        self._model = model

    def count(self, data: PreparedRows, rows: Sequence[int]) -> int:
        """Tokens that carry loss."""
        return supervised_tokens(data, rows)

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None]) -> Tensor:
        """The loss, [1]."""
        return self._model.accumulate(batch, divisor=divisor, between=between).unsqueeze(0)

    def measure(self, batch: MicroBatch) -> Tensor:
        """The summed loss, [1]."""
        return self._model.loss(batch, divisor=1.0).unsqueeze(0)

    def held_out(self, means: Sequence[float]) -> dict[str, float]:
        """The loss and e to it; the perplexity of a loss that is no use any more is no number either."""
        (loss,) = means
        return {"loss": loss, "perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else math.inf}

    def memory(self) -> None:
        """Nothing: a step depends on the model and its rows alone."""
