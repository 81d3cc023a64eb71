"""What answers to held-out prompts take, held against what they took on an H200 (one prompt, a rank of 64)."""

from __future__ import annotations

import pytest

from orchestrator.api.job import EvaluationSpec, GenerationSpec, QLoRAJobSpec
from orchestrator.api.model_facts import Mixture, ModelFacts
from orchestrator.api.plan import Estimate
from orchestrator.sizing.answering import answering_bytes
from orchestrator.sizing.plan_search import choose_class
from orchestrator.sizing.step_time import Work
from tests.builders import LLAMA_3_8B, SMOLLM2_135M, gpus, make_spec, model_facts

MIB = 1 << 20
ALL = gpus(_24Gi=1, _48Gi=1, _80Gi=1)


def facts(model_type: str, *sizes: int) -> ModelFacts:
    return model_facts(*sizes, model_type=model_type)


EXPERTS = Mixture(experts=128, experts_per_token=8, expert_size=768)
MEASURED = [
    (facts("llama", 4096, 14_336, 32, 32, 8, 128, 128_256), (218, 543, 1079)),
    (facts("llama", 4096, 11_008, 32, 32, 32, 128, 32_000), (362, 1243, 2497)),
    (facts("gemma2", 2304, 9216, 26, 8, 4, 256, 256_000), (120, 578, 1834)),
    (facts("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936), (67, 283, 572)),
    (facts("phi3", 3072, 8192, 32, 32, 32, 96, 32_064), (305, 989, 1997)),
    (
        facts("qwen3_moe", 2048, 6144, 12, 32, 4, 128, 151_936).model_copy(update={"mixture": EXPERTS}),
        (296, 429, 607),
    ),
    (facts("gpt_neox", 2560, 10_240, 32, 32, 32, 80, 50_432), (221, 784, 1584)),
    (facts("llama", 8192, 28_672, 20, 64, 8, 128, 128_256), (594, 979, 1492)),
]
"""Allocated MiB beside what lasts, for prompts of 472, 2,008 and 4,056 tokens and answers of 40."""


@pytest.mark.parametrize(("model", "measured"), MEASURED, ids=lambda each: getattr(each, "model_type", ""))
def test_answers_take_less_than_is_counted(model: ModelFacts, measured: tuple[int, ...]) -> None:
    for length, taken in zip((512, 2048, 4096), measured, strict=True):
        assert answering_bytes(model, length) >= taken * MIB
        assert answering_bytes(model, length) <= 5 * taken * MIB, "it is a bound, and no wild guess"


def asking(spec: QLoRAJobSpec, **generation: int) -> QLoRAJobSpec:
    dataset = spec.dataset.model_copy(update={"eval_fraction": "0.1"})
    evaluation = EvaluationSpec(generation=GenerationSpec.model_validate(generation))
    return spec.model_copy(update={"dataset": dataset, "evaluation": evaluation})


def chosen(spec: QLoRAJobSpec, model: ModelFacts = LLAMA_3_8B) -> Estimate:
    found = choose_class(spec, model, ALL, work=Work(steps=10))
    assert isinstance(found, Estimate)
    return found


def test_who_asks_for_no_answers_pays_for_none() -> None:
    plain = chosen(make_spec())
    assert plain.answering_seconds is None
    assert not [item for item in plain.items if "answering" in item.name]


def test_time_grows_with_what_is_asked() -> None:
    few, many = chosen(asking(make_spec(), prompts=8)), chosen(asking(make_spec(), prompts=64))
    assert few.answering_seconds is not None
    assert many.answering_seconds == pytest.approx(8 * few.answering_seconds)
    assert (few.seconds, few.step_seconds) == (many.seconds, many.step_seconds)


def test_a_job_that_trains_in_less_is_sized_for_its_answers() -> None:
    spec = make_spec(rank=1, global_batch_size=1, sequence_length=512)
    plain, asked = chosen(spec, SMOLLM2_135M), chosen(asking(spec), SMOLLM2_135M)
    assert asked.peak_bytes >= plain.peak_bytes
    assert asked.predicted_bytes >= answering_bytes(SMOLLM2_135M, 512)
