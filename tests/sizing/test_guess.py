"""Model types whose layers nobody has traced are sized with room for the worst guess that was measured."""

from __future__ import annotations

from math import ceil

import pytest

from orchestrator.api import trainer_facts
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.package_data import traced_layers
from orchestrator.api.plan import GUESS_ITEM, MemoryPlan
from orchestrator.api.reasons import Refusal
from orchestrator.sizing.footprint import Footprint, footprint
from orchestrator.sizing.guess import WORST_UNDER, guess_words
from orchestrator.sizing.margins import Margins, plan_kind
from orchestrator.sizing.plan_search import choose_class
from tests.builders import LLAMA_3_8B, gpus, make_spec

PLAN = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=32)
LLAMA_WITH_DORA = make_spec(use_dora=True)
"""An adapter under which Llama's layers are transformers', as those of the guess are."""


def facts(model_type: str) -> ModelFacts:
    return LLAMA_3_8B.model_copy(update={"model_type": model_type})


def peak(model_type: str, margins: Margins | None = None) -> int:
    found = Footprint(LLAMA_WITH_DORA, facts(model_type), PLAN, margins=margins or Margins())
    return found.peak_bytes(PLAN.recompute_layers)


def guess_bytes(model_type: str) -> int:
    items = footprint(LLAMA_WITH_DORA, facts(model_type), PLAN)
    return sum(item.bytes for item in items if item.name == GUESS_ITEM)


def test_the_job_that_took_most_over_its_guess_would_have_fitted() -> None:
    taken = ceil(peak("llama") / (1 + WORST_UNDER))
    assert peak("glm4") >= taken
    assert peak("glm4") == pytest.approx(taken, rel=1e-6), "and no more is asked for"
    assert guess_bytes("glm4") == peak("glm4") - peak("llama")


@pytest.mark.parametrize("model_type", sorted(trainer_facts.HANDWRITTEN_TYPES | traced_layers().keys()))
def test_what_was_traced_or_written_by_hand_is_no_guess(model_type: str) -> None:
    for spec in (make_spec(), LLAMA_WITH_DORA):
        assert guess_words(spec.adapter, facts(model_type)) is None


def test_enough_finished_jobs_of_the_type_take_the_place_of_the_guess() -> None:
    kind = plan_kind(PLAN.recompute_layers, LLAMA_3_8B.num_layers, PLAN.offload)
    assert peak("glm4", Margins(shares=((kind, 0.01, True),))) < 1.02 * peak("llama")
    assert peak("glm4", Margins(shares=((kind, 0.01, False),))) == peak("glm4")


def test_a_plan_leaves_the_room_and_a_refusal_says_what_it_is_for() -> None:
    [offered] = gpus(_24Gi=1)
    chosen = choose_class(make_spec(), facts("glm4"), (offered,))
    assert not isinstance(chosen, Refusal)
    assert chosen.predicted_bytes <= offered.usable_bytes * (1 + WORST_UNDER) * 1.001
    refused = choose_class(make_spec(sequence_length=65_536), facts("glm4"), (offered,))
    assert isinstance(refused, Refusal)
    assert (
        "(a guess: layers of model type glm4 were never traced: until prepare does, they are sized like Llama's"
        in refused.message
    )
