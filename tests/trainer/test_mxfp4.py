"""Checkpoints with experts in MXFP4: read as the numbers that they stand for, and refused where the two do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.source import describe_model
from qlora_trainer.outcome import UserError
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model
from torch import Tensor

from orchestrator.api.job import AdapterSpec

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""Of the 16 numbers of FP4 (E2M1)."""
GROUP, BIAS = 32, 127
"""Numbers that share an exponent, and what is taken from it."""


def plain_and_packed(folder: Path) -> tuple[Path, Path]:
    """A tiny model in bfloat16, whose experts' weights are such as MXFP4 has, and the same one with them in MXFP4."""
    plain, packed = build_tiny_model(folder / "plain", "gpt_oss", **SHAPE), folder / "packed"
    tensors, other = load_file(plain / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(256, (experts, outputs, inputs // GROUP, GROUP // 2), generator=draw).byte()
            scales = torch.randint(118, 124, (experts, outputs, inputs // GROUP), generator=draw).byte()
            tensors[name] = numbers(blocks, scales).to(torch.bfloat16)
            other |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            other[name] = tensor
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    packed.mkdir()
    for file in plain.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    save_file(other, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return plain, packed


def numbers(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, inputs, outputs]: of each byte the lower half comes first."""
    pairs = torch.stack([VALUES[(blocks & 15).long()], VALUES[(blocks >> 4).long()]], dim=-1)
    scaled = pairs.flatten(-2) * 2.0 ** (scales.double() - BIAS).unsqueeze(-1)
    return scaled.flatten(-2).transpose(1, 2).contiguous()


def test_experts_in_mxfp4_are_read_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    plain, packed = plain_and_packed(tmp_path)
    ours, expected = (
        {
            name: each.detach()
            for name, each in load_base(folder, torch.device("cpu"), PackedAttention()).named_parameters()
        }
        for folder in (packed, plain)
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_prepare_accepts_such_a_checkpoint_and_refuses_one_without_its_scales(tmp_path: Path) -> None:
    _, packed = plain_and_packed(tmp_path)
    source = f"file://{packed}"
    checked = check_architecture(describe_model(source, "main"), source, AdapterSpec())
    assert checked.separate_because is None
    tensors = load_file(packed / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("down_proj_scales")))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is no matrix in MXFP4 with scales of its own beside it"):
        check_architecture(describe_model(source, "main"), source, AdapterSpec())
