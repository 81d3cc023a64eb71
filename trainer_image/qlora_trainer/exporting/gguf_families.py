"""What GGUF has words for: which models and tokenizers can be written so that llama.cpp computes the same.

GGUF names an architecture, and llama.cpp has its layers as code. A family is here when its tensors and its config's
switches have been held against llama.cpp's answers; anything else is refused by name, because it would be read as
something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.outcome import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models of one architecture of llama.cpp's."""

    architecture: str
    pairs_neighbours: bool = False
    """Whether llama.cpp rotates neighbouring values of a head, where transformers rotates one half with the other."""
    switches: Mapping[str, Sequence[object]]
    """The values that fields of the config may have; absent ones are their classes' defaults."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="llama",
        pairs_neighbours=True,
        switches={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "qwen2": Family(architecture="qwen2", switches={"hidden_act": ("silu",), "use_sliding_window": (False,)}),
    "qwen3": Family(
        architecture="qwen3",
        switches={"hidden_act": ("silu",), "use_sliding_window": (False,), "attention_bias": (False,)},
    ),
}
"""By transformers' model type."""
ROPE_TYPES = ("default", "llama3")
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace("{1,3}", ""): "qwen2"}
"""What words are told apart by, and what llama.cpp calls it."""
IGNORES_MERGES = ("llama-bpe",)
"""Where a word that is a token is taken as it is."""


def family_of(config: Any, source: str) -> Family:
    """How a model is written, by transformers' config of it. UserError for what has not been tried."""
    where = f"spec.publish.formats: {source}"
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"{where} is of model type {config.model_type}, and GGUF is written of {', '.join(sorted(FAMILIES))} "
            "alone; take merged, which llama.cpp's own tools convert, or leave the format out"
        )
    for name, allowed in family.switches.items():
        if getattr(config, name, allowed[0]) not in allowed:
            raise UserError(f"{where} has {name} {getattr(config, name)!r}, of which GGUF is not written; take merged")
    rope = rope_type(config)
    if rope not in ROPE_TYPES:
        raise UserError(
            f"{where} has positions of type {rope!r}, and GGUF is written of {', '.join(ROPE_TYPES)} alone; take merged"
        )
    return family


def rope_type(config: Any) -> str:
    """How positions are told, by transformers' name."""
    return str(config.rope_parameters.get("rope_type", "default"))


def pre_tokenizer_of(tokenizer: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name for how the tokenizer of a tokenizer.json tells words apart. UserError for one that it lacks."""
    found = _pre_tokenizer(tokenizer)
    if found is None:
        raise UserError(
            f"spec.publish.formats: the tokenizer of {source} tells words apart in a way that GGUF is not written of, "
            "which are GPT-2's, SmolLM's, Llama 3's and Qwen's; take merged"
        )
    return found


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    model: Mapping[str, Any] = tokenizer.get("model") or {}
    normalizer: Mapping[str, Any] = tokenizer.get("normalizer") or {"type": "NFC"}  # llama.cpp does not normalise
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer.get("type") != "NFC":
        return None
    name = _named(tokenizer.get("pre_tokenizer") or {})
    return name if bool(model.get("ignore_merges")) == (name in IGNORES_MERGES) else None


def _named(steps: Mapping[str, Any]) -> str | None:
    match steps:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
            ],
        }:
            return "smollm"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return _PATTERNS.get(pattern)
        case _:
            return None
