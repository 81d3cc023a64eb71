"""unsloth, measured as its users have it: its loader, its adapter, its checkpointing, an ordinary training step.

It needs a process of its own: it changes torch, transformers and PEFT for the whole process. It is not a dependency
(parts of it are AGPL and LGPL): it is measured, never bundled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
os.environ.setdefault("UNSLOTH_DISABLE_AUTO_UPDATES", "1")

# Before anything that loads torch, whose allocator it configures, or transformers, which it changes.
import unsloth  # isort: skip  # pyright: ignore[reportMissingImports] - measured where it is installed

import torch

from benchmarks.nf4_checkpoint import graft
from benchmarks.recipe import Peer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = "unsloth"
"""Its own: every layer recomputes, and what a layer starts from waits in host memory."""


class Unsloth(Peer):
    """A checkpoint as unsloth loads and prepares it."""

    def __init__(self, folder: Path, *, layers: int, longest: int, rank: int = 16) -> None:
        """`layers` are grown from what is loaded; `longest` is the longest sequence that will come."""
        super().__init__(load(folder, layers=layers, longest=longest, rank=rank))
        self._recomputes = True

    def set_recompute(self, wanted: bool) -> None:
        """Left as it was set up, unless something else is wanted."""
        if wanted != self._recomputes:
            self.model.for_training(use_gradient_checkpointing=CHECKPOINTING if wanted else False)
            self._recomputes = wanted


def load(folder: Path, *, layers: int, longest: int, rank: int = 16) -> Any:
    """A checkpoint with its adapter, grown to so many layers."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    graft(model, layers)
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=MODULES,
        use_gradient_checkpointing=CHECKPOINTING,
        random_state=0,
    )
