"""What waits in pinned host memory while the card computes something else: layers' inputs, all that layers keep, and
the embedding table.

A layer's input leaves the card on a stream of its own while the layer computes, and comes back while the backward pass
is still at the layer above, so the bus is busy when the card is. A layer ends when its input has left: the host runs
ahead of the card, and inputs that wait to be copied would fill it. Buffers are made once for the longest row and used
again.

What a layer keeps for its backward pass is made all through its forward pass, so it leaves when the layer is done. It
goes from the card when the next such layer is done, too: two layers' activations are there at most. On the way back
those of one layer come while the layers above it compute (`orchestrator.api.layer_ways` says which).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import embedding

from orchestrator.api import trainer_facts


class InputStore:
    """The inputs of the layers of one micro-batch, by the layer's number."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[int, Tensor] = {}
        self._stored: dict[int, Tensor] = {}
        self._on_the_way: dict[int, Tensor] = {}

    def put(self, layer: int, x: Tensor) -> None:
        """Start to copy a layer's input [tokens, width] to the host; `x` is to be held until `wait`."""
        host = self._buffer(layer, x)
        self._stored[layer] = host
        if self._stream is None:
            host.copy_(x)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)

    def fetch(self, layer: int) -> None:
        """Start to bring a layer's input back, if it is stored."""
        host = self._stored.pop(layer, None)
        if host is None:
            return
        if self._stream is None:
            self._on_the_way[layer] = host.clone()
            return
        x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        # The memory was just handed out on the main stream, where its last user may still be at work.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            x.copy_(host, non_blocking=True)
        self._on_the_way[layer] = x

    def take(self, layer: int) -> Tensor:
        """A layer's input, back on the card."""
        self.fetch(layer)
        self.wait()
        return self._on_the_way.pop(layer)

    def wait(self) -> None:
        """What the card computes from here on, it computes after the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def clear(self) -> None:
        """Forget the inputs of a micro-batch that was given up."""
        self._stored.clear()
        self._on_the_way.clear()

    def _buffer(self, layer: int, x: Tensor) -> Tensor:
        held = self._buffers.get(layer)
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            pinned = self._stream is not None
            held = self._buffers[layer] = torch.empty(x.numel(), dtype=x.dtype, pin_memory=pinned)
        return held[: x.numel()].view(x.shape)


Kept = Sequence[Tensor | None]
"""What a layer keeps for its backward pass."""


@dataclass(slots=True)
class _Arriving:
    """A layer's activations on their way back."""

    tensors: list[Tensor | None]
    arrived: Any
    """The event at the end of the copies; none without a card."""


class ActivationStore:
    """All that some layers of one micro-batch keep, by the layer's number."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms: dict[int, Tensor] = {}
        self._stored: dict[int, list[Tensor | None]] = {}
        self._leaving: Kept = ()
        self._arriving: dict[int, _Arriving] = {}

    def put(self, layer: int, kept: Kept) -> None:
        """Start to copy what a layer that is done keeps; it stays on the card until `settle`."""
        self.settle()
        stored = self._stored[layer] = self._places(layer, kept)
        self._leaving = kept
        if self._stream is None:
            _copy(kept, stored)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(kept, stored)

    def settle(self) -> None:
        """What is on its way out leaves the card: what this computes from here on, it computes after the copies."""
        if self._leaving and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._leaving = ()

    def fetch(self, layer: int) -> None:
        """Start to bring a layer's activations back, if they are stored."""
        stored = self._stored.pop(layer, None)
        if stored is None:
            return
        found = [None if each is None else torch.empty_like(each, device=self._device) for each in stored]
        if self._stream is None:
            _copy(stored, found)
            self._arriving[layer] = _Arriving(found, None)
            return
        # The memory was just handed out on the main stream, where its last user may still be at work.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(stored, found)
            self._arriving[layer] = _Arriving(found, self._stream.record_event())

    def take(self, layer: int) -> list[Any]:
        """A layer's activations as they were put, back on the card."""
        self.fetch(layer)
        arriving = self._arriving.pop(layer)
        if arriving.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arriving.arrived)
        return arriving.tensors

    def clear(self) -> None:
        """Forget a micro-batch that was given up."""
        self.settle()
        self._stored.clear()
        self._arriving.clear()

    def _places(self, layer: int, kept: Kept) -> list[Tensor | None]:
        """Where each tensor goes: one after the other in the layer's piece of host memory."""
        size = sum(aligned(each.nbytes) for each in kept if each is not None)
        room = self._rooms.get(layer)
        if room is None or room.numel() < size:
            if room is not None and self._stream is not None:
                self._stream.synchronize()  # the host runs ahead: an earlier micro-batch's may still be read from it
            self._rooms.pop(layer, None)
            del room
            room = self._rooms[layer] = pinned(size, self._device, "what a layer keeps", "offloadedLayers")
        places: list[Tensor | None] = []
        start = 0
        for each in kept:
            if each is None:
                places.append(None)
                continue
            places.append(room[start : start + each.nbytes].view(each.dtype).view(each.shape))
            start += aligned(each.nbytes)
        return places


def _copy(sources: Kept, targets: Kept) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not None and target is not None:
            target.copy_(source, non_blocking=True)


def aligned(count: int) -> int:
    """So many bytes as a tensor takes of a piece of host memory, if the next one is to begin well."""
    step = trainer_facts.STREAM_ALIGNMENT
    return -(-count // step) * step


def pinned(count: int, device: torch.device, content: str, field: str) -> Tensor:
    """So many bytes of host memory that the card reads by itself; torch's own pinned memory comes in powers of two.

    Where there is no room, the error tells of the content and names the field of the plan that asks for it.
    """
    memory = torch.empty(count, dtype=torch.uint8)
    if device.type != "cuda":
        return memory
    driver: Any = torch.cuda.cudart()
    failed = int(driver.cudaHostRegister(memory.data_ptr(), count, 0))
    if failed:
        raise MemoryError(
            f"{count / 2**20:.0f} MiB of host memory for {content} cannot be pinned (CUDA error {failed}): the pod's "
            f"limit of memory, or of locked memory, is too small for the plan's {field}"
        )
    weakref.finalize(memory, driver.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


class HostEmbedding:
    """An embedding table that stays on the host: only the rows of a micro-batch travel."""

    def __init__(self, table: Embedding, device: torch.device) -> None:
        """Moves the table's weight off the card."""
        self._device = device
        weight = table.weight.data.to("cpu")
        self._weight = weight.pin_memory() if device.type == "cuda" else weight
        table.weight.data = self._weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The rows of token ids that are on the host, on the card."""
        rows = embedding(token_ids, self._weight)
        if self._device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self._device, non_blocking=True)
