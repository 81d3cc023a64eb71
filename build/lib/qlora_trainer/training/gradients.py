"""The adapter's gradients, all of them together: their norm, and clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_torch: Any = torch  # Any: the functions over lists of tensors that torch's own optimizers use are not in its stubs


def gradient_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The norm of all gradients together, in float32: bfloat16 would round it to three digits."""
    return _torch.linalg.vector_norm(torch.stack(_torch._foreach_norm(_gradients(parameters), 2, torch.float32)))


def clip(parameters: list[torch.nn.Parameter], norm: float, largest_norm: float) -> None:
    """Scale all gradients down to the largest norm, if they exceed it (Pascanu et al., 2013).

    torch's own takes a tensor for the norm, which costs a launch for every parameter.
    """
    if norm > largest_norm:
        _torch._foreach_mul_(_gradients(parameters), largest_norm / norm)


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
