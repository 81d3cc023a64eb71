"""What answers to held-out prompts take: `qlora_trainer/model/answering.py`, one prompt at a time, once trained.

transformers and PEFT compute the layers, whatever computed them in training. Bytes are an upper bound, for they count
only where training itself takes little: a cache of every layer, and one layer's work on a whole prompt; on an H200,
eight models of six types took 24 to 88 % of it. Times are those of a token at a time: the weights are read once for
each, and the host launches every operation.
"""

from __future__ import annotations

from orchestrator.api import trainer_facts
from orchestrator.api.job import GenerationSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.hardware import Card
from orchestrator.sizing.memory.attention import SOFTCAPPED_TYPES
from orchestrator.sizing.memory.linear_layers import linears
from orchestrator.sizing.memory.timeline import BF16_BYTES

INNER_TENSORS, HIDDEN_TENSORS, HEAD_TENSORS = 7, 10, 6
"""Tensors as wide as the MLP, the stream and all heads that a layer has at one time: products with what PEFT adds."""
WHO_ANSWER = 3
"""The adapter, the base and the alias's holder."""
SCORE_BYTES = 12
"""Of each pair of tokens and head where no kernel of torch's attends: in bfloat16, in float32 and as probabilities."""
TOKEN_LAYER_SECONDS = 0.003
"""The host's work for a token and layer: 0.0012 to 0.0028 on an H200's host, 0.0035 for layers of experts."""
WEIGHT_BYTES = 0.52
"""Read of each weight: NF4 and its scales."""
MEMORY_EFFICIENCY = 0.5
PROMPT_TOKENS_PER_TOKEN = 64
"""Tokens of a prompt that take as long as one of an answer, at the least."""


def answer_tokens(sequence_length: int) -> int:
    """The most tokens of prompt and answer together."""
    return min(sequence_length, trainer_facts.ANSWER_TOKENS)


def answering_bytes(facts: ModelFacts, sequence_length: int) -> int:
    """Beside what lasts: the cache of a record, a layer's part of it twice while it grows, and a layer's work."""
    tokens = answer_tokens(sequence_length)
    heads = facts.num_key_value_heads * facts.head_dim
    cache = 2 * tokens * heads * BF16_BYTES * (facts.num_layers + 1)
    mixture = facts.mixture
    inner = facts.intermediate_size
    if mixture is not None:
        inner = mixture.shared_size + mixture.experts_per_token * mixture.expert_size
    widths = INNER_TENSORS * inner + HIDDEN_TENSORS * facts.hidden_size
    widths += HEAD_TENSORS * facts.num_attention_heads * facts.head_dim
    dense = max(linear.parameters for linear in linears(facts)) * BF16_BYTES
    experts = 0 if mixture is None else 3 * mixture.experts * mixture.expert_size * facts.hidden_size * BF16_BYTES
    head = 4 * facts.vocab_size * BF16_BYTES
    scores = SCORE_BYTES * facts.num_attention_heads * tokens**2 if _is_eager(facts) else 0
    return scores + cache + tokens * widths * BF16_BYTES + max(dense, experts) + head


def _is_eager(facts: ModelFacts) -> bool:
    """Whether transformers may compute attention by its own code."""
    sinks = facts.trace is not None and any(kind.heads.sinks for kind in facts.trace.kinds if kind.heads is not None)
    return facts.model_type in SOFTCAPPED_TYPES or facts.record_by_record or sinks


def answering_seconds(generation: GenerationSpec, facts: ModelFacts, sequence_length: int, card: Card) -> float:
    """The longest that all answers take: of the adapter, the base and the alias's holder."""
    most = answer_tokens(sequence_length)
    tokens = min(generation.max_new_tokens, most) + most / PROMPT_TOKENS_PER_TOKEN
    return WHO_ANSWER * generation.prompts * tokens * token_seconds(facts, card)


def token_seconds(facts: ModelFacts, card: Card) -> float:
    """A token of an answer."""
    mixture = facts.mixture
    each = sum(linear.parameters for linear in linears(facts))
    if mixture is not None:
        each += 3 * mixture.experts * mixture.expert_size * facts.hidden_size
    head = facts.vocab_size * facts.hidden_size * BF16_BYTES
    read = each * facts.num_layers * WEIGHT_BYTES + head
    return max(facts.num_layers * TOKEN_LAYER_SECONDS, read / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY))
