"""What held-out records ask, and what they answer, in tokens.

The last stretch of a record that carries loss is its answer, and all before it the prompt: what the model is asked is
what it was trained to go on from, whatever format the record came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orchestrator.api import trainer_facts
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import Numbers, PreparedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question and the answer that is wanted, token ids."""

    prompt: Numbers
    reference: Numbers


def all_prompts(rows: PreparedRows, sequence_length: int) -> Iterator[Prompt]:
    """Of every record that has both and is short enough.

    One that fills a sequence may have been truncated, and so has its answer.
    """
    longest = min(sequence_length - 1, trainer_facts.ANSWER_TOKENS)
    for index in range(len(rows)):
        ids, labels, positions = rows.row(index)
        ends = np.append(np.flatnonzero(positions == 0)[1:], len(ids))
        for start, end in zip(np.flatnonzero(positions == 0), ends, strict=True):
            found = _prompt(ids[start:end], labels[start:end])
            if found is not None and end - start <= longest:
                yield found


def chosen_prompts(rows: PreparedRows, *, count: int, sequence_length: int, seed: int) -> list[Prompt]:
    """So many of them, drawn by the seed, in the order in which they lie; all where there are no more."""
    found = list(all_prompts(rows, sequence_length))
    drawn = np.random.RandomState(seed).permutation(len(found))[:count]
    return [found[index] for index in sorted(drawn)]


def _prompt(ids: Numbers, labels: Numbers) -> Prompt | None:
    supervised = labels != IGNORED_LABEL
    if not supervised.any():
        return None
    end = len(ids) - int(supervised[::-1].argmax())
    before = np.flatnonzero(~supervised[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    return Prompt(prompt=ids[:start], reference=ids[start:end]) if start > 0 else None
