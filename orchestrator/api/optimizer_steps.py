"""How many optimizer steps a data set gives: what prepare counts, and a plan foresees."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction

from orchestrator.api.base import decimal
from orchestrator.api.job import TrainingSpec

FEWEST_STEPS = 20
"""With fewer optimizer steps than about this an adapter hardly moves."""
FEW_STEPS = "few steps"
"""How the warning about them begins."""


def held_out(samples: Sequence[int], fraction: Decimal, seed: int) -> set[int]:
    """Which of two or more samples of a data set, by index, a share above 0 holds out: at least one, and not all.

    Each sample's own hash decides, so samples that are added to the data set later move none of the others.
    """
    assert len(samples) >= 2, "of a single sample no share can be held out"
    bound = math.ceil(fraction * 2**64)
    chosen = {sample for sample in samples if _draw(seed, sample) < bound}
    if not chosen:
        return {min(samples, key=lambda sample: _draw(seed, sample))}
    if len(chosen) == len(samples):
        chosen.remove(max(samples, key=lambda sample: _draw(seed, sample)))
    return chosen


def _draw(seed: int, index: int) -> int:
    """A number below 2 ** 64 that depends on the seed and the sample's index alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big")


def optimizer_steps(training: TrainingSpec, train_sequences: int) -> int:
    """Optimizer steps of the whole job; the last one may be of fewer sequences."""
    if training.max_steps is not None:
        return training.max_steps
    # Exact: 0.1 epochs of 160 sequences is one batch of 16, not a little more.
    return math.ceil(Fraction(decimal(training.epochs)) * train_sequences / training.global_batch_size)


def steps_warning(steps: int, train_sequences: int, training: TrainingSpec) -> Iterator[str]:
    """A warning where the job ends before it has learnt anything."""
    if steps >= FEWEST_STEPS:
        return
    if training.max_steps is not None:
        yield f"{FEW_STEPS}: spec.training.maxSteps is {steps}, with which an adapter hardly learns; raise it"
        return
    batch = max(1, training.global_batch_size * steps // FEWEST_STEPS)
    lower = f"lower spec.training.globalBatchSize to {batch}" if batch < training.global_batch_size else ""
    more = "raise spec.training.epochs"
    yield (
        f"{FEW_STEPS}: {training.epochs} epochs of {train_sequences} sequences in batches of "
        f"{training.global_batch_size} are {steps} optimizer steps, with which an adapter hardly learns; "
        f"{f'{lower} or {more}' if lower else more}"
    )
