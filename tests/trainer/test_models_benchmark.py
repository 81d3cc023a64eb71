"""Types of models, each tried as a tiny one: trained as transformers and PEFT do, or refused in prepare.

`QLORA_ALL_TYPES=1` tries every type that transformers has, ten minutes or more; a seeded tenth is tried otherwise.
"""

from __future__ import annotations

import os

import pytest
import transformers

from benchmarks import models

EVERY = os.environ.get("QLORA_ALL_TYPES") == "1"
SEED = int(os.environ.get("QLORA_TYPES_SEED", "1"))


@pytest.mark.parametrize("model_type", models.TYPES if EVERY else models.tenth(SEED))
def test_a_type_trains_right_or_is_refused_in_prepare(model_type: str) -> None:
    row = models.try_apart(model_type)
    assert row["verdict"] in ("trained", "refused"), row


def test_the_documented_types_are_those_that_were_found_to_train() -> None:
    known = models.known_rows()
    assert known["versions"]["transformers"] == transformers.__version__
    assert known["types"].keys() == set(models.TYPES)
    assert models.SHIPPED.read_text() == models.shipped(known)
    assert not {row["verdict"] for row in known["types"].values()} & {"wrong", "crashed"}


def test_the_judge_sees_a_wrong_gradient_and_a_wrong_first_token() -> None:
    import torch

    logits, gradients = torch.ones(sum(models.LENGTHS), 8), {"a": torch.ones(4), "b": torch.ones(4)}
    truth = (2.0, logits, gradients)
    off = logits.clone()
    off[models.LENGTHS[0]] += 1.0
    found = models.differences(truth, truth, (2.0, off, {**gradients, "b": torch.zeros(4)}))
    assert models.faults(found) == [
        "logits is off by 1, plain QLoRA by 0",
        "first tokens is off by 1, plain QLoRA by 0",
        "gradients is off by 1, plain QLoRA by 0",
    ]
