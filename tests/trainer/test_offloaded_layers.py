"""What layers keep for the backward pass waits in host memory and comes back the same, to the bit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels.host_offload import ActivationStore, pinned
from qlora_trainer.model.training_model import TrainingModel
from test_model import equal, gradients, make_model, make_records, wake_adapter
from tiny_model import tiny_model
from torch import Tensor

CPU = torch.device("cpu")
LAYERS = 5


def build(family: str = "llama", **fields: Any) -> TrainingModel:
    model = make_model(tiny_model(family, layers=LAYERS), **{"dropout": "0.2", **fields})
    wake_adapter(model)
    return model


@pytest.mark.parametrize(
    ("family", "offloaded_layers", "fields"),
    [
        ("llama", 2, {"recompute_layers": 2, "offload": ("activations", "embeddings")}),
        ("qwen3", 3, {"recompute_layers": 1, "keep_attention": True, "streamed_layers": 3}),
        ("gemma3_text", LAYERS, {}),
        ("mixtral", 2, {"neftune_alpha": 5.0}),
    ],
)
def test_offloading_what_layers_keep_changes_no_bit(family: str, offloaded_layers: int, fields: dict[str, Any]) -> None:
    batches = [collate(make_records(seed)) for seed in (6, 7)]
    resident, offloaded = build(family, **fields), build(family, offloaded_layers=offloaded_layers, **fields)
    offloaded.check()
    assert offloaded.fused is not None
    assert equal(gradients(offloaded, batches), gradients(resident, batches))


def test_a_micro_batch_that_was_given_up_leaves_nothing_behind() -> None:
    batches = [collate(make_records(seed)) for seed in (6, 7)]
    resident, offloaded = build(), build(offloaded_layers=3)
    for model in (resident, offloaded):
        model.train()
        model.loss(batches[1], divisor=1.0)  # nobody asks for its gradients
    assert equal(gradients(offloaded, batches), gradients(resident, batches))


def test_activations_of_two_layers_are_on_the_card_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them leaves, or comes, while the other is made or used."""
    happened: list[tuple[str, int]] = []
    most = 0

    def noted(name: str) -> None:
        method = getattr(ActivationStore, name)

        def note(self: ActivationStore, layer: int, *rest: Any) -> Any:
            nonlocal most
            happened.append((name, layer))
            found = method(self, layer, *rest)
            most = max(most, len(self._arriving) + bool(self._leaving))  # pyright: ignore[reportPrivateUsage]
            return found

        monkeypatch.setattr(ActivationStore, name, note)

    model = build(offloaded_layers=2, recompute_layers=1)  # 0 recomputes, 1 and 3 are offloaded, 2 and 4 stay
    for name in ("put", "take", "fetch"):
        noted(name)
    gradients(model, [collate(make_records())])
    asked = ["fetch 3", "take 3", "fetch 3", "fetch 1", "take 1", "fetch 1"]  # whoever takes asks for what is not there
    assert [f"{name} {layer}" for name, layer in happened] == ["put 1", "put 3", *asked]
    assert most == 1


def test_longer_rows_get_more_room_and_shorter_ones_keep_it() -> None:
    store = ActivationStore(CPU)
    for length in (4, 700, 9):
        kept = (torch.randn(length, 3), None, torch.arange(length), torch.randn(length).bfloat16())
        store.put(0, kept)
        found: list[Tensor | None] = store.take(0)
        assert found[1] is None
        assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True) if a is not None and b is not None)


def test_layers_that_transformers_computes_recompute_instead_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="qlora_trainer.model")
    model = build(use_dora=True, recompute_layers=1, offloaded_layers=2)
    assert "the activations stay on the card" in caplog.text
    recomputing = [module.gradient_checkpointing for module in model.base.model.layers]
    assert recomputing == [True, True, True, False, False]


def test_memory_that_cannot_be_pinned_is_told_of_with_the_field_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802 - its name
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    with pytest.raises(MemoryError, match=r"for what a layer keeps cannot be pinned .* the plan's offloadedLayers"):
        pinned(1 << 20, torch.device("cuda"), "what a layer keeps", "offloadedLayers")
