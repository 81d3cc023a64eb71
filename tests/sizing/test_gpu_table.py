"""GPU classes that an operator defines: what is read, what is refused in which words, and how cards are sorted then."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.api.data_sheets import DATA_SHEETS
from orchestrator.api.gpu_definitions import GpuDefinition
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.core.snapshot import Snapshot
from orchestrator.errors import InvalidObject
from orchestrator.sdk.explanation import snapshot_of
from orchestrator.sdk.planning import Known, plan_job, undefined_words
from orchestrator.sdk.simulation import what_if
from orchestrator.settings import Settings
from orchestrator.sizing.gpu_table import BUILT_IN, gpu_table
from orchestrator.sizing.hardware import CLASS_NAMES, CONTEXT_MIB, MIB, classify, find_card
from tests.builders import LLAMA_3_8B, NOW, gpus, make_attempt, make_job, make_queue, prepared_status

L4S: dict[str, object] = {"usableMiB": 22_016, "cards": ["NVIDIA-L4", "nvidia-l4"], "dollarsPerHour": 0.4}
SPEEDS = {"tflops": 100.0, "memoryGbps": 273.0, "hostGbps": 20.0}


def text(**definitions: object) -> str:
    return json.dumps({name.strip("_"): definition for name, definition in definitions.items()})


def l4s(**more: object) -> str:
    return text(_23Gi={**L4S, **more})


@st.composite
def _tables(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    """Definitions that hold: each card in one class, and no class of more than its name says."""
    sold = draw(
        st.lists(st.integers(4, 999).filter(lambda gib: f"{gib}Gi" not in CLASS_NAMES), unique=True, max_size=6)
    )
    found: dict[str, dict[str, object]] = {}
    for place, gib in enumerate(sold):
        usable = draw(st.integers(max(2_048, gib * 512), gib * 1024 - CONTEXT_MIB))
        speeds = SPEEDS if draw(st.booleans()) else {}
        found[f"{gib}Gi"] = {"usableMiB": usable, "cards": [f"ACME-{place}-{n}" for n in range(place + 1)], **speeds}
    return found


@settings(max_examples=40)
@given(_tables(), st.integers(0, 400_000))
def test_every_card_is_in_the_class_that_names_it_and_others_where_they_were(
    defined: dict[str, dict[str, object]], total_mib: int
) -> None:
    table = gpu_table(json.dumps(defined))
    assert set(table.names) == {*CLASS_NAMES, *defined}
    promised = [table.gpu_class(name, 1).usable_bytes for name in table.names]
    assert promised == sorted(promised)
    assert table.classify("NVIDIA-L40S", total_mib) == classify(total_mib)
    for name, definition in defined.items():
        offered = table.gpu_class(name, 1)
        assert offered.usable_bytes == definition["usableMiB"] * MIB
        assert offered.usable_bytes + CONTEXT_MIB * MIB <= offered.marketed_gib << 30
        assert offered.card is not None
        assert offered.card_known is ("tflops" in definition)
        for card in GpuDefinition.model_validate(definition).cards:
            found = table.classify(card.replace("-", " "), total_mib)
            assert found == (name if total_mib == 0 or total_mib >= table.least_mib(name) else None)
            assert bool(table.too_small(card, total_mib)) is (found is None)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["23Gi", *L4S, *SPEEDS, "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.text(max_size=40) | _ANYTHING.map(json.dumps) | _ANYTHING.map(lambda one: json.dumps({"23Gi": one})))
def test_any_text_makes_a_table_or_is_refused_in_words(anything: str) -> None:
    with suppress(ValueError):
        assert set(gpu_table(anything).names) >= set(CLASS_NAMES)


REFUSED = {
    "no JSON": ("23Gi=22016", r"no JSON"),
    "nothing but brackets": ("[" * 100_000, r"at most|deeply"),
    "a list": ("[]", r"an object, not \[\]"),
    "a name of no size": (text(large=L4S), r"large.*pattern"),
    "a name that is built in": (text(_24Gi=L4S), r"24Gi: .*built in"),
    "a name that is there twice": (f'{{"23Gi": {json.dumps(L4S)}, "23Gi": {json.dumps(L4S)}}}', r"23Gi is there twice"),
    "more than its name": (text(_20Gi=L4S, _21Gi=L4S), r"20Gi: .*built in"),
    "more usable than nominal": (text(_22Gi=L4S), r"22Gi\.usableMiB: 22016 .* more than the 22528"),
    "less than half": (text(_64Gi=L4S), r"64Gi\.usableMiB: 22016 is less than half"),
    "far too much": (l4s(usableMiB=10**9), r"23Gi\.usableMiB: .*1048576, not 1000000000"),
    "far too little": (l4s(usableMiB=1), r"23Gi\.usableMiB: .*2048, not 1"),
    "no number": (l4s(usableMiB="much"), r"23Gi\.usableMiB: .*not 'much'"),
    "a number in quotes": (l4s(usableMiB="22016"), r"23Gi\.usableMiB: .*not '22016'"),
    "no price": (l4s(dollarsPerHour=True), r"23Gi\.dollarsPerHour: .*not True"),
    "more than the card has": (text(_31Gi={"usableMiB": 30_000, "cards": ["NVIDIA-L4"]}), r"NVIDIA-L4 can give.*23034"),
    "no cards": (l4s(cards=[]), r"23Gi\.cards: .*1 item"),
    "a card that is no label": (l4s(cards=["NVIDIA L4"]), r"23Gi\.cards\.0: .*not 'NVIDIA L4'"),
    "a card without bfloat16": (l4s(cards=["Tesla-V100-SXM2-32GB"]), r"V100.* has no bfloat16"),
    "a card that is shared": (l4s(cards=["NVIDIA-L4-SHARED"]), r"NVIDIA-L4-SHARED is .*several times"),
    "a card twice": (text(_23Gi=L4S, _25Gi=L4S), r"25Gi\.cards: NVIDIA-L4 is in 23Gi already"),
    "half of the speeds": (l4s(tflops=100), r"23Gi: .*memoryGbps and hostGbps must be told"),
    "no speed": (l4s(**{**SPEEDS, "tflops": 0}), r"23Gi\.tflops: .*not 0"),
    "an unknown field": (l4s(usable=3), r"23Gi\.usable: "),
}


@pytest.mark.parametrize(("definitions", "words"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_class_is_refused_naming_field_and_value(definitions: str, words: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s)gpu_class_definitions.*({words})"):
        Settings(gpu_class_definitions=definitions)


def test_times_are_for_what_was_told_or_for_known_cards_or_else_a_guess() -> None:
    told = gpu_table(l4s(**SPEEDS)).gpu_class("23Gi", 1)
    assert (told.card_known, told.card and told.card.matmul_tflops, told.card and told.card.host_gbps) == (
        True,
        100,
        20,
    )
    known = gpu_table(l4s()).gpu_class("23Gi", 1)
    assert (known.card, known.card_known) == (find_card("L4"), True)
    guessed = gpu_table(text(_23Gi={**L4S, "cards": ["ACME-1"]})).gpu_class("23Gi", 1)
    assert (guessed.card, guessed.card_known) == (BUILT_IN.gpu_class("24Gi", 1).card, False)


def world(*jobs: str, definitions: str, **capacities: int) -> Snapshot:
    table = gpu_table(definitions)
    queue = make_queue("default", {name.strip("_"): count for name, count in capacities.items()})
    made = [make_job(name, status=prepared_status(LLAMA_3_8B)) for name in jobs]
    here = [table.gpu_class(name.strip("_"), count) for name, count in capacities.items()]
    policy = Settings(gpu_class_definitions=definitions).policy()
    return snapshot_of(made, [queue], here, policy, NOW)


def test_a_job_goes_to_a_defined_class_with_a_plan_that_it_holds() -> None:
    present = world("a", "b", definitions=l4s(), _23Gi=1, _80Gi=1)
    placed = [each.estimate for each in schedule(present).placements]
    assert [each.gpu_class for each in placed] == ["23Gi", "80Gi"], "the smallest first, and quotas know it"
    assert placed[0].usable_bytes == 22_016 * MIB
    assert placed[0].peak_bytes <= 22_016 * MIB
    assert placed[0].dollars is not None
    assert placed[1].dollars is None


@settings(max_examples=10, deadline=None)
@given(st.integers(12_000, 22_000))
def test_no_plan_exceeds_what_a_defined_class_promises(usable_mib: int) -> None:
    definitions = text(_23Gi={"usableMiB": usable_mib, "cards": ["NVIDIA-L4"]})
    for placement in schedule(world("a", definitions=definitions, _23Gi=1)).placements:
        assert placement.estimate.peak_bytes <= usable_mib * MIB


def test_plan_and_simulation_know_classes_that_are_not_here() -> None:
    table = gpu_table(l4s())
    plan = plan_job(make_job("a"), LLAMA_3_8B, gpus(_80Gi=1), Known(table=table))
    assert "23Gi" in [each.gpu_class for each in plan.alternatives]
    present = world("a", definitions=l4s(), _80Gi=0)
    assert what_if(present, ["23Gi=+1"], ["default:23Gi=1"], ()).jobs[0].after.gpu_class == "23Gi"
    with pytest.raises(InvalidObject, match="23Gi"):
        what_if(world("a", definitions="", _80Gi=0), ["23Gi=+1"], (), ())


def test_a_job_on_a_class_that_nobody_defines_any_more_waits_or_goes_elsewhere() -> None:
    attempt = make_attempt(gpu_class="23Gi", finish_time=NOW)
    estimate = plan_job(make_job("a"), LLAMA_3_8B, [gpu_table(l4s()).gpu_class("23Gi", 1)]).chosen
    assert estimate is not None
    began = prepared_status(LLAMA_3_8B, attempts=(attempt,), attempts_total=2, estimate=estimate)
    jobs = [make_job("free", status=began), make_job("bound", status=began, gpu_classes=("23Gi",))]
    policy = Settings().policy()
    outcome = schedule(snapshot_of(jobs, [make_queue("default")], gpus(_80Gi=2), policy, NOW))
    assert [(each.claim.key, each.estimate.gpu_class) for each in outcome.placements] == [("default/free", "80Gi")]
    assert "23Gi" in outcome.refusals["default/bound"].message


def test_a_plan_says_so_where_a_class_is_not_known_here() -> None:
    jobs = [make_job("a", gpu_classes=("23Gi", "24Gi"))]
    assert "QLORA_GPU_CLASS_DEFINITIONS" in (undefined_words(jobs, BUILT_IN) or "")
    assert undefined_words(jobs, gpu_table(l4s())) is None


def test_data_sheets_are_the_judge_of_what_a_card_can_give() -> None:
    for card, sheet in DATA_SHEETS.items():
        label = card.replace(" ", "-")
        usable = sheet.total_mib - CONTEXT_MIB + 1
        gib = -(-(usable + CONTEXT_MIB) // 1024) + 400
        if sheet.tflops is not None and usable >= gib * 512:
            with pytest.raises(ValueError, match="can give"):
                gpu_table(json.dumps({f"{gib}Gi": {"usableMiB": usable, "cards": [label]}}))
