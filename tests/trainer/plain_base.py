"""A base in NF4 by transformers alone: what the trainer's own is held against."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Why: transformers declares some of these functions only in part.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def nf4() -> BitsAndBytesConfig:
    """QLoRA's quantization (Dettmers et al., 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def base_in_nf4(folder: Path, **how: Any) -> Any:
    """The model of a folder, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4(), dtype=torch.bfloat16, device_map={"": "cpu"}, **how
    )
