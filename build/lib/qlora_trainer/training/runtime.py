"""The device that training runs on, and what makes it give the same bits every time.

It is set up before a model is loaded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

DEVICE_FILES = Path("/dev")

log = logging.getLogger(__name__)


def set_up(*, threads: int, deterministic: bool, device_files: Path = DEVICE_FILES) -> torch.device:
    """The GPU if there is one, else the CPU, with a fixed number of threads."""
    torch.set_num_threads(threads)  # the order of sums on the CPU depends on it
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    # What `use_deterministic_algorithms` does, without its import of torch's compiler.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.backends.cudnn.benchmark = False
    # Deterministic mode fills fresh memory to expose reads of it. Nothing here reads any, and it costs bandwidth.
    deterministic_settings: Any = torch.utils.deterministic  # Any: torch makes its attributes when it is loaded
    deterministic_settings.fill_uninitialized_memory = False
    # What bitsandbytes says when it is imported on a CPU, about kernels that it would like to download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = _device(device_files)
    log.info(
        "training on %s", torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} CPU threads"
    )
    return device


def _device(device_files: Path) -> torch.device:
    """The GPU, or the CPU where there is none. A GPU that does not come up is an error, not a reason for the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and any(device_files.glob("nvidia[0-9]*")):
        torch.cuda.init()  # raises what is wrong with it
    return torch.device("cpu")
