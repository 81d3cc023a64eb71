"""How many bytes PyTorch's allocator reserves for a job: its first steps, rehearsed on the allocator's own rules.

`sizing/footprint` says how much is allocated. More is reserved: tensors of different sizes come and go, a hole that is
too small for the next one stays, and what a CUDA graph works with is a pool of its own. Which hole a tensor gets
depends on all that was before it, so nothing but the whole story tells: the base is quantized, the adapter is made and
moved, the layers are checked, micro-batches go forward and back on the walk of `sizing/memory/handwritten_layer`, the
optimizer steps. Each of these functions follows the one of the trainer that its docstring names, and must be changed
with it.

Only layers that the trainer computes by hand can be rehearsed; of the others the walk is not known in its order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from orchestrator.api import trainer_facts
from orchestrator.api.layer_ways import LayerWays
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.memory.cuda_allocator import Block, Pool
from orchestrator.sizing.memory.handwritten_layer import (
    FusedLayer,
    kept_backward,
    kept_forward,
    recomputed_backward,
    recomputed_forward,
    take_kept,
)
from orchestrator.sizing.memory.linear_layers import GROUPS, Linear, linears
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES

STEPS, MICRO_BATCHES = 2, 2
"""Steps that are rehearsed, each of so many micro-batches where it has several. Later ones find what they need."""
KEPT = (
    "x",
    "qkv",
    "attention_output",
    "logsumexp",
    "qkv_low",
    "output_low",
    "attention_added",
    "middle",
    "gate_up",
    "gate_up_low",
    "down_low",
    "mlp_added",
)
"""What a layer that keeps its activations holds until it goes back."""
GRADIENTS = "_gradients"
FIRST_PRODUCTS = ("qkv", "down_low_grad", "product")
"""What a layer's backward pass multiplies first: where it recomputes, where not, and without adapters in the MLP."""
LOW = ("qkv_low", "output_low", "gate_up_low", "down_low")
"""What a layer's groups make with their A, in their order."""
INT64_BYTES = 8
PROBED_TOKENS, FEWER_PROBED_TOKENS = 12, 5
"""How long the rows are that `TrainingModel.check` computes, and the record that it computes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A job as the allocator sees it; sizes in bytes."""

    layer: FusedLayer
    facts: ModelFacts
    norms: int
    """Vectors as wide as the hidden size."""
    recompute_layers: int
    accumulates: bool
    uses_cuda_graphs: bool
    offloads_activations: bool
    offloads_embeddings: bool
    offloaded_layers: int
    streamed_layers: int
    chunk_tokens: int
    """Tokens whose logits the loss computes at a time; all of them where it is 0."""
    adapted: tuple[Linear, ...]
    adapter_bytes: int
    state: tuple[float, ...]
    """Tensors of the optimizer that are in the allocator."""
    workspace_bytes: int
    """What cuBLAS takes for each thread and stream."""
    evaluates: bool
    """Whether there is an evaluation before the first step."""


def reserved_bytes(job: Rehearsed) -> int:
    """The most that is reserved at a time."""
    stage = TrainStage(job, Pool())
    stage.set_up()
    if job.evaluates:
        stage.evaluate()
    for _ in range(STEPS):
        stage.micro_batches()
        stage.update()
    return stage.most_reserved_bytes()


class _Tensors:
    """Named tensors of one owner, each in its place."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._blocks: dict[str, Block] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.afterwards: dict[str, Callable[[], object]] = {}
        """What happens, once, when a tensor of that name comes to be."""

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._blocks))

    def take(self, **sizes: float) -> None:
        """Tensors come to be, but for those that are there already: what a forward pass has left for the way back."""
        for name, size in sizes.items():
            if not size or name in self._blocks:
                continue
            if name in self.before:
                self.before.pop(name)()
            self._blocks[name] = self._pool.take(size)
            if name in self.afterwards:
                self.afterwards.pop(name)()

    def drop(self, *names: str) -> None:
        """Tensors are freed, where they are there."""
        for name in names:
            if name in self._blocks:
                self._pool.drop(self._blocks.pop(name))

    def passing(self, **sizes: float) -> None:
        """Tensors come to be and are freed at once."""
        self.take(**sizes)
        self.drop(*sizes)

    def keep(self, names: Iterable[str]) -> None:
        """Free all others."""
        kept = frozenset(names)
        self.drop(*(name for name in self if name not in kept))

    def hand(self, name: str, other: _Tensors, new_name: str) -> None:
        """A tensor has another owner from now on, if there is one of this name."""
        if name in self._blocks:
            other._blocks[new_name] = self._blocks.pop(name)


class TrainStage:
    """The trainer's train stage on paper: every tensor gets its place in a pool of the allocator.

    Pages are given back after loading and before graphs are captured.
    """

    def __init__(self, job: Rehearsed, pool: Pool) -> None:
        self._job = job
        self._pool = pool
        self._lasting = _Tensors(pool)
        self._run = _Tensors(pool)
        self._graphs: Pool | None = None
        self._most_before_graphs = 0

    def set_up(self) -> None:
        """All that is done before the first micro-batch."""
        _load(self._job, self._lasting)
        self._pool.give_back_pages()
        _make_adapter(self._job, self._lasting)
        _check(self._job, self._lasting)
        _make_optimizer(self._job, self._lasting)

    def evaluate(self) -> None:
        """A forward pass without dropout that leaves nothing for a way back."""
        self._pass(_Evaluation(self._job, self._pool, self._lasting, self._lasting))

    def micro_batches(self) -> None:
        """The micro-batches of one step."""
        for number in range(MICRO_BATCHES if self._job.accumulates else 1):
            if self._job.uses_cuda_graphs:
                self._run_cuda_graphs()
            else:
                self._train(self._lasting, self._pool, accumulated=number > 0)

    def update(self) -> None:
        """`AdapterOptimizer.step`: the gradients side by side."""
        self._lasting.take(gathered=self._job.adapter_bytes)
        self._lasting.drop("gathered", *(name for name in self._lasting if name.endswith(GRADIENTS)))

    def most_reserved_bytes(self) -> int:
        """The most that was reserved at a time, the pool of the CUDA graphs among it."""
        graphs_bytes = self._graphs.reserved_bytes if self._graphs is not None else 0
        return max(self._most_before_graphs, self._pool.reserved_bytes + graphs_bytes)

    def _train(self, lasting: _Tensors, pool: Pool, *, accumulated: bool) -> None:
        self._pass(_MicroBatch(self._job, pool, lasting, self._lasting, accumulated=accumulated))

    def _pass(self, over: _Pass) -> None:
        """`FusedDecoder.begin` forgets the `Run` of the pass before once there is an input for this one."""
        previous, self._run = self._run, over.run_tensors
        over.walk(forget=lambda: previous.keep(()))

    def _run_cuda_graphs(self) -> None:
        """The first micro-batch runs as it is, the second is captured, later ones take nothing."""
        if "sums" not in self._lasting:
            self._lasting.take(sums=self._job.adapter_bytes)
            self._train(self._lasting, self._pool, accumulated=False)
        elif self._graphs is None:
            self._capture()

    def _capture(self) -> None:
        """torch empties the allocator's cache first, and a graph has its own pool and workspaces."""
        self._lasting.take(**{f"graph's {name}": size for name, size in _inputs(self._job).items()})
        self._most_before_graphs = self._pool.reserved_bytes
        self._pool.give_back_pages()
        self._graphs = Pool()
        self._train(_Tensors(self._graphs), self._graphs, accumulated=False)


# --- what lasts


def _load(job: Rehearsed, base: _Tensors) -> None:
    """`load_base`: the layers' matrices one after the other, then tables and norms."""
    facts = job.facts
    streamed = trainer_facts.streamed_numbers(job.streamed_layers, facts.num_layers)
    for index in range(facts.num_layers):
        for linear in linears(facts):
            _quantize(base, f"{index} {linear.name}", linear)
            if index in streamed:
                base.drop(*(f"{part} {index} {linear.name}" for part in ("packed", "scales", "outer scales")))
    table = facts.vocab_size * facts.hidden_size * BF16_BYTES
    base.take(embeddings=table)
    for index in range(job.norms):
        base.take(**{f"norm {index}": facts.hidden_size * BF16_BYTES})
    if not facts.tied_embeddings:
        base.take(head=table)
    for number in range(min(job.streamed_layers, trainer_facts.STREAM_BUFFERS)):
        base.take(**{f"buffer {number}": sum(linear.streamed_bytes for linear in linears(facts))})


def _quantize(base: _Tensors, name: str, linear: Linear) -> None:
    """bitsandbytes' `quantize_4bit`: dense weights and their 32-bit scales are there until the 8-bit ones are."""
    scales = -(-linear.parameters // trainer_facts.NF4_BLOCK)
    base.take(dense=linear.parameters * BF16_BYTES, scales=scales * FP32_BYTES)
    base.take(**{f"packed {name}": linear.parameters / 2})
    base.take(centered=scales * FP32_BYTES)
    outer = scales / trainer_facts.NF4_SCALE_BLOCK * FP32_BYTES
    base.take(**{f"scales {name}": scales, f"outer scales {name}": outer})
    base.drop("centered", "scales", "dense")
    if linear.bias:
        base.take(**{f"bias {name}": linear.outputs * BF16_BYTES})


def _make_adapter(job: Rehearsed, adapter: _Tensors) -> None:
    """`add_adapter` as PEFT 0.21 has it, in bfloat16 at once; A in one piece in `LinearGroup`; `HostEmbedding`."""
    rank = job.layer.rank
    for index in range(job.facts.num_layers):
        for linear in job.adapted:
            adapter.take(**{f"A {index} {linear.name}": rank * linear.inputs * BF16_BYTES})
            adapter.take(**{f"B {index} {linear.name}": rank * linear.outputs * BF16_BYTES})
    for index in range(job.facts.num_layers):
        for place, members in enumerate(GROUPS.values()):
            of_a = [rank * linear.inputs * BF16_BYTES for linear in job.adapted if linear.name in members]
            adapter.take(**{f"stack {index} {place}": sum(of_a)})
            adapter.drop(*(f"A {index} {member}" for member in members))
    if job.offloads_embeddings:
        adapter.drop("embeddings")


def _make_optimizer(job: Rehearsed, lasting: _Tensors) -> None:
    """`AdapterOptimizer`: the adapter moves into one piece, but a group holds the old A until it needs the new."""
    lasting.take(adapter=job.adapter_bytes)
    lasting.drop(*(name for name in lasting if name.startswith("B ")))
    lasting.take(**{f"state {number}": size for number, size in enumerate(job.state)})


# --- the check before training


def _check(job: Rehearsed, probe: _Tensors) -> None:
    """`TrainingModel.check`: all layers are alike, and what is no wider than the hidden size hardly counts."""
    probe.take(workspace=job.workspace_bytes)
    for name in ("after_first", "after_other"):
        _probe_layer(job, probe)
        _probe_logits(job, probe, name, PROBED_TOKENS)
    for linear in linears(job.facts):  # as bitsandbytes has it
        scales = -(-linear.parameters // trainer_facts.NF4_BLOCK) * FP32_BYTES
        probe.passing(unscaled=scales, scales=scales, dense=linear.parameters * BF16_BYTES)
    _probe_layer(job, probe)
    for name in ("ours", "theirs"):
        _probe_logits(job, probe, name, FEWER_PROBED_TOKENS)
    probe.passing(difference=job.facts.vocab_size * FEWER_PROBED_TOKENS * FP32_BYTES)
    probe.drop("after_first", "after_other", "ours", "theirs")


def _probe_layer(job: Rehearsed, probe: _Tensors) -> None:
    layer = job.layer
    for group in (layer.qkv, layer.output):
        probe.passing(weight=group.dense_bytes)
    probe.take(weight=layer.gate_up.dense_bytes, gate_up=layer.of(layer.gate_up.outputs, PROBED_TOKENS))
    probe.drop("weight")
    probe.passing(weight=layer.down.dense_bytes)
    probe.drop("gate_up")


def _probe_logits(job: Rehearsed, probe: _Tensors, name: str, tokens: int) -> None:
    numbers = tokens * job.facts.vocab_size
    probe.take(raw=numbers * BF16_BYTES, **{name: numbers * FP32_BYTES})
    probe.drop("raw")


# --- a micro-batch


def _inputs(job: Rehearsed) -> dict[str, int]:
    """`MicroBatch.to`."""
    return dict.fromkeys(("ids", "targets", "positions", "supervised"), job.layer.tokens * INT64_BYTES)


class _Pass(ABC):
    """A micro-batch's way through the model; a layer's output is the next one's `x`."""

    def __init__(self, job: Rehearsed, pool: Pool, lasting: _Tensors, adapter: _Tensors) -> None:
        """`lasting` is what outlives it in the same pool, `adapter` has the old pieces of A."""
        self._job = job
        self._lasting = lasting
        self._adapter = adapter
        self.run_tensors = _Tensors(pool)
        self._shared = _Tensors(pool)
        self._layers = [_Tensors(pool) for _ in range(job.facts.num_layers + 1)]

    @property
    @abstractmethod
    def _layer(self) -> FusedLayer:
        """The layer as this pass computes it."""

    @property
    def _given(self) -> tuple[str, ...]:
        """What layers that recompute keep of what attention gave."""
        return tuple(self._layer.given) if self._layer.keeps_attention else ()

    @abstractmethod
    def walk(self, forget: Callable[[], None]) -> None:
        """All of it; `forget` drops what the pass before has left."""

    @abstractmethod
    def _forward(self, index: int, own: _Tensors, /) -> None:
        """A layer's forward pass."""

    @abstractmethod
    def _leave(self, index: int, own: _Tensors, /) -> None:
        """What does not stay on the card leaves it when a layer is done."""

    def _hold_embeddings(self, index: int, own: _Tensors) -> None:
        """The decoder holds the first layer's input to its end."""
        if index == 0:
            own.hand("x", self._shared, "embedded")

    def _walk_forward(self, forget: Callable[[], None]) -> None:
        """The way to the normalized states in front of the loss."""
        self._shared.take(**_inputs(self._job))
        forget()
        self._begin(self._layers[0])
        for index, (own, above) in enumerate(pairwise(self._layers)):
            # A group's old pieces of A go when it first needs the new ones.
            own.before = {low: partial(self._adapter.drop, f"stack {index} {place}") for place, low in enumerate(LOW)}
            self._forward(index, own)
            own.hand("out", above, "x")
            self._leave(index, own)
        self._layers[-1].take(normalized=self._layer.stream)

    def _begin(self, first: _Tensors) -> None:
        """Embeddings, and transformers' rotary tables in float32."""
        layer, run = self._layer, self.run_tensors
        self._shared.take(looked_up=layer.stream if layer.family.scales_embeddings else 0)
        first.take(x=layer.stream)
        if not self._job.offloads_embeddings:  # or else the decoder was called with them
            self._shared.drop("looked_up")
        self._lasting.take(workspace=self._job.workspace_bytes)  # angles are a product
        for kind in range(self._layer.family.angle_tables):
            self._turn(run, kind)
            run.take(**{f"first {kind}": layer.span, f"last {kind}": layer.span})

    def _turn(self, run: _Tensors, kind: int) -> None:
        """Cosines and sines for one kind of layers."""
        table = self._layer.tokens * self._job.facts.head_dim * FP32_BYTES
        run.take(half=table / 2, angles=table)
        exact = [f"exact {name} {kind}" for name in ("cos", "sin")]
        for name in exact:
            run.take(unscaled=table, **{name: table})
            run.drop("unscaled")
        if not self._layer.family.exact_angles:
            run.take(**{f"cos {kind}": table / 2, f"sin {kind}": table / 2})
            run.drop(*exact)
        run.drop("half", "angles")

    def _loss(self, last: _Tensors, *, trains: bool) -> None:
        """`cross_entropy` over the normalized states; leaves the gradient to them."""
        layer, facts = self._layer, self._job.facts
        last.take(grad=layer.stream if trains else 0)
        supervised = layer.tokens - 1  # a row's last token predicts nothing
        for start in range(0, supervised, self._job.chunk_tokens or layer.tokens):
            tokens = min(self._job.chunk_tokens or layer.tokens, supervised - start)
            chosen = layer.of(facts.hidden_size, tokens)
            last.take(chosen=chosen, logits=layer.of(facts.vocab_size, tokens))
            last.drop("chosen")
            last.passing(chosen_grad=chosen if trains else 0)
            last.drop("logits")
        last.drop("normalized")

    def _end(self) -> None:
        for each in (*self._layers, self._shared):
            each.keep(())


class _Evaluation(_Pass):
    """`TrainingModel.loss` without gradients: no layer keeps anything."""

    @property
    def _layer(self) -> FusedLayer:
        return replace(self._job.layer, drops=False, keeps_attention=False)

    def walk(self, forget: Callable[[], None]) -> None:
        """All of it."""
        self._walk_forward(forget)
        self._layers[-1].drop("x")
        self._shared.drop("embedded", "looked_up")
        self._loss(self._layers[-1], trains=False)
        self._end()

    def _forward(self, _: int, own: _Tensors, /) -> None:
        recomputed_forward(own, self._layer)
        own.keep(("x", "out"))

    def _leave(self, index: int, own: _Tensors, /) -> None:
        self._hold_embeddings(index, own)
        own.keep(())


class _MicroBatch(_Pass):
    """`TrainingModel.accumulate`: forward and back. A copy of a layer's `x_grad` is the `grad` of the one below."""

    def __init__(self, job: Rehearsed, pool: Pool, lasting: _Tensors, adapter: _Tensors, *, accumulated: bool) -> None:
        """`accumulated`: gradients are there already, and what this one finds is added to them."""
        super().__init__(job, pool, lasting, adapter)
        self._accumulated = accumulated

    @property
    def _layer(self) -> FusedLayer:
        return self._job.layer

    def walk(self, forget: Callable[[], None]) -> None:
        """All of it."""
        self._walk_forward(forget)
        self._shared.drop("embedded", "looked_up")
        self._loss(self._layers[-1], trains=True)
        self._walk_back()
        self._end()

    def _forward(self, index: int, own: _Tensors, /) -> None:
        if self._ways.recomputes(index):
            recomputed_forward(own, self._layer)
            own.keep(("x", "out", *self._given))
        else:
            kept_forward(own, self._layer)
            own.keep((*KEPT, "out"))

    def _leave(self, index: int, own: _Tensors, /) -> None:
        """The input of a layer that recomputes goes to host memory, where activations are offloaded; what one keeps
        whose activations are, once the next such layer is done."""
        ways = self._ways
        if ways.recomputes(index) and self._job.offloads_activations:
            self._hold_embeddings(index, own)
            own.keep(self._given)
        if ways.offloaded_layers and (index == ways.turn or ways.is_offloaded(index)):
            place = ways.offloaded_below(index)
            if place:
                below = ways.offloaded[place - 1]
                self._hold_embeddings(below, self._layers[below])
                self._layers[below].keep(())

    @property
    def _ways(self) -> LayerWays:
        job = self._job
        return LayerWays.of(job.facts.num_layers, job.recompute_layers, job.offloaded_layers)

    def _walk_back(self) -> None:
        layers, last = self._layers, self._layers[-1]
        last.take(x_grad=self._layer.stream)  # of the last norm
        # The backward pass has a thread of its own, for which cuBLAS takes a workspace beside its first product.
        workspace = partial(self._lasting.take, backward_workspace=self._job.workspace_bytes)
        layers[-2].afterwards = dict.fromkeys(FIRST_PRODUCTS, workspace)
        last.keep(("x_grad",))
        for index in reversed(range(self._job.facts.num_layers)):
            layers[index].take(grad=self._layer.stream)  # autograd's own, of the batch's one row
            layers[index + 1].drop("x_grad")
            self._backward(index)
            self._hand_gradients(index)
            layers[index].keep(("x_grad",))

    def _backward(self, index: int) -> None:
        own, layer = self._layers[index], self._layer
        ways = self._ways
        if (fetched := ways.fetched_at(index)) is not None:  # on their way back while this layer computes
            take_kept(self._layers[fetched], layer)
        if not ways.recomputes(index):
            kept_backward(own, layer, first=index == 0)
            return
        own.take(x=layer.stream)  # back from the host, if it is not there
        fetches = self._job.offloads_activations and index > 0 and ways.recomputes(index - 1)
        recomputed_backward(own, layer, fetches=fetches, first=index == 0)
        if fetches:
            own.hand("fetched", self._layers[index - 1], "x")

    def _hand_gradients(self, index: int) -> None:
        """The first gradients stay, those of a pass with CUDA graphs until its end; later ones are added to them."""
        if self._accumulated:
            return
        owner = self._shared if self._job.uses_cuda_graphs else self._lasting
        for name in self._layers[index]:
            if name.endswith(GRADIENTS):
                self._layers[index].hand(name, owner, f"{index} {name}")
