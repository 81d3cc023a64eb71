"""How many floating-point operations a model's training takes: what utilization is told of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.micro_batch import MicroBatch
from qlora_trainer.model.training_model import TrainingModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How many floating-point operations training takes: 4 per weight and token, because the base is frozen.

    Forward 2 and backward to the activations 2 (Dettmers et al., 2023, train no base weight, so the third pair of the
    usual 6 is not there); recomputation is not counted as work. Attention: 6 x width, in every layer, per pair of
    tokens that see each other, forward and backward, of which causality keeps half.
    """

    linear_weights: int
    attention_width: int
    """Of all layers together."""

    def operations(self, batches: Iterable[MicroBatch]) -> float:
        """Floating-point operations of a forward and backward pass over these micro-batches."""
        tokens = pairs = 0
        for batch in batches:
            lengths = batch.record_starts.diff().double()
            tokens += batch.tokens
            pairs += float(lengths.square().sum())
        return 4.0 * self.linear_weights * tokens + 6.0 * self.attention_width * pairs


def arithmetic(model: TrainingModel) -> Arithmetic:
    """How many operations a step of this model takes."""
    config: Any = model.base.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]  # any type's
    return Arithmetic(
        linear_weights=model.linear_weights(), attention_width=sum(map(_attention_width, _layers(config)))
    )


def _layers(config: Any) -> list[Any]:
    """A config for each layer: of some types (Gemma 4) they differ, and then the model's own does not tell sizes."""
    layers = range(config.num_hidden_layers)
    uneven = getattr(config, "is_heterogeneous", False)
    return [config.per_layer_config[layer] if uneven else config for layer in layers]


def _attention_width(layer: Any) -> int:
    head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return layer.num_attention_heads * head
