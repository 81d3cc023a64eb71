"""How long the controller takes to choose plan and class for a job that it has not seen before.

    python -m benchmarks.planning [--repetitions 20] [--save planning]

Every architecture of `benchmarks.architectures` asks with a fresh spec (another rank) each time, against the seven GPU
classes of whole cards: nothing of an earlier answer can be used but what depends on the model alone. A spec's time is
that of `orchestrator.sizing.plan_search.candidates`, after one question that loads tables and modules: on the clock,
and of the processor, which does not count what other processes of the machine took in between.
"""

from __future__ import annotations

import gc
import random
import time
from statistics import median, quantiles

from benchmarks.architectures import CONFIGS, config
from benchmarks.report import argument_parser, emit
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.hardware import CLASS_NAMES, gpu_class
from orchestrator.sizing.plan_search import candidates

SEQUENCES = (512, 2048, 8192)
SLICES = ("10Gi", "20Gi")
CLASSES = tuple(gpu_class(name, capacity=1) for name in CLASS_NAMES if name not in SLICES)


def main() -> None:
    """Ask, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    emit(measure(arguments.repetitions), save=arguments.save)


def measure(repetitions: int) -> dict[str, object]:
    """Milliseconds by architecture, and over all."""
    facts = {name: ModelFacts.from_config(config(name), "main") for name in CONFIGS}
    for of_model in facts.values():
        candidates(make_spec(rank=1, sequence_length=1024), of_model, CLASSES)
    gc.collect()
    gc.freeze()
    questions = [(name, rank, length) for name in facts for rank in range(2, repetitions + 2) for length in SEQUENCES]
    random.Random(0).shuffle(questions)
    clock: dict[str, list[float]] = {name: [] for name in facts}
    processor: dict[str, list[float]] = {name: [] for name in facts}
    for name, rank, length in questions:
        spec = make_spec(rank=rank, sequence_length=length)
        began, began_processor = time.perf_counter(), time.process_time()
        candidates(spec, facts[name], CLASSES)
        processor[name].append(1000 * (time.process_time() - began_processor))
        clock[name].append(1000 * (time.perf_counter() - began))
    return {
        "classes": len(CLASSES),
        "specs": len(questions),
        "clock": summary([each for of_model in clock.values() for each in of_model]),
        "processor": summary([each for of_model in processor.values() for each in of_model]),
        "processor_by_architecture": {name: summary(of_model) for name, of_model in processor.items()},
    }


def summary(milliseconds: list[float]) -> dict[str, float]:
    """The middle and the end of a distribution."""
    return {
        "p50_ms": round(median(milliseconds), 2),
        "p99_ms": round(quantiles(milliseconds, n=100, method="inclusive")[98], 2),
    }


def make_spec(*, rank: int, sequence_length: int) -> QLoRAJobSpec:
    """The defaults but for these."""
    return QLoRAJobSpec(
        model=ModelSource(source="file:///model"),
        dataset=DatasetSource(source="file:///data.jsonl"),
        adapter=AdapterSpec(rank=rank),
        training=TrainingSpec(sequence_length=sequence_length),
    )


if __name__ == "__main__":
    main()
