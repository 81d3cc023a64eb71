"""How many bytes PyTorch's allocator reserves for a job whose layers prepare traced: its first steps, rehearsed.

What `sizing/memory/fragmentation` does for layers that the trainer computes by hand: each tensor of the traced walk
(`api/step_walk`) gets its place by the allocator's own rules. Of what is around the layers the large tensors are there:
base and adapter in a piece, the logits of the check and of the loss, gradients side by side for the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.api import trainer_facts
from orchestrator.api.layer_trace import KIND_LETTERS, InTokens
from orchestrator.api.step_walk import (
    ATTENTION,
    EXPERTS,
    FIRST_SIZE,
    GRAD_SLOTS,
    GRADIENT,
    INPUT_SLOTS,
    OWN_SLOTS,
    PRODUCT,
    PartWalk,
    StepWalk,
    codes_of,
)
from orchestrator.sizing.memory.cuda_allocator import Block, Pool
from orchestrator.sizing.memory.fragmentation import INT64_BYTES, MICRO_BATCHES, PROBED_TOKENS, STEPS
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES

WALKS_KEPT = 8
FORWARD, BACKWARD = "forward", "backward"
"""Each pass has a thread of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedJob:
    """A job as the allocator sees it; sizes in bytes."""

    walk: StepWalk
    layers: str
    """The kind of each layer."""
    frozen_layers: int
    """The first ones, whose gradients nobody asks for."""
    recompute_layers: int
    pass_tokens: int
    """Tokens that go through the layers at a time."""
    passes: int
    """How often a micro-batch goes through the layers."""
    accumulates: bool
    evaluates: bool
    """Whether there is an evaluation before the first step."""
    chunk_tokens: int
    """Tokens whose logits the loss computes at a time; all of them where it is 0."""
    hidden: int
    vocabulary: int
    base_bytes: int
    adapter_bytes: int
    state: tuple[float, ...]
    """Tensors of the optimizer that are in the allocator."""
    attention: tuple[tuple[int, ...], ...]
    """What each kind's attention takes by the way in its backward pass."""
    rows_per_token: tuple[int, ...]
    """Of each kind's routed experts."""


def reserved_bytes(job: TracedJob) -> int:
    """The most that is reserved at a time."""
    stage = TrainStage(job, Pool())
    stage.set_up()
    if job.evaluates:
        stage.evaluate()
    for _ in range(STEPS):
        for number in range(MICRO_BATCHES if job.accumulates else 1):
            stage.train(accumulated=number > 0)
        stage.update()
    return stage.pool.reserved_bytes


@lru_cache(maxsize=WALKS_KEPT)
def unpacked(text: str) -> StepWalk:
    """A trace's walk."""
    return StepWalk.unpacked(text)


Slots = dict[int, Block]


class TrainStage:
    """The trainer's train stage on paper."""

    def __init__(self, job: TracedJob, pool: Pool) -> None:
        self._job = job
        self.pool = pool
        self._gradients: list[Block] = []
        self._idle = {FORWARD, BACKWARD}
        """Threads that have not multiplied yet, for each of which cuBLAS takes a workspace."""

    def set_up(self) -> None:
        """Base, adapter and optimizer, and the check of the model in between."""
        job = self._job
        self.pool.take(job.base_bytes)
        adapter = self.pool.take(job.adapter_bytes)
        for _ in range(2):
            self._check()
        self.pool.take(job.adapter_bytes)  # in one piece
        self.pool.drop(adapter)
        for size in job.state:
            self.pool.take(size)

    def _check(self) -> None:
        """`TrainingModel.check`: a few tokens, and all their logits."""
        self._forward_alone(PROBED_TOKENS)
        numbers = PROBED_TOKENS * self._job.vocabulary
        for block in [self.pool.take(numbers * size) for size in (BF16_BYTES, FP32_BYTES)]:
            self.pool.drop(block)

    def evaluate(self) -> None:
        """A forward pass that leaves nothing for a way back."""
        inputs = self._inputs()
        for _ in range(self._job.passes):
            self._forward_alone(self._job.pass_tokens)
        self._loss(trains=False)
        self._drop(inputs)

    def train(self, *, accumulated: bool) -> None:
        """A micro-batch, whose gradients are added to those that are there or stay."""
        job = self._job
        inputs = self._inputs()
        passes = [_Pass(self, job, job.pass_tokens) for _ in range(job.passes)]
        for each in passes:
            each.forward(job.recompute_layers)
        self._loss(trains=True)
        sums: list[Block] = []  # of all passes, before they are added to what is there
        for number, each in enumerate(reversed(passes)):
            found = each.backward(keeps_gradients=number == 0 and (not accumulated or job.passes > 1))
            sums += found
        if accumulated:
            self._drop(sums)
        else:
            self._gradients += sums
        self._drop(inputs)

    def update(self) -> None:
        """`AdapterOptimizer.step`: gradients side by side, piece by piece from the first layer on."""
        pieces: list[Block] = []
        largest, rest = trainer_facts.OPTIMIZER_PIECE * BF16_BYTES, self._job.adapter_bytes
        while rest > 0:
            piece = self.pool.take(min(largest, rest))
            pieces.append(piece)
            rest -= largest
            self._drop_gradients(piece.size if rest > 0 else None)
        self._drop(pieces)

    def _drop_gradients(self, count_bytes: int | None) -> None:
        """Those of the first layers, so many bytes of them or all: a backward pass ends with them."""
        gone = 0
        while self._gradients and (count_bytes is None or gone + self._gradients[-1].size <= count_bytes):
            gone += self._gradients[-1].size
            self.pool.drop(self._gradients.pop())

    def multiply(self, thread: str) -> None:
        """A matrix product: the first of a thread takes a workspace."""
        if thread in self._idle:
            self._idle.remove(thread)
            self.pool.take(trainer_facts.CUBLAS_WORKSPACE_BYTES)

    def _forward_alone(self, tokens: int) -> None:
        """The forward pass of layers that keep nothing."""
        alone = _Pass(self, self._job, tokens)
        alone.forward(len(self._job.layers), keeps=False)
        alone.end()

    def _inputs(self) -> list[Block]:
        """`MicroBatch.to`: ids, targets, positions, and where the targets are."""
        return [self.pool.take(self._job.passes * self._job.pass_tokens * INT64_BYTES) for _ in range(4)]

    def _loss(self, *, trains: bool) -> None:
        """`cross_entropy`: the gradient to the states is the walk's."""
        job = self._job
        tokens = job.passes * job.pass_tokens - 1  # a row's last token predicts nothing
        for start in range(0, tokens, job.chunk_tokens or tokens):
            chunk = min(job.chunk_tokens or tokens, tokens - start)
            chosen = self.pool.take(chunk * job.hidden * BF16_BYTES)
            logits = self.pool.take(chunk * job.vocabulary * BF16_BYTES)
            self.pool.drop(chosen)
            if trains:
                self.pool.drop(self.pool.take(chunk * job.hidden * BF16_BYTES))
            self.pool.drop(logits)

    def _drop(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.pool.drop(block)


class _Pass:
    """Tokens on their way through the model and back: each part's tensors by their slots."""

    def __init__(self, stage: TrainStage, job: TracedJob, tokens: int) -> None:
        self._stage, self._pool = stage, stage.pool
        self._job = job
        self._tokens = tokens
        self._sizes = _bytes(job.walk.sizes, tokens)
        self._slots: list[Slots] = [{} for _ in range(len(job.layers) + 2)]
        self._parts: list[PartWalk] = []

    def forward(self, recompute_layers: int, *, keeps: bool = True) -> None:
        """The way to the loss."""
        walk, count = self._job.walk, len(self._job.layers)
        recomputes = max(recompute_layers, self._job.frozen_layers)
        parts = [walk.recomputed if index < recomputes else walk.whole for index in range(count)]
        layers = [each.kinds[self._kind(index)] for index, each in enumerate(parts, start=1)]
        self._parts = [parts[0].begin, parts[0].first, *layers[1:], parts[-1].end]
        for index, part in enumerate(self._parts):
            self._play(index, part.forward, FORWARD)
            if index + 1 < len(self._parts):
                self._hand(index, part.output, index + 1, INPUT_SLOTS)
            if not keeps or 0 < index <= self._job.frozen_layers:
                self._clear(index)
        self._play(0, parts[0].begin.backward, FORWARD)

    def backward(self, *, keeps_gradients: bool) -> list[Block]:
        """The way back; the gradients, if they stay: others are added to those that are there, one by one."""
        gradients: list[Block] = []
        for index in reversed(range(1 + self._job.frozen_layers, len(self._parts))):
            self._play(index, self._parts[index].backward, BACKWARD, gradients if keeps_gradients else None)
            self._hand(index, self._parts[index].grad, index - 1, GRAD_SLOTS)
            self._clear(index)
        self.end()
        return gradients

    def end(self) -> None:
        """Everything is gone."""
        for index in range(len(self._slots)):
            self._clear(index)

    def _play(self, index: int, codes: str, thread: str, gradients: list[Block] | None = None) -> None:
        """One pass of one part; `gradients` gets those of adapters."""
        slots, stays = self._slots[index], False
        for code in codes_of(codes):
            number, drops = divmod(code, 2)
            if drops:
                if number in slots:
                    self._pool.drop(slots.pop(number))
            elif number >= FIRST_SIZE:
                block = self._pool.take(self._sizes[number])
                if not stays:
                    slots[_lowest_free(slots)] = block
                elif gradients is not None:
                    gradients.append(block)
                else:
                    self._pool.drop(block)
                stays = False
            elif number == GRADIENT:
                stays = True
            elif number == PRODUCT:
                self._stage.multiply(thread)
            else:
                self._work(self._kind(index), number)

    def _work(self, kind: int, number: int) -> None:
        """What is at work takes, and leaves nothing."""
        if number == ATTENTION:
            blocks = [self._pool.take(size) for size in self._job.attention[kind]]
            for block in blocks:
                self._pool.drop(block)
            return
        tile = self._job.walk.experts[kind]
        assert tile is not None, "nothing else works with experts"
        rows = self._tokens * self._job.rows_per_token[kind]
        for start in range(0, rows, trainer_facts.EXPERT_TILE_TOKENS):
            sizes = _bytes(self._job.walk.sizes, min(trainer_facts.EXPERT_TILE_TOKENS, rows - start))
            self._tile(tile.forward if number == EXPERTS else tile.backward, sizes)

    def _tile(self, codes: str, sizes: Sequence[int]) -> None:
        slots: Slots = {}
        for code in codes_of(codes):
            number, drops = divmod(code, 2)
            if not drops:
                slots[_lowest_free(slots)] = self._pool.take(sizes[number])
            elif number in slots:
                self._pool.drop(slots.pop(number))
        for block in slots.values():
            self._pool.drop(block)

    def _hand(self, index: int, numbers: Iterable[int], other: int, first: int) -> None:
        """Tensors have another part from now on."""
        for place, number in enumerate(numbers):
            if number in self._slots[index]:
                self._slots[other][first + place] = self._slots[index].pop(number)

    def _clear(self, index: int) -> None:
        for block in self._slots[index].values():
            self._pool.drop(block)
        self._slots[index].clear()

    def _kind(self, index: int) -> int:
        return KIND_LETTERS.index(self._job.layers[index - 1])


def _lowest_free(slots: Slots) -> int:
    slot = OWN_SLOTS
    while slot in slots:
        slot += 1
    return slot


def _bytes(sizes: Iterable[InTokens], tokens: int) -> list[int]:
    return [max(1, round(sum(c * tokens**power for power, c in enumerate(size)))) for size in sizes]
