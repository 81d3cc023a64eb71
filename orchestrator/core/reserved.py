"""How many bytes PyTorch's allocator reserves for a job: its first steps, rehearsed on the allocator's own rules.

`core/sizing` says how much is allocated. More is reserved: tensors of different sizes come and go, a hole that is too
small for the next one stays, and what a CUDA graph works with is a pool of its own. Which hole a tensor gets depends on
all that was before it, so nothing but the whole story tells: the base is quantized, the adapter is made and moved, the
layers are checked, micro-batches go forward and back on the walk of `core/fused`, the optimizer steps. Each of these
functions follows the one of the trainer that its docstring names, and must be changed with it.

Only layers that the trainer computes by hand can be rehearsed; of the others the walk is not known in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from orchestrator.api.results import ModelFacts
from orchestrator.core.fused import FusedLayer, kept_backward, kept_forward, recomputed_backward, recomputed_forward
from orchestrator.core.linears import NF4_BLOCK, SCALE_BLOCK, Group, Linear, linears
from orchestrator.core.pages import Block, Pool, drop
from orchestrator.core.timeline import BF16_BYTES, FP32_BYTES, Walk

STEPS, MICRO_BATCHES = 2, 2
"""What is rehearsed: steps, and of each so many micro-batches. Later ones find what they need."""
KEPT = ("x", "qkv", "answer", "logsumexp", "qkv_low", "output_low", "middle", "gate_up", "gate_up_low", "down_low")
"""By a layer that keeps its activations, until it goes back."""
GRADIENTS = "_gradients"
FIRST_PRODUCTS = ("qkv", "down_low_grad")
"""What a layer's backward pass multiplies first: where it recomputes, and where it does not."""


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
    chunk_tokens: int
    """Of the loss."""
    batch_bytes: int
    adapter_bytes: int
    state_bytes: int
    """Of the optimizer, in the allocator."""
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
        self.afterwards: dict[str, Callable[[], object]] = {}
        """What happens once a tensor of that name has come to be."""

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._blocks))

    def take(self, **sizes: float) -> None:
        """Tensors come to be, but for those that are there already: what a forward pass has left for the way back."""
        for name, size in sizes.items():
            if size and name not in self._blocks:
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

    def apart(self, part: Callable[[Walk], None]) -> None:
        """A part with names of its own, nothing of which is left."""
        inner = _Tensors(self._pool)
        part(inner)
        inner.keep(())

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
        scales = -(-linear.parameters // NF4_BLOCK)
        base = self._lasting
        base.take(dense=linear.parameters * BF16_BYTES, scales=scales * FP32_BYTES)
        base.take(**{f"packed {name}": linear.parameters / 2})
        base.take(centered=scales * FP32_BYTES)
        base.take(**{f"scales {name}": scales, f"outer scales {name}": scales / SCALE_BLOCK * FP32_BYTES})
        base.drop("centered", "scales", "dense")
        if linear.bias:
            base.take(**{f"bias {name}": linear.outputs * BF16_BYTES})

    def _make_adapter(self) -> None:
        """`add_adapter` in float32 and then bfloat16, `LinearGroup` with its A in one piece, `HostEmbedding`."""
        adapter, rank = self._lasting, self._job.layer.rank
        pairs = {
            f"{index} {place} {member}": (rank * group.inputs, rank * outputs)
            for index, place, group in self._groups()
            for member, outputs in enumerate(group.adapted_outputs)
        }
        for name, (a, b) in pairs.items():
            adapter.take(**{f"float A {name}": a * FP32_BYTES, f"float B {name}": b * FP32_BYTES})
        for name, (a, b) in pairs.items():
            adapter.take(**{f"A {name}": a * BF16_BYTES})
            adapter.drop(f"float A {name}")
            adapter.take(**{f"B {name}": b * BF16_BYTES})
            adapter.drop(f"float B {name}")
        for index, place, group in self._groups():
            adapter.take(**{f"A {index} {place}": rank * group.inputs * group.adapters * BF16_BYTES})
            adapter.drop(*(f"A {index} {place} {member}" for member in range(group.adapters)))
        if self._job.offloads_embeddings:
            adapter.drop("embeddings")

    def _groups(self) -> Iterator[tuple[int, int, Group]]:
        layer = self._job.layer
        groups = (layer.qkv, layer.output, layer.gate_up, layer.down)
        return ((i, place, group) for i in range(self._job.facts.num_layers) for place, group in enumerate(groups))

    def _check(self) -> None:
        """`TrainingModel.check`: a few tokens, for which dense weights are made."""
        self._lasting.take(workspace=self._job.workspace_bytes)
        for group in (self._job.layer.qkv, self._job.layer.output, self._job.layer.gate_up, self._job.layer.down):
            self._lasting.passing(weight=group.dense_bytes)

    def _make_optimizer(self) -> None:
        """`AdapterOptimizer`: the adapter moves into one piece, then both moments are made."""
        self._lasting.take(adapter=self._job.adapter_bytes)
        self._lasting.drop(*(name for name in self._lasting if name.startswith(("A ", "B "))))
        self._lasting.take(moment=self._job.state_bytes / 2, second_moment=self._job.state_bytes / 2)

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
        self._lasting.take(graph_inputs=self._job.batch_bytes)
        self._most_before_graphs = self._pool.reserved_bytes
        self._pool.give_back_pages()
        self._graphs = Pool()
        lasting = _Tensors(self._graphs)
        lasting.take(workspace=self._job.workspace_bytes)
        self._micro_batch(lasting, self._graphs, trains=True, accumulated=False)

    def _update(self) -> None:
        """`AdapterOptimizer.step`: the gradients side by side."""
        self._lasting.take(gathered=self._job.adapter_bytes)
        self._lasting.drop("gathered", *(name for name in self._lasting if name.endswith(GRADIENTS)))

    def _micro_batch(self, lasting: _Tensors, pool: Pool, *, trains: bool, accumulated: bool) -> None:
        """`TrainingModel.accumulate`; a layer's output is the next one's `x`, a copy of `x_grad` the `grad` below."""
        job, layer = self._job, self._job.layer
        shared = _Tensors(pool)
        layers = [_Tensors(pool) for _ in range(job.facts.num_layers + 1)]
        shared.take(batch=job.batch_bytes)
        layers[0].take(x=layer.stream)
        turns = layer.of(job.facts.head_dim)
        shared.take(cos=turns, sin=turns, first=layer.span, last=layer.span)
        for index, (own, above) in enumerate(pairwise(layers)):
            self._forward(index, own, trains=trains)
            own.hand("out", above, "x")
            if self._leaves(index) or not trains:
                own.keep(())
        self._loss(layers[-1], trains=trains)
        if trains:
            layers[-1].take(x_grad=layer.stream)  # of the last norm
            # The backward pass has a thread of its own, for which cuBLAS takes a workspace beside its first product.
            workspace = partial(lasting.take, backward_workspace=job.workspace_bytes)
            layers[-2].afterwards = dict.fromkeys(FIRST_PRODUCTS, workspace)
            layers[-1].keep(("x_grad",))
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

    def _leaves(self, index: int) -> bool:
        """Whether a layer's input goes to host memory."""
        return self._job.offloads_activations and index < self._job.recompute_layers

    def _forward(self, index: int, own: _Tensors, *, trains: bool) -> None:
        if index < self._job.recompute_layers or not trains:
            recomputed_forward(own, self._job.layer)
            own.keep(("x", "out"))
        else:
            kept_forward(own, self._job.layer)
            own.keep((*KEPT, "out"))

    def _backward(self, index: int, layers: list[_Tensors]) -> None:
        own, layer = layers[index], self._job.layer
        if index >= self._job.recompute_layers:
            kept_backward(own, layer)
            return
        own.take(x=layer.stream)  # back from the host, if it is not there
        recomputed_backward(own, layer, offloaded=self._job.offloads_activations and index > 0)
        if index > 0:
            own.hand("fetched", layers[index - 1], "x")

    def _loss(self, last: _Tensors, *, trains: bool) -> None:
        """`cross_entropy` over the normalized states; leaves the gradient to them."""
        layer, facts = self._job.layer, self._job.facts
        chunk = min(self._job.chunk_tokens or layer.tokens, layer.tokens)
        chosen = layer.of(facts.hidden_size, chunk)
        last.take(normalized=layer.stream, grad=layer.stream if trains else 0)
        for _ in range(-(-layer.tokens // chunk)):
            last.take(chosen=chosen, logits=layer.of(facts.vocab_size, chunk))
            last.drop("chosen")
            last.passing(chosen_grad=chosen if trains else 0)
            last.drop("logits")
        last.drop("normalized")
