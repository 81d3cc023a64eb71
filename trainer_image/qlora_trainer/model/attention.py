"""Which attention a model is trained with: packed where that is the model's own, else transformers', record by record.

Rules:

- Packed attention must take every argument that the model gives its attention, and in every call of a forward pass over
  several records give what the model's own eager attention gives on each in float32, with transformers' own masks.
- So it is held against the loaded weights, layer by layer: logits would hide a layer under the roundings of the others.
- A model that cannot be held against its own attention is not packed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from qlora_trainer.data.micro_batch import MicroBatch
from qlora_trainer.kernels.moe_experts import silent_experts
from qlora_trainer.kernels.packed_attention import NAME as PACKED_ATTENTION
from qlora_trainer.kernels.packed_attention import PackedAttention, UnknownAttention
from qlora_trainer.model.probe import drawn_probe
from qlora_trainer.model.text_part import model_class

COMPARED_ATTENTION = "qlora_compared"
"""The name of the attention that computes every call both ways."""
CHECKED_LAYER_TYPES = {"full_attention", "sliding_attention"}
TOLERANCE = 0.03
"""Largest relative difference of an attention's output from the eager one's in float32; bfloat16 makes up to 0.01."""
FIRST_LENGTHS = (5, 30, 13)
"""Tokens of the probe's records, before one that is longer than the windows."""
LONGEST_RECORD = 640
"""Eager scores of a longer record would take too much of a card; small copies of the model are tried beyond windows."""
PROBE_TOKENS = range(3, 64)
"""The probe's token ids."""

log = logging.getLogger(__name__)


def attention_implementation(config: PreTrainedConfig) -> str:
    """The name of packed attention where the architecture may be able to use it, else of transformers' own."""
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or CHECKED_LAYER_TYPES)
    if model_class(config)._supports_attention_backend and layer_types <= CHECKED_LAYER_TYPES:
        return PACKED_ATTENTION
    return own_attention_implementation(config)


def own_attention_implementation(config: PreTrainedConfig) -> str:
    """The name of transformers' own attention that the architecture is made for."""
    return (
        "sdpa" if model_class(config)._supports_sdpa else "eager"
    )  # it may look its attention up in a table of its own


def settle_attention(base: PreTrainedModel, packed: PackedAttention) -> None:
    """Leave a loaded base with packed attention only if that is its own; `packed` knows why it is not."""
    config: Any = base.config
    if config._attn_implementation != PACKED_ATTENTION:
        packed.unfit_because = "not all of its layers have an attention that can be exchanged"
        return
    packed.unfit_because = reason = _difference(base, packed)
    base.set_attn_implementation(PACKED_ATTENTION if reason is None else own_attention_implementation(config))


def _difference(base: PreTrainedModel, packed: PackedAttention) -> str | None:
    batch = _probe(base.config.get_text_config())
    compared = _ComparedAttention(packed, batch)
    AttentionInterface.register(COMPARED_ATTENTION, compared)
    AttentionMaskInterface.register(COMPARED_ATTENTION, eager_mask)
    head: Any = base.get_output_embeddings()
    on_device = batch.to(head.weight.device)
    packed.expect(batch, on_device.record_starts)
    base.set_attn_implementation(COMPARED_ATTENTION)
    try:
        with torch.no_grad(), silent_experts(base):  # whose roundings would only make the layers' inputs others
            base(input_ids=on_device.input_ids, position_ids=on_device.position_ids, use_cache=False)
    except UnknownAttention as error:
        return str(error)
    return None if compared.calls else "its layers ask for no attention by name"


class _ComparedAttention:
    """The model's own eager attention, which raises UnknownAttention where the packed one differs from it."""

    def __init__(self, packed: PackedAttention, batch: MicroBatch) -> None:
        self._packed = packed
        self._records = list(pairwise(batch.record_starts.tolist()))
        self.calls = 0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        self.calls += 1
        ours, _ = self._packed(module, query, key, value, None, **others)
        eager = _own_eager_attention(module)
        parts: list[Tensor] = []
        for a, b in self._records:
            own = (part[:, :, a:b].float() for part in (query, key, value))
            parts.append(eager(module, *own, _cut(attention_mask, a, b), **others)[0])
        theirs = torch.cat(parts, dim=1)
        difference = float((ours.float() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not difference <= TOLERANCE:
            raise UnknownAttention(f"packed attention is off by {difference:.1%} from the model's own")
        return theirs.to(query.dtype), None


def _cut(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    """A record's part of a row's mask, which not every model makes such that records do not see each other."""
    return None if mask is None else mask[..., start:end, start:end].float().clamp(min=-1e30)


def _own_eager_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The function beside the class that transformers' classes fall back on by convention."""
    for own in type(module).__mro__:
        found = getattr(sys.modules[own.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnknownAttention(f"{type(module).__name__} has no eager attention to hold it against")


def _probe(config: Any) -> MicroBatch:
    sizes = config.to_dict()  # layers may have some of their own
    windows = [sizes.get(name) for name in ("sliding_window", "window_size", "attention_window_size")]
    longest = max((window + 5 for window in windows if isinstance(window, int)), default=0)
    return drawn_probe((*FIRST_LENGTHS, min(max(longest, FIRST_LENGTHS[0]), LONGEST_RECORD)), PROBE_TOKENS)
