"""The footprint formula's parts, and the plans that follow from it.

That it counts every tensor of a training step is what tests/trainer/test_sizing.py shows.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.architectures import config
from orchestrator.api import trainer_facts
from orchestrator.api.data_sheets import DATA_SHEETS, lacks_bfloat16
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import AttentionKernels, Estimate, MemoryPlan
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.sizing.footprint import Footprint, adapter_parameters, footprint, peak_bytes
from orchestrator.sizing.hardware import (
    CLASS_NAMES,
    GIB,
    MIB,
    MIG_TOTAL_MIB,
    GpuClass,
    classify,
    cpu_class,
    find_card,
    gpu_class,
    priced,
)
from orchestrator.sizing.plan_search import (
    AS_FAST,
    HOLES_AT_MOST,
    allowed_classes,
    candidates,
    choose_class,
    choose_plan,
    escalate,
    estimate,
    fallback_plan,
    offloads,
    plans,
)
from orchestrator.sizing.step_time import StepTime, Work
from tests.builders import LLAMA_2_13B, LLAMA_3_8B, LLAMA_3_70B, SMOLLM2_135M, gpus, make_spec

ALL = gpus(_24Gi=1, _48Gi=1, _80Gi=1)


def plan(micro_batch_size: int = 1, recompute_layers: int = 0, accumulation_steps: int = 16, chunk: int = 1024):
    return MemoryPlan(
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        recompute_layers=recompute_layers,
        loss_chunk_tokens=chunk,
    )


def test_nf4_weights_of_8b_take_what_counting_them_by_hand_gives() -> None:
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    constants = layer // 64
    by_hand = 32 * (layer // 2 + constants + constants // 256 * 4)
    [weights] = [item.bytes for item in footprint(make_spec(), LLAMA_3_8B, plan()) if item.name.startswith("base")]
    assert by_hand <= weights <= by_hand * 1.0001  # each tensor is rounded up to 512 bytes


def test_experts_are_counted_in_nf4_and_adapters_are_not_on_them() -> None:
    facts = ModelFacts.from_config(config("qwen3-30b-a3b"), "main")
    experts = 48 * 128 * 3 * 2048 * 768
    attention = 48 * 2048 * (2 * 32 + 2 * 4) * 128
    [weights] = [item.bytes for item in footprint(make_spec(), facts, plan()) if item.name.startswith("base")]
    by_hand = (experts + attention) * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    assert by_hand <= weights <= by_hand * 1.0001
    assert experts / 2**30 * 0.516 == pytest.approx(13.9, abs=0.1)
    assert adapter_parameters(make_spec(rank=8).adapter, facts) == 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))


def test_adapter_parameters_follow_the_target_modules() -> None:
    everything = adapter_parameters(make_spec(rank=8).adapter, SMOLLM2_135M)
    assert everything == 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    some = make_spec(rank=8).adapter.model_copy(update={"target_modules": ("q_proj", "model.layers.v_proj")})
    assert adapter_parameters(some, SMOLLM2_135M) == 30 * 8 * ((576 + 576) + (576 + 192))
    unknown = make_spec(rank=8).adapter.model_copy(update={"target_modules": ("in_proj",)})
    assert adapter_parameters(unknown, SMOLLM2_135M) == everything


MORE = {
    "a higher rank": {"rank": 64},
    "DoRA": {"use_dora": True},
    "a longer sequence": {"sequence_length": 4096},
    "optimizer state that is not paged": {"optimizer": "adamw_32bit"},
}


@pytest.mark.parametrize("fields", MORE.values(), ids=MORE)
@pytest.mark.parametrize("recomputed", [0, 16, 32])
def test_asking_for_more_takes_more_bytes(fields: dict[str, object], recomputed: int) -> None:
    under = plan(2, recomputed)
    assert peak_bytes(make_spec(**fields), LLAMA_3_8B, under) > peak_bytes(make_spec(), LLAMA_3_8B, under)


def test_a_paged_optimizer_takes_no_room_from_the_allocator() -> None:
    state = {name: dict(_items(make_spec(optimizer=name)))["optimizer state"] for name in trainer_facts.OPTIMIZER_BYTES}
    trainable = adapter_parameters(make_spec().adapter, LLAMA_3_8B)
    assert state["paged_adamw_32bit"] == 0
    assert state["adamw_32bit"] == 8 * trainable
    assert state["paged_adamw_8bit"] == state["adamw_8bit"] - 2 * trainable


def _items(spec: QLoRAJobSpec) -> list[tuple[str, int]]:
    return [(item.name, item.bytes) for item in footprint(spec, LLAMA_3_8B, plan())]


def test_an_estimate_adds_up_and_names_its_class() -> None:
    made = estimate(make_spec(), LLAMA_3_8B, plan(), gpu_class("24Gi", 1), work=Work(steps=7))
    assert (made.gpu_class, made.usable_bytes, made.steps) == ("24Gi", 22_016 * MIB, 7)
    expected = peak_bytes(make_spec(), LLAMA_3_8B, plan(), multiprocessors=128)
    assert made.peak_bytes == sum(item.bytes for item in made.items) == expected


# --- GPU classes -------------------------------------------------------------------------------------------------

CLASSES_OF_CARDS = {
    "8Gi": ["RTX 3050", "RTX 3060 Ti", "RTX 3070", "RTX 4060", "RTX 5060"],
    "10Gi": ["RTX 3080"],
    "12Gi": ["RTX 3060", "RTX 4070", "RTX 5070"],
    "16Gi": ["T4", "A2", "A4000", "RTX 4060 Ti", "RTX 4080", "RTX 5060 Ti", "RTX 5070 Ti", "RTX 5080"],
    "24Gi": ["A10", "A10G", "A30", "A5000", "L4", "RTX 3090", "RTX 4090"],
    "32Gi": ["V100", "RTX 5000 Ada", "RTX 5090"],
    "40Gi": ["A100 40GB"],
    "48Gi": ["A40", "L20", "L40", "L40S", "A6000", "RTX 6000 Ada"],
    "80Gi": ["H100 80GB", "H100 PCIe", "A100 80GB"],
    "96Gi": ["H100 NVL", "H20", "RTX PRO 6000"],
    "141Gi": ["H200"],
    "180Gi": ["B200"],
    "288Gi": ["B300"],
}
CLASS_OF = {card: name for name, cards in CLASSES_OF_CARDS.items() for card in cards}


@pytest.mark.parametrize("card", DATA_SHEETS)
def test_every_card_is_in_the_class_that_it_is_sold_as(card: str) -> None:
    assert classify(DATA_SHEETS[card].total_mib) == CLASS_OF[card]


@pytest.mark.parametrize(("name", "class_name"), [("1g.10gb", "10Gi"), ("2g.20gb", "20Gi"), ("3g.40gb", "40Gi")])
def test_a_slice_of_a_card_is_in_the_class_of_its_own_memory(name: str, class_name: str) -> None:
    assert classify(MIG_TOTAL_MIB[name]) == class_name


def test_a_class_promises_no_more_than_its_smallest_card_has_beside_the_context() -> None:
    for card, sheet in DATA_SHEETS.items():
        usable_mib = gpu_class(CLASS_OF[card], 1).usable_bytes / MIB
        assert usable_mib <= sheet.total_mib - 0.9 * 1024, card


def test_the_classes_that_are_designed_to_offer_their_design_budgets() -> None:
    assert gpu_class("24Gi", 1).usable_bytes == 21.5 * GIB
    assert gpu_class("48Gi", 1).usable_bytes == 44.0 * GIB


def test_no_card_of_a_class_is_slower_than_the_one_that_its_times_are_told_for() -> None:
    for name, cards in CLASSES_OF_CARDS.items():
        slowest = gpu_class(name, 1).card
        assert slowest is not None, name
        speeds = [card.matmul_tflops for each in cards if (card := find_card(each)) is not None]
        assert min(speeds) >= slowest.matmul_tflops, name


def test_the_slowest_card_of_a_class_is_a_guess_where_not_all_that_are_here_are_named() -> None:
    assert gpu_class("48Gi", 2, ["NVIDIA-L40S", "NVIDIA-A40"]).card_known
    assert not gpu_class("48Gi", 2, ["NVIDIA-L40S", "something new"]).card_known
    assert not gpu_class("48Gi", 2).card_known


@pytest.mark.parametrize(("product", "capability", "lacks"), [
    ("NVIDIA-A10G", 8, False),
    ("something new", 12, False),
    ("something old", 7, True),
    ("Tesla-T4", None, True),
    ("Tesla-V100-SXM2-32GB", None, True),
    ("Tesla-V100-SXM2-32GB", 7, True),
    ("something", None, False),
    ("", None, False),
])  # fmt: skip
def test_cards_without_bfloat16_are_known_by_capability_or_by_name(
    product: str, capability: int | None, lacks: bool
) -> None:
    assert lacks_bfloat16(product, capability) is lacks


def test_a_laptops_card_is_not_taken_for_its_namesake() -> None:
    assert find_card("NVIDIA GeForce RTX 4090") is not None
    assert find_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_a_card_too_small_for_any_class_has_none() -> None:
    assert classify(6144) is None


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24Gi", "48Gi", "80Gi"])
@pytest.mark.parametrize("facts", [SMOLLM2_135M, LLAMA_3_8B, LLAMA_2_13B])
def test_every_plan_fits_keeps_the_global_batch_and_recomputes_no_more_than_it_must(
    facts: ModelFacts, name: str
) -> None:
    spec, offered = make_spec(global_batch_size=24), gpu_class(name, 1)
    found = list(plans(spec, facts, offered))
    assert found
    for each in found:
        assert each.micro_batch_size * each.accumulation_steps == 24
        assert peak_on(offered, spec, facts, each) <= room(offered)
        if each.recompute_layers:
            less = each.model_copy(update={"recompute_layers": each.recompute_layers - 1})
            assert peak_on(offered, spec, facts, less) > room(offered)


def room(gpu_class: GpuClass) -> float:
    """What tensors can have of it."""
    return gpu_class.usable_bytes / (1 + HOLES_AT_MOST)


def test_plans_that_holes_could_break_are_for_jobs_that_fit_nothing_else() -> None:
    spec, offered = make_spec(global_batch_size=1, sequence_length=8192), gpu_class("24Gi", 1)
    least = MemoryPlan(
        micro_batch_size=1, accumulation_steps=1, recompute_layers=32, offload=("activations", "embeddings")
    )
    tight = replace(offered, usable_bytes=peak_on(offered, spec, LLAMA_3_8B, least))
    (found,) = plans(spec, LLAMA_3_8B, tight)
    assert found == least.model_copy(update={"recompute_layers": found.recompute_layers})
    assert peak_on(offered, spec, LLAMA_3_8B, found) == tight.usable_bytes, "it recomputes no more than helps"
    tighter = replace(tight, usable_bytes=tight.usable_bytes - 1)
    assert all(each.streamed_layers for each in plans(spec, LLAMA_3_8B, tighter)), "none has all layers on the card"
    assert list(plans(spec, never_streamed(LLAMA_3_8B), tighter)) == []


def never_streamed(facts: ModelFacts) -> ModelFacts:
    return facts.model_copy(update={"record_by_record": True})


def peak_on(gpu_class: GpuClass, spec: QLoRAJobSpec, facts: ModelFacts, under: MemoryPlan) -> int:
    return peak_bytes(spec, facts, under, multiprocessors=gpu_class.multiprocessors)


@pytest.mark.parametrize("name", ["10Gi", "24Gi", "48Gi", "80Gi"])
@pytest.mark.parametrize("facts", [SMOLLM2_135M, LLAMA_3_8B, LLAMA_2_13B, LLAMA_3_70B])
def test_the_chosen_plan_is_as_fast_as_the_fastest_of_all_that_fit(facts: ModelFacts, name: str) -> None:
    assert_fastest(make_spec(), never_streamed(facts), gpu_class(name, 1), attentions=((False, "own"),))


@pytest.mark.parametrize("has_flash", [False, True])
@pytest.mark.parametrize("sequence_length", [4096, 8192, 16384, 32768])
@pytest.mark.parametrize("facts", [SMOLLM2_135M, LLAMA_3_8B, LLAMA_2_13B])
def test_so_it_is_where_records_are_long_and_attention_has_kernels_to_choose_from(
    facts: ModelFacts, sequence_length: int, has_flash: bool
) -> None:
    spec = make_spec(global_batch_size=4, sequence_length=sequence_length)
    kernels = ("own", "flash-attn-4") if has_flash else ("own",)
    assert_fastest(
        spec,
        facts.model_copy(update={"flash_attention": has_flash}),
        gpu_class("24Gi", 1, products=["NVIDIA H200"]),
        attentions=tuple((keep, each) for keep in (False, True) for each in kernels),
    )


def test_flash_attention_is_for_cards_that_it_was_measured_on_and_records_that_are_long_enough() -> None:
    facts = LLAMA_3_8B.model_copy(update={"flash_attention": True})
    hopper, ampere = (
        gpu_class("80Gi", 1, products=[name]) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    )
    long, short = Work(record_tokens=2048), Work(record_tokens=200)
    assert choose_plan(make_spec(), facts, hopper, work=long).attention == "flash-attn-4"
    for where, what in ((hopper, short), (ampere, long)):
        assert choose_plan(make_spec(), facts, where, work=what).attention == "own"
    assert choose_plan(make_spec(), LLAMA_3_8B, hopper, work=long).attention == "own", "the trainer has it not"


def assert_fastest(
    spec: QLoRAJobSpec, facts: ModelFacts, offered: GpuClass, attentions: tuple[tuple[bool, AttentionKernels], ...]
) -> None:
    """The chosen plan against every one that there is, with each pair of what is kept of attention and its kernels.

    The host has no memory to spare (`test_offloading_plans` is about those that have).
    """
    offered = replace(offered, host_bytes=0)
    step_time = StepTime(spec, facts, Work())
    batch = spec.training.global_batch_size
    everything = [
        MemoryPlan(
            micro_batch_size=size,
            accumulation_steps=batch // size,
            recompute_layers=layers,
            offload=offload,
            keep_attention=keep and layers > 0,
            attention=attention,
        )
        for size in (1, 2, 4, 8, 16)
        if size <= batch
        for layers in range(facts.num_layers + 1)
        for offload in offloads(spec, facts)
        for keep, attention in attentions
    ]
    fitting = [each for each in everything if peak_on(offered, spec, facts, each) <= room(offered)]
    chosen = choose_plan(spec, facts, offered)
    if not fitting:
        assert chosen is None or peak_on(offered, spec, facts, chosen) > room(offered)
        return
    assert chosen in fitting
    fastest = min(step_time.step_seconds(each, offered.card) for each in fitting)
    assert step_time.step_seconds(chosen, offered.card) <= AS_FAST * fastest


def test_a_choice_among_all_classes_takes_few_walks_and_the_same_question_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes planning quick: bytes are worked out once for all classes, and only for plans that may be best."""
    walks: list[Footprint] = []
    build = Footprint.__init__

    def counted(self: Footprint, *arguments: object, **named: object) -> None:
        walks.append(self)
        build(self, *arguments, **named)

    monkeypatch.setattr(Footprint, "__init__", counted)
    every = tuple(gpu_class(name, 1) for name in CLASS_NAMES)
    spec = make_spec(rank=17)  # that no other test asks about
    found = candidates(spec, LLAMA_2_13B, every)
    assert [each.gpu_class for each in found] == list(CLASS_NAMES[1:]), "13B is too large for the smallest class"
    assert 0 < len(walks) <= 24, "the plans"
    assert sum(len(walk._peaks) for walk in walks) <= 190, "of 24 plans with up to 40 layers that recompute"
    walks.clear()
    assert candidates(spec, LLAMA_2_13B, every) is found
    choose_class(spec, LLAMA_2_13B, every[:3])
    assert not walks


def test_a_larger_card_is_used_to_recompute_less() -> None:
    spec = make_spec(sequence_length=8192)
    on_24, on_80 = (choose_plan(spec, LLAMA_3_8B, gpu_class(name, 1)) for name in ("24Gi", "80Gi"))
    assert on_24.recompute_layers + on_24.offloaded_layers > on_80.recompute_layers + on_80.offloaded_layers


def test_a_cpu_takes_the_same_formula() -> None:
    chosen = choose_class(make_spec(sequence_length=512), SMOLLM2_135M, (cpu_class(8 * GIB, 1),))
    assert (chosen.gpu_class, chosen.plan) == ("cpu", plan())
    assert chosen.peak_bytes == peak_bytes(make_spec(sequence_length=512), SMOLLM2_135M, plan())


def names(classes: tuple[GpuClass, ...]) -> list[str]:
    return [each.name for each in classes]


def test_resources_say_which_classes_are_allowed_and_in_which_order() -> None:
    backwards = ALL[::-1]
    assert names(allowed_classes(make_spec(), backwards)) == ["24Gi", "48Gi", "80Gi"]
    assert names(allowed_classes(make_spec(vram="48Gi"), backwards)) == ["48Gi", "80Gi"]
    assert names(allowed_classes(make_spec(gpu_classes=("80Gi", "24Gi")), backwards)) == ["80Gi", "24Gi"]
    assert names(allowed_classes(make_spec(vram="25Gi", gpu_classes=("80Gi", "24Gi")), backwards)) == ["80Gi"]


def test_the_smallest_class_that_fits_is_chosen() -> None:
    chosen = [choose_class(make_spec(), facts, ALL).gpu_class for facts in (LLAMA_3_8B, LLAMA_2_13B, LLAMA_3_70B)]
    assert chosen == ["24Gi", "24Gi", "48Gi"]


def test_a_model_that_fits_nothing_is_refused_with_what_would_fit() -> None:
    here, spec, facts = gpus(_24Gi=1, _48Gi=1), make_spec(sequence_length=65_536), never_streamed(LLAMA_3_70B)
    least = plan(1, 80).model_copy(update={"offload": ("activations", "embeddings")})
    needed = peak_on(here[1], spec, facts, least)
    refused = choose_class(spec, facts, here)
    assert refused.reason is Reason.DOES_NOT_FIT
    told = re.fullmatch(
        rf"needs {needed / GIB:.1f} GiB at sequenceLength 65536, and 48Gi offers 44.0 GiB; "
        r"sequenceLength (\d+) fits 48Gi, and a card of class 80Gi takes it as it is",
        refused.message,
    )
    assert told
    shorter = int(told[1])
    assert not isinstance(choose_class(make_spec(sequence_length=shorter), facts, here), Refusal)
    assert isinstance(choose_class(make_spec(sequence_length=shorter + 65_536 // 16), facts, here), Refusal)
    assert not isinstance(choose_class(spec, facts, gpus(_80Gi=1)), Refusal)


def test_what_fits_no_card_at_any_length_is_told_so() -> None:
    refused = choose_class(make_spec(), never_streamed(LLAMA_3_70B), gpus(_24Gi=1))
    assert refused.message.endswith("24Gi offers 21.5 GiB; a card of class 40Gi takes it as it is"), refused.message


def test_a_demand_that_no_class_here_meets_is_refused_with_what_is_here() -> None:
    assert choose_class(make_spec(vram="141Gi"), SMOLLM2_135M, ALL) == Refusal(
        reason=Reason.DOES_NOT_FIT,
        message="resources.vram 141Gi leaves none of the classes here (24Gi, 48Gi, 80Gi); "
        "ask for less or add such a GPU",
    )


def test_where_there_is_no_gpu_at_all_a_job_waits_for_one() -> None:
    refused = choose_class(make_spec(), SMOLLM2_135M, ())
    assert refused == Refusal(reason=Reason.WAITING_FOR_GPU, message="there is no GPU here; add one")


# --- times and prices ---------------------------------------------------------------------------------------------

PRICES = "24Gi=0.5,48Gi=0.9,80Gi=2.0"


def priced_choice(deadline_seconds: int | None, prices: str = PRICES, **spec: object) -> Estimate:
    made = make_spec(sequence_length=512, active_deadline_seconds=deadline_seconds, **spec)
    return choose_class(made, LLAMA_3_8B, priced(ALL, prices), work=Work(steps=1000))


def test_an_estimate_tells_steps_seconds_and_dollars_for_the_slowest_card_of_its_class() -> None:
    chosen = priced_choice(None)
    assert (chosen.gpu_class, chosen.card, chosen.steps) == ("24Gi", "A10G", 1000)
    assert chosen.seconds == 1000 * chosen.step_seconds
    assert chosen.dollars == pytest.approx(chosen.seconds / 3600 * 0.5)
    assert choose_class(make_spec(), LLAMA_3_8B, ALL).dollars is None
    on_cpu = choose_class(make_spec(), SMOLLM2_135M, (cpu_class(64 * GIB, 1),), work=Work(steps=9))
    assert (on_cpu.card, on_cpu.step_seconds, on_cpu.seconds) == (None, None, None)


def test_with_a_deadline_and_prices_the_cheapest_class_that_makes_it_comes_first() -> None:
    """An hour of an A100 costs four times as much as one of an A10G and gets more than four times as much done."""
    seconds = {name: priced_choice(None, gpu_classes=(name,)).seconds for name in ("24Gi", "48Gi", "80Gi")}
    assert seconds["80Gi"] < seconds["48Gi"] < seconds["24Gi"]
    cheapest = min(("24Gi", "48Gi", "80Gi"), key=lambda name: priced_choice(None, gpu_classes=(name,)).dollars)
    assert priced_choice(10_000_000).gpu_class == cheapest
    assert priced_choice(10_000_000, "24Gi=0.01,48Gi=0.9,80Gi=2.0").gpu_class == "24Gi"
    assert priced_choice(int(seconds["24Gi"]) - 1, "24Gi=0.01,48Gi=0.9,80Gi=9.0").gpu_class == "48Gi"
    assert priced_choice(int(seconds["48Gi"]) - 1, "24Gi=0.01,48Gi=0.9,80Gi=9.0").gpu_class == "80Gi"


def test_without_prices_or_where_none_makes_the_deadline_the_smallest_class_comes_first() -> None:
    assert priced_choice(10_000_000, "").gpu_class == "24Gi"
    assert priced_choice(1).gpu_class == "24Gi"
    assert priced_choice(10_000_000, gpu_classes=("48Gi", "24Gi")).gpu_class == "48Gi"


# --- after an out-of-memory ------------------------------------------------------------------------------------------


def test_the_ladder_recomputes_everything_then_offloads_everything_and_then_halves_the_micro_batch() -> None:
    steps, current = [], plan(6, 4, accumulation_steps=4)
    while current is not None:
        steps.append((current.micro_batch_size, current.accumulation_steps, current.recompute_layers, current.offload))
        current = fallback_plan(make_spec(), LLAMA_3_8B, current)
    out = ("activations", "embeddings")
    assert steps == [(6, 4, 4, ()), (6, 4, 32, ()), (6, 4, 32, out), (3, 8, 32, out), (1, 24, 32, out)]


def test_its_first_rung_gives_up_what_attention_has_beside_the_least() -> None:
    most = plan(1, 32).model_copy(update={"keep_attention": True, "attention": "flash-attn-4"})
    assert fallback_plan(make_spec(), LLAMA_3_8B, most) == plan(1, 32)


def test_where_nothing_can_be_offloaded_the_ladder_is_shorter() -> None:
    dora = make_spec(use_dora=True)
    assert fallback_plan(dora, SMOLLM2_135M, plan(2, 30, accumulation_steps=8)) == plan(1, 30)
    assert fallback_plan(make_spec(), LLAMA_3_8B, plan(2, 32, accumulation_steps=8), offload=False) == plan(1, 32)


@pytest.mark.parametrize("facts", [LLAMA_3_8B, LLAMA_3_70B])
def test_each_rung_of_the_ladder_takes_fewer_bytes_while_training(facts: ModelFacts) -> None:
    spec, current = make_spec(), plan(4, 3, accumulation_steps=4)
    while (less := fallback_plan(spec, facts, current)) is not None:
        assert training_bytes(spec, facts, less) < training_bytes(spec, facts, current)
        current = less


def training_bytes(spec: QLoRAJobSpec, facts: ModelFacts, under: MemoryPlan) -> int:
    """The peak but for the moment of loading, which the last rungs share."""
    return Footprint(spec, facts, under).training_bytes(under.recompute_layers)


def test_after_the_last_rung_comes_the_next_larger_class() -> None:
    spec = make_spec()
    failed = estimate(spec, LLAMA_3_8B, last_rung(32), ALL[0])
    assert escalate(spec, LLAMA_3_8B, failed, ALL) == candidates(spec, LLAMA_3_8B, ALL[1:])[0]


def last_rung(layers: int) -> MemoryPlan:
    return plan(1, layers).model_copy(update={"offload": ("activations", "embeddings")})


def test_after_the_last_class_comes_a_refusal() -> None:
    spec = make_spec(gpu_classes=("24Gi",))
    failed = estimate(spec, LLAMA_3_8B, last_rung(32), ALL[0])
    refused = escalate(spec, LLAMA_3_8B, failed, ALL)
    assert refused.reason is Reason.DOES_NOT_FIT
    assert "no larger class is allowed here" in refused.message
