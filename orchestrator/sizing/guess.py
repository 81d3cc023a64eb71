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
RECORDS_JOBS, RECORDS_WORST_UNDER = 18, -0.183
"""Traced jobs whose records go one by one (GPT-OSS, GPT-J, StableLM; the same ranks and lengths), and the worst."""


def _is_guess(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether nobody knows well enough what the model's layers take with such an adapter.

    A trace shows what layers take, but not the workspaces of attention kernels that transformers chooses; under DoRA
    traces were from 2.2 % under to 15 % over.
    """
    if has_table(facts.model_type, use_dora=adapter.use_dora, experts=adapter.experts):
        return False
    return facts.trace is None or not facts.trace.packed or adapter.use_dora


def headroom(adapter: AdapterSpec, facts: ModelFacts) -> float:
    """What a prediction is multiplied with: 1 where it is no guess."""
    if not _is_guess(adapter, facts):
        return 1.0
    one_by_one = facts.trace is not None and not facts.trace.packed
    return 1 / (1 + RECORDS_WORST_UNDER) if one_by_one else HEADROOM


def guess_words(adapter: AdapterSpec, facts: ModelFacts) -> str | None:
    """What to know about an estimate that is a guess; None where it is none."""
    if not _is_guess(adapter, facts):
        return None
    more = f"so {headroom(adapter, facts) - 1:.1%} more are asked for"
    if facts.trace is not None and facts.trace.packed:
        return f"traces of layers with DoRA were off by more than others, {more}"
    if facts.trace is not None:
        return (
            f"records of model type {facts.model_type} go one by one through transformers' own attention, whose "
            f"kernels' workspaces are not traced: the worst of {RECORDS_JOBS} measured jobs was predicted "
            f"{-RECORDS_WORST_UNDER:.1%} under what it took, {more}"
        )
    adapted = " with adapters on their experts" if adapter.experts else ""
    return (
        f"layers of model type {facts.model_type}{adapted} were never traced: until prepare does, they are sized like "
        f"Llama's; {JOBS} measured jobs of such types were predicted from {-WORST_UNDER:.1%} under to "
        f"{WORST_OVER:.1%} over what they took, {MEAN_ERROR:.2%} off on average, {JOBS_UNDER} of them under, {more}; "
        "layers that carry a state (Mamba, delta nets) may take many times as much, which prepare finds on a CPU"
    )
