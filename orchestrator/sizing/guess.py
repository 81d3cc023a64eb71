"""Bytes of layers that are in no table and were not traced yet: a guess, and how far such guesses were off.

Until prepare has traced them, such layers are sized like Llama's. The jobs of `benchmarks/results/untabled_rows.jsonl`
and `held_out_rows.jsonl` say what that is worth: predicted over measured peak, less one. No room could make up for it,
and none is needed: a job gets no GPU before prepare has run.
"""

from __future__ import annotations

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.layer_tables import has_table
from orchestrator.api.model_facts import ModelFacts

JOBS, MODELS = 288, 33
JOBS_UNDER = 140
"""Jobs that took more than was predicted, the usual margin counted."""
MEAN_ERROR, WORST_UNDER, WORST_OVER = 0.1219, -0.9677, 1.2055


def guess_words(adapter: AdapterSpec, facts: ModelFacts) -> str | None:
    """What to know about an estimate that is a guess; None where it is none."""
    known = has_table(facts.model_type, use_dora=adapter.use_dora, experts=adapter.experts)
    if known or facts.trace is not None:
        return None
    adapted = " with adapters on their experts" if adapter.experts else ""
    return (
        f"layers of model type {facts.model_type}{adapted} were never traced: until prepare does, they are sized like "
        f"Llama's; {JOBS} measured jobs of {MODELS} such models were predicted from {-WORST_UNDER:.1%} under to "
        f"{WORST_OVER:.1%} over what they took, {MEAN_ERROR:.1%} off on average, {JOBS_UNDER} of them under; no job "
        "gets a GPU by this figure, as prepare comes first"
    )
