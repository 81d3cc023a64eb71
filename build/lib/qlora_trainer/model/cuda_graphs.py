"""Short micro-batches as CUDA graphs: launching a step's thousands of kernels takes longer than running them.

Up to about 4,000 tokens the card waits for the host, whatever the model; a graph is launched in one piece. Rules:

- A graph is made for a shape, so micro-batches are padded to a few shapes: a record of its own at the end that carries
  no loss, records without tokens, and positions whose target is IGNORED_LABEL. Nothing else sees them.
- A shape runs without a graph the first time, which builds what the graph takes for granted (kernels, cuBLAS). Both run
  the same kernels on the same numbers and give the same bits, so nobody can tell when a graph was made.
- Graphs keep the memory of a micro-batch for themselves. Whoever else runs out of memory gets it back (`make_room`).
- Gradients are added up in one place that all graphs know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from orchestrator.api import trainer_facts
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import MicroBatch, StepInputs

RECORDS_FACTOR = 4
"""Records are padded to a power of this: attention starts blocks for each, and those of empty records end at once."""
SUPERVISED_PARTS = 4
"""Positions that carry loss are padded to a multiple of this part of the tokens."""
MOST_GRAPHS = 16
MOST_TIMES_GIVEN_UP = 3
"""So often may all graphs be given up for want of memory; then there are no more."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a graph is made for."""

    tokens: int
    records: int
    supervised: int

    @classmethod
    def of(cls, batch: MicroBatch) -> Shape:
        """The smallest padded shape that the micro-batch fits."""
        step = trainer_facts.CUDA_GRAPH_TOKENS_STEP
        tokens = -(-batch.tokens // step) * step
        wanted = len(batch.record_starts) - 1 + (tokens > batch.tokens)
        records = 1
        while records < wanted:
            records *= RECORDS_FACTOR
        part = tokens // SUPERVISED_PARTS
        return cls(tokens=tokens, records=records, supervised=-(-len(batch.supervised) // part) * part)

    def pad(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch in this shape."""
        more = self.tokens - batch.tokens
        positions = torch.arange(more).unsqueeze(0)
        return MicroBatch(
            input_ids=pad(batch.input_ids, (0, more)),
            targets=pad(batch.targets, (0, more), value=IGNORED_LABEL),
            position_ids=torch.cat([batch.position_ids, positions], dim=1),
            record_starts=pad(batch.record_starts, (0, self.records + 1 - len(batch.record_starts)), value=self.tokens),
            longest_record=self.tokens,
            # A row's last token predicts nothing.
            supervised=pad(batch.supervised, (0, self.supervised - len(batch.supervised)), value=self.tokens - 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """Both passes over one shape."""

    inputs: StepInputs
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: Tensor


class CudaGraphs:
    """The graphs of one model, each of both passes over one shape."""

    def __init__(
        self, parameters: Sequence[Parameter], forward: Callable[[StepInputs], Tensor], draw_seed: Callable[[], int]
    ) -> None:
        """`forward` gives a micro-batch's loss, `parameters` get its gradients."""
        self._parameters = list(parameters)
        self._forward = forward
        self._draw_seed = draw_seed
        self._device = self._parameters[0].device
        self._graphs: dict[Shape, _Graph] = {}
        self._seen: set[Shape] = set()
        self._times_given_up = 0
        self._pool: Any = None
        self._stream: Any = None
        self._sum: Tensor | None = None
        self._sums: list[Tensor] = []

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    @staticmethod
    def takes(batch: MicroBatch) -> bool:
        """Whether the micro-batch is short enough to gain anything."""
        return batch.tokens <= trainer_facts.CUDA_GRAPH_TOKENS

    def run(self, batch: MicroBatch, divisor: float, between: Callable[[], None]) -> Tensor:
        """The loss, good until the next call; the gradients are added to the parameters'."""
        self._take_gradients()
        shape = Shape.of(batch)
        padded, seed = shape.pad(batch), self._draw_seed()
        graph = self._graph(shape, padded)
        if graph is None:
            inputs = StepInputs.of(padded, seed, divisor, self._device)
            return self.make_room(lambda: self._pass(inputs, between))
        graph.inputs.refill(padded, seed, divisor)
        graph.forward.replay()
        between()
        graph.backward.replay()
        return graph.loss

    def make_room(self, compute: Callable[[], Result]) -> Result:
        """Compute, if need be with the memory that the graphs hold."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        log.info("the memory of %d CUDA graphs is needed for something else", len(self._graphs))
        self._forget()
        return compute()

    def _take_gradients(self) -> None:
        if self._parameters[0].grad is not None:
            return
        if self._sum is None:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._sum = self._parameters[0].new_empty(sum(sizes))
            parts = zip(self._sum.split(sizes), self._parameters, strict=True)
            self._sums = [part.view(parameter.shape) for part, parameter in parts]
        self._sum.zero_()
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total

    def _pass(self, inputs: StepInputs, between: Callable[[], None]) -> Tensor:
        loss = self._forward(inputs)
        between()
        self._add_gradients(loss)
        return loss.detach()

    def _add_gradients(self, loss: Tensor) -> None:
        gradients = list(torch.autograd.grad(loss, self._parameters))
        torch._foreach_add_(self._sums, gradients)  # pyright: ignore[reportPrivateUsage] - torch's optimizers use it

    def _graph(self, shape: Shape, padded: MicroBatch) -> _Graph | None:
        if shape in self._graphs:
            return self._graphs[shape]
        if shape not in self._seen:
            self._seen.add(shape)
            return None
        if len(self._graphs) >= MOST_GRAPHS or self._times_given_up >= MOST_TIMES_GIVEN_UP:
            return None
        try:
            self._graphs[shape] = self._capture(padded)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            log.info("steps run without CUDA graphs: %s", error)
            self._times_given_up = MOST_TIMES_GIVEN_UP
            self._forget()
        return self._graphs.get(shape)

    def _capture(self, padded: MicroBatch) -> _Graph:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        inputs = StepInputs.of(padded, 0, 1.0, self._device)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads go on using the card in the meantime: one may be saving a checkpoint.
        how: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(forward, **how):
            loss = self._forward(inputs)
        with torch.cuda.graph(backward, **how):
            self._add_gradients(loss)
        return _Graph(inputs=inputs, forward=forward, backward=backward, loss=loss.detach())

    def _forget(self) -> None:
        self._graphs.clear()
        self._seen.clear()
        self._pool = None
        self._times_given_up += 1
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
