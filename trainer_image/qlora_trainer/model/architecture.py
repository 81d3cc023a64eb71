"""Whether a base model can be tuned here, found without its weights and without a GPU.

Rules:

- A model is a causal language model that transformers itself has; no code that comes with one is run.
- Its weights are the checkpoint's: transformers loads the names, shapes and types of the checkpoint's tensors into the
  model without memory, with its own renaming, fusing and tying. What it would draw at random, leave out or overwrite
  is refused by name, because it would do so with a warning and train to the end.
- What is quantized, and so what an adapter can be on, is asked of the very code that loads the model for training.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

from orchestrator.api.job import AdapterSpec
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import target_modules
from qlora_trainer.model.blame import is_models
from qlora_trainer.model.loading import refuse_unquantized, weightless_base
from qlora_trainer.model.rehearsal import rehearse
from qlora_trainer.model.source import ModelDescription, TensorShape, known_config, library_words
from qlora_trainer.outcome import UserError

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The types, by safetensors' names, that are numbers as they stand; any other needs scales or a table."""
NAMED = 3
"""So many names stand in a message."""


def check_architecture(description: ModelDescription, source: str, adapter: AdapterSpec) -> str | None:
    """Refuse, as a UserError, what training could not do with the model, its weights or the adapter's targets.

    Returns why its records are trained one by one; None where rows of them are packed.
    """
    config = known_config(description.folder, source)
    _refuse_generation_config(source, description.folder)
    if description.tensors is not None:
        _refuse_other_weights(source, config, description.tensors)
    PackedAttention().register()
    try:
        base, _ = weightless_base(deepcopy(config), torch.device("cpu"))
    except Exception as error:  # a config that the class cannot be built from, in any of its ways
        if not is_models(error):
            raise
        raise UserError(
            f"{source}: {config.architectures[0]} cannot be built from its config: {library_words(error)}"
        ) from error
    _refuse_unquantizable(source, base)
    target_modules(base, adapter)
    return rehearse(config, source, adapter)


def _refuse_generation_config(source: str, folder: Path) -> None:
    """UserError where transformers would load the weights and then fail of generation_config.json."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        json.dumps(config.to_diff_dict())
        ends: Any = config.eos_token_id
        if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends or 0])):
            raise TypeError(f"eos_token_id is neither a token nor a list of them: {ends!r}")
    except Exception as error:  # whatever the file provokes, it is the user's to mend
        raise UserError(
            f"{source}: {GENERATION_CONFIG_NAME} is not valid: {library_words(error)}; mend the file, or remove it"
        ) from error


def _refuse_unquantizable(source: str, base: Any) -> None:
    try:
        refuse_unquantized(base)
    except UserError as error:
        raise UserError(f"{source}: {error.message}") from error


# --- weights


def _refuse_other_weights(source: str, config: Any, tensors: Mapping[str, TensorShape]) -> None:
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ignored: Iterable[str] = getattr(architecture, "_keys_to_ignore_on_load_unexpected", None) or ()
    _refuse_unusable_dtypes(
        source, {name: each for name, each in tensors.items() if not any(re.search(part, name) for part in ignored)}
    )
    found = _loaded_without_memory(source, architecture, config, tensors)
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


def _refuse_unusable_dtypes(source: str, tensors: Mapping[str, TensorShape]) -> None:
    unusable = {name: shape.dtype for name, shape in tensors.items() if shape.dtype not in WEIGHT_DTYPES}
    if unusable:
        types = ", ".join(sorted(set(unusable.values())))
        raise UserError(
            f"{source} holds weights in {types}, {len(unusable)} tensors, the first is {min(unusable)}; give the "
            "model's 16-bit weights, training quantizes them to NF4"
        )


def _loaded_without_memory(
    source: str, architecture: Any, config: Any, tensors: Mapping[str, TensorShape]
) -> dict[str, Any]:
    """What transformers says of a checkpoint: missing, unexpected and mismatched keys, after its own conversions."""
    empty = {name: torch.empty(each.shape, dtype=torch.bfloat16, device="meta") for name, each in tensors.items()}
    try:
        with _quiet():
            _, info = architecture.from_pretrained(
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
    return info


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
