"""Records without a meaning, to try a model on: the same tokens in every process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qlora_trainer.data.micro_batch import MicroBatch, collate


def probe(*records: Iterable[int]) -> MicroBatch:
    """A row of records, given as token ids, of which every token is supervised."""
    rows = [np.fromiter(record, dtype=np.int32) for record in records]
    return collate([(ids, ids, np.arange(len(ids), dtype=np.int32)) for ids in rows])


def drawn_probe(lengths: Sequence[int], tokens: range) -> MicroBatch:
    """A row of records of so many tokens each, drawn from a range of ids."""
    random = np.random.RandomState(0)
    return probe(*(random.randint(tokens.start, tokens.stop, size=length) for length in lengths))
