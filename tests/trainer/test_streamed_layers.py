"""Layers that come from the host compute what layers that stay on the card do, to the bit, however they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from qlora_trainer import train
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels.streamed_layers import StreamedLayers
from qlora_trainer.model.loading import load_base, streamed
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors.torch import load_file
from test_model import equal, gradients, make_model, make_records, wake_adapter
from test_resume import losses, run_until
from tiny_model import save_tokenizer, tiny_model
from torch import Tensor
from toy_job import digest_of_adapter, make_task

from orchestrator.api import trainer_facts

CPU = torch.device("cpu")
LAYERS = 5


def build(family: str = "llama", streamed_layers: int = 0, **fields: Any) -> TrainingModel:
    model = make_model(
        tiny_model(family, layers=LAYERS), streamed_layers=streamed_layers, **{"dropout": "0.2", **fields}
    )
    wake_adapter(model)
    return model


def learned(model: TrainingModel) -> list[Tensor]:
    """Losses with and without gradients, logits, and the gradients of two micro-batches that follow each other."""
    batches = [collate(make_records(seed)) for seed in (6, 7)]
    found = [loss.detach() for loss in (model.loss(batch, divisor=3.0) for batch in batches)]
    with torch.no_grad():
        model.eval()
        found += [model.logits(batches[0]), model.reference_log_probabilities(batches[1])]
    return [*found, *gradients(model, batches)]


def test_streamed_layers_lie_evenly_among_the_others() -> None:
    for layers in range(1, 12):
        for count in range(layers + 3):
            numbers = trainer_facts.streamed_numbers(count, layers)
            assert len(numbers) == min(count, layers)
            gaps = [after - before for before, after in zip((-1, *numbers), (*numbers, layers), strict=True)]
            assert not numbers or max(gaps[:-1]) - min(gaps[:-1]) <= 1


@pytest.mark.parametrize("streamed_layers", [1, 2, 3, LAYERS])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"recompute_layers": 3}),
        ("qwen3", {"recompute_layers": LAYERS, "offload": ("activations", "embeddings")}),
        ("gemma3_text", {"recompute_layers": 2, "keep_attention": True}),
        ("mixtral", {"recompute_layers": 2}),
        ("qwen3_moe", {"recompute_layers": LAYERS}),
    ],
)
def test_streaming_changes_no_bit(family: str, fields: dict[str, Any], streamed_layers: int) -> None:
    resident, from_host = build(family, **fields), build(family, streamed_layers, **fields)
    assert from_host.fused is not None
    from_host.check()
    assert from_host.fused is not None
    assert equal(learned(from_host), learned(resident))


def test_a_pass_copies_each_layer_once_and_what_is_there_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two that are there at each end."""
    model = build(streamed_layers=4)
    copied: list[int] = []
    fetch = StreamedLayers._fetch  # pyright: ignore[reportPrivateUsage]

    def noted(self: StreamedLayers, place: int) -> None:
        before = [buffer.place for buffer in self._buffers]  # pyright: ignore[reportPrivateUsage]
        fetch(self, place)
        if [buffer.place for buffer in self._buffers] != before:  # pyright: ignore[reportPrivateUsage]
            copied.append(place)

    batches = [collate(make_records(seed)) for seed in (6, 7)]
    gradients(model, batches)
    monkeypatch.setattr(StreamedLayers, "_fetch", noted)
    gradients(model, batches)
    assert copied == [2, 3, 1, 0] * 2


def test_all_streamed_layers_share_two_buffers() -> None:
    base: Any = load_base(tiny_model(layers=LAYERS), CPU, PackedAttention(), streamed_layers=4)
    storages = {
        parameter.untyped_storage().data_ptr()
        for parameter in base.parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }
    assert len(storages) == 2 + 7  # and one layer that stays, of seven matrices
    layers = streamed(base)
    assert layers is not None
    assert layers.count == 4
    weights = sum(each.nbytes for each in base.model.layers[0].parameters() if isinstance(each, bnb.nn.Params4bit))
    assert layers.host_bytes > 4 * weights


def test_answers_come_from_streamed_layers_too() -> None:
    """Where transformers computes them, once training has ended."""
    resident, from_host = build(), build(streamed_layers=3)
    ids = torch.arange(5, 25).unsqueeze(0)
    found: list[Tensor] = []
    for model in (resident, from_host):
        model.end_training()
        with torch.no_grad():
            found.append(model.peft_model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
            found.append(model.base(input_ids=ids, use_cache=False).logits)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def weights_of(base: Any) -> dict[str, Tensor]:
    """The dense weights of every matrix, each layer's once its turn has come."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(base.model.layers):
        if (layers := streamed(base)) is not None:
            layers.take(number)
        for name, parameter in layer.named_parameters():
            state = getattr(parameter, "quant_state", None)
            dense = parameter.detach() if state is None else bnb.functional.dequantize_4bit(parameter.data, state)
            found[f"{number}.{name}"] = dense.clone()
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_are_the_same_from_a_checkpoint_from_the_cache_and_drawn_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    caplog.set_level("INFO")
    folder = tiny_model(family, layers=LAYERS)
    random = tmp_path / "random"
    save_tokenizer(random)
    (random / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    (random / "random_weights.json").write_text('{"seed": 3}')
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    for each in (folder, random):
        expected = weights_of(load_base(each, CPU, PackedAttention()))
        found = weights_of(load_base(each, CPU, PackedAttention(), streamed_layers=3))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    expected = weights_of(load_base(folder, CPU, PackedAttention()))
    monkeypatch.setenv("QLORA_MODEL_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        found = weights_of(load_base(folder, CPU, PackedAttention(), streamed_layers=3))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "from the cache of quantized weights" in caplog.text
    found = weights_of(load_base(folder, CPU, PackedAttention()))  # which a plan that streams has written
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_type_that_transformers_computes_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="layers of gemma2 cannot be streamed"):
        load_base(tiny_model("gemma2"), CPU, PackedAttention(), streamed_layers=1)


def test_a_model_whose_layers_go_back_to_transformers_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="the plan streams 1 layers from the host"):
        make_model(streamed_layers=1, use_dora=True)


def test_a_base_of_another_plan_is_not_trained_on() -> None:
    packed = PackedAttention()
    resident = make_model(packed_attention=packed)
    plan = resident._plan.model_copy(update={"streamed_layers": 1})  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ValueError, match="loaded for another plan"):
        TrainingModel(resident.peft_model, plan, packed, 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_job_that_streams_ends_with_the_adapter_of_one_that_does_not_and_so_does_one_that_was_stopped(
    tmp_path: Path, family: str
) -> None:
    job: dict[str, Any] = {
        "family": family,
        "adapter": {"dropout": "0.1"},
        "training": {"optimizer": "paged_adamw_8bit"},
        "evaluation": {"every_steps": 2},
        "recompute_layers": 1,
        "steps": 4,
        "layers": LAYERS,
    }
    train.run(make_task(tmp_path / "resident", **job))
    train.run(make_task(tmp_path / "streamed", streamed_layers=4, **job))
    run_until(make_task(tmp_path / "stopped", streamed_layers=4, **job), 3)
    train.run(make_task(tmp_path / "stopped", streamed_layers=4, attempt=2, **job))
    adapters = [tmp_path / name / "adapter" for name in ("resident", "streamed", "stopped")]
    digests = {digest_of_adapter(folder.parent) for folder in adapters}
    assert len(digests) == 1
    assert losses(adapters[0].parent) == losses(adapters[1].parent) == losses(adapters[2].parent)
    assert load_file(adapters[1] / "adapter_model.safetensors")
