"""A quantized base as a checkpoint that transformers and what builds on it can load, whole or with its first layers.

Writing 70B's 39 GB takes minutes: `write` may leave layers out, and `graft` puts copies of the others in their places
once the model is on the card. Speed and bytes do not depend on what the weights are.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from huggingface_hub import split_torch_state_dict_into_shards
from qlora_trainer.model.quantized_cache import QUANTIZATION
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.trainer.tiny_model import save_tokenizer

SHARD_SIZE = "2GB"
LAYER = re.compile(r"\.layers\.(\d+)\.")


def write(base: PreTrainedModel, folder: Path, *, layers: int) -> float:
    """The base's first layers, everything that is not in layers, and a tokenizer; the GiB of the tensors."""
    save_tokenizer(folder, chat_template=None)
    (folder / "config.json").write_text(json.dumps(_config(base, layers)))
    tensors = {name: tensor for name, tensor in base.state_dict().items() if _layer(name) < layers}
    if base.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name].cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return round(sum(tensor.nbytes for tensor in tensors.values()) / 2**30, 2)


def graft(model: PreTrainedModel, layers: int) -> None:
    """Copy a loaded model's layers in turn, until it has so many, each with memory of its own."""
    stack: Any = model.get_decoder().layers
    loaded = len(stack)
    if loaded == layers:
        return
    for number in range(loaded, layers):
        layer = copy.deepcopy(stack[number % loaded])
        layer.self_attn.layer_idx = number
        for module in layer.modules():
            if isinstance(module, bnb.nn.Linear4bit):  # a copied weight still belongs to the module it was copied from
                weight: Any = module.weight
                weight.module = module
                module.quant_state = weight.quant_state
        stack.append(layer)
    model.config.num_hidden_layers = layers
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[number % loaded] for number in range(layers)]
    places = {parameter.data_ptr() for parameter in stack.parameters()}
    assert len(places) == len(list(stack.parameters())), "layers share memory"


def _config(base: PreTrainedModel, layers: int) -> dict[str, Any]:
    settings: dict[str, Any] = {**QUANTIZATION, "llm_int8_skip_modules": ["lm_head"]}
    config: dict[str, Any] = {
        **base.config.to_dict(),
        "_name_or_path": "",
        "use_cache": True,
        "architectures": [type(base).__name__],
        "num_hidden_layers": layers,
        "dtype": "bfloat16",
        "quantization_config": BitsAndBytesConfig(**settings).to_dict(),
    }
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    return config


def _layer(name: str) -> int:
    """The layer that a tensor is part of; -1 for what is not in layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1
