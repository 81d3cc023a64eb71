"""The generation of the card, by which kernels choose their tiles; nothing is tuned while a job runs."""

from __future__ import annotations

from functools import cache

import torch

HOPPER = 9
"""NVIDIA's major compute capability: H100, H200."""


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is an H100 or H200."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
