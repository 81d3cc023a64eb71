"""The walk of a traced step (`orchestrator/api/step_walk`), made of its events.

Rules:

- Tensors that are small whatever the tokens are left out.
- A tensor belongs to the part that makes it. Another part may drop it where it was handed over: by the part before on
  the way forward, by the part behind on the way back. Whatever else drops it, it stays to the end of its part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.api import step_walk
from orchestrator.api.layer_tables import ATTENTION, EXPERTS_BACKWARD, EXPERTS_FORWARD
from orchestrator.api.layer_trace import InTokens
from orchestrator.api.step_walk import (
    FIRST_SIZE,
    GRAD_SLOTS,
    GRADIENT,
    INPUT_SLOTS,
    MOST_SIZES,
    MOST_SLOTS,
    OWN_SLOTS,
    PRODUCT,
    SMALL_AT_TOKENS,
    SMALL_BYTES,
    PartWalk,
    PartWalks,
    coded,
)
from qlora_trainer.model.recorded_step import OUTPUTS, Event

AT_WORK = {ATTENTION: step_walk.ATTENTION, EXPERTS_FORWARD: step_walk.EXPERTS, EXPERTS_BACKWARD: step_walk.EXPERTS_BACK}
PRODUCTS = re.compile(r"aten\.(add|b|baddb)?mm\b")
"""Operations that multiply matrices."""
HANDED = GRAD_SLOTS - INPUT_SLOTS
NOTHING = range(0)


class Unwalkable(Exception):
    """More than a walk holds."""


class Sizes:
    """The sizes of a walk, each once."""

    def __init__(self) -> None:
        self._numbers: dict[InTokens, int] = {}

    def code(self, size: InTokens) -> int | None:
        """What takes a tensor of that size; None for a small one."""
        if sum(coefficient * SMALL_AT_TOKENS**power for power, coefficient in enumerate(size)) < SMALL_BYTES:
            return None
        number = self._numbers.setdefault(size, FIRST_SIZE + len(self._numbers))
        if number >= MOST_SIZES:
            raise Unwalkable
        return 2 * number

    def all(self) -> tuple[InTokens, ...]:
        """In their order."""
        return (*((),) * FIRST_SIZE, *self._numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a part's two passes are among the events."""

    forward: range
    backward: range


class WalkedStep:
    """The events of a step, by parts in their order."""

    def __init__(
        self,
        events: Sequence[Event],
        sizes: Mapping[int, InTokens],
        known: Sizes,
        parts: Sequence[Part],
        stream: InTokens,
    ) -> None:
        """`sizes` are the allocations'; `stream` is that of what goes from part to part."""
        self._events = events
        self._stream = stream
        self._sizes = sizes
        self._known = known
        self._parts = parts
        self._gone = {event.number: place for place, event in enumerate(events) if event.kind == "drop"}

    def codes(self, places: range) -> str:
        """What comes and goes there, all of which is made there."""
        return self._codes(places, _Slots({}))

    def _begin(self) -> PartWalk:
        """What is before the layers, and what of it goes when the decoder ends."""
        slots, part = _Slots({}), self._parts[0]
        forward = self._codes(part.forward, slots)
        output = slots.hand(self._output(0))
        events = (self._events[place] for place in part.backward)
        gone = [code for event in events if event.kind == "drop" for code in slots.drop(event.number)]
        return PartWalk(forward=forward, output=output, backward=coded(gone))

    def parts(self, layers: Sequence[int]) -> PartWalks:
        """What is before the layers, the first one, these, and what is behind the last one."""
        return PartWalks(
            begin=self._begin(),
            first=self._part(1),
            kinds=tuple(self._part(1 + layer) for layer in layers),
            end=self._part(len(self._parts) - 1),
        )

    def _part(self, index: int) -> PartWalk:
        inputs = self._output(index - 1)
        grads = self._grad(index + 1) if index + 1 < len(self._parts) else []
        slots = _Slots({**_numbered(inputs, INPUT_SLOTS), **_numbered(grads, GRAD_SLOTS)})
        forward = self._codes(self._parts[index].forward, slots)
        output = slots.hand(self._output(index))
        backward = self._codes(self._parts[index].backward, slots, backward=True)
        return PartWalk(forward=forward, output=output, backward=backward, grad=slots.hand(self._grad(index)))

    def _output(self, index: int) -> list[int]:
        """What a part makes in its forward pass that goes elsewhere than in its own passes."""
        part = self._parts[index]
        made = [number for number in self._alive(part.forward) if self._gone[number] not in part.backward]
        if index == 0:  # rotary tables and masks are nobody's in particular
            made = [number for number in made if self._sizes[number] == self._stream][-1:]
        return made[-HANDED:]

    def _grad(self, index: int) -> list[int]:
        """What a part makes in its backward pass that goes later."""
        return self._alive(self._parts[index].backward)[-HANDED:]

    def _alive(self, places: range) -> list[int]:
        """What is made there, is there at the end, and goes some time."""
        made = (self._events[place] for place in places)
        return [
            event.number
            for event in made
            if event.kind == "take"
            and places.stop <= self._gone.get(event.number, -1)
            and self._known.code(self._sizes[event.number]) is not None
        ]

    def _codes(self, places: range, slots: _Slots, *, backward: bool = False) -> str:
        found: list[int] = []
        events = self._events[places.start : places.stop]
        product = next((event for event in events if event.kind == "take" and PRODUCTS.match(event.name)), None)
        for event in _with_outputs_first(events):
            if event.kind == "take":
                found += self._taken(event, slots, stays=backward and event.number not in self._gone)
            elif event.kind == "drop":
                found += slots.drop(event.number)
            elif event.kind in AT_WORK:
                found.append(2 * AT_WORK[event.kind])
            if event is product:
                found.append(2 * PRODUCT)
        return coded(found)

    def _taken(self, event: Event, slots: _Slots, *, stays: bool) -> list[int]:
        code = self._known.code(self._sizes[event.number])
        if code is None:
            return []
        if stays:
            return [2 * GRADIENT, code]
        slots.take(event.number)
        return [code]


def _with_outputs_first(events: Sequence[Event]) -> Iterator[Event]:
    """Experts begin their work once what they give is there."""
    waiting: list[tuple[Event, int]] = []
    for event in events:
        if OUTPUTS.get(event.kind):
            waiting.append((event, OUTPUTS[event.kind]))
            continue
        yield event
        if event.kind == "take":
            waiting = [(each, count - 1) for each, count in waiting]
            yield from (each for each, count in waiting if count == 0)
            waiting = [(each, count) for each, count in waiting if count > 0]


class _Slots:
    """Which tensor is where."""

    def __init__(self, held: Mapping[int, int]) -> None:
        self._held = dict(held)

    def take(self, number: int) -> None:
        """Into the lowest free slot."""
        taken = set(self._held.values())
        slot = next(slot for slot in range(OWN_SLOTS, MOST_SLOTS + 1) if slot not in taken)
        if slot == MOST_SLOTS:
            raise Unwalkable
        self._held[number] = slot

    def drop(self, number: int) -> list[int]:
        """The code for it; none where it is in no slot."""
        slot = self._held.pop(number, None)
        return [] if slot is None else [2 * slot + 1]

    def hand(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The slots of tensors that another part has from now on."""
        return tuple(self._held.pop(number) for number in numbers)


def _numbered(numbers: Sequence[int], first: int) -> dict[int, int]:
    return {number: first + place for place, number in enumerate(numbers)}


def tile_codes(events: Sequence[Event], sizes: Mapping[int, InTokens], known: Sizes) -> str:
    """A pass of experts over a tile."""
    everything = Part(forward=range(len(events)), backward=NOTHING)
    return WalkedStep(events, sizes, known, [everything], ()).codes(everything.forward)
