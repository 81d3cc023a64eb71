"""Bytes of model types whose layers were neither traced nor written by hand: a guess, and what it may be wrong by.

Such layers are sized like Llama's. 121 jobs of 21 shapes that are in no table were measured on an H200 (ranks 4 to 256,
384 to 24,576 tokens, micro-batches of 1 to 3) and held against that, predicted over measured peak, less one.
"""

from __future__ import annotations

from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.memory.traced_layer import is_traced

JOBS = 121
JOBS_UNDER = 40
"""Jobs that took more than was predicted, the usual margin counted."""
MEAN_ERROR, WORST_UNDER, WORST_OVER = 0.0475, -0.163, 0.401
HEADROOM = 1 / (1 + WORST_UNDER)
"""What a prediction is multiplied with so that the worst of these jobs would have fitted."""


def is_guess(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether nobody knows what the model's layers take with such an adapter."""
    if facts.model_type in trainer_facts.HANDWRITTEN_TYPES and not adapter.use_dora:
        return False
    return not is_traced(facts.model_type)


def guess_words(adapter: AdapterSpec, facts: ModelFacts) -> str | None:
    """What to know about an estimate that is a guess; None where it is none."""
    if not is_guess(adapter, facts):
        return None
    return (
        f"layers of model type {facts.model_type} were never traced, so they are sized like Llama's; "
        f"{JOBS} measured jobs of such types were predicted from {-WORST_UNDER:.1%} under to {WORST_OVER:.1%} over "
        f"what they took, {MEAN_ERROR:.2%} off on average, {JOBS_UNDER} of them under, so {HEADROOM - 1:.1%} more "
        "are asked for"
    )
