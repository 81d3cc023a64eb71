"""An adapter as PEFT itself makes, saves, loads and merges it, with weights that matter: the judge of exports."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Why: transformers and PEFT declare the types of what they return only in part.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Path, into: Path, *, seed: int = 0, scale: float = 0.1, **config: Any) -> Path:
    """A folder with adapter_config.json and bfloat16 weights for the base in a folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ALL_LINEAR, **config}
    lora = LoraConfig(task_type="CAUSAL_LM", **options)
    adapted: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        elif "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    adapted.save_pretrained(into)
    return into


def with_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base in this type with the adapter beside it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(dtype).eval()
