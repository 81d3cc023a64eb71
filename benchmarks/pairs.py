"""Preferences that everybody is measured on: the same random ids, in the same order.

A case's sequence is what a row of the trainer holds, a pair: each answer with its prompt is half of it, and the prompt
is half of that. So `4096x2` is two pairs a step, of answers that have 2,048 tokens with their prompts, and all four
count as tokens of the step. There are few micro-batches, which come again and again: margins grow on what is learned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import FIRST_ORDINARY_TOKEN, Case

MICRO_BATCHES = 4
BETA = 0.1
ADAPTER_FILE = "adapter.safetensors"
"""What everybody's training begins with."""
COMPARED_STEPS = 12
"""Of so many steps loss and margin are kept, to be compared."""


class Pair(NamedTuple):
    """Token ids of a preference."""

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]


def pairs(case: Case, vocabulary: int) -> list[Pair]:
    """Those of all micro-batches, in their order."""
    random = np.random.RandomState(0)
    answer = case.sequence // 2
    prompt = answer // 2
    found: list[Pair] = []
    for _ in range(MICRO_BATCHES * case.micro_batch):
        ids = random.randint(FIRST_ORDINARY_TOKEN, vocabulary, 2 * answer - prompt, dtype=np.int32)
        found.append(Pair(ids[:prompt], ids[prompt:answer], ids[answer:]))
    return found
