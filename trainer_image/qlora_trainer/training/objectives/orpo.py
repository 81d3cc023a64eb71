"""Odds ratio preference optimization (Hong et al., 2024, equations 4, 6 and 7), with TRL's names and defaults.

    loss = -log p(chosen) - beta * log sigmoid(log(odds(chosen) / odds(rejected)))

where p is the model with its adapter, log p an answer's mean over its tokens, and odds(y) = p(y) / (1 - p(y)). No model
is asked but the one that trains. A row holds pairs, of each what was chosen first, then what was rejected.

As the paper has it, the first term is of the chosen answer alone and a mean over pairs; TRL's takes in the prompt, and
is a mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orchestrator.api.job import HELD_OUT_METRICS, ObjectiveSpec
from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows
from qlora_trainer.model.training_model import TrainingModel

NEAREST_TO_CERTAIN = -1e-6
"""A mean log-probability above this counts as this: the odds of what is certain are infinite."""


class OddsRatio:
    """See `objective.Objective`."""

    figures = HELD_OUT_METRICS["orpo"]

    def __init__(self, spec: ObjectiveSpec, model: TrainingModel) -> None:
        self._beta = float(spec.beta)
        self._model = model

    def count(self, data: PreparedRows, rows: Sequence[int]) -> int:
        """Pairs."""
        return sum(len(data.records(index)) for index in rows) // 2

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None]) -> Tensor:
        """The figures, [10]."""
        figures = self.measure(batch) / divisor
        between()
        figures[0].backward()  # pyright: ignore[reportUnknownMemberType]  # torch's own
        return figures.detach()

    def measure(self, batch: MicroBatch) -> Tensor:
        """The sums of the figures, [10]."""
        lengths = torch.tensor(batch.supervised_by_record())
        sums = self._model.log_probabilities(batch)
        return odds_figures(sums / lengths.to(sums.device), beta=self._beta).sum(1)

    def held_out(self, means: Sequence[float]) -> dict[str, float]:
        """The same figures."""
        return dict(zip(self.figures, means, strict=True))

    def memory(self) -> None:
        """Nothing: a step depends on the model and its rows alone."""


def odds_figures(means: Tensor, *, beta: float) -> Tensor:
    """The figures of each pair, [10, pairs], of mean log-probabilities [2 x pairs], chosen and rejected by turns.

    Only the loss has a gradient.
    """
    chosen, rejected = means[0::2], means[1::2]
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    ratio = logsigmoid(log_odds)
    rewards = beta * chosen, beta * rejected
    told = (*rewards, (chosen > rejected).float(), rewards[0] - rewards[1], chosen, rejected, -chosen, ratio, log_odds)
    return torch.stack([-chosen - beta * ratio, *(each.detach() for each in told)])


def _log_odds(log_probability: Tensor) -> Tensor:
    bounded = log_probability.clamp(max=NEAREST_TO_CERTAIN)
    return bounded - torch.log(-torch.expm1(bounded))
