"""Random weights in NF4: sizing and benchmarks without a checkpoint.

Rules: they stand in only where `$QLORA_ALLOW_RANDOM_WEIGHTS` is 1; they have the memory layout of a real checkpoint,
tensor for tensor; the same seed gives the same bits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch.nn import Parameter
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_trainer.kernels.moe_experts import NF4Experts, nf4
from qlora_trainer.kernels.streamed_layers import NOTHING_ON_HOST, OnHost
from qlora_trainer.model import quantization
from qlora_trainer.model.quantization import COMPUTE_DTYPE
from qlora_trainer.model.source import RANDOM_WEIGHTS_NAME, RANDOM_WEIGHTS_VARIABLE
from qlora_trainer.model.text_part import from_config
from qlora_trainer.outcome import UserError


def random_seed(folder: Path) -> int:
    """The seed that a folder names in place of weights; UserError where random weights are not allowed."""
    if os.environ.get(RANDOM_WEIGHTS_VARIABLE) != "1":
        raise UserError(
            f"{folder} holds {RANDOM_WEIGHTS_NAME} in place of weights, which is for sizing and benchmarks; "
            f"give a model with safetensors, or set {RANDOM_WEIGHTS_VARIABLE}=1"
        )
    return int(json.loads((folder / RANDOM_WEIGHTS_NAME).read_text())["seed"])


def random_base(
    config: PreTrainedConfig, implementation: str, device: torch.device, *, seed: int, on_host: OnHost = NOTHING_ON_HOST
) -> PreTrainedModel:
    """N(0, 0.02) drawn and quantized layer by layer: the memory layout of a real checkpoint, with no file read."""
    with torch.device("meta"):
        base = from_config(config, dtype=COMPUTE_DTYPE, attn_implementation=implementation)
    quantization.replace_experts(base)
    generator = torch.Generator(device).manual_seed(seed)
    head = base.get_output_embeddings()
    module: Any
    for name, module in list(base.named_modules()):
        if isinstance(module, NF4Experts):
            _draw_experts(module, device, generator)
            _leave(module, on_host.device(f"{name}.", device))
        elif type(module) is torch.nn.Linear and module is not head:  # as bitsandbytes replaces them
            base.set_submodule(
                name, _leave(_random_layer(module, device, generator), on_host.device(f"{name}.", device))
            )
        elif type(module).__name__.endswith("RotaryEmbedding"):
            rotary: Any = type(module)
            base.set_submodule(name, rotary(config.get_text_config()).to(device))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _fill_buffers(base, module, device)
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=COMPUTE_DTYPE, device=device)
            if parameter.dim() > 1:
                values.normal_(0, 0.02, generator=generator)
            owner, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(owner), leaf, Parameter(values, requires_grad=False))
    base.tie_weights()
    base.is_loaded_in_4bit = True  # as transformers' own loading marks it, for PEFT
    return base


def _fill_buffers(base: PreTrainedModel, module: torch.nn.Module, device: torch.device) -> None:
    """Constants such as Gemma's scale of embeddings, which no checkpoint holds: transformers fills them itself."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty_like(buffer, device=device))
    base._init_weights(module)  # pyright: ignore[reportPrivateUsage] - transformers' only way to fill a buffer


def _random_layer(linear: Any, device: torch.device, generator: torch.Generator) -> bnb.nn.Linear4bit:
    shape = (linear.out_features, linear.in_features)
    weight = torch.empty(shape, dtype=COMPUTE_DTYPE, device=device).normal_(0, 0.02, generator=generator)
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=COMPUTE_DTYPE,
        quant_type="nf4",
        device="meta",
    )
    parameter: Any = bnb.nn.Params4bit  # whose __new__ has no types
    layer.weight = parameter(weight, quant_type="nf4", compress_statistics=True, module=layer).to(device)
    return layer


def _leave(module: torch.nn.Module, place: torch.device) -> torch.nn.Module:
    """Put a module's quantized weights there."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, bnb.nn.Params4bit) and parameter.device.type != place.type:
            weight: Any = parameter  # whose class has methods of a module's types
            setattr(module, name, weight.to(place))
    return module


def _draw_experts(module: NF4Experts, device: torch.device, generator: torch.Generator) -> None:
    """Put together from parts, as transformers fuses the experts of a checkpoint: that takes memory too."""
    for name in module.matrices:
        experts, *matrix = getattr(module, name).shape
        fused = module.layout.gated and not module.layout.transposed and name == module.layout.first
        shape = (experts, matrix[0] // 2, matrix[1]) if fused else (experts, *matrix)
        halves = [
            torch.empty(shape, dtype=COMPUTE_DTYPE, device=device).normal_(0, 0.02, generator=generator)
            for _ in range(2 if fused else 1)
        ]
        quantized: Any = nf4(torch.cat(halves, dim=1) if fused else halves[0])
        del halves
        setattr(module, name, quantized.to(device))
