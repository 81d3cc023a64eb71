"""What kind of card there is: kernels are cut up for its generation, which is never tuned while a job runs."""

from __future__ import annotations

from functools import cache

import torch

HOPPER = 9
"""NVIDIA's major compute capability: H100, H200."""


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a card of that generation."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
