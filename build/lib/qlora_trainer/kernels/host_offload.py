"""What waits in pinned host memory while the card computes something else: layer inputs, and the embedding table.

A layer's input leaves the card on a stream of its own while the layer computes, and comes back while the backward pass
is still at the layer above, so the bus is busy when the card is. A layer ends when its input has left: the host runs
ahead of the card, and inputs that wait to be copied would fill it. Buffers are made once for the longest row and used
again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import embedding


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
