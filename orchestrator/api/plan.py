"""The memory plan that a train stage follows, and the estimate behind it.

`sizing/footprint` produces both, the controller records them in the job's status, the trainer obeys the plan.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.api.base import Amount, Count, Model, ShortText
from orchestrator.api.model_facts import MAX_LAYERS

OffloadTarget = Literal["activations", "embeddings"]
AttentionKernels = Literal["own", "flash-attn-4"]


class MemoryPlan(Model):
    """How the trainer spends the card's memory. Plans never change what is learned, only bytes and seconds."""

    micro_batch_size: int = Field(ge=1, le=1024)
    """Sequences in one forward pass."""
    accumulation_steps: int = Field(ge=1, le=65536)
    """Micro-batches in one optimizer step; times micro_batch_size gives the global batch."""
    recompute_layers: int = Field(ge=0, le=MAX_LAYERS)
    """The first so many decoder layers recompute their activations in the backward pass."""
    keep_attention: bool = False
    """Whether these keep what attention gave, which costs most to compute again where records are long."""
    attention: AttentionKernels = "own"
    """What computes attention where the trainer computes the layers itself; it falls back on its own kernels."""
    offload: Annotated[tuple[OffloadTarget, ...], Field(max_length=2)] = ()
    """What is moved to pinned host memory while it is not in use."""
    offloaded_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """So many decoder layers, evenly among the others, have all that they keep for the backward pass in pinned host
    memory meanwhile; of the others the first ones recompute. The last layer's backward pass comes at once: it stays."""
    streamed_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """So many decoder layers, evenly among the others, have their frozen weights in pinned host memory and come to the
    card when their turn does, in each pass of each micro-batch."""
    loss_chunk_tokens: int = Field(default=1024, ge=0, le=1 << 20)
    """Tokens whose logits exist at one time; 0 materialises all of them."""


class ByteItem(Model):
    """One line of an estimate."""

    name: ShortText
    bytes: Count


MARGIN_ITEM = "margin"
"""The line of an estimate that is no tensor: what the prediction may be wrong by."""
MARGIN_ITEMS = frozenset({MARGIN_ITEM, "margin of a guess"})
"""The second is in estimates of earlier versions."""


class Estimate(Model):
    """What a job is expected to take on one GPU class under one memory plan."""

    gpu_class: ShortText
    plan: MemoryPlan
    items: Annotated[tuple[ByteItem, ...], Field(max_length=32)]
    """Allocator bytes by purpose; their sum is `peak_bytes`."""
    peak_bytes: Count
    usable_bytes: Count
    """Allocator bytes that the smallest card of the class offers."""
    steps: Count
    card: ShortText | None = None
    """The slowest card of the class, which the times are for; absent where its speed is not known."""
    step_seconds: Amount | None = None
    """Expected seconds of an optimizer step."""
    seconds: Amount | None = None
    """Expected seconds of all steps; evaluations, checkpoints and loading come on top."""
    answering_seconds: Amount | None = None
    """Seconds that answers to held-out prompts take at the most, where the job asks for some."""
    dollars: Amount | None = None
    """Expected price of those seconds; absent where the operator has told none for the class."""

    @property
    def predicted_bytes(self) -> int:
        """The peak that is expected, without margins."""
        return sum(item.bytes for item in self.items if item.name not in MARGIN_ITEMS)

    @model_validator(mode="after")
    def _items_add_up(self) -> Estimate:
        if sum(item.bytes for item in self.items) != self.peak_bytes:
            raise ValueError("peakBytes must be the sum of items[].bytes")
        return self
