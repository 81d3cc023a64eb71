"""The trainer's steps on preferences: its own objective, reference and sizing (`benchmarks.pairs` has the rows).

A step asks the reference, as each step of a first epoch does, unless its case says that the answers are `remembered`.
`chosen` in a case stands for the plan that the controller would choose for so many pairs a step on a card of 24 GB.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from peft import PeftModel
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows, micro_batches
from qlora_trainer.kernels.flash_attention import has_kernels_for
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.training.objectives.dpo import TRAIN, DirectPreference
from qlora_trainer.training.objectives.reference import Reference

from benchmarks.cases import GIB, Case
from benchmarks.estimators import Row, ours
from benchmarks.pairs import BETA, COMPARED_STEPS, MICRO_BATCHES, Pair, pairs
from benchmarks.report import circumstances, class_here
from benchmarks.shapes import config_of
from benchmarks.speed import Bench, Steps
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, ObjectiveSpec, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.plan_search import choose_plan

CLASS = "24Gi"
RECORDS = 2
"""Of a row: both answers, each with its prompt."""
CHOSEN = "chosen"
LOSS, MARGIN = (DirectPreference.figures.index(name) for name in ("loss", "rewards/margins"))


class PairSteps(Steps):
    """Optimizer steps on preferences, as the loop makes them."""

    def __init__(self, peft_model: PeftModel, attention: PackedAttention, case: Case, vocabulary: int) -> None:
        super().__init__(peft_model, attention, case, vocabulary)
        self._plan = case.plan()
        self._rows_in_memory = prepared(pairs(case, vocabulary))
        self._known = self._asked() if case.remembered else None
        self._objective = self._new_objective()
        self._figures: list[torch.Tensor] = []

    def batches(self) -> Sequence[MicroBatch]:
        """Those of the next step; what the reference said is forgotten, unless it is to be remembered."""
        self._objective = self._new_objective()
        return self._batches_of(self._number)

    def accumulate(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The loss, a mean over pairs; gradients are added."""
        parts = [
            self._objective.accumulate(batch, divisor=float(self._case.micro_batch), between=lambda: None).clone()
            for batch in batches
        ]
        self._figures.append(torch.stack(parts).sum(0))
        return self._figures[-1][LOSS]

    def told(self) -> dict[str, object]:
        """Loss and margin of the first steps."""
        first = torch.stack(self._figures[:COMPARED_STEPS]).tolist()
        return {"losses": [each[LOSS] for each in first], "margins": [each[MARGIN] for each in first]}

    def _batches_of(self, step: int) -> list[MicroBatch]:
        first = step % MICRO_BATCHES * self._case.micro_batch
        rows = range(first, first + self._case.micro_batch)
        return list(micro_batches(self._rows_in_memory, rows, self._plan.micro_batch_size))

    def _new_objective(self) -> DirectPreference:
        memory = {} if self._known is None else {TRAIN: self._known}
        return DirectPreference(objective(), self._model, self._rows_in_memory, None, memory)

    def _asked(self) -> torch.Tensor:
        reference = Reference(self._model, self._rows_in_memory, None)
        for step in range(MICRO_BATCHES):
            for batch in self._batches_of(step):
                reference.log_probabilities(batch)
        return reference.values


def measure(bench: Bench, text: str, settings: Namespace) -> dict[str, object]:
    """The figures of a case, its prediction, and the row that reports on sizing read."""
    case = case_of(text, settings.shape)
    bench.begin_anew()
    found = bench.measure(case, settings, kind=PairSteps)
    return {**found, **sized(case, settings, found)}


def case_of(text: str, shape: str) -> Case:
    """A case, under the controller's own plan if it says so."""
    case = Case.parse(text)
    if CHOSEN not in text.split("+"):
        return case
    facts = ModelFacts.from_config(config_of(shape), "main")
    facts = facts.model_copy(update={"flash_attention": has_kernels_for(facts.head_dim)})
    plan = choose_plan(job(case), facts, class_here(CLASS))
    if plan is None:
        raise ValueError(f"{text}: no plan fits {CLASS}")
    return replace(case, own_plan=plan)


def objective() -> ObjectiveSpec:
    """Direct preference optimization as TRL has it unless it is told otherwise."""
    return ObjectiveSpec(type="dpo", beta=str(BETA))


def job(case: Case) -> QLoRAJobSpec:
    """What is measured, as a user would have it."""
    return QLoRAJobSpec(
        model=ModelSource(source="file:///model"),
        dataset=DatasetSource(source="file:///data.jsonl", format="preference"),
        adapter=AdapterSpec(rank=16, alpha=16, dropout="0"),
        training=TrainingSpec(
            objective=objective(),
            sequence_length=case.sequence,
            global_batch_size=case.micro_batch,
            optimizer="paged_adamw_8bit",
        ),
    )


def sized(case: Case, settings: Namespace, found: dict[str, Any]) -> dict[str, object]:
    """What the controller predicts for a measured case, and both in a line of `benchmarks.sizing`."""
    if "step_seconds" not in found or not torch.cuda.is_available():
        return {}
    spec = job(case)
    row = {
        "part": "whole",
        "model": settings.shape,
        "config": config_of(settings.shape),
        "adapter": spec.adapter.to_wire(),
        "training": spec.training.to_wire(),
        "plan": case.plan().to_wire(),
        "records": RECORDS,
        "evaluation": False,
        "cap_gib": settings.cap_gib,
        "fused": True,
        "separate": False,
        "step_seconds": found["step_seconds"],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        **circumstances(),
    }
    read = Row.read(row)
    assert read is not None, "it has all that a row must have"
    predicted = ours(read, margin=True)
    return {
        "predicted_gib": round(predicted / GIB, 3),
        "predicted_over_measured": round(predicted / read.measured_bytes, 4),
        "sizing_row": row,
    }


def prepared(found: Sequence[Pair]) -> PreparedRows:
    """Pairs as prepare would have written them, a row each."""
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "position_ids": []}
    for prompt, *answers in found:
        ignored = np.full(len(prompt), IGNORED_LABEL, dtype=np.int32)
        columns["input_ids"].append(np.concatenate([part for each in answers for part in (prompt, each)]))
        columns["labels"].append(np.concatenate([part for each in answers for part in (ignored, each)]))
        lengths = [len(prompt) + len(each) for each in answers]
        columns["position_ids"].append(np.concatenate([np.arange(each, dtype=np.int32) for each in lengths]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        parquet.write_table(pa.table({name: pa.array(rows) for name, rows in columns.items()}), path)
        return PreparedRows(path)
