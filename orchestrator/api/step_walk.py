"""The order in which a traced model's large tensors come and go, from which follows what the allocator reserves.

A step is told in parts: what is before the first layer, a layer of each kind, what is behind the last one. Each part is
two lists of codes, one a pass. An even code takes a tensor, of the size at half the code; those at `ATTENTION`,
`EXPERTS` and `EXPERTS_BACK` stand for what is at work there, `PRODUCT` for a pass's first matrix product, and
`GRADIENT` says that the next tensor is an adapter's gradient, which gets no slot. Any other gets the lowest free slot
from `OWN_SLOTS` on; those below hold what other parts have handed over: from `INPUT_SLOTS` on what the part before has
made, from `GRAD_SLOTS` on what the part behind has. An odd code drops the tensor in the slot at half the code.
"""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field, StringConstraints

from orchestrator.api.base import Model
from orchestrator.api.layer_trace import MOST_KINDS, InTokens

ATTENTION, EXPERTS, EXPERTS_BACK, PRODUCT, GRADIENT = range(5)
FIRST_SIZE = 5
"""Sizes before this one are of no tensor."""
INPUT_SLOTS, GRAD_SLOTS, OWN_SLOTS = 0, 4, 8
MOST_SIZES, MOST_SLOTS = 256, 1024
MOST_CODES = 1 << 14
MOST_JSON_BYTES = 1 << 18
"""Of a walk, so that nobody's text inflates without bound."""
SMALL_BYTES, SMALL_AT_TOKENS = 1 << 20, 1 << 14
"""Tensors that are smaller than this with so many tokens are left out: all of them together fill a page or two."""

ZERO = ord("#")
"""The character of code 0: those behind a quotation mark need no escape in JSON, and are short."""
Codes = Annotated[
    str, StringConstraints(max_length=MOST_CODES, pattern=f"^[{chr(ZERO)}-{chr(ZERO + 2 * MOST_SLOTS - 1)}]*$")
]
"""A character for each code."""
Slots = Annotated[tuple[int, ...], Field(max_length=GRAD_SLOTS - INPUT_SLOTS)]


def coded(codes: Iterable[int]) -> str:
    """Codes as text."""
    return "".join(chr(ZERO + code) for code in codes)


def codes_of(text: str) -> Iterator[int]:
    """The codes of a text."""
    return (ord(character) - ZERO for character in text)


class PartWalk(Model):
    """A part of a step."""

    forward: Codes
    output: Slots = ()
    """The slots that the next part is handed."""
    backward: Codes = ""
    grad: Slots = ()
    """The slots that the part before is handed."""


class TileWalk(Model):
    """Both passes of routed experts over a tile of rows; sizes are by these rows. Nothing is left."""

    forward: Codes
    backward: Codes


class PartWalks(Model):
    """The parts of a step whose layers all recompute, or all keep their activations."""

    begin: PartWalk
    """What is before the layers; what of it goes when the decoder ends is its backward pass."""
    first: PartWalk
    """The first layer: nobody asks for the gradient to its input."""
    kinds: Annotated[tuple[PartWalk, ...], Field(max_length=MOST_KINDS)]
    """Layers behind it, by the trace's kinds."""
    end: PartWalk
    """From the last layer to the loss, and back."""


class StepWalk(Model):
    """A step, by parts."""

    sizes: Annotated[tuple[InTokens, ...], Field(max_length=MOST_SIZES)]
    recomputed: PartWalks
    whole: PartWalks
    experts: Annotated[tuple[TileWalk | None, ...], Field(max_length=MOST_KINDS)] = ()
    """By the trace's kinds; none where no kind has experts."""

    def packed(self) -> str:
        """The JSON, deflated (RFC 1950), in base 85 (RFC 1924): a walk is long, and parts of it are alike."""
        text = self.model_dump_json(by_alias=True, exclude_defaults=True)
        return b85encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def unpacked(cls, text: str) -> StepWalk:
        """What `packed` gave; ValueError for any other text."""
        try:
            inflating = zlib.decompressobj()
            found = inflating.decompress(b85decode(text), MOST_JSON_BYTES)
        except zlib.error as error:
            raise ValueError("the walk cannot be inflated") from error
        if not inflating.eof:
            raise ValueError(f"the walk is longer than {MOST_JSON_BYTES} bytes, or cut")
        return cls.model_validate_json(found)
