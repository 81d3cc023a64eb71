"""What is alive on the card, instant by instant: the tool that the memory models of layers are written with.

A model walks through a computation as the trainer does, and says what comes to be and what goes; the timeline adds
up. Bytes are counted as PyTorch's allocator hands them out.
"""

from __future__ import annotations

from typing import Protocol

BF16_BYTES, FP32_BYTES, INT32_BYTES = 2, 4, 4
ALLOCATION_BYTES = 512
"""The allocator's smallest unit; with expandable segments larger blocks are split to it (c10/cuda, `should_split`)."""


def allocated(size_bytes: float) -> int:
    """What the allocator hands out for a tensor of so many bytes."""
    return -int(-size_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


class Walk(Protocol):
    """What a computation is walked on: a `Timeline` adds up, `sizing/memory/fragmentation` gives each tensor its
    place."""

    def take(self, **sizes: float) -> None:
        """Tensors of so many bytes come to be."""
        ...

    def drop(self, *names: str) -> None:
        """Tensors are freed."""
        ...

    def passing(self, **sizes: float) -> None:
        """Tensors come to be and are freed at once."""
        ...


class Timeline:
    """Tensors by name, their sum now, and its peak so far."""

    __slots__ = ("_held", "live_bytes", "peak_bytes")

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def copy(self) -> Timeline:
        """A second timeline that goes on from here."""
        other = Timeline()
        other._held = dict(self._held)
        other.live_bytes, other.peak_bytes = self.live_bytes, self.peak_bytes
        return other

    def take(self, **sizes: float) -> None:
        """Tensors of so many bytes come to be."""
        held, live = self._held, self.live_bytes
        for name, size in sizes.items():
            assert name not in held, f"{name} is alive already"
            held[name] = taken = allocated(size)
            live += taken
        self.live_bytes = live
        if live > self.peak_bytes:
            self.peak_bytes = live

    def drop(self, *names: str) -> None:
        """Tensors are freed."""
        for name in names:
            self.live_bytes -= self._held.pop(name)

    def passing(self, **sizes: float) -> None:
        """Tensors come to be and are freed at once."""
        live = self.live_bytes + sum(map(allocated, sizes.values()))
        if live > self.peak_bytes:
            self.peak_bytes = live
