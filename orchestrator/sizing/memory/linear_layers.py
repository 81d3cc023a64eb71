"""The linear layers of an architecture, and what they take: NF4 weights, dense copies, adapters, gradients.

Which layers an architecture has, under which names, is read from transformers' own modules (the tests hold it against
them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.memoized import memoized
from orchestrator.sizing.memory.timeline import BF16_BYTES, allocated

CODE_BYTES = 64
MODELS_KEPT = 256
OFFSET_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A quantized matrix of a decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights of the matrix."""
        return self.inputs * self.outputs

    @property
    def weight_bytes(self) -> int:
        """What bitsandbytes keeps: packed weights, scales, scales of scales, the code and the offset."""
        bias = allocated(BF16_BYTES * self.outputs) if self.bias else 0
        return self.streamed_bytes + allocated(CODE_BYTES) + allocated(OFFSET_BYTES) + bias

    @property
    def streamed_bytes(self) -> int:
        """What of that is on the host where the layer is streamed, or in its buffer on the card."""
        scales = -(-self.parameters // trainer_facts.NF4_BLOCK)
        outer = -(-scales // trainer_facts.NF4_SCALE_BLOCK)
        return sum(allocated(size) for size in (-(-self.parameters // 2), scales, 4 * outer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linear layers with one input, some with adapters."""

    inputs: int
    outputs: int
    adapted_outputs: tuple[int, ...]
    """Outputs of each member with an adapter."""

    @property
    def adapters(self) -> int:
        """Members with an adapter."""
        return len(self.adapted_outputs)

    @property
    def dense_bytes(self) -> int:
        """The weights, dequantized."""
        return self.inputs * self.outputs * BF16_BYTES

    def gradients(self, rank: int) -> tuple[int, ...]:
        """Bytes of the adapters' gradients as they come to be: of each B by itself, then of A in one piece."""
        elements = (*(rank * outputs for outputs in self.adapted_outputs), rank * self.inputs * self.adapters)
        return tuple(count * BF16_BYTES for count in elements)

    def gradient_bytes(self, rank: int) -> int:
        """The sum of `gradients` as the allocator hands it out."""
        return _gradient_bytes(self, rank)


@lru_cache(maxsize=MODELS_KEPT)
def _gradient_bytes(group: Group, rank: int) -> int:
    return sum(map(allocated, group.gradients(rank)))


@memoized(MODELS_KEPT)
def linears(facts: ModelFacts) -> tuple[Linear, ...]:
    """The matrices of one decoder layer, in the order of its modules."""
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    match facts.model_type:
        case "phi3":
            shapes = {"o_proj": (q, h), "qkv_proj": (h, q + 2 * kv), "gate_up_proj": (h, 2 * i), "down_proj": (i, h)}
        case "gpt_neox":
            shapes = {
                "query_key_value": (h, q + 2 * kv),
                "dense": (q, h),
                "dense_h_to_4h": (h, i),
                "dense_4h_to_h": (i, h),
            }
        case "starcoder2":
            attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
            shapes = {**attention, "c_fc": (h, i), "c_proj": (i, h)}
        case _:
            attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
            shapes = {**attention, **_mlp(facts)}
    biased = _BIASED.get(facts.model_type, frozenset())
    return tuple(
        Linear(name=name, inputs=inputs, outputs=outputs, bias=biased is None or name in biased)
        for name, (inputs, outputs) in shapes.items()
    )


def _mlp(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """The MLP; in a mixture what every token goes through beside the routed experts (`sizing/memory/experts`)."""
    h, i = facts.hidden_size, facts.intermediate_size
    gate: dict[str, tuple[int, int]] = {}
    if facts.mixture is not None:
        if not facts.mixture.shared_size:
            return {}
        i, gate = facts.mixture.shared_size, {"shared_expert_gate": (h, 1)}
    return {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h), **gate}


_BIASED: dict[str, frozenset[str] | None] = {
    "qwen2": frozenset({"q_proj", "k_proj", "v_proj"}),
    "qwen2_moe": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gpt_neox": None,
    "starcoder2": None,
}
"""Which layers have a bias, by model type: some, or all."""


def targeted(adapter: AdapterSpec, every: Sequence[Linear]) -> tuple[Linear, ...]:
    """The matrices with an adapter; all of them where a target's name is not one of these."""
    if adapter.target_modules == "all-linear":
        return tuple(every)
    wanted = {name.rsplit(".", 1)[-1] for name in adapter.target_modules}
    unknown = wanted - {linear.name for linear in every}
    return tuple(every) if unknown else tuple(linear for linear in every if linear.name in wanted)


GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "output": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}
"""What the trainer multiplies in one product where it computes the layer."""


def group(names: Sequence[str], every: Sequence[Linear], adapted: Sequence[Linear]) -> Group:
    """The group of the named matrices, empty where there are none."""
    members = [linear for linear in every if linear.name in names]
    return Group(
        inputs=members[0].inputs if members else 0,
        outputs=sum(member.outputs for member in members),
        adapted_outputs=tuple(member.outputs for member in members if member in adapted),
    )
