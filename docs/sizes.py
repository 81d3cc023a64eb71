"""The page of GPU classes and of what fits them, from the code that admits jobs."""

from __future__ import annotations

from benchmarks.architectures import config
from orchestrator.api.data_sheets import DATA_SHEETS
from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.hardware import CLASS_NAMES, GIB, GpuClass, classify, gpu_class
from orchestrator.sizing.plan_search import choose_plan

MODELS = {
    "Llama 3.2 1B": "llama-3.2-1b",
    "Phi-3 mini 3.8B": "phi-3-mini-3.8b",
    "Qwen2.5 7B": "qwen2.5-7b",
    "Llama 3.1 8B": "llama-3.1-8b",
    "Llama 2 13B": "llama-2-13b",
    "Phi-4 14B": "phi-4-14b",
    "Mistral Small 24B": "mistral-small-24b",
    "Qwen3 30B-A3B": "qwen3-30b-a3b",
    "Qwen2.5 32B": "qwen2.5-32b",
    "Mixtral 8x7B": "mixtral-8x7b",
    "Llama 3.1 70B": "llama-3.1-70b",
}
"""Shapes of `benchmarks.architectures` by the models' own names."""
LENGTHS = tuple(1 << exponent for exponent in range(9, 17))
"""Tokens of a row that are asked for: 512 to 65,536."""
PAGE = """# GPU classes, and what fits

A class stands for all cards that keep its promise: what PyTorch's allocator can have on the smallest of them.
`spec.resources.gpuClasses` names classes, `spec.resources.vram` asks in what cards are sold as; without either a job
gets the smallest class that fits, of those that are here.

| class | sold as | usable | cards |
|---|---|---|---|
{classes}

Cards without bfloat16 (V100, T4, GeForce before the 3000s) are in no class, whatever their memory: jobs do not train on
them, and the service says so of a node that has some. Nor is a card in one that has no memory of its own (GB10), unless
a [class of your own](../operators/gpu-classes.md) names it. Where nobody tells what the cards of a class are, times are
for the slowest of it, and `qlora plan` calls them a guess.

## The longest row that fits

Tokens a row, as predicted for the defaults (rank 16 on all linear layers): powers of two up to 65,536, whatever the
model itself was made for. A dash: not even 512. Of long rows a part waits in host memory. A star: with layers of the
model streamed from host memory ([how](../memory.md)), where no larger class is allowed. `qlora plan` tells what holds
for your job; what was measured is in [performance](../performance.md) and [memory](../memory.md).

| model | {names} |
|---|{rule}
{rows}
"""


def page() -> str:
    """The page as Markdown."""
    classes = [gpu_class(name, capacity=1) for name in CLASS_NAMES]
    return PAGE.format(
        classes="\n".join(_class_row(each) for each in classes),
        names=" | ".join(f"`{each.name}`" for each in classes),
        rule="---:|" * len(classes),
        rows="\n".join(_model_row(name, shape, classes) for name, shape in MODELS.items()),
    )


def longest(facts: ModelFacts, gpu_class: GpuClass) -> int | None:
    """The longest row of LENGTHS that a class takes, in tokens; None where it takes none."""
    low, high = 0, len(LENGTHS)  # what is below `low` fits, and nothing from `high` on
    while low < high:
        middle = (low + high) // 2
        if choose_plan(_spec(LENGTHS[middle]), facts, gpu_class) is None:
            high = middle
        else:
            low = middle + 1
    return LENGTHS[low - 1] if low else None


def _class_row(gpu_class: GpuClass) -> str:
    cards = [
        name
        for name, sheet in DATA_SHEETS.items()
        if sheet.tflops is not None and classify(sheet.total_mib) == gpu_class.name
    ]
    usable = f"{gpu_class.usable_bytes / GIB:.1f} GiB"
    return f"| `{gpu_class.name}` | {gpu_class.marketed_gib} GB | {usable} | {', '.join(cards) or 'slices (MIG)'} |"


def _model_row(name: str, shape: str, classes: list[GpuClass]) -> str:
    facts = ModelFacts.from_config(config(shape), "main")
    return f"| {name} | {' | '.join(_length_words(facts, each) for each in classes)} |"


def _length_words(facts: ModelFacts, gpu_class: GpuClass) -> str:
    length = longest(facts, gpu_class)
    if length is None:
        return "-"
    plan = choose_plan(_spec(length), facts, gpu_class)
    return f"{length:,}*" if plan is not None and plan.streamed_layers else f"{length:,}"


def _spec(sequence_length: int) -> QLoRAJobSpec:
    return QLoRAJobSpec(
        model=ModelSource(source="file:///model"),
        dataset=DatasetSource(source="file:///data.jsonl"),
        training=TrainingSpec(sequence_length=sequence_length),
    )
