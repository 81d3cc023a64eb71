"""How many bytes a job takes under a memory plan: the peak of PyTorch's allocator, line by line.

The trainer's own code, walked through instant by instant: what lasts (weights, adapter, optimizer state), and at each
instant that can be the peak what comes and goes (`sizing/memory/handwritten_layer` for layers that the trainer computes
by hand, `sizing/memory/traced_layer` for types whose tables ship, `sizing/memory/traced_model` for models that prepare
traced). The largest instant is the peak. `sizing/plan_search` chooses
among plans with it; it is held against measured peaks in tests/sizing/test_sizing_rows.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.base import decimal
from orchestrator.api.job import QLoRAJobSpec, TrainingSpec
from orchestrator.api.layer_trace import KIND_LETTERS, Heads, ModelTrace
from orchestrator.api.layer_ways import LayerWays
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MARGIN_ITEM, ByteItem, MemoryPlan
from orchestrator.sizing.answering import answering_bytes
from orchestrator.sizing.margins import DEFAULT, Margins
from orchestrator.sizing.memoized import memoized
from orchestrator.sizing.memory import traced_rehearsal
from orchestrator.sizing.memory.attention import SHORT_RECORD_TOKENS, SOFTCAPPED_TYPES, Attention
from orchestrator.sizing.memory.cuda_allocator import LARGE_PAGE, SMALL_PAGE
from orchestrator.sizing.memory.experts import Experts, expert_linears, fusing_bytes
from orchestrator.sizing.memory.fragmentation import Rehearsed, reserved_bytes
from orchestrator.sizing.memory.handwritten_layer import FusedLayer, LayerBytes, family_of, layer_bytes
from orchestrator.sizing.memory.linear_layers import GROUPS, Group, Linear, group, linears, targeted
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES, allocated
from orchestrator.sizing.memory.traced_layer import TracedLayer, final_norm, traced_layer_bytes
from orchestrator.sizing.memory.traced_model import end_bytes, kinds_bytes, left_bytes, outside_bytes, shared_bytes
from orchestrator.sizing.memory.traced_rehearsal import TracedJob, unpacked

TOKEN_BYTES = 4 * 8
"""A micro-batch on the card: ids, targets, positions, and where the targets are."""
RECORD_SUM_BYTES = 3 * 8
"""More where the loss is one of records: losses by position, put together, and weights of their gradients."""
NORMS = {"gemma2": 4, "gemma3_text": 4, "gpt_neox": 4, "olmoe": 4, "olmo2": 4, "olmo3": 4, "starcoder2": 4}
"""Vectors of a layer as wide as the hidden size, by model type; two where it is not told."""
MOST_MULTIPROCESSORS = 148
"""The most of any card in `sizing/hardware`, where the class is not known."""
SLACK_SHARE = 0.0075
SLACK_BYTES = 2 << 20
DORA_SHARE = 0.028
"""More where prepare traced layers with DoRA: of 53 such jobs one took 2.66 % more than its trace has, and why is not
known; the others took at most 0.06 % more and 0.39 % less (`benchmarks.traced_report`)."""
HOLES_SHARE = 0.113
"""Share of a layer's backward pass that is reserved beside it and cannot be used, where the order of its tensors is not
known. Fitted, the median over the architectures that `benchmarks.sizing_report` calls fitted."""
RESULTS_KEPT = 1536
TRACES_KEPT = 64
"""A result of a trace keeps the trace, which may take as much memory as a hundred others."""


OUTER_CODE_BYTES = 1024

LOADING = "loading"
"""The instant before training."""


class Instant(NamedTuple):
    """A moment that can be the peak: what it takes beside what lasts."""

    name: str
    kept_bytes: int
    """Activations that wait for their backward pass."""
    gradient_bytes: int
    working_bytes: int


def _total_bytes(instant: tuple[str, int, int, int]) -> int:
    return instant[1] + instant[2] + instant[3]


class Footprint:
    """A job's bytes under all plans that differ only in how many layers they recompute.

    A search over plans asks for many such numbers on many classes, and one walk through a layer answers all of them.
    """

    def __init__(
        self,
        spec: QLoRAJobSpec,
        facts: ModelFacts,
        plan: MemoryPlan,
        *,
        multiprocessors: int = MOST_MULTIPROCESSORS,
        records: int | None = None,
        margins: Margins = DEFAULT,
        loaded: bool = False,
    ) -> None:
        """`records` is how many a micro-batch packs, where that is known; `loaded`: the base is there already."""
        self._margins = margins
        self._slack_share = _slack_share(spec.adapter, facts)
        self._question = _Question(
            adapter=spec.adapter,
            optimizer=spec.training.optimizer,
            sequence_length=spec.training.sequence_length,
            packing=spec.training.packing,
            deterministic=spec.training.deterministic,
            captures=can_be_captured(spec.training),
            token_bytes=TOKEN_BYTES + (0 if spec.training.objective.type == "sft" else RECORD_SUM_BYTES),
            facts=facts,
            plan=plan,
            multiprocessors=multiprocessors,
            records=records,
            trainable=adapter_parameters(spec.adapter, facts),
            loaded=loaded,
            answers=spec.evaluation.generation is not None,
        )
        self._lasting_bytes = sum(count for _, count in _lasting(self._question))
        self._layers = _Layers.of(self._question)
        self._instants = _Instants(self._question, self._layers)
        self._peaks: dict[int, int] = {}

    def peak_bytes(self, recompute_layers: int) -> int:
        """The peak where the first so many layers recompute."""
        if recompute_layers not in self._peaks:
            found = self._found_bytes(recompute_layers)
            self._peaks[recompute_layers] = found + self._margin(found, recompute_layers)
        return self._peaks[recompute_layers]

    def least_recompute(self, room_bytes: int) -> int | None:
        """How few layers may recompute for the peak to fit; None if it does not even where all do.

        The peak falls with their number, about evenly, so it is soon found by interpolation, and the sooner the more
        is known from earlier questions.
        """
        if self.peak_bytes(0) <= room_bytes:
            return 0
        if self.peak_bytes(self._layers.count) > room_bytes:
            return None
        low = max(layers for layers, peak in self._peaks.items() if peak > room_bytes)
        high = min(layers for layers, peak in self._peaks.items() if peak <= room_bytes)
        while low + 1 < high:
            most, least = self.peak_bytes(low), self.peak_bytes(high)
            middle = low - (room_bytes - most) * (high - low) // (most - least)
            middle = min(max(middle, low + 1), high - 1)
            if self.peak_bytes(middle) <= room_bytes:
                high = middle
            else:
                low = middle
        return high

    def items(self, recompute_layers: int) -> tuple[ByteItem, ...]:
        """That peak, by purpose."""
        peak = self._instants.largest(self._recomputing(recompute_layers))
        found = (
            *_lasting(self._question),
            ("adapter gradients, bf16", peak.gradient_bytes),
            ("activations kept for the backward pass", peak.kept_bytes),
            (f"working set: {peak.name}", peak.working_bytes),
        )
        margin = self._margin(sum(count for _, count in found), recompute_layers)
        return tuple(ByteItem(name=name, bytes=count) for name, count in (*found, (MARGIN_ITEM, margin)))

    @property
    def kept_layer_bytes(self) -> int:
        """What a layer that does not recompute keeps of a micro-batch: the most, where layers are of several kinds."""
        return max(each.kept for each in self._layers.whole)

    def reserved_bytes(self, recompute_layers: int, *, evaluates: bool = False) -> int:
        """What the allocator reserves for that peak where there is room, without a margin.

        `evaluates`: before the first step. Takes as long as choosing a plan does.
        """
        if isinstance(self._question.shape, FusedLayer) and self._question.facts.mixture is None:
            return reserved_bytes(self.rehearsed(recompute_layers, evaluates=evaluates))
        if self._question.trace is not None and self._question.trace.walk:
            return traced_rehearsal.reserved_bytes(self.rehearsed_trace(recompute_layers, evaluates=evaluates))
        recomputing = self._recomputing(recompute_layers)
        ends = self._layers.ends(recomputing)
        largest = max(self._layers.at(index, recomputing).backward_peak for index in ends)
        return round(self._found_bytes(recompute_layers) + SMALL_PAGE + LARGE_PAGE + HOLES_SHARE * largest)

    def rehearsed(self, recompute_layers: int, *, evaluates: bool = False) -> Rehearsed:
        """The job as the allocator sees it, where the trainer computes its layers by hand."""
        shape = self._question.shape
        assert isinstance(shape, FusedLayer), "the order of tensors is known for layers written by hand alone"
        return _rehearsed(self._question, shape, recompute_layers, evaluates)

    def rehearsed_trace(self, recompute_layers: int, *, evaluates: bool = False) -> TracedJob:
        """The job as the allocator sees it, where the order of its layers' tensors was traced."""
        trace = self._question.trace
        assert trace is not None, "layers that prepare traced"
        return _traced_job(self._question, trace, self._recomputing(recompute_layers), evaluates)

    def training_bytes(self, recompute_layers: int) -> int:
        """The peak from the first micro-batch on, without a margin: loading does not count."""
        instants = self._instants.all(self._recomputing(recompute_layers))
        return self._lasting_bytes + max(_total_bytes(each) for each in instants if each.name != LOADING)

    def _margin(self, found_bytes: int, recompute_layers: int) -> int:
        """The margin of the model, or what finished jobs have taught."""
        share = self._margins.share(self._question.plan, self._layers.count, recompute_layers, self._slack_share)
        return round(SLACK_BYTES + share * found_bytes)

    def _found_bytes(self, recompute_layers: int) -> int:
        return self._lasting_bytes + self._instants.largest_bytes(self._recomputing(recompute_layers))

    def _recomputing(self, recompute_layers: int) -> int:
        return min(recompute_layers, self._layers.count)


def footprint(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    plan: MemoryPlan,
    *,
    multiprocessors: int = MOST_MULTIPROCESSORS,
    records: int | None = None,
) -> tuple[ByteItem, ...]:
    """The plan's peak, by purpose. `records` is how many a micro-batch packs, where that is known."""
    found = Footprint(spec, facts, plan, multiprocessors=multiprocessors, records=records)
    return found.items(plan.recompute_layers)


def peak_bytes(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    plan: MemoryPlan,
    *,
    multiprocessors: int = MOST_MULTIPROCESSORS,
    records: int | None = None,
) -> int:
    """The plan's peak."""
    found = Footprint(spec, facts, plan, multiprocessors=multiprocessors, records=records)
    return found.peak_bytes(plan.recompute_layers)


def adapter_parameters(adapter: AdapterSpec, facts: ModelFacts) -> int:
    """Trainable parameters: A and B of every targeted matrix, and DoRA's magnitudes."""
    trace = _trace(adapter, facts)
    return _adapter_parameters(adapter, facts) if trace is None else trace.adapter_parameters


@memoized(RESULTS_KEPT)
def _adapter_parameters(adapter: AdapterSpec, facts: ModelFacts) -> int:
    magnitudes = 1 if adapter.use_dora else 0
    each = sum(
        adapter.rank * (linear.inputs + linear.outputs) + magnitudes * linear.outputs
        for linear in targeted(adapter, linears(facts))
    )
    return (each + _experts_parameters(adapter, facts)) * facts.num_layers


def _experts_parameters(adapter: AdapterSpec, facts: ModelFacts) -> int:
    """Of a layer's routed experts: A and B of gate and up as one matrix, and of down."""
    if not adapter.experts or facts.mixture is None:
        return 0
    size, hidden = facts.mixture.expert_size, facts.hidden_size
    return facts.mixture.experts * adapter.rank * ((hidden + 2 * size) + (size + hidden))


def _trace(adapter: AdapterSpec, facts: ModelFacts) -> ModelTrace | None:
    """What prepare traced of the job's layers, if it had to."""
    return None if is_fused(adapter, facts) else facts.trace


def _slack_share(adapter: AdapterSpec, facts: ModelFacts) -> float:
    """What a prediction may be wrong by, where no finished job has taught more."""
    return SLACK_SHARE + (DORA_SHARE if adapter.use_dora and _trace(adapter, facts) is not None else 0)


def is_fused(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether the trainer computes this model's layers by hand."""
    return facts.model_type in trainer_facts.HANDWRITTEN_TYPES and not adapter.use_dora and not adapter.experts


def can_be_captured(training: TrainingSpec) -> bool:
    """Whether a graph can be made of a micro-batch: NEFTune draws in it, and what weighs preferences is of its end."""
    return decimal(training.neftune_alpha) == 0 and training.objective.type == "sft"


def card_matters(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether bytes depend on the card: torch's flash attention keeps sums for multiprocessors, our own does not."""
    return not is_fused(adapter, facts) or facts.head_dim > trainer_facts.LARGEST_TRITON_HEAD


# --- the parts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Question:
    """All that the bytes depend on, but for how many layers the plan recomputes."""

    adapter: AdapterSpec
    optimizer: str
    sequence_length: int
    packing: bool
    deterministic: bool
    captures: bool
    """See `can_be_captured`."""
    token_bytes: int
    """What a token of a micro-batch takes beside what goes through the layers."""
    facts: ModelFacts
    plan: MemoryPlan
    multiprocessors: int
    records: int | None
    trainable: int
    """Parameters of the adapter."""
    loaded: bool
    """What loading the base takes by the way is not asked for."""
    answers: bool
    """Whether held-out prompts are answered when training is over."""

    @cached_property
    def uses_cuda_graphs(self) -> bool:
        """Whether micro-batches run as CUDA graphs."""
        from_host = self.plan.offload or self.plan.offloaded_layers or self.plan.streamed_layers
        graphs = is_fused(self.adapter, self.facts) and not from_host and self.captures
        return graphs and self.plan.micro_batch_size * self.sequence_length <= trainer_facts.CUDA_GRAPH_TOKENS

    @property
    def streamed_layers(self) -> int:
        """How many layers' weights are on the host."""
        return min(self.plan.streamed_layers, self.facts.num_layers)

    @property
    def offloaded_layers(self) -> int:
        """How many layers' activations may wait on the host."""
        return self.plan.offloaded_layers if isinstance(self.shape, FusedLayer) else 0

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch, padding counted."""
        tokens = self.plan.micro_batch_size * self.sequence_length
        step = trainer_facts.CUDA_GRAPH_TOKENS_STEP if self.uses_cuda_graphs else 1
        return -(-tokens // step) * step

    @cached_property
    def passes(self) -> int:
        """How many times a micro-batch goes through the layers: a record each, where these cannot be packed."""
        if self.trace is None or self.trace.packed:
            return 1
        return self.records or self.plan.micro_batch_size  # a record may be as long as a sequence

    @cached_property
    def stream(self) -> int:
        """A tensor of [tokens, hidden]."""
        return allocated(self.tokens * self.facts.hidden_size * BF16_BYTES)

    @cached_property
    def trace(self) -> ModelTrace | None:
        """The model's layers as prepare traced them."""
        return _trace(self.adapter, self.facts)

    @cached_property
    def shape(self) -> FusedLayer | TracedLayer:
        """A layer, and the micro-batch that goes through it."""
        return _shape(self)

    @cached_property
    def logits_bytes(self) -> int:
        """What the loss works with."""
        return _logits_bytes(self)

    @cached_property
    def final_norms(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Around the loss, and back from it: where the last layer keeps its activations, and where it recomputes."""
        return _final_norm(self, recomputes=False), _final_norm(self, recomputes=True)

    @cached_property
    def outside(self) -> tuple[int, int]:
        """Before the first layer, and from its backward pass on: where it keeps its activations, and recomputes."""
        if self.trace is None:
            return 0, 0
        whole, recomputed = (outside_bytes(end, self.pass_tokens) for end in (self.trace.whole, self.trace.recomputed))
        return whole, recomputed

    @cached_property
    def left(self) -> tuple[int, int]:
        """What a record leaves that others follow: where the last layer keeps its activations, and recomputes."""
        if self.trace is None or self.passes == 1:
            return 0, 0
        whole, recomputed = (left_bytes(end, self.pass_tokens) for end in (self.trace.whole, self.trace.recomputed))
        return whole, recomputed

    @cached_property
    def shared_bytes(self) -> int:
        """What all layers of a pass get beside their input, as a trace has it; 0 where none tells."""
        return 0 if self.trace is None else shared_bytes(self.trace, self.pass_tokens)

    @property
    def pass_tokens(self) -> int:
        """Tokens that go through the layers at a time."""
        return -(-self.tokens // self.passes)

    @cached_property
    def loading_bytes(self) -> int:
        """What loading takes on top of what lasts."""
        return _loading_bytes(self)


def _lasting(question: _Question) -> Iterator[tuple[str, int]]:
    """What stays for as long as training does."""
    facts, trainable = question.facts, question.trainable
    streamed, layer = question.streamed_layers, layer_streamed_bytes(facts)
    weights = _weight_bytes(facts) if question.trace is None else _traced_bytes(question.trace)[0]
    yield "base weights, NF4", weights - streamed * (layer - _outer_codes_bytes(facts))
    if streamed:
        yield "buffers of streamed layers", min(streamed, trainer_facts.STREAM_BUFFERS) * allocated(layer)
    yield (
        "embeddings, head, norms and routers, bf16" if facts.mixture else "embeddings, head and norms, bf16",
        _sixteen_bit_bytes(question),
    )
    yield "adapter, bf16", trainable * BF16_BYTES
    yield "optimizer state", round(sum(_state(question)))
    yield "cuBLAS workspaces", 2 * trainer_facts.CUBLAS_WORKSPACE_BYTES  # of the main thread, and of autograd's


@memoized(RESULTS_KEPT)
def _weight_bytes(facts: ModelFacts) -> int:
    return facts.num_layers * sum(linear.weight_bytes for linear in _quantized(facts))


@memoized(RESULTS_KEPT)
def layer_streamed_bytes(facts: ModelFacts) -> int:
    """What a layer that is streamed takes on the host, and in a buffer on the card."""
    return sum(linear.streamed_bytes for linear in _quantized(facts))


def _outer_codes_bytes(facts: ModelFacts) -> int:
    """Each matrix of a streamed layer has a copy of its own of the code of its scales' scales."""
    return len(_quantized(facts)) * OUTER_CODE_BYTES


def _quantized(facts: ModelFacts) -> tuple[Linear, ...]:
    experts = () if facts.mixture is None else expert_linears(facts.mixture, facts.hidden_size)
    return *linears(facts), *experts


def can_stream(spec: QLoRAJobSpec, facts: ModelFacts) -> bool:
    """Whether layers can come from the host: where the trainer computes them, and nothing is answered token by token.

    An answer would take all layers over the link for each of its tokens.
    """
    return moves_layers(spec.adapter, facts) and spec.evaluation.generation is None


def streamed_host_bytes(plan: MemoryPlan, facts: ModelFacts) -> int:
    """What the plan's streamed layers take of the host's memory, pinned."""
    return min(plan.streamed_layers, facts.num_layers) * layer_streamed_bytes(facts)


def moves_layers(adapter: AdapterSpec, facts: ModelFacts) -> bool:
    """Whether what belongs to layers can go to the host and come back in time: where the trainer computes them."""
    return is_fused(adapter, facts) and not facts.record_by_record


def offloaded_host_bytes(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> int:
    """What the plan's layers with their activations in host memory take of it, pinned."""
    if not plan.offloaded_layers or not moves_layers(spec.adapter, facts):
        return 0
    ways = LayerWays.of(facts.num_layers, plan.recompute_layers, plan.offloaded_layers)
    return ways.offloaded_layers * Footprint(spec, facts, plan).kept_layer_bytes


def _state(question: _Question) -> tuple[float, ...]:
    """Tensors of the optimizer in the allocator: what is paged moves out where the allocator wants the room."""
    count, in_8_bit = question.trainable, question.optimizer.endswith("8bit")
    paged = question.optimizer.startswith("paged") and count >= trainer_facts.SMALLEST_PAGED
    moments = () if paged else (count * (1 if in_8_bit else FP32_BYTES),) * 2
    return (*moments, *((count * FP32_BYTES / trainer_facts.OPTIMIZER_BLOCK,) * 2 if in_8_bit else ()))


def _sixteen_bit_bytes(question: _Question) -> int:
    facts = question.facts
    table = allocated(facts.vocab_size * facts.hidden_size * BF16_BYTES)
    tables = 1 if facts.tied_embeddings or _embeddings_leave(question) else 2
    if question.trace is not None:
        return tables * table + _traced_bytes(question.trace)[1]
    experts = 0 if facts.mixture is None else facts.mixture.experts
    routers = facts.num_layers * allocated(experts * facts.hidden_size * BF16_BYTES)
    return tables * table + _norms(facts) * allocated(facts.hidden_size * BF16_BYTES) + routers


@memoized(TRACES_KEPT)
def _traced_bytes(trace: ModelTrace) -> tuple[int, int]:
    """Of all layers' quantized matrices, and of what stays in 16 bits but for embeddings and head."""
    counts = [trace.layers.count(letter) for letter in KIND_LETTERS[: len(trace.kinds)]]
    quantized = sum(count * kind.weight_bytes for count, kind in zip(counts, trace.kinds, strict=True))
    others = sum(count * kind.other_bytes for count, kind in zip(counts, trace.kinds, strict=True))
    return quantized, others + trace.other_bytes


def _norms(facts: ModelFacts) -> int:
    return NORMS.get(facts.model_type, 2) * facts.num_layers + 1


def _embeddings_leave(question: _Question) -> bool:
    leave = "embeddings" in question.plan.offload and not question.facts.tied_embeddings
    return leave and not family_of(question.facts.model_type).table_scales


class _Instants:
    """Every moment that can be the peak of a question.

    Within a kind of layers bytes grow or fall evenly, so the ends are enough.
    """

    def __init__(self, question: _Question, layers: _Layers) -> None:
        self._layers = layers
        self._gradients = _GradientBytes.of(question, layers)
        self._held = _held_bytes(question)
        self._from_host = _from_host_bytes(question)
        self._forward, self._backward = _shared_bytes(question)
        self._batch = question.token_bytes * question.tokens
        self._loss = tuple(at_loss + question.logits_bytes + self._forward for at_loss, _ in question.final_norms)
        self._norm = tuple(in_norm + self._backward for _, in_norm in question.final_norms)
        self._left = question.left
        self._outside = question.outside
        self._shared = question.shared_bytes
        self._loading = question.loading_bytes
        self._passes = question.passes
        self._answering = answering_bytes(question.facts, question.sequence_length) if question.answers else 0

    def largest(self, recomputing: int) -> Instant:
        """The peak where the first so many layers recompute."""
        return Instant(*max(self._at(recomputing), key=_total_bytes))

    def largest_bytes(self, recomputing: int) -> int:
        """That peak without what lasts; a search asks for many."""
        return max(map(_total_bytes, self._at(recomputing)))

    def all(self, recomputing: int) -> tuple[Instant, ...]:
        """The moments in their order."""
        return tuple(Instant(*each) for each in self._at(recomputing))

    def _at(self, recomputing: int) -> Iterator[tuple[str, int, int, int]]:
        """The fields of each moment."""
        layers, gradients = self._layers, self._gradients
        everything = layers.kept(layers.count, recomputing)
        first = layers.at(0, recomputing)  # which may keep what goes at the decoder's end
        every_layer = recomputing == layers.count
        left = self._left[every_layer] or first.kept - first.first_kept + self._shared  # as in older traces
        others = (self._passes - 1) * (everything + left)
        for index in layers.ends(recomputing):
            layer, kept = layers.at(index, recomputing), layers.kept(index, recomputing)
            held = (self._held[layers.offloaded_layers > 0 and not first.kept] if index else 0) + self._from_host
            yield "a layer's forward pass", others + kept, gradients.before, layer.forward_peak + self._forward + held
            # What was let go of before the loss is there no more. What the first layer takes is not what others do: but
            # for what is at work there, it is told with what is around the layers.
            done, behind = gradients.after(index), others + kept - (first.released if index else 0)
            backward = (layer.backward_peak if index else layer.first_backward_peak) + self._backward
            yield "a layer's backward pass", behind, done, backward
            if self._passes > 1:  # autograd keeps the sums of all records' gradients before it adds them to the others
                behind -= others // (self._passes - 1)
                yield "a layer's backward pass", behind, gradients.before + gradients.all, backward
        everything -= first.released
        yield "loss", self._passes * everything, gradients.before, self._loss[every_layer]
        yield "the last norm's backward pass", others + everything, gradients.before, self._norm[every_layer]
        outside = self._outside[recomputing > 0] + self._batch
        yield "what the decoder does around its layers", others, gradients.after(0), outside
        yield "optimizer", 0, gradients.all, min(gradients.all, trainer_facts.OPTIMIZER_PIECE * BF16_BYTES)
        yield LOADING, 0, 0, self._loading
        yield "answering held-out prompts", 0, 0, self._answering


@dataclass(frozen=True, slots=True, kw_only=True)
class _GradientBytes:
    """How many bytes the adapters' gradients take as a backward pass goes from the last layer to the first."""

    behind: tuple[int, ...]
    """Those of the layers behind each one."""
    all: int
    """Those of every layer, and of what is beside them."""
    before: int
    """What is there when the pass begins: sums of earlier micro-batches, or those that graphs add to."""
    sums_at_once: bool
    """Whether all layers' gradients are added to the sums together, as a graph does."""

    @classmethod
    def of(cls, question: _Question, layers: _Layers) -> _GradientBytes:
        """Those of the question."""
        each = [layers.at(index, layers.count).gradients for index in range(layers.count)]
        upto, graphs = list(accumulate(each)), question.uses_cuda_graphs
        every = upto[-1] + (0 if question.trace is None else question.trace.other_gradient_bytes)
        return cls(
            behind=tuple(upto[-1] - done for done in upto),
            all=every,
            before=every if question.plan.accumulation_steps > 1 or graphs else 0,
            sums_at_once=graphs,
        )

    def after(self, index: int) -> int:
        """Those that are there when a layer's turn comes."""
        if self.sums_at_once:
            return self.behind[index] + self.before
        return self.before or self.behind[index]


def _shared_bytes(question: _Question) -> tuple[int, int]:
    """What all layers share, in the forward and in the backward pass: rotary tables, the batch, a workspace."""
    told = question.shared_bytes > 0  # and so counted where it is
    shared = 0 if told else 2 * allocated(question.tokens * question.facts.head_dim * BF16_BYTES)
    if isinstance(question.shape, FusedLayer):
        family = question.shape.family
        shared *= family.angle_tables * (2 if family.exact_angles else 1)
        shared += 2 * family.angle_tables * allocated(question.shape.span)
    # Records that go alone have their gradients as parts of one tensor, which stays for as long as any of them.
    again = allocated(question.pass_tokens * question.facts.hidden_size * BF16_BYTES) if question.passes > 1 else 0
    # Graphs are captured on a stream of their own, in each pass.
    capturing = trainer_facts.CUBLAS_WORKSPACE_BYTES if question.uses_cuda_graphs else 0
    return shared + question.token_bytes * question.tokens + capturing, shared + again + 2 * capturing


def _held_bytes(question: _Question) -> tuple[int, int]:
    """The embeddings, which the decoder holds on to where the first layer's input leaves the card, as is told for those
    that recompute, or all that it keeps."""
    return question.stream * ("activations" in question.plan.offload), question.stream


def _from_host_bytes(question: _Question) -> int:
    """Embeddings as they came from the host, where the decoder works with a multiple of them."""
    scaled = family_of(question.facts.model_type).scales_embeddings and _embeddings_leave(question)
    return question.stream if scaled else 0


def _final_norm(question: _Question, *, recomputes: bool) -> tuple[int, int]:
    """Around the loss, and back from it: the last hidden states as they are and normalized, and their gradient."""
    if question.trace is not None:
        end = question.trace.recomputed if recomputes else question.trace.whole
        at_loss, in_norm = end_bytes(end, question.pass_tokens)
        return question.passes * at_loss, in_norm
    if isinstance(question.shape, TracedLayer):
        return final_norm(question.shape, recomputes=recomputes)
    return 3 * question.stream, 3 * question.stream


def _logits_bytes(question: _Question) -> int:
    """`qlora_trainer/model/loss.py`: a chunk's hidden states or their gradient, and its logits."""
    chunk = min(question.plan.loss_chunk_tokens or question.tokens, question.tokens)
    logits = allocated(chunk * question.facts.vocab_size * BF16_BYTES)
    return logits + allocated(chunk * question.facts.hidden_size * BF16_BYTES)


def _loading_bytes(question: _Question) -> int:
    """PEFT 0.18 makes the adapter in float32; embeddings leave the card after they were loaded; the rest comes later.

    The experts of the last layer are fused, and layers' own embeddings leave, before there is an adapter.
    """
    facts = question.facts
    table = allocated(facts.vocab_size * facts.hidden_size * BF16_BYTES) if _embeddings_leave(question) else 0
    later = sum(_state(question)) + 2 * trainer_facts.CUBLAS_WORKSPACE_BYTES
    adapter = question.trainable * (FP32_BYTES - BF16_BYTES)
    early = _fusing_bytes(question) + (0 if question.loaded else allocated(facts.layer_inputs * BF16_BYTES))
    return max(0, round(max(adapter, early - question.trainable * BF16_BYTES) + table - later))


def _fusing_bytes(question: _Question) -> int:
    if question.loaded:
        return 0
    if question.trace is not None:
        return question.trace.fusing_bytes
    mixture = question.facts.mixture
    return 0 if mixture is None else fusing_bytes(mixture, question.facts.hidden_size)


def _rehearsed(question: _Question, layer: FusedLayer, recompute_layers: int, evaluates: bool) -> Rehearsed:
    facts, plan = question.facts, question.plan
    return Rehearsed(
        layer=layer,
        facts=facts,
        norms=_norms(facts),
        recompute_layers=recompute_layers,
        accumulates=plan.accumulation_steps > 1,
        uses_cuda_graphs=question.uses_cuda_graphs,
        offloads_activations="activations" in plan.offload,
        offloads_embeddings=_embeddings_leave(question),
        offloaded_layers=question.offloaded_layers,
        streamed_layers=question.streamed_layers,
        chunk_tokens=plan.loss_chunk_tokens,
        adapted=targeted(question.adapter, linears(facts)),
        adapter_bytes=question.trainable * BF16_BYTES,
        state=_state(question),
        workspace_bytes=trainer_facts.CUBLAS_WORKSPACE_BYTES,
        evaluates=evaluates,
    )


def _traced_job(question: _Question, trace: ModelTrace, recomputing: int, evaluates: bool) -> TracedJob:
    facts, plan = question.facts, question.plan
    return TracedJob(
        walk=unpacked(trace.walk),
        layers=trace.layers,
        frozen_layers=_frozen(trace),
        recompute_layers=recomputing,
        pass_tokens=question.pass_tokens,
        passes=question.passes,
        accumulates=plan.accumulation_steps > 1,
        evaluates=evaluates,
        chunk_tokens=plan.loss_chunk_tokens,
        hidden=facts.hidden_size,
        vocabulary=facts.vocab_size,
        base_bytes=_traced_bytes(trace)[0] + _sixteen_bit_bytes(question),
        adapter_bytes=question.trainable * BF16_BYTES,
        state=_state(question),
        attention=tuple(_attention(question, kind.heads).traced_workspace for kind in trace.kinds),
        rows_per_token=tuple(0 if kind.experts is None else kind.experts.rows_per_token for kind in trace.kinds),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """The decoder's layers, the first so many of which recompute."""

    kinds: tuple[int, ...]
    """The kind of each layer."""
    recomputed: tuple[LayerBytes, ...]
    """What a layer of each kind takes that recomputes."""
    whole: tuple[LayerBytes, ...]
    offloaded_layers: int = 0
    """How many may have what they keep in host memory; where any do, all layers are of one kind."""

    @classmethod
    def of(cls, question: _Question) -> _Layers:
        """The layers of the question."""
        shape, trace = question.shape, question.trace
        if trace is not None:
            recomputed, whole = (_kinds(question, trace, recomputes) for recomputes in (True, False))
            numbers = [KIND_LETTERS.index(letter) for letter in trace.layers]
            frozen = _frozen(trace)
            if frozen:
                numbers[:frozen] = [len(trace.kinds) + kind for kind in numbers[:frozen]]
                recomputed, whole = ((*each, *_without_gradients(each, question)) for each in (recomputed, whole))
            return cls(kinds=tuple(numbers), recomputed=recomputed, whole=whole)
        if isinstance(shape, FusedLayer):
            recomputed, whole = layer_bytes(shape, offloaded="activations" in question.plan.offload)
        else:
            recomputed, whole = (
                _traced_layer_bytes(shape, recomputes=True),
                _traced_layer_bytes(shape, recomputes=False),
            )
        return cls(
            kinds=(0,) * question.facts.num_layers,
            recomputed=(recomputed,),
            whole=(whole,),
            offloaded_layers=question.offloaded_layers,
        )

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.kinds)

    def ends(self, recomputing: int) -> tuple[int, ...]:
        """The first layer, and of the others the first and the last of each kind, recomputing or not."""
        if len(self.recomputed) == 1:
            last = self.count - 1
            if self.offloaded_layers:
                return _turning_points(self._ways(recomputing))
            if recomputing in (0, self.count):
                return tuple(dict.fromkeys((0, min(1, last), last)))
            return tuple(dict.fromkeys((0, min(1, last), recomputing - 1, recomputing, last)))
        by_kind: dict[tuple[bool, bool, int], list[int]] = {}
        for index, kind in enumerate(self.kinds):
            ends = by_kind.setdefault((index == 0, index < recomputing, kind), [index, index])
            ends[1] = index
        return tuple(sorted({index for ends in by_kind.values() for index in ends}))

    def _ways(self, recomputing: int) -> LayerWays:
        return _layer_ways(self.count, recomputing, self.offloaded_layers)

    def at(self, index: int, recomputing: int) -> LayerBytes:
        """One layer's bytes."""
        if not self.offloaded_layers or recomputing == self.count:  # then none is
            return (self.recomputed if index < recomputing else self.whole)[self.kinds[index]]
        ways, whole = self._ways(recomputing), self.whole[0]
        own = self.recomputed[0] if ways.recomputes(index) else whole
        return _beside(own, whole.kept if ways.has_neighbour(index) else 0, 0 if ways.is_offloaded(index) else own.kept)

    def kept(self, below: int, recomputing: int) -> int:
        """What the layers below one keep."""
        if not below:
            return 0
        first = self.at(0, recomputing)
        recomputed = min(below, recomputing)
        if len(self.recomputed) == 1:
            offloaded = 0
            if self.offloaded_layers:
                ways = self._ways(recomputing)
                recomputed, offloaded = ways.recomputing_below(below), ways.offloaded_below(below)
            whole = below - recomputed - offloaded
            others = recomputed * self.recomputed[0].kept + whole * self.whole[0].kept
        else:
            others = self._sums(True)[recomputed] + self._sums(False)[below] - self._sums(False)[recomputed]
        return others - (first.kept - first.first_kept)

    def _sums(self, recomputes: bool) -> tuple[int, ...]:
        """What the first so many layers keep if all recompute, or none."""
        return _kept_sums(self.kinds, self.recomputed if recomputes else self.whole)


_layer_ways = lru_cache(maxsize=RESULTS_KEPT)(LayerWays.of)


@lru_cache(maxsize=RESULTS_KEPT)
def _beside(layer: LayerBytes, neighbour_bytes: int, kept: int) -> LayerBytes:
    """A layer that computes while a neighbour's activations leave or come, and of which so much stays on the card."""
    return replace(
        layer,
        kept=kept,
        first_kept=kept,
        forward_peak=layer.forward_peak + neighbour_bytes,
        backward_peak=layer.backward_peak + neighbour_bytes,
        first_backward_peak=layer.first_backward_peak + neighbour_bytes,
    )


@lru_cache(maxsize=RESULTS_KEPT)
def _turning_points(ways: LayerWays) -> tuple[int, ...]:
    """The layers that can have the peak: the ends of those of one way, where others begin or activations turn."""
    last = ways.layers - 1
    behind = next((n for n in range(ways.layers) if ways.recomputing_below(n + 1) >= ways.recompute_layers), last)
    turns = (ways.offloaded[0], ways.turn) if ways.offloaded_layers else ()
    ends = {0, min(1, last), behind, min(behind + 1, last), last, *turns}
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for number in range(ways.layers):
        kinds.setdefault((ways.is_offloaded(number), ways.recomputes(number)), []).append(number)
    found: set[int] = set()
    for of_kind in kinds.values():
        for end in ends:
            place = bisect_left(of_kind, end)
            found.update(of_kind[max(0, place - 1) : place + 1])
    return tuple(sorted(found))


@lru_cache(maxsize=TRACES_KEPT)
def _kept_sums(kinds: tuple[int, ...], layers: tuple[LayerBytes, ...]) -> tuple[int, ...]:
    return tuple(accumulate((layers[kind].kept for kind in kinds), initial=0))


@memoized(TRACES_KEPT)
def _all_kinds(
    trace: ModelTrace, recomputes: bool, tokens: int, attention_bytes: tuple[int, ...]
) -> tuple[LayerBytes, ...]:
    return kinds_bytes(trace, recomputes=recomputes, tokens=tokens, attention_bytes=attention_bytes)


def _kinds(question: _Question, trace: ModelTrace, recomputes: bool) -> tuple[LayerBytes, ...]:
    attention = tuple(_attention(question, kind.heads).traced_workspace_bytes for kind in trace.kinds)
    return _all_kinds(trace, recomputes, question.pass_tokens, attention)


def _frozen(trace: ModelTrace) -> int:
    """How many layers come before the first one with adapters: nobody asks for their gradients."""
    adapted = [kind.gradient_bytes > 0 for kind in trace.kinds]
    found = next((index for index, letter in enumerate(trace.layers) if adapted[KIND_LETTERS.index(letter)]), 0)
    return 0 if trace.other_gradient_bytes else found


def _without_gradients(kinds: Iterable[LayerBytes], question: _Question) -> tuple[LayerBytes, ...]:
    """Layers that keep nothing, and have no backward pass; the decoder holds on to its embeddings all the same."""
    held = allocated(question.pass_tokens * question.facts.hidden_size * BF16_BYTES)
    nothing = {"kept": 0, "first_kept": held, "released": held, "backward_peak": 0, "first_backward_peak": 0}
    return tuple(replace(kind, **nothing) for kind in kinds)


_traced_layer_bytes = lru_cache(maxsize=RESULTS_KEPT)(traced_layer_bytes)


def _shape(question: _Question) -> FusedLayer | TracedLayer:
    facts, adapter, tokens, mixture = question.facts, question.adapter, question.tokens, question.facts.mixture
    attention = _attention(question)
    drops = decimal(adapter.dropout) > 0
    if not is_fused(adapter, facts):
        return TracedLayer(
            tokens=tokens,
            facts=facts,
            adapted=targeted(adapter, linears(facts)),
            rank=adapter.rank,
            drops=drops,
            dora=adapter.use_dora,
            attention=attention,
        )
    return FusedLayer(
        tokens=tokens,
        hidden=facts.hidden_size,
        inner=facts.intermediate_size,
        rank=adapter.rank,
        drops=drops,
        mlp_tile_tokens=trainer_facts.MLP_TILE_TOKENS,
        keeps_attention=question.plan.keep_attention,
        family=family_of(facts.model_type),
        attention=attention,
        experts=None if mixture is None else Experts(tokens=tokens, hidden=facts.hidden_size, mixture=mixture),
        **_groups(adapter, facts),
    )


@memoized(RESULTS_KEPT)
def _groups(adapter: AdapterSpec, facts: ModelFacts) -> dict[str, Group]:
    """The groups of linear layers of a layer that the trainer computes by hand, by name."""
    every = linears(facts)
    adapted = targeted(adapter, every)
    return {name: group(members, every, adapted) for name, members in GROUPS.items()}


def _attention(question: _Question, heads: Heads | None = None) -> Attention:
    facts = question.facts
    heads = heads or Heads(query=facts.num_attention_heads, key=facts.num_key_value_heads, size=facts.head_dim)
    least = question.plan.micro_batch_size
    most = max(least, question.tokens // SHORT_RECORD_TOKENS) if question.packing else least
    least, most = question.records or least, question.records or most
    own = not card_matters(question.adapter, facts)  # and then nothing of the row does either, but for its length
    alone = own or (question.trace is not None and not question.trace.packed)
    return Attention(
        tokens=question.pass_tokens,
        records=1 if alone else least,
        most_records=1 if alone else most,
        query_heads=heads.query,
        key_heads=heads.key,
        head_size=heads.size,
        deterministic=question.deterministic and not own,
        multiprocessors=1 if own else question.multiprocessors,
        softcaps=facts.model_type in SOFTCAPPED_TYPES,
        sinks=heads.sinks,
        by_flash=question.plan.attention == "flash-attn-4" and is_fused(question.adapter, facts),
    )
