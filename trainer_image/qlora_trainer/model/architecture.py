"""Whether a base model can be tuned here, found without its weights and without a GPU.

Rules:

- A model is a causal language model that transformers itself has; no code that comes with one is run.
- Its weights are the checkpoint's: every parameter comes of one named tensor, or is tied to one that does. transformers
  loads the names, shapes and types of the checkpoint's tensors into the model without memory, with its own renaming,
  fusing and tying. What it would draw at random, leave out or overwrite is refused by name, because it would do so with
  a warning, or without, and train to the end.
- Embeddings and head that config.json ties and the checkpoint has a tensor for each of are tied where these are equal,
  as transformers does it. Only who reads the weights knows, so they are counted as two.
- What is quantized, and so what an adapter can be on, is asked of the very code that loads the model for training.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import GENERATION_CONFIG_NAME

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.job import PublishFormat
from qlora_trainer.kernels import state_kernels
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model import mxfp4
from qlora_trainer.model.adapter import target_modules
from qlora_trainer.model.blame import is_models
from qlora_trainer.model.loading import refuse_unquantized, weightless_base
from qlora_trainer.model.recorded_step import decoder_layers
from qlora_trainer.model.rehearsal import rehearse
from qlora_trainer.model.source import ModelDescription, TensorShape, known_config, library_words
from qlora_trainer.model.text_part import decoder_of, from_config, is_text_part, model_class
from qlora_trainer.outcome import UserError

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The types, by safetensors' names, that are numbers as they stand; any other needs scales or a table."""
NAMED = 3
"""So many names stand in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModel:
    """What is found where a model is tried."""

    separate_because: str | None
    """Why its records are trained one by one; None where rows of them are packed."""
    stores_tied_twice: bool
    """Whether its checkpoint has tensors of their own for weights that config.json ties."""
    state_packages: Mapping[str, str | None]
    """What has kernels for its layers that carry a state, and the version that is installed, if one is."""


def check_architecture(
    description: ModelDescription,
    source: str,
    adapter: AdapterSpec,
    *,
    answers: bool = False,
    formats: Sequence[PublishFormat] = (),
) -> CheckedModel:
    """Refuse, as a UserError, what training could not do with the model, its weights or the adapter's targets.

    `answers`: the trained model is to generate some; `formats` are what it is to be published in.
    """
    config = known_config(description.folder, source)
    _refuse_generation_config(source, description.folder)
    PackedAttention().register()
    try:
        base, _ = weightless_base(deepcopy(config), torch.device("cpu"))
    except Exception as error:  # a config that the class cannot be built from, in any of its ways
        if not is_models(error):
            raise
        raise UserError(
            f"{source}: {config.architectures[0]} cannot be built from its config: {library_words(error)}"
        ) from error
    stores_tied_twice = False
    if description.tensors is not None:
        tensors = mxfp4.as_read(source, description.tensors)
        _refuse_two_for_one(source, base, tensors)
        _refuse_unusable_dtypes(source, base, tensors)
        stores_tied_twice = _has_apart(_checked_weights(source, config, tensors))
    refuse_reused_layers(source, base)
    _refuse_untraceable(source, base)
    _refuse_unquantizable(source, base)
    targets = target_modules(base, adapter)
    if formats:
        refuse_unmergeable(description.tensors, source, deepcopy(config), targets)
    separate_because = rehearse(config, source, adapter, answers=answers)
    return CheckedModel(
        separate_because=separate_because,
        stores_tied_twice=stores_tied_twice,
        state_packages=state_kernels.packages(base),
    )


def _refuse_generation_config(source: str, folder: Path) -> None:
    """UserError where transformers would load the weights and then fail of generation_config.json."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        json.dumps(config.to_diff_dict())
        ends: Any = config.eos_token_id
        if not all(type(token) is int for token in (ends if isinstance(ends, list) else [0 if ends is None else ends])):
            raise TypeError(f"eos_token_id is neither a token nor a list of them: {ends!r}")
    except Exception as error:  # whatever the file provokes, it is the user's to mend
        raise UserError(
            f"{source}: {GENERATION_CONFIG_NAME} is not valid: {library_words(error)}; mend the file, or remove it"
        ) from error


def _refuse_untraceable(source: str, base: Any) -> None:
    """UserError for a model without layers as a trace needs them; a plan that recomputes them does, too."""
    try:
        decoder_layers(decoder_of(base))
    except ValueError as error:
        raise UserError(
            f"{source}: {error}, so nobody knows how much memory its layers take; choose another model"
        ) from error


def _refuse_unquantizable(source: str, base: Any) -> None:
    try:
        refuse_unquantized(base)
    except UserError as error:
        raise UserError(f"{source}: {error.message}") from error


def refuse_reused_layers(source: str, base: Any) -> None:
    """UserError where layers are used more than once: they are counted, and have an adapter, once."""
    name, tables = type(base).__name__, (base.get_input_embeddings(), base.get_output_embeddings())
    tied: Mapping[str, str] = base.all_tied_weights_keys
    shared = [pair for pair in tied.items() if base.get_submodule(pair[0].rpartition(".")[0]) not in tables]
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in base.modules())
    uses = getattr(base.config.get_text_config(), "num_hidden_layers", layers)
    if shared:
        target, origin = shared[0]
        what = f"uses the weights of a layer in others, such as {origin} for {target}"
    elif 0 < layers < uses:
        what = f"goes through its {layers} layers more than once, {uses} times in all"
    else:
        return
    raise UserError(
        f"{source}: {name} {what}, and what an adapter is and how much memory it takes there is not known; choose a "
        "model whose layers are each used once"
    )


# --- other formats


def refuse_unmergeable(
    tensors: Mapping[str, TensorShape] | None, source: str, config: Any, targets: Sequence[str]
) -> None:
    """UserError where an adapter on these targets, as PEFT matches names, cannot be added to the checkpoint's weights.

    `tensors` are the checkpoint's as they are stored.
    """
    where = f"spec.publish.formats: {source}"
    if tensors is None:
        raise UserError(f"{where} has no weights to merge the adapter into; leave the formats out")
    if odd := next((name for name, shape in sorted(tensors.items()) if shape.dtype not in WEIGHT_DTYPES), None):
        raise UserError(
            f"{where} holds {odd} in {tensors[odd].dtype}, and an adapter is merged into 16-bit weights alone; give "
            "the model's 16-bit weights as spec.model.source, or leave the formats out"
        )
    base = _plain_base(config)
    if is_text_part(base):
        raise UserError(
            f"{where} holds more than a text model, of which the other parts are not read; leave the formats out"
        )
    stored = stored_linears(base, tensors)
    ends = tuple(f".{target}" for target in targets)
    for name, module in base.named_modules():
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2
        if is_matrix and f".{name}".endswith(ends) and name not in stored:
            raise UserError(
                f"{where} stores the weight of {name} otherwise than the model has it, fused or transposed, "
                "so no adapter is merged into it; choose other targets, or leave the formats out"
            )


def linears_of_checkpoint(config: Any, tensors: Iterable[str]) -> dict[str, str]:
    """`stored_linears` of a model that nobody has built yet."""
    return stored_linears(_plain_base(config), tensors)


def stored_linears(base: Any, tensors: Iterable[str]) -> dict[str, str]:
    """By the name of a linear layer, the checkpoint's name of its weight, for those that are stored as they are."""
    ways = _ways_in(base, tensors)
    found = {
        name: ways.get(f"{name}.weight", {}).get(f"{name}.weight", [])
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return {name: names[0] for name, names in found.items() if len(names) == 1 and len(ways[f"{name}.weight"]) == 1}


def _plain_base(config: Any) -> Any:
    """The model as transformers has it, without memory."""
    with init_empty_weights(), no_init_weights():
        return from_config(config, dtype=torch.bfloat16)


# --- weights


def _checked_weights(source: str, config: Any, tensors: Mapping[str, TensorShape]) -> PreTrainedModel:
    """The model without memory, as transformers loads such a checkpoint; UserError where that is not all of it."""
    architecture = model_class(config)
    base, found = _loaded_without_memory(source, architecture, config, tensors)
    for reason, names, hint in (
        ("lack {count} of the model's tensors", found["missing_keys"], "copy the whole model"),
        ("hold {count} tensors of other shapes than config.json says", _mismatched(found), "the two belong together"),
        ("hold {count} tensors that the model does not have", found["unexpected_keys"], "give the model's own weights"),
    ):
        if names:
            listed = ", ".join(sorted(names)[:NAMED])
            raise UserError(
                f"{source}: its weights {reason.format(count=len(names))} ({architecture.__name__}): "
                f"{listed}{', ...' if len(names) > NAMED else ''}; {hint}"
            )
    return base


def _has_apart(base: PreTrainedModel) -> bool:
    """Whether weights that the config ties were loaded from a tensor each."""
    tied: Mapping[str, str] = base.all_tied_weights_keys
    find = base.get_parameter_or_buffer
    return any(find(target) is not find(origin) for target, origin in tied.items())


def _refuse_two_for_one(source: str, base: PreTrainedModel, tensors: Iterable[str]) -> None:
    """UserError for two tensors that are loaded as the same one: transformers takes one of them, without a word.

    `base` has no weights.
    """
    for target, ways in _ways_in(base, tensors).items():
        names = next((names for names in ways.values() if len(names) > 1), None)
        if names is None and target in ways and len(ways) > 1:  # once as it is, and once in parts
            names = [name for names in ways.values() for name in names]
        if names is not None:
            raise UserError(
                f"{source}: its weights hold {target} twice, as {names[0]} and as {names[1]}, of which one would be "
                "left out; remove the one that is not meant, or give the model as it was published"
            )


def _ways_in(base: PreTrainedModel, tensors: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """By the model's tensor: by the part of it, or its own name where it is whole, the checkpoint's names for that.

    The names are changed by transformers' own rules. Experts of a layer, for example, are parts of one tensor.
    """
    own, prefix = base.state_dict(), base.base_model_prefix
    rules = get_model_conversion_mapping(base)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    ways: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(tensors):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:  # a name that needs no rule
            target, pattern = name, None
        part = target if pattern is None else apply_renamings(name, renamings).removeprefix(f"{prefix}.")
        if target in own:  # else it is among `unexpected_keys`
            ways[target][part].append(name)
    return ways


def _refuse_unusable_dtypes(source: str, base: Any, tensors: Mapping[str, TensorShape]) -> None:
    ignored: Iterable[str] = base._keys_to_ignore_on_load_unexpected
    read = {name: each for name, each in tensors.items() if not any(re.search(part, name) for part in ignored)}
    unusable = {name: shape.dtype for name, shape in read.items() if shape.dtype not in WEIGHT_DTYPES}
    if unusable:
        types = ", ".join(sorted(set(unusable.values())))
        raise UserError(
            f"{source} holds weights in {types}, {len(unusable)} tensors, the first is {min(unusable)}; give the "
            "model's 16-bit weights, training quantizes them to NF4"
        )


def _loaded_without_memory(
    source: str, architecture: Any, config: Any, tensors: Mapping[str, TensorShape]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of missing, unexpected and mismatched keys, after its own conversions."""
    empty = {name: torch.empty(each.shape, dtype=torch.bfloat16, device="meta") for name, each in tensors.items()}
    try:
        with _quiet():
            return architecture.from_pretrained(
                None,
                config=config,
                state_dict=empty,
                device_map={"": "meta"},
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever names, shapes and config provoke, they are the user's to mend
        if not is_models(error):
            raise
        raise UserError(f"{source}: its weights do not fit its config.json; {library_words(error)}") from error


def _mismatched(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} {list(stored)} instead of {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]]


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' report of what it found, which is a refusal here."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
