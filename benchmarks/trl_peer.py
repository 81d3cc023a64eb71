"""TRL's training run on preferences, of a model that PEFT or unsloth adapts: timed from step to step by a callback.

Settings are those of TRL's documentation for QLoRA: the base in NF4 is loaded as it is, `peft_config` is handed to
`DPOTrainer`, which then takes the base without the adapter for its reference, and checkpoints all layers. It asks the
reference in each step; in a case that is `remembered`, before the first (`precompute_ref_log_probs`). Rows are handed
over as token ids, which spares the tokenizer, and come in their order.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import GIB, Case, measured, peaks, start_afresh
from benchmarks.pairs import ADAPTER_FILE, BETA, COMPARED_STEPS, pairs
from benchmarks.recipe import MAX_GRAD_NORM, Clock

MARGIN = "rewards/margins"


class Preferences:
    """A checkpoint that is loaded and trained anew for every case."""

    def __init__(self, folder: Path, scratch: Path, load: Callable[[Path], tuple[Any, LoraConfig | None]]) -> None:
        """`load` gives the model of a folder, and what adapter it is to have unless it has one."""
        self._folder, self._scratch, self._load = folder, scratch, load

    def measure(self, text: str, settings: Namespace) -> dict[str, Any]:
        """The figures of a case: all layers recompute unless it ends in `/0`, and then none does."""
        start_afresh([])
        before_gib = round(torch.cuda.memory_allocated() / GIB, 3) if torch.cuda.is_available() else 0.0
        case, clock = Case.parse(text), Clock()
        model, adapter = self._load(self._folder)
        trainer = _trainer_kind()(
            model=model,
            args=self._arguments(case, settings, recompute=not text.endswith("/0")),
            train_dataset=_rows(case, model.config.vocab_size),
            processing_class=AutoTokenizer.from_pretrained(self._folder, local_files_only=True),
            peft_config=adapter,
            callbacks=[clock],
        )
        begin_with(trainer.model, load_file(self._scratch / ADAPTER_FILE))
        trainer.train()
        first = clock.logs[:COMPARED_STEPS]
        return {
            **measured(case, iter(clock.seconds).__next__, settings),
            "losses": [each["loss"] for each in first],
            "margins": [each[MARGIN] for each in first],
            "left_by_case_before_gib": before_gib,
            **peaks(),
        }

    def _arguments(self, case: Case, settings: Namespace, *, recompute: bool) -> Any:
        return trl.DPOConfig(
            output_dir=str(self._scratch / "output"),
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=1,
            max_steps=settings.warm_up + settings.steps * settings.repetitions,
            max_length=case.sequence // 2,
            beta=BETA,
            precompute_ref_log_probs=case.remembered,
            gradient_checkpointing=recompute,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            optim="paged_adamw_8bit",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
        )


def load_nf4(folder: Path) -> tuple[Any, LoraConfig]:
    """A checkpoint in NF4 as transformers loads it, and the adapter of PEFT's documentation."""
    place = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=place, local_files_only=True, attn_implementation="sdpa"
    )
    return model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def begin_with(model: torch.nn.Module, adapter: dict[str, torch.Tensor]) -> None:
    """Take this adapter for the one that trains."""
    own = {name.replace(".default.", "."): each for name, each in model.named_parameters() if ".default." in name}
    assert own.keys() == adapter.keys(), f"another adapter trains: {sorted(own.keys() ^ adapter.keys())[:3]}"
    for name, parameter in own.items():
        parameter.data.copy_(adapter[name])


def _rows(case: Case, vocabulary: int) -> Dataset:
    found = pairs(case, vocabulary)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({name: [pair[index].tolist() for pair in found] for index, name in enumerate(names)})


def _trainer_kind() -> Any:
    """TRL's trainer, which unsloth has replaced by then where it is measured."""

    class Trainer(trl.DPOTrainer):
        """Has token ids, and keeps them in their order."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    return Trainer
