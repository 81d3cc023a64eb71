"""A fact that the trainer and the sizing share is changed in one place, and both follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from qlora_trainer.data.micro_batch import MicroBatch, collate
from qlora_trainer.kernels import takeover, tiled_attention
from qlora_trainer.model.cuda_graphs import CudaGraphs
from qlora_trainer.training import telemetry

from orchestrator.api import data_sheets, trainer_facts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing.footprint import footprint, peak_bytes
from orchestrator.sizing.hardware import find_card
from orchestrator.sizing.memory.attention import Attention
from orchestrator.sizing.step_time import StepTime, Work
from tests.builders import LLAMA_3_8B, make_spec

TOKENS = 1024


def batch() -> MicroBatch:
    ids = np.zeros(TOKENS, dtype=np.int32)
    return collate([(ids, ids, np.arange(TOKENS, dtype=np.int32))])


def training_bytes() -> int:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=1024)
    return peak_bytes(make_spec(sequence_length=TOKENS), LLAMA_3_8B, plan)


def step_seconds() -> float:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0, loss_chunk_tokens=1024)
    card = find_card("H200")
    assert card is not None
    return StepTime(make_spec(sequence_length=TOKENS), LLAMA_3_8B, Work()).step_seconds(plan, card)


def attention() -> Attention:
    return Attention(
        tokens=TOKENS,
        records=1,
        most_records=1,
        query_heads=4,
        key_heads=2,
        head_size=256,
        deterministic=True,
        multiprocessors=132,
        softcaps=True,
    )


def cublas_bytes() -> int:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0)
    return next(item.bytes for item in footprint(make_spec(), LLAMA_3_8B, plan) if item.name.startswith("cuBLAS"))


def score_tiles() -> int:
    options = tiled_attention.ScoreOptions(scaling=1.0, window=None, softcap=None)
    return len(list(tiled_attention._score_tiles(torch.zeros(4, TOKENS, 8), options)))


SHARED: Iterable[tuple[str, object, Callable[[], object], Callable[[], object]]] = [
    ("CUDA_GRAPH_TOKENS", TOKENS - 1, lambda: CudaGraphs.takes(batch()), training_bytes),
    ("CUDA_GRAPH_TOKENS", TOKENS - 1, lambda: CudaGraphs.takes(batch()), step_seconds),
    ("SCORES_BYTES", 1 << 20, score_tiles, lambda: attention().traced_workspace_bytes),
    ("CUBLAS_WORKSPACE_BYTES", 16 << 20, trainer_facts.cublas_workspace_config, cublas_bytes),
]


# Their places tell them apart: a function's own name would hold its address, which differs from process to process.
@pytest.mark.parametrize(
    ("name", "value", "trainer", "sizing"), SHARED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(SHARED)]
)
def test_both_sides_follow(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: object,
    trainer: Callable[[], object],
    sizing: Callable[[], object],
) -> None:
    before = trainer(), sizing()
    monkeypatch.setattr(trainer_facts, name, value)
    assert trainer() != before[0]
    assert sizing() != before[1]


def test_the_types_that_are_said_to_be_written_by_hand_are_those_of_the_registry() -> None:
    configs = [layer.__init__.__annotations__["config"] for layer in takeover.WINDOWS]
    assert {config.model_type for config in configs} == trainer_facts.HANDWRITTEN_TYPES


@pytest.mark.parametrize("name", data_sheets.DATA_SHEETS)
def test_utilization_is_told_against_the_peak_that_times_are_predicted_with(name: str) -> None:
    card, utilization = find_card(name), telemetry.Utilization.of(f"NVIDIA {name}", 1e15, 1.0)
    if card is None or utilization is None:
        assert name in ("V100", "T4")
        assert card is None
        assert utilization is None
    else:
        assert utilization.sustained == pytest.approx(1000 / card.matmul_tflops)


def test_utilization_of_a_hopper_is_told_against_its_data_sheet_with_the_sustained_figure_beside_it() -> None:
    found = telemetry.Utilization.of("NVIDIA H100 80GB HBM3", 0.604 * 790e12, 1.0)
    assert found is not None
    assert found.rounded() == {"mfu": 0.4825, "mfu_sustained": 0.604}
    assert telemetry.Utilization.of("something new", 1e15, 1.0) is None
