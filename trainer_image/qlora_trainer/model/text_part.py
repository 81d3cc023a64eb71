"""The class of a model that is trained: a causal language model, or the text part of a model that holds more.

Rules:

- Of a model of images (or sound) and text there are its decoder, its embeddings and its head, under the names that they
  have in the whole. So a checkpoint of the whole is read by transformers' own rules, and PEFT loads the adapter there.
- Nothing else of it takes memory: it is taken away before weights are read, and its weights are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch.nn import Module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orchestrator.api.model_facts import TEXT_CONFIG
from qlora_trainer.model.source import holds_text_model


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a model of this config is loaded as."""
    if holds_text_model(config.model_type):
        return _text_part(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def from_config(config: PreTrainedConfig, **options: Any) -> Any:
    """A model with new weights, as `AutoModelForCausalLM.from_config` makes it."""
    return model_class(config)._from_config(config, **options)


def is_text_part(base: Any) -> bool:
    """Whether it is the part of a model that holds more."""
    return hasattr(base, "beside_text")


def decoder_of(base: Any) -> Any:
    """The model without its head: some that hold a text model with a head name that one, and Llama 4's names itself."""
    head, found = base.get_output_embeddings(), base.get_decoder()
    while head is not None and any(module is head for module in found.modules()):
        inner = next((each for each in found.children() if isinstance(each, PreTrainedModel)), None)
        if inner is None:
            break
        found = inner
    return found


@cache
def _text_part(whole: Any) -> Any:
    class TextPart(whole):
        def __init__(self, config: PreTrainedConfig, *others: Any, **options: Any) -> None:
            super().__init__(config, *others, **options)
            self.beside_text = tuple(_beside_text(self))
            for name in self.beside_text:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, None)
            tied: dict[str, str] = self.all_tied_weights_keys
            gone = tuple(f"{name}." for name in self.beside_text)
            self.all_tied_weights_keys = {name: each for name, each in tied.items() if not name.startswith(gone)}
            prefix = f"{self.base_model_prefix}."  # which some checkpoints leave out
            self._keys_to_ignore_on_load_unexpected |= {
                f"^({re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}" for name in gone
            }

        def set_attn_implementation(self, attn_implementation: str, **options: Any) -> None:
            text_alone = {"": attn_implementation, TEXT_CONFIG: attn_implementation}
            super().set_attn_implementation(text_alone, **options)

    TextPart.__name__, TextPart.__qualname__, TextPart.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    return TextPart


def _beside_text(model: Any) -> Iterator[str]:
    """The names of the modules beside the decoder, its embeddings and its head."""
    decoder = decoder_of(model)
    kept = [decoder, model.get_input_embeddings(), model.get_output_embeddings()]
    return iter(()) if decoder is model else _without(kept, model, "")


def _without(kept: list[Module], module: Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        if any(child is each for each in kept):
            continue
        if any(inner is each for inner in child.modules() for each in kept):
            yield from _without(kept, child, f"{path}{name}.")
        else:
            yield f"{path}{name}"
