"""How far memory estimators are off, ours and others', over the same measured rows.

    python -m benchmarks.estimators [--rows benchmarks/results/sizing_rows.jsonl] [--save estimators]

The rows are those of `benchmarks.sizing`: QLoRA jobs of this trainer with the peak of PyTorch's allocator. An error is
predicted over measured, less one; below zero a job would have run out of memory on a card of the predicted size.

- ours: `orchestrator.sizing.footprint`, with and without its margin.
- fitcheck-llm (`pip install fitcheck-llm`, else left out): its own `estimate`, without the item for the CUDA context,
  which is not in the allocator. It knows of gradient checkpointing on or off, so only rows that recompute all layers
  or none, offload nothing, and target what it can name are given to it.
- accelerate estimate-memory: the `int4` total, 4 bits for every parameter, and the same with the 20 % that its guide
  adds for what comes on top; it gives no figure for training in 4 bits.
- bytes a parameter: half a byte for each frozen one and 18 for each trained one (transformers, "Model training
  anatomy": AdamW with mixed precision); activations are not in it.
- unsloth's table of least VRAM by model size (its documentation, "Unsloth Requirements"), between its lines in
  proportion; for whole models alone.

The others estimate other trainers, so this says what somebody who plans a job of ours by them would meet, not how good
they are at their own.
"""

from __future__ import annotations

import importlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.report import RESULTS, argument_parser, emit
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.layer_trace import ModelTrace
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MARGIN_ITEMS, MemoryPlan
from orchestrator.sizing.footprint import Footprint, adapter_parameters
from orchestrator.sizing.memory.linear_layers import linears

ROWS = RESULTS / "sizing_rows.jsonl"
QLORA_PARTS = ("cut", "whole", "untabled", "long", "streamed", "offloaded")
MIB, GIB = 1 << 20, 1 << 30
GB = 10**9
UNSLOTH_LEAST_GB = {3: 3.5, 7: 5, 8: 6, 9: 6.5, 11: 7.5, 14: 8.5, 27: 22, 32: 26, 40: 30, 70: 41, 81: 48, 90: 53}
"""VRAM by billions of parameters, QLoRA in 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A measured job."""

    model: str
    part: str
    facts: ModelFacts
    spec: QLoRAJobSpec
    plan: MemoryPlan
    records: int
    evaluates: bool
    multiprocessors: int
    measured_bytes: int
    reserved_bytes: int
    card_bytes: float
    """All of its card, or what the allocator may have of that: where it runs full, pages that hold nothing go first."""

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Row | None:
        """A line of the file; None where the job did not run to its end, or was no QLoRA job of ours."""
        if raw["part"] not in QLORA_PARTS or "step_seconds" not in raw or not raw.get("peak_allocated_bytes"):
            return None
        training = TrainingSpec.model_validate(raw["training"])
        return cls(
            model=raw["model"],
            part=raw["part"],
            facts=ModelFacts.from_config(raw["config"], "main").model_copy(update={"trace": _trace(raw)}),
            spec=QLoRAJobSpec(
                model=ModelSource(source="file:///model"),
                dataset=DatasetSource(
                    source="file:///data.jsonl",
                    format="messages" if training.objective.type == "sft" else "preference",
                ),
                adapter=AdapterSpec.model_validate(raw["adapter"]),
                training=training,
            ),
            plan=MemoryPlan.model_validate(raw["plan"]),
            records=raw["records"],
            evaluates=raw["evaluation"],
            multiprocessors=raw["multiprocessors"],
            measured_bytes=raw["peak_allocated_bytes"],
            reserved_bytes=raw["peak_reserved_bytes"],
            card_bytes=GIB * (raw.get("cap_gib") or _card_gib(raw.get("card", ""))),
        )

    def footprint(self) -> Footprint:
        """What the job takes, by our model, from the adapter on: that is when the row's peak was begun to be taken."""
        return Footprint(
            self.spec,
            self.facts,
            self.plan,
            multiprocessors=self.multiprocessors,
            records=self.records * self.plan.micro_batch_size,
            loaded=True,
        )

    @property
    def parameters(self) -> int:
        """Parameters of the base model."""
        facts = self.facts
        tables = 1 if facts.tied_embeddings else 2
        layers = facts.num_layers * sum(linear.parameters for linear in linears(facts))
        return layers + tables * facts.vocab_size * facts.hidden_size


Estimator = Callable[[Row], float | None]
"""Bytes, or None where it has no answer."""


def main() -> None:
    """Compare, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    arguments = parser.parse_args()
    emit(compare(list(read_rows(arguments.rows))), save=arguments.save)


def _card_gib(card: str) -> float:
    """Of a card as `benchmarks.report` describes it, `name (n GiB)`; any number where it does not tell."""
    found = re.search(r"\(([\d.]+) GiB\)$", card)
    return inf if found is None else float(found[1])


def _trace(raw: dict[str, Any]) -> ModelTrace | None:
    trace = raw.get("trace")
    return None if trace is None else ModelTrace.model_validate(trace)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows that can be compared."""
    for line in path.read_text().splitlines():
        row = Row.read(json.loads(line))
        if row is not None:
            yield row


def compare(rows: list[Row]) -> dict[str, object]:
    """The errors of every estimator that is here."""
    return {
        "rows": len(rows),
        "models": sorted({row.model for row in rows}),
        "estimators": {name: errors(estimator, rows) for name, estimator in estimators().items()},
    }


def errors(estimator: Estimator, rows: Iterable[Row]) -> dict[str, object]:
    """One estimator's errors, in per cent of the measured peak."""
    found: list[tuple[float, str]] = []
    for row in rows:
        predicted = estimator(row)
        if predicted is not None:
            found.append((100 * (predicted / row.measured_bytes - 1), row.model))
    if not found:
        return {"rows": 0}
    percents = [percent for percent, _ in found]
    return {
        "rows": len(found),
        "mean_error": round(mean(abs(percent) for percent in percents), 2),
        "median_error": round(median(abs(percent) for percent in percents), 2),
        "least": round(min(percents), 2),
        "least_of": min(found)[1],
        "most": round(max(percents), 2),
        "most_of": max(found)[1],
        "too_small": sum(percent < 0 for percent in percents),
    }


def estimators() -> dict[str, Estimator]:
    """All of them by name."""
    found: dict[str, Estimator] = {
        "ours": lambda row: ours(row, margin=True),
        "ours, without the margin": lambda row: ours(row, margin=False),
        "accelerate estimate-memory, int4": lambda row: row.parameters / 2,
        "accelerate estimate-memory, int4 and 20 %": lambda row: 1.2 * row.parameters / 2,
        "bytes a parameter": bytes_a_parameter,
        "unsloth's table": unsloth_table,
    }
    return found | fitcheck()


def ours(row: Row, *, margin: bool) -> float:
    """What the controller would size the job with."""
    items = row.footprint().items(row.plan.recompute_layers)
    return float(sum(item.bytes for item in items if margin or item.name not in MARGIN_ITEMS))


def bytes_a_parameter(row: Row) -> float:
    """Half a byte for each frozen parameter, 18 for each trained one."""
    return row.parameters / 2 + 18 * adapter_parameters(row.spec.adapter, row.facts)


def unsloth_table(row: Row) -> float | None:
    """The table's figure, between its lines in proportion; there is none below its first line and above its last."""
    billions, sizes = row.parameters / 1e9, sorted(UNSLOTH_LEAST_GB)
    if row.part != "whole" or not sizes[0] <= billions <= sizes[-1]:
        return None
    above = sizes[max(1, bisect_left(sizes, billions))]
    below = sizes[sizes.index(above) - 1]
    least, most = UNSLOTH_LEAST_GB[below], UNSLOTH_LEAST_GB[above]
    return GB * (least + (most - least) * (billions - below) / (above - below))


def fitcheck() -> dict[str, Estimator]:
    """fitcheck-llm, if it is installed."""
    try:
        package: Any = importlib.import_module("fitcheck")
    except ImportError:
        return {}
    return {f"fitcheck-llm {package.__version__}": lambda row: fitcheck_bytes(package, row)}


def fitcheck_bytes(package: Any, row: Row) -> float | None:
    """Its answer to a job that it can describe."""
    every = row.plan.recompute_layers >= row.facts.num_layers
    names = {linear.name for linear in linears(row.facts)}
    targets = row.spec.adapter.target_modules
    wanted = sorted(names) if targets == "all-linear" else list(targets)
    if row.plan.offload or row.spec.adapter.use_dora or not (every or row.plan.recompute_layers == 0):
        return None
    optimizer = row.spec.training.optimizer
    try:
        report = package.estimate(
            package.ModelConfig(
                name=row.model,
                num_params=row.parameters,
                hidden_size=row.facts.hidden_size,
                num_layers=row.facts.num_layers,
                num_attention_heads=row.facts.num_attention_heads,
                num_kv_heads=row.facts.num_key_value_heads,
                intermediate_size=row.facts.intermediate_size,
                vocab_size=row.facts.vocab_size,
                head_dim=row.facts.head_dim,
                tie_word_embeddings=row.facts.tied_embeddings,
            ),
            package.TrainingConfig(
                precision="bf16",
                quantization="nf4",
                double_quant=True,
                optimizer="adamw-8bit" if optimizer.endswith("8bit") else "adamw",
                batch_size=row.plan.micro_batch_size,
                seq_len=row.spec.training.sequence_length,
                lora_rank=row.spec.adapter.rank,
                lora_targets=wanted,
                grad_checkpoint=every,
                flash_attn=True,
                grad_accum_steps=row.plan.accumulation_steps,
            ),
            package.get_gpu("h200"),
        )
    except ValueError:
        return None  # an architecture or target that it does not know
    return (report.total_mib - report.overhead_mib) * MIB


if __name__ == "__main__":
    main()
