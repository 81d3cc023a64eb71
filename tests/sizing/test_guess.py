"""What is said of a model type whose layers nobody has traced: that figures are guesses, and what these are worth."""

from __future__ import annotations

import pytest

from orchestrator.api import trainer_facts
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.package_data import traced_layers
from orchestrator.api.reasons import Refusal
from orchestrator.sizing.guess import guess_words
from orchestrator.sizing.plan_search import choose_class
from tests.builders import LLAMA_3_8B, gpus, make_spec

LLAMA_WITH_DORA = make_spec(use_dora=True)
"""An adapter under which Llama's layers are transformers', as those of the guess are."""


def facts(model_type: str) -> ModelFacts:
    return LLAMA_3_8B.model_copy(update={"model_type": model_type})


@pytest.mark.parametrize("model_type", sorted(trainer_facts.HANDWRITTEN_TYPES | traced_layers().keys()))
def test_what_was_traced_or_written_by_hand_is_no_guess(model_type: str) -> None:
    for spec in (make_spec(), LLAMA_WITH_DORA):
        assert guess_words(spec.adapter, facts(model_type)) is None


def test_a_refusal_says_that_it_is_a_guess_and_what_guesses_were_off_by() -> None:
    [offered] = gpus(_24Gi=1)
    refused = choose_class(make_spec(sequence_length=65_536), facts("glm4"), (offered,))
    assert isinstance(refused, Refusal)
    assert (
        "(a guess: layers of model type glm4 were never traced: until prepare does, they are sized like Llama's"
        in refused.message
    )
    assert "% under to " in refused.message
