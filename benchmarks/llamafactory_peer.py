"""LLaMA-Factory, measured as its users have it: its own training run, timed from step to step by a callback.

It needs a process of its own. Its settings are those of its QLoRA examples with what its documentation has for speed:
Liger's kernels, and rows that are full. It is told not to check versions: it knows transformers up to 5.6 and PEFT up
to 0.20.
"""

from __future__ import annotations

import os
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(DISABLE_VERSION_CHECK="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from datasets import Dataset
from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports] - measured where it is installed
from transformers import AutoConfig

from benchmarks.cases import GIB, Case, cap_memory, measured, peaks, start_afresh
from benchmarks.recipe import MAX_GRAD_NORM, Clock


class LlamaFactory:
    """A checkpoint that is loaded and trained anew for every case."""

    def __init__(self, folder: Path, scratch: Path, *, cap_gib: float, rank: int = 16) -> None:
        cap_memory(cap_gib)
        self._folder = folder
        self._scratch = scratch
        self._rank = rank

    def measure(self, text: str, settings: Namespace) -> dict[str, Any]:
        """The figures of a case: all layers recompute unless it ends in `/0`, and then none does."""
        start_afresh([])
        before_gib = round(torch.cuda.memory_allocated() / GIB, 3) if torch.cuda.is_available() else 0.0
        case = Case.parse(text)
        clock = Clock()
        steps = settings.warm_up + settings.steps * settings.repetitions
        run_exp({**self._arguments(case, steps), "disable_gradient_checkpointing": text.endswith("/0")}, [clock])
        figures = measured(case, iter(clock.seconds).__next__, settings)
        return {**figures, "loss": round(clock.logs[-1]["loss"], 4), "left_by_case_before_gib": before_gib, **peaks()}

    def _arguments(self, case: Case, steps: int) -> dict[str, Any]:
        on_card = torch.cuda.is_available()
        return {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(self._folder),
            "template": "default",
            "dataset": "rows",
            "tokenized_path": str(self._rows(case, steps)),
            "cutoff_len": case.sequence,
            "disable_shuffling": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": self._rank,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "bf16": True,
            "use_cpu": not on_card,
            "flash_attn": "sdpa",
            "enable_liger_kernel": on_card,
            "optim": "paged_adamw_8bit",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "per_device_train_batch_size": case.micro_batch,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "logging_steps": 1,
            "log_level": "warning",
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "output_dir": str(self._scratch / "output"),
            "overwrite_output_dir": True,
        }

    def _rows(self, case: Case, steps: int) -> Path:
        """Everybody's rows as a data set that has been tokenized."""
        path = self._scratch / f"rows-{case.sequence}x{case.micro_batch}"
        if not path.exists():
            vocabulary = AutoConfig.from_pretrained(self._folder, local_files_only=True).vocab_size
            ids = np.concatenate(list(islice(case.rows(vocabulary), steps)))
            Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}).save_to_disk(path)
        return path
