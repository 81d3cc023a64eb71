"""When layers are streamed from the host: where nothing else fits, with bytes and seconds as measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architectures import config
from benchmarks.estimators import ROWS, Row
from benchmarks.sizing_report import error, reserved_error
from orchestrator.api.job import GenerationSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import Refusal
from orchestrator.sizing.footprint import footprint, layer_streamed_bytes, streamed_host_bytes
from orchestrator.sizing.hardware import find_card
from orchestrator.sizing.plan_search import choose_class, choose_plan, fallback_plan, plans
from orchestrator.sizing.step_time import StepTime, Work
from tests.builders import LLAMA_3_8B, LLAMA_3_70B, gpus, make_spec

SMALL, BOTH = gpus(_24Gi=1), gpus(_24Gi=1, _48Gi=1)
RESULTS = Path(ROWS).parent
LEAST_SHARE = 0.8


def rows() -> list[Row]:
    found = [Row.read(json.loads(line)) for line in (RESULTS / "streamed_rows.jsonl").read_text().splitlines()]
    return [row for row in found if row is not None]


def test_layers_are_streamed_where_no_class_that_is_allowed_holds_all_of_them() -> None:
    chosen = choose_class(make_spec(), LLAMA_3_70B, SMALL)
    assert not isinstance(chosen, Refusal)
    assert chosen.plan.streamed_layers > 0
    assert chosen.peak_bytes <= SMALL[0].usable_bytes
    larger = choose_class(make_spec(), LLAMA_3_70B, BOTH)
    assert not isinstance(larger, Refusal)
    assert (larger.gpu_class, larger.plan.streamed_layers) == ("48Gi", 0)
    asked = choose_class(make_spec(gpu_classes=("24Gi",)), LLAMA_3_70B, BOTH)
    assert not isinstance(asked, Refusal)
    assert asked.plan.streamed_layers > 0
    fits = choose_plan(make_spec(), LLAMA_3_8B, SMALL[0])
    assert fits is not None
    assert fits.streamed_layers == 0


def test_the_fastest_plan_that_streams_comes_first_and_all_of_them_stream() -> None:
    spec = make_spec()
    found = list(plans(spec, LLAMA_3_70B, SMALL[0]))
    assert all(0 < plan.streamed_layers <= 80 for plan in found)
    card = SMALL[0].card
    assert card is not None
    seconds = [StepTime(spec, LLAMA_3_70B, Work()).step_seconds(plan, card) for plan in found]
    assert seconds[0] <= 1.02 * min(seconds)


@pytest.mark.parametrize(
    ("facts", "changes"),
    [
        (LLAMA_3_70B, {"use_dora": True}),
        (ModelFacts.from_config(config("gemma-4-31b-like"), "main"), {}),
        (LLAMA_3_70B.model_copy(update={"record_by_record": True}), {}),
    ],
    ids=["DoRA", "a traced type", "record by record"],
)
def test_what_the_trainer_does_not_compute_by_hand_is_never_streamed(
    facts: ModelFacts, changes: dict[str, Any]
) -> None:
    tight = gpus(_16Gi=1)
    assert choose_plan(make_spec(**changes), facts, tight[0]) is None


def test_a_job_whose_prompts_are_answered_in_the_end_is_not_streamed() -> None:
    spec = make_spec()
    asks = spec.evaluation.model_copy(update={"generation": GenerationSpec.model_construct(prompts=8)})
    assert choose_plan(spec.model_copy(update={"evaluation": asks}), LLAMA_3_70B, SMALL[0]) is None


def test_a_streamed_layer_leaves_two_buffers_on_the_card_whatever_their_number() -> None:
    spec = make_spec()
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=80)
    weights = []
    for count in (0, 40, 80, 1000):
        items = footprint(spec, LLAMA_3_70B, plan.model_copy(update={"streamed_layers": count}))
        found = {item.name: item.bytes for item in items}
        assert found.get("buffers of streamed layers", 0) == (2 * layer_streamed_bytes(LLAMA_3_70B) if count else 0)
        weights.append(found["base weights, NF4"])
    assert weights[0] - weights[1] == weights[1] - weights[2]
    assert weights[3] == weights[2] < 0.001 * weights[0]
    everything = plan.model_copy(update={"streamed_layers": 1000})
    assert streamed_host_bytes(everything, LLAMA_3_70B) == 80 * layer_streamed_bytes(LLAMA_3_70B)


def test_out_of_memory_all_layers_are_streamed_before_the_micro_batch_is_halved() -> None:
    spec = make_spec()
    plan = MemoryPlan(
        micro_batch_size=4,
        accumulation_steps=4,
        recompute_layers=80,
        streamed_layers=60,
        offload=("activations", "embeddings"),
    )
    smaller = fallback_plan(spec, LLAMA_3_70B, plan)
    assert smaller == plan.model_copy(update={"streamed_layers": 80})
    halved = fallback_plan(spec, LLAMA_3_70B, smaller)
    assert halved is not None
    assert (halved.micro_batch_size, halved.streamed_layers) == (2, 80)


def test_predicted_peaks_are_never_below_the_measured_ones() -> None:
    errors = [error(row) for row in rows()]
    assert len(errors) >= 12
    assert sum(row.plan.streamed_layers > 0 for row in rows()) >= 6
    assert min(errors) >= 0
    assert sum(errors) / len(errors) <= 1.5
    assert max(abs(reserved_error(row)) for row in rows()) <= 2


def test_expected_times_are_the_measured_ones_within_ten_per_cent() -> None:
    raw = [json.loads(line) for line in (RESULTS / "streamed_rows.jsonl").read_text().splitlines()]
    card = find_card("NVIDIA H200")
    assert card is not None
    for each in raw:
        row = Row.read(each)
        if row is None or not row.plan.streamed_layers or row.facts.mixture is not None:
            continue
        expected = StepTime(row.spec, row.facts, Work()).step_seconds(row.plan, card)
        assert expected == pytest.approx(each["step_seconds"], rel=0.1)


def test_streaming_was_measured_to_change_no_bit_and_to_be_near_its_bound() -> None:
    results = json.loads((RESULTS / "streaming.json").read_text())["results"]
    assert {"70b", "32b"} <= results.keys()
    for cases in results.values():
        for case in cases:
            assert case["losses_equal"]
            assert case["adapters_equal"]
            assert case["share_of_bound"] >= LEAST_SHARE
            assert case["measured_gib"] <= case["predicted_gib"] <= case["cap_gib"]
