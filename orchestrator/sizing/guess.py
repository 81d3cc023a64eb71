"""Bytes of layers that are in no table and were not traced yet: a guess, and what it may be wrong by.

Until prepare has traced them, such layers are sized like Llama's. 121 jobs of 21 shapes that are in no table were
measured on an H200 (ranks 4 to 256, 384 to 24,576 tokens, micro-batches of 1 to 3) and held against that, predicted
over measured peak, less one.
"""

from __future__ import annotations

from orchestrator.api.job import AdapterSpec
from orchestrator.api.layer_tables import has_table
from orchestrator.api.model_facts import ModelFacts

JOBS = 121
JOBS_UNDER = 40
"""Jobs that took more than was predicted, the usual margin counted."""
MEAN_ERROR, WORST_UNDER, WORST_OVER = 0.0475, -0.163, 0.401
HEADROOM = 1 / (1 + WORST_UNDER)
"""What a prediction is multiplied with so that the worst of these jobs would have fitted."""


def is_guess(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether nobody knows well enough what the model's layers take with such an adapter.

    A trace shows what layers take, but not the workspaces of attention kernels that transformers chooses; under DoRA
    traces were from 2.2 % under to 15 % over.
    """
    if has_table(facts.model_type, use_dora=adapter.use_dora):
        return False
    return facts.trace is None or not facts.trace.packed or adapter.use_dora


def guess_words(adapter: AdapterSpec, facts: ModelFacts) -> str | None:
    """What to know about an estimate that is a guess; None where it is none."""
    if not is_guess(adapter, facts):
        return None
    if facts.trace is not None and facts.trace.packed:
        return f"traces of layers with DoRA were off by more than others, so {HEADROOM - 1:.1%} more are asked for"
    if facts.trace is not None:
        return (
            f"records of model type {facts.model_type} go one by one through transformers' own attention, whose "
            f"kernels' workspaces are not traced, so {HEADROOM - 1:.1%} more are asked for"
        )
    return (
        f"layers of model type {facts.model_type} were never traced: until prepare does, they are sized like "
        f"Llama's; {JOBS} measured jobs of such types were predicted from {-WORST_UNDER:.1%} under to "
        f"{WORST_OVER:.1%} over what they took, {MEAN_ERROR:.2%} off on average, {JOBS_UNDER} of them under, so "
        f"{HEADROOM - 1:.1%} more are asked for"
    )
