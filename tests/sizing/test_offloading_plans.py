"""When layers have what they keep in host memory: where that is faster than to compute it again, and there is room."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.architectures import config
from benchmarks.estimators import Row
from benchmarks.report import RESULTS
from benchmarks.sizing_report import error, reserved_error
from orchestrator.api.job import AdapterSpec, QLoRAJobSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.trainer_facts import MLP_TILE_TOKENS
from orchestrator.sizing import footprint
from orchestrator.sizing.footprint import Footprint, is_fused, offloaded_host_bytes, peak_bytes
from orchestrator.sizing.hardware import CLASS_NAMES, GIB, GpuClass, find_card, gpu_class
from orchestrator.sizing.plan_search import HOLES_AT_MOST, HOST_SHARE, choose_plan, fallback_plan, plans
from orchestrator.sizing.step_time import StepTime, Work, ordering_card
from tests.builders import LLAMA_3_70B, make_spec

A6000 = replace(gpu_class("48Gi", 1, ["RTX A6000"]), host_bytes=128 * GIB)
SPEC = make_spec(sequence_length=512, global_batch_size=16)
JOBS = 60
ROWS = [json.loads(line) for line in (RESULTS / "offloaded_rows.jsonl").read_text().splitlines()]
MODELS = ("llama-3.1-8b", "llama-2-13b", "qwen2.5-32b", "llama-3.1-70b", "mistral-7b", "qwen3-30b-a3b", "gemma-2-2b")


def chosen(offered: GpuClass, spec: QLoRAJobSpec = SPEC, facts: ModelFacts = LLAMA_3_70B) -> MemoryPlan:
    found = choose_plan(spec, facts, offered)
    assert found is not None
    return found


def seconds(plan: MemoryPlan, offered: GpuClass, spec: QLoRAJobSpec = SPEC, facts: ModelFacts = LLAMA_3_70B) -> float:
    return StepTime(spec, facts, Work()).step_seconds(plan, ordering_card(offered))


def test_on_a_card_that_is_slower_than_its_link_layers_are_offloaded_instead_of_computed_again() -> None:
    plan, without = chosen(A6000), chosen(replace(A6000, host_bytes=0))
    assert plan.offloaded_layers > 60
    assert (without.offloaded_layers, without.recompute_layers > 60) == (0, True)
    assert seconds(plan, A6000) < 0.85 * seconds(without, A6000)


@pytest.mark.parametrize("host_gib", [16, 32, 64, 256, None])
def test_activations_never_take_more_of_the_host_than_their_share(host_gib: int | None) -> None:
    offered = replace(A6000, host_bytes=None if host_gib is None else host_gib * GIB)
    plan = chosen(offered)
    taken = offloaded_host_bytes(SPEC, LLAMA_3_70B, plan)
    assert taken > 0
    assert host_gib is None or taken <= HOST_SHARE * host_gib * GIB


def test_where_the_link_is_too_slow_to_pay_nothing_is_offloaded() -> None:
    assert A6000.card is not None
    slow = replace(A6000, card=replace(A6000.card, host_gbps=0.5))
    assert chosen(slow).offloaded_layers == 0


def test_any_job_gets_a_plan_that_fits_and_is_no_slower_for_the_host_that_there_is() -> None:
    draw = random.Random(5)
    offloading = 0
    for _ in range(JOBS):
        facts = ModelFacts.from_config(config(draw.choice(MODELS)), "main")
        spec = make_spec(
            sequence_length=draw.choice([256, 1024, 4096, 16384]),
            global_batch_size=draw.choice([1, 4, 12, 16]),
            rank=draw.choice([8, 64]),
        )
        offered = replace(gpu_class(draw.choice(CLASS_NAMES[3:10]), 1), host_bytes=draw.choice([8, 40, 500]) * GIB)
        plan, without = choose_plan(spec, facts, offered), choose_plan(spec, facts, replace(offered, host_bytes=0))
        assert (plan is None) == (without is None)
        if plan is None or without is None:
            continue
        assert peak_bytes(spec, facts, plan) <= offered.usable_bytes
        assert offloaded_host_bytes(spec, facts, plan) <= HOST_SHARE * (offered.host_bytes or 0)
        assert seconds(plan, offered, spec, facts) <= seconds(without, offered, spec, facts)
        assert not plan.offloaded_layers or (is_fused(spec.adapter, facts) and not plan.streamed_layers)
        offloading += plan.offloaded_layers > 0
    assert offloading > JOBS // 10


@pytest.mark.parametrize(
    ("model", "sequence_length", "class_name"),
    [("llama-2-13b", 4096, "24Gi"), ("llama-3.1-8b", 8192, "24Gi"), ("qwen2.5-32b", 4096, "48Gi")],
)
@pytest.mark.parametrize("product", ["NVIDIA H200", "NVIDIA-A40", "NVIDIA-L40S"])
def test_no_other_number_of_offloaded_layers_is_much_faster(
    model: str, sequence_length: int, class_name: str, product: str
) -> None:
    """Against every number of layers, with as few others recomputed as fit, whatever the micro-batch."""
    facts = ModelFacts.from_config(config(model), "main")
    spec = make_spec(sequence_length=sequence_length, global_batch_size=4)
    offered = replace(gpu_class(class_name, 1, products=[product]), host_bytes=1000 * GIB)
    room = int(offered.usable_bytes / (1 + HOLES_AT_MOST))
    fastest = float("inf")
    for size in (1, 2, 4):
        for count in range(facts.num_layers):
            plan = MemoryPlan(
                micro_batch_size=size,
                accumulation_steps=4 // size,
                recompute_layers=0,
                offloaded_layers=count,
                offload=("embeddings",),
            )
            found = Footprint(spec, facts, plan).least_recompute(room)
            if found is not None:
                plan = plan.model_copy(update={"recompute_layers": found})
                fastest = min(fastest, seconds(plan, offered, spec, facts))
    plan = chosen(offered, spec, facts)
    assert seconds(plan, offered, spec, facts) <= 1.05 * fastest


def test_layers_that_the_trainer_does_not_compute_by_hand_are_never_offloaded() -> None:
    spec = SPEC.model_copy(update={"adapter": AdapterSpec(use_dora=True)})
    assert all(not plan.offloaded_layers for plan in plans(spec, LLAMA_3_70B, replace(A6000, usable_bytes=60 * GIB)))


def test_the_more_layers_are_offloaded_the_less_is_on_the_card_down_to_two() -> None:
    plan = MemoryPlan(micro_batch_size=4, accumulation_steps=4, recompute_layers=0, offload=("embeddings",))
    peaks: list[int] = []
    for count in range(0, 82, 3):
        found = Footprint(SPEC, LLAMA_3_70B, plan.model_copy(update={"offloaded_layers": count}))
        peaks.append(found.peak_bytes(0))
        kept = found.kept_layer_bytes
    assert max(after - before for before, after in pairwise(peaks)) < 0.1 * kept  # all but steadily
    assert peaks[0] - peaks[-1] == pytest.approx(78 * kept, rel=0.02)  # with the margin
    recomputing = Footprint(SPEC, LLAMA_3_70B, plan.model_copy(update={"offloaded_layers": 30}))
    assert recomputing.peak_bytes(80) == Footprint(SPEC, LLAMA_3_70B, plan).peak_bytes(80)


def test_no_layer_but_those_that_are_asked_about_has_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the walk through all layers, of plans of any kind."""
    draw = random.Random(7)
    drawn: list[tuple[QLoRAJobSpec, ModelFacts, MemoryPlan, int]] = []
    for _ in range(JOBS):
        facts = ModelFacts.from_config(config(draw.choice(MODELS)), "main")
        facts = facts.model_copy(update={"num_layers": draw.choice([2, 3, 7, facts.num_layers])})
        spec = make_spec(sequence_length=draw.choice([256, 8192]), rank=draw.choice([8, 256]))
        plan = MemoryPlan(
            micro_batch_size=draw.choice([1, 4]),
            accumulation_steps=draw.choice([1, 4]),
            recompute_layers=0,
            keep_attention=draw.random() < 0.5,
            offload=draw.choice([(), ("activations",), ("embeddings",)]),
            offloaded_layers=draw.randint(0, facts.num_layers),
        )
        drawn.append((spec, facts, plan, draw.randint(0, facts.num_layers)))
    found = [Footprint(spec, facts, plan).peak_bytes(recomputing) for spec, facts, plan, recomputing in drawn]
    monkeypatch.setattr(footprint, "_turning_points", lambda ways: tuple(range(ways.layers)))
    assert found == [Footprint(spec, facts, plan).peak_bytes(recomputing) for spec, facts, plan, recomputing in drawn]


def test_bytes_and_seconds_are_the_measured_ones() -> None:
    """On an H200: no peak is under, and times are within ten per cent."""
    card = find_card("NVIDIA H200")
    assert card is not None
    errors: list[float] = []
    for raw in ROWS:
        row = Row.read(raw) if "plan" in raw else None
        if row is not None:
            errors.append(error(row))
            assert abs(reserved_error(row)) <= 2
            expected = StepTime(row.spec, row.facts, Work()).step_seconds(row.plan, card)
            assert expected == pytest.approx(raw["step_seconds"], rel=0.1)
    assert len(errors) >= 20
    assert min(errors) >= 0
    assert sum(errors) / len(errors) <= 1.5


def test_offloading_was_measured_to_change_no_bit() -> None:
    """Losses and the adapter, of micro-batches that the MLP takes as a whole."""
    learned: defaultdict[tuple[object, ...], dict[int, tuple[list[float], str]]] = defaultdict(dict)
    for raw in ROWS:
        if "losses" in raw and raw["cap_gib"]:
            plan, length = MemoryPlan.model_validate(raw["plan"]), raw["training"]["sequenceLength"]
            if plan.micro_batch_size * length <= MLP_TILE_TOKENS:
                found = raw["losses"], raw["adapter_sha256"]
                learned[raw["model"], length, plan.micro_batch_size][plan.offloaded_layers] = found
    compared = [alike for alike in learned.values() if len(alike) > 1]
    assert len(compared) >= 3
    for alike in compared:
        assert all(each == next(iter(alike.values())) for each in alike.values())


def test_out_of_memory_everything_recomputes_and_nothing_of_it_waits_on_the_host() -> None:
    plan = MemoryPlan(micro_batch_size=2, accumulation_steps=8, recompute_layers=10, offloaded_layers=40)
    smaller = fallback_plan(SPEC, LLAMA_3_70B, plan)
    assert smaller is not None
    assert (smaller.recompute_layers, smaller.offloaded_layers, smaller.micro_batch_size) == (80, 0, 2)
