"""Direct preference optimization (Rafailov et al., 2023, equation 7), with TRL's names and defaults.

    loss = -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

where p is the model with its adapter and q the one that training began with (`reference`). With a label smoothing of e
it is (1 - e) times that, plus e times the same of the pair the other way round (Mitchell, 2023:
https://ericmitchell.ai/cdpo.pdf).

Log-probabilities are sums over an answer's tokens. A row holds pairs, of each what was chosen first, then what was
rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orchestrator.api.job import HELD_OUT_METRICS, ObjectiveSpec
from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.storage.tensors import Tensors
from qlora_trainer.training.objectives.reference import Reference

TRAIN, EVALUATION = "train", "eval"
"""Names of what is remembered of the reference."""


class DirectPreference:
    """See `objective.Objective`."""

    figures = HELD_OUT_METRICS["dpo"]

    def __init__(
        self,
        spec: ObjectiveSpec,
        model: TrainingModel,
        train_rows: PreparedRows,
        eval_rows: PreparedRows | None,
        memory: Tensors,
    ) -> None:
        self._beta, self._smoothing = float(spec.beta), float(spec.label_smoothing)
        self._model = model
        self._references = {TRAIN: Reference(model, train_rows, memory.get(TRAIN))}
        if eval_rows is not None:
            self._references[EVALUATION] = Reference(model, eval_rows, memory.get(EVALUATION))

    def count(self, data: PreparedRows, rows: Sequence[int]) -> int:
        """Pairs."""
        return sum(len(data.records(index)) for index in rows) // 2

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None]) -> Tensor:
        """The figures, [7]."""
        figures = self._sums(batch, self._references[TRAIN]) / divisor
        between()
        figures[0].backward()  # pyright: ignore[reportUnknownMemberType]  # torch's own
        return figures.detach()

    def measure(self, batch: MicroBatch) -> Tensor:
        """The sums of the figures, [7]."""
        return self._sums(batch, self._references[EVALUATION])

    def held_out(self, means: Sequence[float]) -> dict[str, float]:
        """The same figures."""
        return dict(zip(self.figures, means, strict=True))

    def memory(self) -> Tensors:
        """What the reference has said so far."""
        return {name: reference.values for name, reference in self._references.items()}

    def _sums(self, batch: MicroBatch, reference: Reference) -> Tensor:
        base = reference.log_probabilities(batch)  # first: what it takes is gone when gradients are kept
        policy = self._model.log_probabilities(batch)
        return preference_figures(policy, base, beta=self._beta, label_smoothing=self._smoothing).sum(1)


def preference_figures(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """The figures of each pair, [7, pairs], of log-probabilities [2 x pairs], chosen and rejected by turns.

    Only the loss has a gradient.
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    told = (chosen, rejected, (chosen > rejected).float(), margins, policy[0::2], policy[1::2])
    return torch.stack([loss, *(each.detach() for each in told)])
