"""The log-probabilities of records by the model that training began with: the base without its adapter, or with the
one that the job goes on from.

They never change, so each is computed once: in the first micro-batch that has the record, without gradients. From then
on it is remembered, in checkpoints too. A job that is resumed finds what was computed, and computes the others in the
very micro-batches in which it would have: it goes on bit for bit. There is no second model, and no pass over the data
before the first step, which somebody who is preempted often would never get through.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows
from qlora_trainer.model.training_model import TrainingModel


class Reference:
    """Of the records of one file."""

    def __init__(self, model: TrainingModel, data: PreparedRows, known: Tensor | None) -> None:
        """`known` is the `values` of an earlier attempt."""
        self._model = model
        self.values = torch.full((data.record_count,), torch.nan) if known is None else known.clone()
        """float32 [records], on the host; NaN where it is not known yet."""
        assert self.values.shape == (data.record_count,), "what is remembered is of other data"

    def log_probabilities(self, batch: MicroBatch) -> Tensor:
        """Of the micro-batch's records, [records], on the model's device."""
        records = np.array(batch.records)
        found = self.values[records]
        if bool(found.isnan().any()):
            found = self._model.reference_log_probabilities(batch).cpu()
            self.values[records] = found
        return found.to(self._model.device)
