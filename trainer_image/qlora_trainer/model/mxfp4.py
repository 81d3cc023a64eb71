"""Checkpoints whose experts are in MXFP4 (OCP Microscaling Formats, 2023), as GPT-OSS's are published.

They are read as if they were 16-bit weights, a matrix of a layer at a time, and quantized to NF4 like these. A matrix
of experts [experts, inputs, outputs] is stored as two: `_blocks` [experts, outputs, groups, bytes of a group], of which
each byte holds two numbers, and `_scales` [experts, outputs, groups], the exponents of two. transformers would
dequantize all experts of a layer at once, and take three times what they take in 16 bits; here it is one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_trainer.model.source import TensorShape
from qlora_trainer.outcome import UserError

MATRICES = ("gate_up_proj", "down_proj")
BLOCKS, SCALES = "_blocks", "_scales"


def as_read(source: str, tensors: Mapping[str, TensorShape]) -> dict[str, TensorShape]:
    """The tensors of a checkpoint with those in MXFP4 as they will be read; UserError where the two do not fit."""
    found = dict(tensors)
    for name, blocks in tensors.items():
        matrix = name.removesuffix(BLOCKS)
        if matrix == name or matrix.rpartition(".")[2] not in MATRICES:
            continue
        scales = tensors.get(f"{matrix}{SCALES}")
        shape = blocks.shape
        if scales is None or {blocks.dtype, scales.dtype} != {"U8"} or len(shape) != 4 or scales.shape != shape[:3]:
            raise UserError(
                f"{source}: {name} is no matrix in MXFP4 with scales of its own beside it; copy the whole model anew"
            )
        del found[name], found[f"{matrix}{SCALES}"]
        experts, outputs, groups, size = shape
        found[matrix] = TensorShape(dtype="BF16", shape=(experts, 2 * groups * size, outputs))
    return found


class _Dequantize(ConversionOps):
    """16-bit weights of a matrix's blocks and scales, which come in the type of the model: whole numbers up to 255."""

    # As transformers' own operations are, and are called.
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """The matrix, under its name in the model."""
        parts = {
            name.rpartition("_")[2]: each[0] if isinstance(each, list) else each for name, each in input_dict.items()
        }
        blocks, scales = parts["blocks"], parts["scales"]
        experts, outputs, groups, size = blocks.shape
        matrix = torch.empty(experts, 2 * groups * size, outputs, dtype=torch.bfloat16, device=blocks.device)
        for number in range(experts):
            own = slice(number, number + 1)
            matrix[own] = convert_moe_packed_tensors(blocks[own], scales[own], dtype=matrix.dtype)
        return {full_layer_name: matrix}


def conversions() -> list[WeightConverter]:
    """What makes 16-bit weights of such tensors, where a checkpoint has any."""
    return [
        WeightConverter([f"{name}{BLOCKS}", f"{name}{SCALES}"], [name], operations=[_Dequantize()]) for name in MATRICES
    ]
