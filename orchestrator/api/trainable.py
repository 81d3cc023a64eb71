"""Whether a model can be tuned, as its config.json and the names of its files tell: the same in a plan and in prepare.

Rules:

- A refusal is a ValueError, whose text is a sentence about the model that ends with what to do instead.
- Prepare asks of config.json as it stands and of what transformers makes of it. A plan has no transformers: what those
  classes assume where config.json is silent, and which types no small copy of could be trained, it takes from a table
  (`package_data.model_types`), which a trial of every type writes (`python -m benchmarks.models`).
- A plan cannot know: what only weights and tokenizer tell, what a step on a small copy of this very config brings to
  light, and sizes that config.json leaves to transformers' class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast

from orchestrator.api.model_facts import (
    ATTENTION_HEADS,
    MIXTURE_FIELDS,
    OVERRIDES,
    TEXT_CONFIG,
    FieldMissing,
    ModelFacts,
    is_mixture,
)
from orchestrator.api.words import on_one_line

INNER_MODELS = (TEXT_CONFIG, "decoder", "text_encoder", "generator")
"""Under which names transformers looks for a text model inside a model of more."""
ASSUMED = ("is_encoder_decoder", "use_bidirectional_attention", "decoder_attention_heads", OVERRIDES)
"""What decides in a config, besides models inside and sizes of experts."""
VOCABULARIES = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab.*", "*.tiktoken", "tekken.json")
"""The files that transformers reads a tokenizer's tokens from; each is enough, but for pairs' first."""
NO_EXPERTS = "spec.adapter.experts: the model has no routed experts; leave it out, or choose a mixture of experts"
IMAGES_ALONE = "vision"
"""Of `use_bidirectional_attention`: an image is seen as a whole, a text from left to right."""
LEFT_TO_RIGHT = "choose a model that generates text from left to right"
MAX_NAME_SHOWN = 200
"""Characters of a stranger's name in a message."""

Json = Mapping[str, Any]  # Any: whatever a stranger's file holds


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """What is known of a model type, whatever a config says."""

    classes: tuple[str, ...]
    """Its models that are trained."""
    wraps: bool = False
    """Whether these hold a text model beside others, which alone is trained."""
    sees_both_sides: bool = False
    """Whether it is made to fill in masks."""
    assumes: Mapping[str, object] = field(default_factory=dict[str, object])
    """See `assumed`."""
    refused: str | None = None
    """Why it cannot be trained, as a trial has shown."""
    layers: tuple[str, ...] = ()
    """The last names of layers that an adapter may be on, in any of its forms; none where that is not known."""
    separate_because: str | None = None
    """Why its records are trained one by one, as a trial has shown; None where rows of them are packed."""


def trainable_facts(config: Json, revision: str, known: KnownType) -> ModelFacts:
    """The facts in a config; ValueError where it, or its type, cannot be trained."""
    config = _completed(config, known.assumes)
    refuse_fields(config)
    architecture = architecture_of(config)
    _refuse_overrides(config, architecture, known.assumes)
    if not known.wraps:
        _refuse_inner(config, INNER_MODELS)
    if known.sees_both_sides:
        raise ValueError(
            f"the model is a {architecture} of a type that fills in masks with the text on both sides, not a causal "
            f"language model; {LEFT_TO_RIGHT}"
        )
    if known.wraps and architecture not in known.classes:
        raise ValueError(
            f"the model is a {architecture}, but its config is that of a {known.classes[0]}, which holds a text model "
            "beside others; give that model, or save the text model alone"
        )
    if architecture not in known.classes:
        raise ValueError(f"the model is a {architecture}, not a causal language model; {LEFT_TO_RIGHT}")
    if known.refused is not None:
        raise ValueError(known.refused)
    try:
        facts = ModelFacts.from_config(config, revision)
        return facts.model_copy(update={"record_by_record": known.separate_because is not None})
    except FieldMissing as error:
        lacks = "has no attention heads" if error.field == ATTENTION_HEADS else "does not tell its sizes"
        raise ValueError(
            f"the model is a {architecture} that {lacks} ({error.field} is missing in config.json), so nobody knows "
            "how much memory its layers take; choose another model"
        ) from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config.json does not describe a model that can be trained: {reason}") from error


def refuse_targets(targets: Iterable[str], known: KnownType) -> None:
    """ValueError for an adapter on layers that no model of the type has; where in it, only prepare knows."""
    for wanted in targets:
        if known.layers and wanted.rpartition(".")[2] not in known.layers:
            raise ValueError(
                f"spec.adapter.targetModules: {wanted!r} is no linear layer of such a model that can have an adapter; "
                f"choose of {', '.join(known.layers)}, or all-linear"
            )


def refuse_files_without_tokenizer(names: Collection[str]) -> None:
    """ValueError for a model's files, by their names, that no tokenizer can be made of."""
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in VOCABULARIES)]
    if not found:
        raise ValueError(
            "the model has no tokenizer: there is neither tokenizer.json nor tokenizer.model nor vocab.json with "
            "merges.txt; copy them from where the model was published"
        )
    if found == ["vocab.json"] and "merges.txt" not in names:
        raise ValueError(
            "the model has half of a tokenizer, vocab.json without its merges.txt; copy that file from where the model "
            "was published"
        )


def unknown_type(config: Json, version: str) -> str:
    """Why a model whose type transformers does not know is refused."""
    if config.get("auto_map"):
        return "the model needs the code in its own repository (auto_map), which is never run; choose another model"
    return (
        f"transformers {version} does not know the model type {shown(model_type_of(config))!r} as one of a causal "
        "language model; choose another model or a newer trainer image"
    )


def refuse_fields(config: Json) -> None:
    """ValueError for what the fields of a config rule out, whatever its type."""
    model_type_of(config)
    _refuse_quantized(config)
    _refuse_inner(config, INNER_MODELS[1:])
    architecture = architecture_of(config)
    for level in (config, _mapping(config.get(TEXT_CONFIG))):
        _refuse_level(level, architecture)


def _refuse_level(config: Json, architecture: str) -> None:
    if config.get("is_encoder_decoder") or config.get("decoder_attention_heads"):
        raise ValueError(
            f"the model is a {architecture}, which is made of an encoder and a decoder, not a causal language model; "
            f"{LEFT_TO_RIGHT}"
        )
    if config.get("use_bidirectional_attention") not in (None, False, IMAGES_ALONE):
        raise ValueError(
            f"the model is a {architecture} that sees the text on both sides (use_bidirectional_attention), not a "
            f"causal language model; {LEFT_TO_RIGHT}"
        )


def _refuse_overrides(config: Json, architecture: str, assumes: Json) -> None:
    """ValueError for layers of sizes of their own, but for types whose class makes such layers: these were tried."""
    levels = (config, assumes), (_mapping(config.get(TEXT_CONFIG)), _mapping(assumes.get(TEXT_CONFIG)))
    if any(level.get(OVERRIDES) and not own.get(OVERRIDES) for level, own in levels):
        raise ValueError(
            f"the model is a {architecture} whose layers have sizes of their own ({OVERRIDES}), and how much memory "
            "such layers take is not known here; choose a model of equal layers"
        )


def _refuse_inner(config: Json, names: Iterable[str]) -> None:
    if any(isinstance(config.get(name), Mapping) for name in names):
        parts = sorted(name for name, value in config.items() if isinstance(value, Mapping) and _is_part(name))
        raise ValueError(
            f"the model is a {architecture_of(config)}, which holds a text model beside others ({', '.join(parts)}) in "
            "a way that is not known here; choose a text model, or save the text model alone"
        )


def _completed(config: Json, assumes: Json) -> Json:
    """The config with what its type assumes; some have the fields of the text model inside among their own."""
    if TEXT_CONFIG not in assumes:
        return {**assumes, **config}
    own = {name: each for name, each in config.items() if name != "model_type"}
    text = _mapping(config[TEXT_CONFIG]) if isinstance(config.get(TEXT_CONFIG), Mapping) else own
    return {**assumes, **config, TEXT_CONFIG: {**_mapping(assumes[TEXT_CONFIG]), **text}}


def model_type_of(config: Json) -> str:
    """The model type; ValueError where none is named."""
    found = config.get("model_type")
    if not isinstance(found, str) or not found:
        raise ValueError("config.json names no model_type; give the folder of a Hugging Face model")
    return found


def architecture_of(config: Json) -> str:
    """The name of the model's class; ValueError where there is none."""
    names: object = config.get("architectures")
    if not names:
        raise ValueError(
            "architectures is missing in config.json, so nobody knows what the model is; take the file from where the "
            "model was published"
        )
    listed = cast("list[object]", names) if isinstance(names, list | tuple) else [None]
    if not all(isinstance(each, str) for each in listed):
        raise ValueError("`architectures` in config.json must be a list of class names")
    return shown(str(listed[0]))


def assumed(resolved: Json) -> dict[str, object]:
    """What of a type's own defaults decides whether it can be trained, where config.json leaves it out."""
    experts = MIXTURE_FIELDS if is_mixture(resolved) else ()
    names = [name for name in (*ASSUMED, *experts) if resolved.get(name)]
    parts = [name for name, value in resolved.items() if isinstance(value, Mapping) and _is_part(name)]
    wraps = any(name in INNER_MODELS for name in parts)
    decisive = {name: True if isinstance(resolved[name], Mapping) else resolved[name] for name in names}
    return {
        **decisive,
        **({name: assumed(resolved[name]) if name == TEXT_CONFIG else {} for name in parts} if wraps else {}),
    }


def shown(name: str) -> str:
    """A name from a stranger's file, as it may stand in a message."""
    return on_one_line(name)[:MAX_NAME_SHOWN]


def _is_part(name: str) -> bool:
    return name in INNER_MODELS or (name.endswith(("_config", "_encoder")) and name != "quantization_config")


def is_mxfp4(config: Json) -> bool:
    """Whether a checkpoint's experts are in MXFP4, which is read and quantized to NF4."""
    return _mapping(config.get("quantization_config")).get("quant_method") == "mxfp4"


def _refuse_quantized(config: Json) -> None:
    inner = _mapping(config.get(TEXT_CONFIG))
    for level in (config, inner):
        quantization: object = level.get("quantization_config")
        if quantization and (level is inner or not is_mxfp4(level)):
            method = shown(str(_mapping(quantization).get("quant_method") or "an unnamed method"))
            raise ValueError(
                f"the model is already quantized ({method}); give its 16-bit weights, training quantizes them to NF4"
            )


def _mapping(value: object) -> Json:
    return cast("Json", value if isinstance(value, Mapping) else {})
