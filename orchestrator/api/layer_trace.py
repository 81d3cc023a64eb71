"""What a model's layers take in one job, traced from the very modules: what prepare finds and sizing reads.

A job's adapter is known when it is prepared, so all that may still change is how many tokens a micro-batch has, and
how many layers recompute their activations. Bytes are polynomials in the tokens of a micro-batch: coefficients of 1, t
and t squared, of which the last ones may be left out. Layers of one kind take the same.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from orchestrator.api.base import Count, Model

MOST_KINDS = 8
MOST_INSTANTS = 12
MOST_ROWS_PER_TOKEN = 1024
MOST_WALK_CHARACTERS = 4096
"""No more fits a termination message."""
KIND_LETTERS = "abcdefgh"
LARGEST_COEFFICIENT = 1e15
MAX_WIDTH = 1 << 20
"""Of a layer, an expert or a head, and so many heads or experts: ten times what any known model has."""

Coefficient = Annotated[float, Field(ge=-LARGEST_COEFFICIENT, le=LARGEST_COEFFICIENT)]
InTokens = Annotated[tuple[Coefficient, ...], Field(max_length=3)]
"""Bytes as coefficients of 1, t and t squared for a micro-batch of t tokens."""
Instants = Annotated[tuple[InTokens, ...], Field(max_length=MOST_INSTANTS)]
"""Moments of a pass that can be its peak."""


class LayerInstants(Model):
    """One layer's passes, with its input and, in the backward pass, the gradient to its output among the bytes, and all
    else that is there but for what layers keep, and adapters and their gradients."""

    kept: InTokens
    """What waits for the backward pass, the layer's input counted if it does, its output not."""
    operations: InTokens = ()
    """How many operations the host starts in both passes; none in older traces."""
    forward: Instants
    backward: Instants
    attention: Instants = ()
    """Moments of the backward pass at which attention is at work, its own workspace not counted."""
    experts: Instants = ()
    """Moments of the forward pass at which routed experts are at work, what they take by the way not counted."""
    experts_again: Instants = ()
    """Such moments of the backward pass, where the forward pass is computed once more."""
    experts_backward: Instants = ()
    """Such moments of the backward pass itself."""


class EndInstants(Model):
    """The ends of a decoder whose layers all recompute, or all keep their activations."""

    first_kept: InTokens
    """What the first layer keeps: nobody asks for the gradient to its input."""
    released: InTokens = ()
    """What of that is let go of before the loss."""
    loss: InTokens
    """What is there at the loss, beside what layers keep."""
    norm: Instants
    """From there back to the last layer."""
    shared: InTokens = ()
    """What all layers get beside their input, which is counted in every moment; in older traces there is none, and no
    moment has it."""
    left: InTokens = ()
    """What a record leaves that has gone through the decoder, beside what layers keep: others follow it one by one."""
    outside: Instants = ()
    """Before the first layer, and in the backward pass from that layer on."""


class Heads(Model):
    """What a layer attends with."""

    query: int = Field(ge=1, le=MAX_WIDTH)
    key: int = Field(ge=1, le=MAX_WIDTH)
    size: int = Field(ge=1, le=MAX_WIDTH)
    sinks: bool = False
    """Whether each has a sink, which the trainer's own kernels know, where heads are not too large for them."""


class ExpertInstants(Model):
    """What a layer's routed experts take by the way, whatever tokens choose; tokens come in tiles."""

    rows_per_token: int = Field(default=1, ge=1, le=MOST_ROWS_PER_TOKEN)
    """Of what goes in: experts that do not choose get every token, one after the other."""
    forward: Instants
    """For a tile of so many rows."""
    backward: Instants


class LayerKind(Model):
    """Layers that take the same."""

    weight_bytes: Count
    """Of a layer's quantized matrices."""
    other_bytes: Count
    """Of what stays in 16 bits."""
    gradient_bytes: Count
    """Of its adapters' gradients."""
    recomputed: LayerInstants
    whole: LayerInstants
    experts: ExpertInstants | None = None
    heads: Heads | None = None
    """None where they are the model's."""


class ModelTrace(Model):
    """All layers of a model under a job's adapter."""

    packed: bool
    """Whether rows of records go through the layers; else one record after the other does."""
    kinds: Annotated[tuple[LayerKind, ...], Field(min_length=1, max_length=MOST_KINDS)]
    layers: Annotated[str, StringConstraints(pattern=f"^[{KIND_LETTERS}]+$", max_length=1024)]
    """The kind of each layer, a for the first of `kinds`."""
    recomputed: EndInstants
    whole: EndInstants
    fusing_bytes: Count = 0
    """More than a layer's quantized experts, while those of a checkpoint are put together on the card."""
    other_bytes: Count
    """Of weights outside the layers, but for embeddings, head, and what stays on the host."""
    other_gradient_bytes: Count = 0
    """Of adapters' gradients outside the layers."""
    adapter_parameters: Count
    walk: Annotated[str, StringConstraints(max_length=MOST_WALK_CHARACTERS)] = ""
    """The order in which tensors come and go, a packed `step_walk.StepWalk`: what the allocator reserves follows from
    it. None in older traces, where what is computed depends on the tokens, or where it is too long."""

    @model_validator(mode="after")
    def _kinds_are_named(self) -> Self:
        letters = KIND_LETTERS[: len(self.kinds)]
        if not set(self.layers) <= set(letters):
            raise ValueError(f"layers must be of the kinds {letters}")
        return self
