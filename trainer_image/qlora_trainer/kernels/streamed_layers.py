"""Decoder layers whose frozen weights live in host memory and come to the card when their turn does, in both passes.

Rules:

- A layer's packed weights and scales are one piece of pinned memory, and so one copy. All streamed layers share two
  buffers on the card, each as large as the largest of them; what a layer computes with are views into its buffer, at
  addresses that never change.
- Streamed layers take the two buffers in turn. When a layer has been computed, the copy of the next but one begins,
  into the buffer that it leaves, while the next one computes. Where the forward pass turns around, the last two layers
  are there already, and so are the first two where the next micro-batch begins.
- Whoever calls a layer's module finds its weights there; a backward pass by hand says when it begins and ends. A layer
  that comes out of turn is copied then and there: slower, never wrong.
- They lie evenly among those that stay on the card, so that the bus is busy for as long as the card is.
- Copies and computation wait for each other on the card; the host waits for neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn import Module

from orchestrator.api import trainer_facts
from qlora_trainer.kernels.host_offload import aligned, pinned

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class OnHost:
    """Which of a model's weights are never all on the card, not even while it is loaded."""

    numbers: frozenset[int] = frozenset()
    """Of the streamed layers."""

    @classmethod
    def of(cls, streamed: int, layers: int) -> OnHost:
        """So many of a decoder's layers."""
        return cls(frozenset(trainer_facts.streamed_numbers(streamed, layers)))

    def holds(self, name: str) -> bool:
        """Whether a parameter, by its full name in the model, is of such a layer."""
        found = LAYER.search(name)
        return found is not None and int(found[1]) in self.numbers

    def device(self, name: str, device: torch.device) -> torch.device:
        """Where to put a tensor of that name, on the way to the device."""
        return torch.device("cpu") if self.holds(name) else device


NOTHING_ON_HOST = OnHost()


@dataclass(slots=True)
class _Buffer:
    """Room on the card for one layer."""

    memory: Tensor
    """[bytes] uint8"""
    place: int | None = None
    """The layer that is in it, or on its way there, by its place among the streamed ones."""
    arrived: Any = field(default=None)
    """The event at the end of that copy."""


class StreamedLayers:
    """The frozen weights of some decoder layers, and the way they take to the card."""

    def __init__(self, modules: Mapping[int, Module], device: torch.device) -> None:
        """`modules`: transformers' layers by their numbers, at least one, whose quantized weights may be anywhere.

        They leave for the host; all else of the layers goes to the device.
        """
        self._device = device
        self._places = {number: place for place, number in enumerate(sorted(modules))}
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        pieces = [_Pieces(modules[number]) for number in self._places]
        size = max(each.bytes for each in pieces)
        self._buffers = [
            _Buffer(torch.empty(size, dtype=torch.uint8, device=device))
            for _ in range(min(trainer_facts.STREAM_BUFFERS, len(pieces)))
        ]
        self._host: list[Tensor] = []
        for place, (number, own) in enumerate(zip(self._places, pieces, strict=True)):
            self._host.append(own.leave(self._buffer(place).memory, device))
            self._announce(modules[number], number)

    @property
    def count(self) -> int:
        """How many layers are streamed."""
        return len(self._host)

    @property
    def host_bytes(self) -> int:
        """What they take of the host's memory."""
        return sum(each.nbytes for each in self._host)

    def take(self, number: int, *, back: bool = False) -> None:
        """A layer is about to be computed, in the forward pass or `back`; one that is not streamed is always there."""
        place = self._places.get(number)
        if place is None:
            return
        buffer = self._buffer(place)
        if buffer.place != place:  # out of turn
            self._fetch(place)
            self._fetch(place - 1 if back else place + 1)
        if buffer.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.arrived)

    def leave(self, number: int, *, back: bool = False) -> None:
        """A layer has been computed, as far as the host knows."""
        place = self._places.get(number)
        if place is not None:
            self._fetch(place - trainer_facts.STREAM_BUFFERS if back else place + trainer_facts.STREAM_BUFFERS)

    def _buffer(self, place: int) -> _Buffer:
        return self._buffers[place % len(self._buffers)]

    def _fetch(self, place: int) -> None:
        """Start to copy a layer, if there is one of that place and it is not there, once all that is queued is done."""
        if not 0 <= place < len(self._host):
            return
        buffer, host = self._buffer(place), self._host[place]
        if buffer.place == place:
            return
        buffer.place = place
        room = buffer.memory[: host.numel()]
        if self._copies is None:
            room.copy_(host)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            room.copy_(host, non_blocking=True)
            buffer.arrived = self._copies.record_event()

    def _announce(self, module: Module, number: int) -> None:
        def take(*_: object) -> None:
            self.take(number)

        def leave(*_: object) -> None:
            self.leave(number)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(leave)


class _Pieces:
    """What of a layer is streamed: each quantized parameter's packed weights, its scales and their scales."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._owners: list[tuple[Any, str]] = []
        parameters: list[Any] = [each for each in module.parameters() if isinstance(each, Params4bit)]
        for parameter in parameters:
            state = parameter.quant_state
            self._owners += [(parameter, "data"), (state, "absmax"), (state.state2, "absmax")]
        self.bytes = sum(aligned(tensor.nbytes) for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (_bare(getattr(owner, name)) for owner, name in self._owners)

    def leave(self, buffer: Tensor, device: torch.device) -> Tensor:
        """Gather them on the host and put views into the buffer in their places; what is not streamed stays."""
        host = pinned(self.bytes, device, "a streamed layer", "streamedLayers")
        start = 0
        for owner, name in self._owners:
            tensor = _bare(getattr(owner, name))
            part = slice(start, start + tensor.nbytes)
            host[part].copy_(tensor.reshape(-1).view(torch.uint8))
            setattr(owner, name, buffer[part].view(tensor.dtype).view(tensor.shape))
            start += aligned(tensor.nbytes)
        self._stay(device)
        return host

    def _stay(self, device: torch.device) -> None:
        for parameter in self._module.parameters():
            state: Any = getattr(parameter, "quant_state", None)
            if not isinstance(parameter, Params4bit):
                parameter.data = parameter.data.to(device)
            elif state is not None:
                state.code, state.offset = state.code.to(device), state.offset.to(device)
                state.state2.code = state.state2.code.to(device)
        for module in self._module.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))


def _bare(tensor: Tensor) -> Tensor:
    """Without bitsandbytes' class of parameters, which does more than a tensor when it is asked for anything."""
    return tensor.detach().as_subclass(Tensor)
