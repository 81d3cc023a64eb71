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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from orchestrator.api import trainer_facts
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.memory.cuda_allocator import Block, Pool, drop
from orchestrator.sizing.memory.handwritten_layer import (
    FusedLayer,
    kept_backward,
    kept_forward,
    recomputed_backward,
    recomputed_forward,
)
from orchestrator.sizing.memory.linear_layers import GROUPS, Linear, linears
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES

STEPS, MICRO_BATCHES = 2, 2
"""What is rehearsed: steps, and of each so many micro-batches. Later ones find what they need."""
KEPT = ("x", "qkv", "answer", "logsumexp", "qkv_low", "output_low", "middle", "gate_up", "gate_up_low", "down_low")
"""By a layer that keeps its activations, until it goes back."""
GRADIENTS = "_gradients"
FIRST_PRODUCTS = ("qkv", "down_low_grad", "product")
"""What a layer's backward pass multiplies first: where it recomputes, where not, and without adapters in the MLP."""
LOW = ("qkv_low", "output_low", "gate_up_low", "down_low")
"""What a layer's groups make with their A, in their order."""
INT64_BYTES = 8
PROBED_TOKENS, FEWER_PROBED_TOKENS = 12, 5
"""Of the rows that `TrainingModel.check` computes, and of the record that it computes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A job as the allocator sees it; sizes in bytes."""

    layer: FusedLayer
    facts: ModelFacts
    norms: int
    """Vectors as wide as the hidden size."""
    recompute_layers: int
    accumulates: bool
    replayed: bool
    """As CUDA graphs."""
    offloads_activations: bool
    offloads_embeddings: bool
    scales_embeddings: bool
    """Once they are looked up."""
    chunk_tokens: int
    """Of the loss."""
    adapted: tuple[Linear, ...]
    adapter_bytes: int
    state: tuple[float, ...]
    """Of the optimizer, what is in the allocator."""
    workspace_bytes: int
    """Of cuBLAS, for each thread and stream."""
    evaluates: bool
    """Before the first step."""


def reserved_bytes(job: Rehearsed) -> int:
    """The most that is reserved at a time."""
    return _Stage(job).most_reserved()


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
                drop(self._blocks.pop(name))

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


class _Stage:
    """The trainer's train stage on paper."""

    def __init__(self, job: Rehearsed) -> None:
        self._job = job
        self._pool = Pool()
        self._lasting = _Tensors(self._pool)
        self._run = _Tensors(self._pool)
        self._graphs: Pool | None = None
        self._most_before_graphs = 0

    def most_reserved(self) -> int:
        """Walk through. Pages are given back after loading and before graphs are captured."""
        self._load()
        self._make_adapter()
        self._check()
        self._make_optimizer()
        if self._job.evaluates:
            self._micro_batch(self._lasting, self._pool, trains=False, accumulated=False)
        for _ in range(STEPS):
            for number in range(MICRO_BATCHES if self._job.accumulates else 1):
                if self._job.replayed:
                    self._replay()
                else:
                    self._micro_batch(self._lasting, self._pool, trains=True, accumulated=number > 0)
            self._update()
        graphs_bytes = self._graphs.reserved_bytes if self._graphs is not None else 0
        return max(self._most_before_graphs, self._pool.reserved_bytes + graphs_bytes)

    # --- what lasts

    def _load(self) -> None:
        """`load_base`: the layers' matrices one after the other, then tables and norms; what is free goes back."""
        facts = self._job.facts
        for index in range(facts.num_layers):
            for linear in linears(facts):
                self._quantize(f"{index} {linear.name}", linear)
        table = facts.vocab_size * facts.hidden_size * BF16_BYTES
        self._lasting.take(embeddings=table)
        for index in range(self._job.norms):
            self._lasting.take(**{f"norm {index}": facts.hidden_size * BF16_BYTES})
        if not facts.tied_embeddings:
            self._lasting.take(head=table)
        self._pool.give_back_pages()

    def _quantize(self, name: str, linear: Linear) -> None:
        """bitsandbytes' `quantize_4bit`: dense weights and their 32-bit scales are there until the 8-bit ones are."""
        scales = -(-linear.parameters // trainer_facts.NF4_BLOCK)
        base = self._lasting
        base.take(dense=linear.parameters * BF16_BYTES, scales=scales * FP32_BYTES)
        base.take(**{f"packed {name}": linear.parameters / 2})
        base.take(centered=scales * FP32_BYTES)
        base.take(
            **{f"scales {name}": scales, f"outer scales {name}": scales / trainer_facts.NF4_SCALE_BLOCK * FP32_BYTES}
        )
        base.drop("centered", "scales", "dense")
        if linear.bias:
            base.take(**{f"bias {name}": linear.outputs * BF16_BYTES})

    def _make_adapter(self) -> None:
        """`add_adapter` as PEFT 0.21 has it, in bfloat16 at once; A in one piece in `LinearGroup`; `HostEmbedding`."""
        adapter, rank = self._lasting, self._job.layer.rank
        for index in range(self._job.facts.num_layers):
            for linear in self._job.adapted:
                adapter.take(**{f"A {index} {linear.name}": rank * linear.inputs * BF16_BYTES})
                adapter.take(**{f"B {index} {linear.name}": rank * linear.outputs * BF16_BYTES})
        for index in range(self._job.facts.num_layers):
            for place, members in enumerate(GROUPS.values()):
                of_a = [rank * linear.inputs * BF16_BYTES for linear in self._job.adapted if linear.name in members]
                adapter.take(**{f"stack {index} {place}": sum(of_a)})
                adapter.drop(*(f"A {index} {member}" for member in members))
        if self._job.offloads_embeddings:
            adapter.drop("embeddings")

    def _check(self) -> None:
        """`TrainingModel.check`: all layers are alike, and what is no wider than the hidden size hardly counts."""
        probe = self._lasting
        probe.take(workspace=self._job.workspace_bytes)
        for name in ("after_first", "after_other"):
            self._probe_layer()
            self._probe_logits(name, PROBED_TOKENS)
        for linear in linears(self._job.facts):  # as bitsandbytes has it
            scales = -(-linear.parameters // trainer_facts.NF4_BLOCK) * FP32_BYTES
            probe.passing(unscaled=scales, scales=scales, dense=linear.parameters * BF16_BYTES)
        self._probe_layer()
        for name in ("ours", "theirs"):
            self._probe_logits(name, FEWER_PROBED_TOKENS)
        probe.passing(difference=self._job.facts.vocab_size * FEWER_PROBED_TOKENS * FP32_BYTES)
        probe.drop("after_first", "after_other", "ours", "theirs")

    def _probe_layer(self) -> None:
        layer, probe = self._job.layer, self._lasting
        for group in (layer.qkv, layer.output):
            probe.passing(weight=group.dense_bytes)
        probe.take(weight=layer.gate_up.dense_bytes, gate_up=layer.of(layer.gate_up.outputs, PROBED_TOKENS))
        probe.drop("weight")
        probe.passing(weight=layer.down.dense_bytes)
        probe.drop("gate_up")

    def _probe_logits(self, name: str, tokens: int) -> None:
        numbers = tokens * self._job.facts.vocab_size
        self._lasting.take(raw=numbers * BF16_BYTES, **{name: numbers * FP32_BYTES})
        self._lasting.drop("raw")

    def _make_optimizer(self) -> None:
        """`AdapterOptimizer`: the adapter moves into one piece, but a group holds the old A until it needs the new."""
        self._lasting.take(adapter=self._job.adapter_bytes)
        self._lasting.drop(*(name for name in self._lasting if name.startswith("B ")))
        self._lasting.take(**{f"state {number}": size for number, size in enumerate(self._job.state)})

    # --- steps

    def _replay(self) -> None:
        """`Replay.run`: the first micro-batch runs as it is, the second is captured, later ones take nothing."""
        if "sums" not in self._lasting:
            self._lasting.take(sums=self._job.adapter_bytes)
            self._micro_batch(self._lasting, self._pool, trains=True, accumulated=False)
        elif self._graphs is None:
            self._capture()

    def _capture(self) -> None:
        """`Replay._capture`: torch empties the allocator's cache first, and a graph has its own pool and workspaces."""
        self._lasting.take(**{f"graph's {name}": size for name, size in self._inputs().items()})
        self._most_before_graphs = self._pool.reserved_bytes
        self._pool.give_back_pages()
        self._graphs = Pool()
        self._micro_batch(_Tensors(self._graphs), self._graphs, trains=True, accumulated=False)

    def _update(self) -> None:
        """`AdapterOptimizer.step`: the gradients side by side."""
        self._lasting.take(gathered=self._job.adapter_bytes)
        self._lasting.drop("gathered", *(name for name in self._lasting if name.endswith(GRADIENTS)))

    def _inputs(self) -> dict[str, int]:
        """`MicroBatch.to`."""
        return dict.fromkeys(("ids", "targets", "positions", "supervised"), self._job.layer.tokens * INT64_BYTES)

    def _micro_batch(self, lasting: _Tensors, pool: Pool, *, trains: bool, accumulated: bool) -> None:
        """`TrainingModel.accumulate`; a layer's output is the next one's `x`, a copy of `x_grad` the `grad` below."""
        job = self._job
        layer = job.layer if trains else replace(job.layer, drops=False)
        shared = _Tensors(pool)
        layers = [_Tensors(pool) for _ in range(job.facts.num_layers + 1)]
        shared.take(**self._inputs())
        self._begin(lasting, shared, pool, layers[0])
        for index, (own, above) in enumerate(pairwise(layers)):
            own.before = {low: partial(self._lasting.drop, f"stack {index} {place}") for place, low in enumerate(LOW)}
            self._forward(index, own, layer, trains=trains)
            own.hand("out", above, "x")
            if self._leaves(index) or not trains:
                if index == 0:
                    own.hand("x", shared, "embedded")  # the decoder holds it to its end
                own.keep(())
        last = layers[-1]
        last.take(normalized=layer.stream)
        last.drop(*(() if trains else ("x",)))
        shared.drop("embedded", "looked_up")
        self._loss(last, trains=trains)
        if trains:
            last.take(x_grad=layer.stream)  # of the last norm
            # The backward pass has a thread of its own, for which cuBLAS takes a workspace beside its first product.
            workspace = partial(lasting.take, backward_workspace=job.workspace_bytes)
            layers[-2].afterwards = dict.fromkeys(FIRST_PRODUCTS, workspace)
            last.keep(("x_grad",))
            for index in reversed(range(job.facts.num_layers)):
                layers[index].take(grad=layer.stream)  # autograd's own, of the batch's one row
                layers[index + 1].drop("x_grad")
                self._backward(index, layers)
                for name in layers[index]:
                    if name.endswith(GRADIENTS) and not accumulated:
                        layers[index].hand(name, shared if job.replayed else lasting, f"{index} {name}")
                layers[index].keep(("x_grad",))
        for each in (*layers, shared):
            each.keep(())

    def _begin(self, lasting: _Tensors, shared: _Tensors, pool: Pool, first: _Tensors) -> None:
        """`FusedDecoder.begin` forgets the `Run` before; embeddings, and transformers' rotary tables in float32."""
        layer = self._job.layer
        self._run.keep(())
        self._run = run = _Tensors(pool)
        shared.take(looked_up=layer.stream if self._job.scales_embeddings else 0)
        first.take(x=layer.stream)
        if not self._job.offloads_embeddings:  # or else the decoder was called with them
            shared.drop("looked_up")
        lasting.take(workspace=self._job.workspace_bytes)  # angles are a product
        turns = layer.tokens * self._job.facts.head_dim * FP32_BYTES
        run.take(half=turns / 2, angles=turns)
        for name in ("cos", "sin"):
            run.take(unscaled=turns, **{f"exact {name}": turns})
            run.drop("unscaled")
        run.take(cos=turns / 2, sin=turns / 2)
        run.drop("half", "angles", "exact cos", "exact sin")
        run.take(first=layer.span, last=layer.span)

    def _leaves(self, index: int) -> bool:
        """Whether a layer's input goes to host memory."""
        return self._job.offloads_activations and index < self._job.recompute_layers

    def _forward(self, index: int, own: _Tensors, layer: FusedLayer, *, trains: bool) -> None:
        if index < self._job.recompute_layers or not trains:
            recomputed_forward(own, layer)
            own.keep(("x", "out"))
        else:
            kept_forward(own, layer)
            own.keep((*KEPT, "out"))

    def _backward(self, index: int, layers: list[_Tensors]) -> None:
        own, layer = layers[index], self._job.layer
        if index >= self._job.recompute_layers:
            kept_backward(own, layer, first=index == 0)
            return
        own.take(x=layer.stream)  # back from the host, if it is not there
        recomputed_backward(own, layer, fetches=self._job.offloads_activations and index > 0, first=index == 0)
        if index > 0:
            own.hand("fetched", layers[index - 1], "x")

    def _loss(self, last: _Tensors, *, trains: bool) -> None:
        """`cross_entropy` over the normalized states; leaves the gradient to them."""
        layer, facts = self._job.layer, self._job.facts
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
