"""How many bytes a job takes under a memory plan, line by line.

An upper bound on PyTorch's peak allocation for QLoRA on a decoder-only transformer with gated MLPs: NF4 linears
with double quantization, everything else in bf16. `core/plans` chooses among plans with it. It is held against
measured peaks in tests/core/test_sizing.py.

Per-token figures count bf16 elements; h is the hidden size, i the MLP's inner size, q and kv the widths of the query
and the key (or value) projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.api.base import decimal
from orchestrator.api.job import AdapterSpec, QLoRAJobSpec
from orchestrator.api.plan import ByteItem, Estimate, MemoryPlan
from orchestrator.api.results import ModelFacts
from orchestrator.core.facts import GpuClass

BF16_BYTES = 2
FP32_BYTES = 4
# NF4 with double quantization (Dettmers et al., 2023, section 3): 4 bits a weight, an 8-bit constant for 64 weights,
# a 32-bit one for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = {
    "adamw_8bit": 2 + 8 / 256,  # two 8-bit moments, and a 32-bit constant for each block of 256
    "paged_adamw_8bit": 2 + 8 / 256,
    "adamw_32bit": 8.0,
    "paged_adamw_32bit": 8.0,  # paged out only under pressure, so counted
}
LOGITS_COPIES = 3  # fp32: logits, softmax, gradient
DEQUANTIZED_COPIES = 2  # one matrix in use, the next being made
SLACK_SHARE = 0.04  # of what comes and goes: what the allocator cannot hand out again
SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A quantized matrix of a decoder layer."""

    name: str
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Weights of the matrix."""
        return self.inputs * self.outputs


def linears(facts: ModelFacts) -> tuple[Linear, ...]:
    """The matrices of one decoder layer."""
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    return (
        Linear(name="q_proj", inputs=h, outputs=q),
        Linear(name="k_proj", inputs=h, outputs=kv),
        Linear(name="v_proj", inputs=h, outputs=kv),
        Linear(name="o_proj", inputs=q, outputs=h),
        Linear(name="gate_proj", inputs=h, outputs=i),
        Linear(name="up_proj", inputs=h, outputs=i),
        Linear(name="down_proj", inputs=i, outputs=h),
    )


def footprint(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> tuple[ByteItem, ...]:
    """The plan's peak, by purpose."""
    lasting = tuple(_lasting(spec, facts))
    passing = tuple(_passing(spec, facts, plan))
    slack = SLACK_BYTES + SLACK_SHARE * sum(count for _, count in passing)
    items = (*lasting, *passing, ("allocator slack", slack))
    return tuple(ByteItem(name=name, bytes=round(count)) for name, count in items)


def peak_bytes(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> int:
    """The plan's peak."""
    return sum(item.bytes for item in footprint(spec, facts, plan))


def estimate(
    spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan, gpu_class: GpuClass, *, steps: int = 0
) -> Estimate:
    """The plan's peak held against what a class offers."""
    items = footprint(spec, facts, plan)
    return Estimate(
        gpu_class=gpu_class.name,
        plan=plan,
        items=items,
        peak_bytes=sum(item.bytes for item in items),
        usable_bytes=gpu_class.usable_bytes,
        steps=steps,
    )


def adapter_parameters(adapter: AdapterSpec, facts: ModelFacts) -> int:
    """Trainable parameters: A and B of every targeted matrix, and DoRA's magnitudes."""
    magnitudes = 1 if adapter.use_dora else 0
    each = sum(
        adapter.rank * (linear.inputs + linear.outputs) + magnitudes * linear.outputs
        for linear in _targeted(adapter, facts)
    )
    return each * facts.num_layers


def _targeted(adapter: AdapterSpec, facts: ModelFacts) -> tuple[Linear, ...]:
    """The matrices with an adapter; all of them where a target's name is not one of these."""
    every = linears(facts)
    if adapter.target_modules == "all-linear":
        return every
    wanted = {name.rsplit(".", 1)[-1] for name in adapter.target_modules}
    unknown = wanted - {linear.name for linear in every}
    return every if unknown else tuple(linear for linear in every if linear.name in wanted)


def _lasting(spec: QLoRAJobSpec, facts: ModelFacts) -> Iterator[tuple[str, float]]:
    """What stays for as long as training does."""
    h = facts.hidden_size
    quantized = sum(linear.parameters for linear in linears(facts)) * facts.num_layers
    yield "base weights, NF4", quantized * NF4_BYTES
    tables = (1 if facts.tied_embeddings else 2) * facts.vocab_size * h
    norms = (2 * facts.num_layers + 1) * h
    yield "embeddings, head and norms, bf16", (tables + norms) * BF16_BYTES
    trainable = adapter_parameters(spec.adapter, facts)
    yield "adapter, bf16", trainable * BF16_BYTES
    yield "adapter gradients, bf16", trainable * BF16_BYTES
    yield "optimizer state", trainable * OPTIMIZER_BYTES[spec.training.optimizer]


def _passing(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> Iterator[tuple[str, float]]:
    """What comes and goes with every micro-step."""
    tokens = plan.micro_batch_size * spec.training.sequence_length
    recomputed = min(plan.recompute_layers, facts.num_layers)
    kept = facts.num_layers - recomputed
    layer_bytes = tokens * _kept_bytes_a_token(spec.adapter, facts) + _mask_bytes(spec, plan)
    yield "inputs of recomputed layers", recomputed * tokens * facts.hidden_size * BF16_BYTES
    yield "activations of kept layers", kept * layer_bytes
    yield "attention mask", _mask_bytes(spec, plan)
    yield "working set", max(_layer_bytes(spec, facts, plan), _loss_bytes(facts, plan, tokens))
    largest = max(linear.parameters for linear in linears(facts))
    copies = DEQUANTIZED_COPIES * (2 if spec.adapter.use_dora else 1)  # DoRA also takes the norm of W + BA
    yield "dequantization workspace", copies * largest * BF16_BYTES


def _kept_bytes_a_token(adapter: AdapterSpec, facts: ModelFacts) -> int:
    """What the backward pass of one layer needs of its forward pass.

    Two norms keep an fp32 copy and their output (6 h), attention its output and the residual (2 h), q, k and v; the
    gated MLP keeps gate, activation, up and their product (4 i).
    """
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    kept = (8 * h + 4 * i + q + 2 * kv) * BF16_BYTES
    if decimal(adapter.dropout) > 0:  # each adapter keeps its own dropped input, and a mask of a byte an element
        kept += sum(linear.inputs for linear in _targeted(adapter, facts)) * (BF16_BYTES + 1)
    if adapter.use_dora:  # the scaled and the unscaled product
        kept += 2 * sum(linear.outputs for linear in _targeted(adapter, facts)) * BF16_BYTES
    return kept


def _layer_bytes(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> int:
    """The backward pass through one recomputed layer: its activations and their gradients.

    Fitted from above to peaks measured at 8B (four lengths), 13B and 70B: their slopes over the tokens give
    8 h + 7 i + 6 (q + 2 kv) elements a token; the attention kernel's fp32 sums are in the last term.
    """
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    each = (8 * h + 7 * i + 6 * (q + 2 * kv)) * BF16_BYTES
    plain = spec.adapter.model_copy(update={"dropout": "0", "use_dora": False})
    each += _kept_bytes_a_token(spec.adapter, facts) - _kept_bytes_a_token(plain, facts)
    return plan.micro_batch_size * spec.training.sequence_length * each + _mask_bytes(spec, plan)


def _loss_bytes(facts: ModelFacts, plan: MemoryPlan, tokens: int) -> int:
    """The logits of one chunk in fp32, and the last hidden states with their gradient."""
    chunk = min(plan.loss_chunk_tokens or tokens, tokens)
    logits = chunk * facts.vocab_size * FP32_BYTES * LOGITS_COPIES
    return logits + LOGITS_COPIES * tokens * facts.hidden_size * BF16_BYTES


def _mask_bytes(spec: QLoRAJobSpec, plan: MemoryPlan) -> int:
    """The mask that keeps packed records apart: a bf16 bias for each pair of positions.

    The batch has one, and the attention of every layer keeps another for its backward pass.
    """
    return plan.micro_batch_size * spec.training.sequence_length**2 * BF16_BYTES if spec.training.packing else 0
