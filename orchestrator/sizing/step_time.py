"""How long a step takes under a memory plan: what a card has to compute and to move, and how fast it does that.

`sizing/plan_search` chooses among plans with it. Each term is counted from the model's shape; how fast a card gets it
done comes from its data sheet, times efficiencies that were fitted to the committed measurements on H100 and H200
(benchmarks/results; tests/sizing/test_step_time.py holds the model against them). On other cards it is an
extrapolation.

Where records are computed one after the other, each takes the launches, small kernels and dequantized weights that
a packed row takes once; that too is an extrapolation.

A micro-step takes as long as the slowest of three that go on at one time: the card's own work, the host's launches,
and the traffic over PCIe. The time for evaluations, checkpoints and loading is not part of it.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

from orchestrator.api import trainer_facts
from orchestrator.api.job import QLoRAJobSpec, TrainingSpec
from orchestrator.api.layer_ways import LayerWays
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import PrepareResult
from orchestrator.sizing.footprint import (
    Footprint,
    adapter_parameters,
    can_be_captured,
    layer_streamed_bytes,
    moves_layers,
)
from orchestrator.sizing.hardware import Card, GpuClass
from orchestrator.sizing.memory.attention import SOFTCAPPED_TYPES
from orchestrator.sizing.memory.handwritten_layer import family_of
from orchestrator.sizing.memory.linear_layers import linears, targeted
from orchestrator.sizing.memory.timeline import BF16_BYTES
from orchestrator.sizing.memory.traced_model import operations

DEQUANTIZED_BYTES = 0.5 + 1 / 64 + BF16_BYTES
"""Traffic of each weight: NF4 and its scale are read, bfloat16 is written."""

MATMUL_EFFICIENCY = 0.84
"""Share of a card's `matmul_tflops` that all products of a step reach: fitted."""
MEMORY_EFFICIENCY = 0.8
"""Share of a card's `memory_gbps`: NVIDIA's kernels and ours reach 75 to 85 % (a profile at 8B on an H100)."""
SMALL_HEAD = 64
"""Heads up to this size have fewer products for each score."""
INNER_BYTES, HIDDEN_BYTES, ADAPTER_BYTES, LOGIT_BYTES = 18, 48, 5, 6
"""What is read and written for each token: of the inner and hidden sizes in a layer beside its products (the gated
activation takes 3 values forward and 6 back), of an adapter's inputs and outputs, of the vocabulary (that profile)."""
DROPOUT_BYTES = 14
"""What is read and written for each value that an adapter's dropout falls on: the mask is drawn anew
for each of three uses."""
HEAD_NORM_BYTES = 30
"""Likewise for each value of queries and keys that are normalized by head (a profile of Qwen3-0.6B on an H100)."""
ROW_BYTES = 16
"""Likewise for each expert of a token: its input, its output and both gradients are gathered."""
FIRST_MATRICES = 2 / 3
"""Share of an expert's weights that gate and up have."""
AGAIN = 1 / 3
"""Share of a layer's bytes, kernels and launches that recomputing it repeats."""
TRACED_LAYER_BYTES = 4.0
"""How many times as much is read and written where transformers computes the layer, one operation after the other."""
KERNEL_SECONDS = 0.0002
"""The many small kernels of a layer, whatever their size: fitted."""
DROPOUT_KERNEL_SECONDS = 0.0002
"""What dropout adds to that: fitted to models of 0.1B and 0.6B."""
HANDWRITTEN_LAUNCH_SECONDS, TRACED_LAUNCH_SECONDS = 0.0058, 0.011
"""The host's work for a layer and micro-step: 0.175 s for 32 layers without CUDA graphs on an H100, 0.35 s for 60 and,
on another's host, 0.23 s for 30; and 0.36 s for 32 where transformers computes them."""
END_NORM_LAUNCHES, HEAD_NORM_LAUNCHES = 1.4, 1.25
"""How many times as much that is where halves of a layer end with norms, and where heads are normalized: Gemma 3, which
has both, took 0.0102 s for each of 62 layers on an H200's host."""
OPERATION_SECONDS = 50e-6
"""The host's work for an operation of a layer that transformers and PEFT compute, where a trace has counted them: 43
to 77 microseconds on hosts of H200s where that was the bound, 45 to 55 in the thousands of small ones of hybrids."""
SOFTCAP_LAUNCH_SECONDS = 0.0036
"""What each further record adds to that where its attention softcaps scores, which no kernel of torch's does."""
SOFTCAP_SCORE_BYTES = 160
"""What is read and written there for each pair of tokens and head: some forty passes over scores in 32 bits."""
EXPERT_LAUNCH_SECONDS, EXPERT_KERNEL_SECONDS = 0.0055, 0.00085
"""The host's work for a tile of tokens of a layer of experts and micro-step, and the small kernels that sort tokens by
expert and back; fitted to 57 jobs of mixtures on an H200, whose host took 0.007, and to Qwen3-30B-A3B on an H100."""
EXPERT_SPEED = 0.7
"""Speed of experts' products, against others."""
REFERENCE_SHARE = 0.5
"""Of a micro-step that recomputes nothing, what a pass without gradients takes: half of the products, as the base is
frozen, and of the dequantized weights; less of the rest."""
STEP_SECONDS = 0.004
"""Around a step's micro-steps: norms, clipping, waiting for the loss."""
TRAFFIC_BYTES = 6.0
"""An optimizer step reads parameter and gradient and writes the parameter, for each; its state goes both ways."""

ONE_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Matrices whose input is dropped together with another's where the trainer computes the layer."""

CPU = Card(name="cpu", matmul_tflops=0.1, memory_gbps=20.0, host_gbps=1000.0, flash_share=0.5, attention_share=0.5)
UNKNOWN = Card(
    name="unknown", matmul_tflops=60.0, memory_gbps=300.0, host_gbps=12.0, flash_share=0.5, attention_share=0.5
)
"""Good enough to put plans in order where no speed is known; no times are told from them."""


class _Kernels(NamedTuple):
    """How fast attention is computed, fitted to `benchmarks.kernels` and `benchmarks.attention`."""

    share: float
    """What of the products' speed the forward pass reaches, with endless records."""
    half_speed_tokens: float
    """How long a record has to be for half of that: tiles on the diagonal."""
    small_heads: float
    """How fast they are with heads up to SMALL_HEAD, of 1 with others."""
    backward: float
    """The speed of the backward pass, deterministic, against that."""


class Work(NamedTuple):
    """How much there is to train on; a tuple, since it is part of what each of thousands of jobs asks."""

    steps: int = 0
    """Optimizer steps of the job; 0 where prepare has not counted them."""
    sequence_tokens: float | None = None
    """Tokens of a sequence, on average; a full one where that is not known."""
    record_tokens: float | None = None
    """Tokens of a record, within which attention stays; a whole sequence where that is not known. Of a preference,
    those of both answers."""
    sequences: int = 0
    """Sequences of the training data; 0 where prepare has not counted them."""

    @classmethod
    def of(cls, prepared: PrepareResult) -> Work:
        """What prepare has counted."""
        return cls(
            steps=prepared.steps,
            sequence_tokens=prepared.train_tokens / prepared.train_sequences,
            record_tokens=prepared.train_tokens / prepared.train_records,
            sequences=prepared.train_sequences,
        )


class StepTime:
    """The seconds of one job's steps, under any plan on any card."""

    def __init__(self, spec: QLoRAJobSpec, facts: ModelFacts, work: Work) -> None:
        every = linears(facts)
        self._spec = spec
        self._facts = facts
        self._mixture = facts.mixture
        self._fused = moves_layers(spec.adapter, facts)
        self._weights = sum(linear.parameters for linear in every)
        family = family_of(facts.model_type)
        last = every[-1].parameters  # the last product of a layer is not needed again to go back, but through a norm
        spared = self._fused and self._mixture is None and not family.ends_with_norms
        self._again = self._weights - last if spared else self._weights
        self._expert_weights = 3 * facts.hidden_size * facts.mixture.expert_size if facts.mixture else 0
        adapted = targeted(spec.adapter, every)
        beside = ADAPTER_BYTES * sum(linear.inputs + linear.outputs for linear in adapted)
        self._drops = float(spec.adapter.dropout) > 0
        if self._drops:
            inputs = {
                ONE_INPUT.get(each.name, each.name) if self._fused else each.name: each.inputs for each in adapted
            }
            beside += DROPOUT_BYTES * sum(inputs.values())
        if family.normalizes_heads:
            beside += HEAD_NORM_BYTES * (facts.num_attention_heads + facts.num_key_value_heads) * facts.head_dim
        self._beside_bytes = beside
        self._launches = END_NORM_LAUNCHES if family.ends_with_norms else 1.0
        self._launches *= HEAD_NORM_LAUNCHES if family.normalizes_heads else 1.0
        self._softcaps = facts.model_type in SOFTCAPPED_TYPES
        self._trainable = adapter_parameters(spec.adapter, facts)
        self._state_bytes = trainer_facts.OPTIMIZER_BYTES[spec.training.optimizer]
        self._uses_cuda_graphs = self._fused and can_be_captured(spec.training)
        self._sequence_tokens = work.sequence_tokens or spec.training.sequence_length
        self._record_tokens = min(work.record_tokens or self._sequence_tokens, self._sequence_tokens)
        self._first_share = 0.0
        if spec.training.objective.type != "sft":
            self._record_tokens /= 2
        if spec.training.objective.type == "dpo":
            self._first_share = _first_share(spec.training, work)

    @property
    def record_tokens(self) -> float:
        """Tokens of a record, on average."""
        return self._record_tokens

    def step_seconds(self, plan: MemoryPlan, card: Card) -> float:
        """One optimizer step: all its micro-steps and the update."""
        traffic = self._trainable * (TRAFFIC_BYTES + 2 * self._state_bytes)
        update = STEP_SECONDS + traffic / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY)
        seconds = self.micro_step_seconds(plan, card)
        if self._first_share:
            without_gradients = plan.model_copy(update={"recompute_layers": 0, "offload": (), "offloaded_layers": 0})
            seconds += self._first_share * REFERENCE_SHARE * self.micro_step_seconds(without_gradients, card)
        return plan.accumulation_steps * seconds + update

    def micro_step_seconds(self, plan: MemoryPlan, card: Card) -> float:
        """Forward and backward pass of one micro-batch."""
        tokens, again = self._tokens(plan), self._again_layers(plan)
        from_host = plan.offload or plan.offloaded_layers or plan.streamed_layers
        graphs = self._uses_cuda_graphs and not from_host and tokens <= trainer_facts.CUDA_GRAPH_TOKENS
        launches = 0.0 if graphs or card is CPU else self._launch_seconds(tokens, again)
        stream = self._stream_seconds(tokens, card)
        there_and_back = 2 * again * stream if "activations" in plan.offload else 0.0
        embeddings = stream if "embeddings" in plan.offload else 0.0  # which the card waits for
        computing = self._with_streamed_layers(plan, self._card_seconds(plan, tokens, again, card), again, card)
        computing += self._waiting_seconds(plan, computing, tokens, again, card)
        return max(computing, launches, there_and_back) + embeddings

    def _with_streamed_layers(self, plan: MemoryPlan, seconds: float, again: int, card: Card) -> float:
        """Each pass takes as long as the card computes, or as its layers' weights are on their way.

        Those that fill the buffers where the passes turn around are there. A frozen layer's products take as long back
        as forth, and once more where it recomputes.
        """
        layers = self._facts.num_layers
        copied = max(0, min(plan.streamed_layers, layers) - trainer_facts.STREAM_BUFFERS)
        if not copied:
            return seconds
        copying = copied * layer_streamed_bytes(self._facts) / (card.host_gbps * 1e9)
        forth = seconds * layers / (2 * layers + again)
        fetched = again * self._stream_seconds(self._tokens(plan), card) if "activations" in plan.offload else 0.0
        return max(forth, copying) + max(seconds - forth, copying + fetched)

    def layers_apart(self, plan: MemoryPlan, card: Card) -> int:
        """How far apart offloaded layers have to be for the card to wait for none of them."""
        again = self._again_layers(plan)
        layer = self._card_seconds(plan, self._tokens(plan), again, card) / (2 * self._facts.num_layers + again)
        return max(1, math.ceil(self._copy_seconds(self._tokens(plan), card) / layer))

    def _waiting_seconds(self, plan: MemoryPlan, seconds: float, tokens: float, again: int, card: Card) -> float:
        """What layers add whose activations go to the host and come back while the layers up to the next one compute.

        Where that takes longer than these, the card waits; and the copies take their share of its memory.
        """
        layers = self._facts.num_layers
        count = LayerWays.of(layers, again, plan.offloaded_layers).offloaded_layers
        if not count:
            return 0.0
        copying, layer = self._copy_seconds(tokens, card), seconds / (2 * layers + again)
        apart, further = divmod(layers - 1, count)  # so many are one layer further apart
        waits = 0.0
        for computing in (layer, layer * (1 + again / layers)):  # forth and back
            waits += (count - further) * max(0.0, copying - apart * computing)
            waits += further * max(0.0, copying - (apart + 1) * computing)
        return waits + 2 * count * self._kept_token_bytes * tokens / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY)

    def _copy_seconds(self, tokens: float, card: Card) -> float:
        """What a layer keeps, in one direction."""
        return self._kept_token_bytes * tokens / (card.host_gbps * 1e9)

    def kept_layer_bytes(self, micro_batch_size: int) -> int:
        """What a layer that does not recompute keeps of a micro-batch of full sequences."""
        return int(self._kept_token_bytes * micro_batch_size * self._spec.training.sequence_length)

    @cached_property
    def _kept_token_bytes(self) -> float:
        """What a layer keeps of each token that does not recompute."""
        one = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0)
        return Footprint(self._spec, self._facts, one).kept_layer_bytes / self._spec.training.sequence_length

    def parts(self, plan: MemoryPlan, card: Card) -> dict[str, float]:
        """Seconds of the card's own work in a micro-step, by what it does."""
        tokens, again = self._tokens(plan), self._again_layers(plan)
        return {
            "products": self._product_seconds(tokens, again, card),
            "attention": self._attention_seconds(plan, tokens, again, card),
            "dequantization": self._dequantization_seconds(tokens, again, card),
            "memory traffic": self._memory_seconds(tokens, again, card),
            "small kernels": self._kernel_seconds(tokens, again, card),
        }

    def _tokens(self, plan: MemoryPlan) -> float:
        return plan.micro_batch_size * self._sequence_tokens

    def _again_layers(self, plan: MemoryPlan) -> int:
        return min(plan.recompute_layers, self._facts.num_layers)

    def _card_seconds(self, plan: MemoryPlan, tokens: float, again: int, card: Card) -> float:
        return (
            self._product_seconds(tokens, again, card)
            + self._attention_seconds(plan, tokens, again, card)
            + self._dequantization_seconds(tokens, again, card)
            + self._memory_seconds(tokens, again, card)
            + self._kernel_seconds(tokens, again, card)
        )

    def _product_seconds(self, tokens: float, again: int, card: Card) -> float:
        """4 operations a weight and token (2 forward, 2 back; the base is frozen), 2 more where it is recomputed."""
        head = self._facts.vocab_size * self._facts.hidden_size
        layers = self._facts.num_layers
        weights = 4 * self._weights * layers + 2 * self._again * again + 4 * head
        if self._mixture is not None:  # gate and up are multiplied once more to go back
            chosen = self._mixture.experts_per_token * self._expert_weights
            weights += 2 * self._expert_passes(again) * chosen / EXPERT_SPEED
        return tokens * weights / (card.matmul_tflops * 1e12 * MATMUL_EFFICIENCY)

    def _dequantization_seconds(self, tokens: float, again: int, card: Card) -> float:
        """Every matrix for each pass of each micro-step; of experts for each tile of its tokens."""
        layers = self._facts.num_layers
        weights = (2 * layers + AGAIN * again) * self._weights
        weights += self._expert_passes(again) * self._dense_experts(tokens) * self._expert_weights
        weights *= self._passes(tokens)
        return weights * DEQUANTIZED_BYTES / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY)

    def _memory_seconds(self, tokens: float, again: int, card: Card) -> float:
        facts = self._facts
        inner, rows = facts.intermediate_size, 0
        if self._mixture is not None:
            rows = self._mixture.experts_per_token
            inner = self._mixture.shared_size + rows * self._mixture.expert_size
        layer = INNER_BYTES * inner + (HIDDEN_BYTES + ROW_BYTES * rows) * facts.hidden_size
        layer += self._beside_bytes
        layers = (facts.num_layers + AGAIN * again) * (1.0 if self._fused else TRACED_LAYER_BYTES)
        moved = tokens * (layer * layers + LOGIT_BYTES * facts.vocab_size)
        return moved / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY)

    def _kernel_seconds(self, tokens: float, again: int, card: Card) -> float:
        each = KERNEL_SECONDS + (DROPOUT_KERNEL_SECONDS if self._drops else 0.0)
        each += EXPERT_KERNEL_SECONDS * self._tiles(tokens)
        return 0.0 if card is CPU else each * self._passes(tokens) * (self._facts.num_layers + AGAIN * again)

    def _attention_seconds(self, plan: MemoryPlan, tokens: float, again: int, card: Card) -> float:
        """Flash attention (Dao, 2023): a pair takes 4 x width forward and 2.5 times that back; causality keeps half."""
        width = self._facts.num_attention_heads * self._facts.head_dim
        forward = 2 * width * tokens * self._record_tokens / (card.matmul_tflops * 1e12)
        kernels = self._kernels(plan, card)
        speed = kernels.small_heads if self._facts.head_dim <= SMALL_HEAD else 1.0
        forward *= (1 + kernels.half_speed_tokens / self._record_tokens) / (kernels.share * speed)
        backward = 2.5 * forward / kernels.backward
        layers = self._facts.num_layers
        products = forward * (layers + (0 if plan.keep_attention else again)) + backward * layers
        if not self._softcaps:
            return products
        scores = self._facts.num_attention_heads * tokens * self._record_tokens * (layers + AGAIN * again)
        return products + scores * SOFTCAP_SCORE_BYTES / (card.memory_gbps * 1e9 * MEMORY_EFFICIENCY)

    def _kernels(self, plan: MemoryPlan, card: Card) -> _Kernels:
        if not self._fused:
            return _Kernels(card.flash_share, half_speed_tokens=0, small_heads=1.0, backward=0.87)
        if plan.attention == "flash-attn-4" and card.flash4_share is not None:
            return _Kernels(card.flash4_share, half_speed_tokens=700, small_heads=0.85, backward=0.78)
        return _Kernels(card.attention_share, half_speed_tokens=1500, small_heads=0.72, backward=0.735)

    def _launch_seconds(self, tokens: float, again: int) -> float:
        if self._facts.trace is not None and not self._fused:
            passes = self._passes(tokens)
            counted = operations(self._facts.trace, again, tokens / passes)
            if counted is not None:
                experts = EXPERT_LAUNCH_SECONDS * self._tiles(tokens) * (self._facts.num_layers + AGAIN * again)
                return passes * (counted * OPERATION_SECONDS + experts)
        each = HANDWRITTEN_LAUNCH_SECONDS * self._launches if self._fused else TRACED_LAUNCH_SECONDS
        each += EXPERT_LAUNCH_SECONDS * self._tiles(tokens)
        if self._softcaps:
            each += SOFTCAP_LAUNCH_SECONDS * max(0.0, tokens / self._record_tokens - 1)
        return each * self._passes(tokens) * (self._facts.num_layers + AGAIN * again)

    def _passes(self, tokens: float) -> float:
        """How often the layers are gone through for a micro-batch: once, or for each of its records."""
        return max(1.0, tokens / self._record_tokens) if self._facts.record_by_record else 1.0

    def _expert_passes(self, again: int) -> float:
        """How often experts are multiplied: gate and up once more to go back, all where transformers recomputes."""
        return (2 + FIRST_MATRICES) * self._facts.num_layers + (0 if self._fused else again)

    def _dense_experts(self, tokens: float) -> float:
        """How many experts of a layer are dequantized in a pass."""
        return 0.0 if self._mixture is None else self._mixture.experts * self._tiles(tokens)

    def _tiles(self, tokens: float) -> float:
        """Into which the tokens of a mixture are cut."""
        return 0.0 if self._mixture is None else math.ceil(tokens / trainer_facts.EXPERT_TILE_TOKENS)

    def _stream_seconds(self, tokens: float, card: Card) -> float:
        """One residual stream over PCIe."""
        return tokens * self._facts.hidden_size * BF16_BYTES / (card.host_gbps * 1e9)


def _first_share(training: TrainingSpec, work: Work) -> float:
    """Share of the sequences in a job's steps that are there for the first time: the reference is asked about them."""
    if work.steps and work.sequences:
        return min(1.0, work.sequences / (work.steps * training.global_batch_size))
    return 1.0 if training.max_steps is not None else min(1.0, 1 / float(training.epochs))


def ordering_card(gpu_class: GpuClass) -> Card:
    """What a class's plans are put in order by."""
    return CPU if gpu_class.cpu else gpu_class.card or UNKNOWN
