"""The model that is trained: NF4 as published, an adapter as PEFT saves it, and a loss that is transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_base import base_in_nf4
from qlora_trainer.data.micro_batch import MicroBatch, StepInputs, collate
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model, save_tokenizer, tiny_model
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.api.job import AdapterSpec
from orchestrator.api.plan import AttentionKernels, MemoryPlan, OffloadTarget

CPU = torch.device("cpu")
LENGTHS = (9, 21, 4)


def make_model(
    folder: Path | None = None,
    *,
    seed: int = 1,
    recompute_layers: int = 0,
    chunk_tokens: int = 16,
    neftune_alpha: float = 0.0,
    offload: tuple[OffloadTarget, ...] = (),
    keep_attention: bool = False,
    attention: AttentionKernels = "own",
    packed_attention: PackedAttention | None = None,
    streamed_layers: int = 0,
    offloaded_layers: int = 0,
    **adapter: Any,
) -> TrainingModel:
    packed_attention = packed_attention or PackedAttention()
    base = load_base(folder or tiny_model(), CPU, packed_attention, streamed_layers=streamed_layers)
    peft_model = add_adapter(base, AdapterSpec(**{"rank": 4, "alpha": 8, "dropout": "0", **adapter}), seed=seed)
    plan = MemoryPlan(
        micro_batch_size=1,
        accumulation_steps=1,
        recompute_layers=recompute_layers,
        loss_chunk_tokens=chunk_tokens,
        offload=offload,
        keep_attention=keep_attention,
        attention=attention,
        streamed_layers=streamed_layers,
        offloaded_layers=offloaded_layers,
    )
    return TrainingModel(peft_model, plan, packed_attention, neftune_alpha)


def wake_adapter(model: TrainingModel) -> None:
    """Give B values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.trainable():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_records(seed: int = 6) -> list[tuple[Any, Any, Any]]:
    source = np.random.RandomState(seed)
    tokens = [source.randint(5, 500, size=length).astype(np.int32) for length in LENGTHS]
    return [(ids, ids, np.arange(len(ids), dtype=np.int32)) for ids in tokens]


def gradients(model: TrainingModel, batches: list[MicroBatch], *, seed: int = 0) -> list[Tensor]:
    model.train()
    torch.manual_seed(seed)
    for batch in batches:
        model.loss(batch, divisor=float(sum(LENGTHS) - len(LENGTHS))).backward()
    found = [parameter.grad for _, parameter in model.trainable() if parameter.grad is not None]
    model.peft_model.zero_grad(set_to_none=True)
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- the base


def test_the_base_is_nf4_with_double_quantization_and_nothing_is_float32() -> None:
    model = make_model(use_dora=True)
    layers = [module for module in model.base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
        assert layer.weight.dtype == torch.uint8
    floating = {p.dtype for p in model.base.parameters() if p.is_floating_point()}
    assert floating == {torch.bfloat16}


def test_only_the_adapter_is_trained_on_every_linear_layer_but_the_head() -> None:
    model = make_model(use_dora=True)
    trained = [name for name, parameter in model.peft_model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 3
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_target_modules_may_be_named_and_unknown_ones_are_refused() -> None:
    model = make_model(target_modules=("q_proj", "mlp.down_proj"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.trainable()}
    assert names == {"q_proj", "down_proj"}
    with pytest.raises(UserError, match=r"'w_proj' is no linear layer .* an adapter; choose of down_proj, gate_proj"):
        make_model(target_modules=("q_proj", "w_proj"))
    with pytest.raises(UserError, match="lm_head"):
        make_model(target_modules=("lm_head",))


# --- the adapter


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone() -> None:
    batch = collate(make_records())
    first, again, other = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    torch.manual_seed(99)
    assert equal(list(first.adapter().values()), list(again.adapter().values()))
    assert not equal(list(first.adapter().values()), list(other.adapter().values()))
    for model in (first, other):
        model.eval()
    with torch.no_grad():
        with first.peft_model.disable_adapter():
            base_loss = first.loss(batch, divisor=1.0)
        assert first.loss(batch, divisor=1.0) == other.loss(batch, divisor=1.0) == base_loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_adapter_is_the_one_that_peft_saves_and_loads(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    wake_adapter(model)
    model.peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == model.adapter().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.adapter().items())

    fresh = load_base(tiny_model(), CPU, PackedAttention())
    fresh.set_attn_implementation("sdpa")
    loaded = PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False).eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        theirs = loaded(input_ids=ids, labels=ids).loss
        row = ids[0].numpy().astype(np.int32)
        model.eval()
        ours = model.loss(collate([(row, row, np.arange(20, dtype=np.int32))]), divisor=19.0)
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=0)


def test_loading_an_adapter_keeps_its_type_and_refuses_another() -> None:
    model, other = make_model(seed=1), make_model(seed=2)
    model.load_adapter(other.adapter())
    assert equal(list(model.adapter().values()), list(other.adapter().values()))
    with pytest.raises(ValueError, match="not of this model and spec"):
        model.load_adapter({name: tensor.float() for name, tensor in other.adapter().items()})
    with pytest.raises(ValueError, match="not of this model and spec"):
        model.load_adapter(make_model(rank=8).adapter())


# --- loss and packing


def reference_loss(folder: Path, records: list[tuple[Any, Any, Any]]) -> float:
    """Every record by itself through transformers' own model, attention and loss."""
    model = base_in_nf4(folder, attn_implementation="eager")
    model.train()  # an evaluation would repack the weights on some CPUs
    total = 0.0
    with torch.no_grad():
        for ids, _, _ in records:
            tensor = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
            total += float(model(input_ids=tensor, labels=tensor).loss) * (len(ids) - 1)
    return total


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6, "final_logit_softcapping": 2.0, "attention_dropout": 0.0}),
        ("granite", {"logits_scaling": 4.0, "attention_dropout": 0.0}),
        ("cohere", {"logit_scale": 0.5}),
    ],
)
def test_the_loss_of_a_packed_row_is_that_of_its_records_alone(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    folder = build_tiny_model(tmp_path / family, family, **config)
    model = make_model(folder)
    model.check()
    records = make_records()
    with torch.no_grad():
        packed = float(model.loss(collate(records), divisor=1.0))
    assert packed == pytest.approx(reference_loss(folder, records), rel=2e-3)


def test_tokens_of_one_record_do_not_move_another() -> None:
    model = make_model()
    wake_adapter(model)
    first, second, third = make_records()
    changed = make_records(seed=7)[1]
    with torch.no_grad():
        model.eval()
        one = model._hidden(StepInputs.of(collate([first, second, third]), 0, 1.0, CPU))
        other = model._hidden(StepInputs.of(collate([first, changed, third]), 0, 1.0, CPU))
    middle = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    assert torch.equal(one[:, : middle.start], other[:, : middle.start])
    assert torch.equal(one[:, middle.stop :], other[:, middle.stop :])
    assert not torch.equal(one[:, middle], other[:, middle])


def test_an_architecture_that_mixes_packed_records_is_trained_record_by_record(tmp_path: Path) -> None:
    config = {"state_size": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1, "intermediate_size": 128}
    folder = build_tiny_model(tmp_path / "mamba2", "mamba2", **config)
    model = make_model(folder, target_modules=("in_proj",))
    wake_adapter(model)
    model.check()
    assert model.separate
    together = gradients(model, [collate(make_records())])
    alone = gradients(model, [collate([record]) for record in make_records()])
    model.separate_because = None
    mixed = gradients(model, [collate(make_records())])
    for one, other, wrong in zip(together, alone, mixed, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))
        assert not torch.equal(one, wrong)
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name, _ in make_model(folder).trainable()} == {
        "in_proj"
    }
    with pytest.raises(UserError, match="is no linear layer of the model that can have an adapter"):
        make_model(folder, target_modules=("out_proj",))


def test_splitting_into_micro_batches_gives_the_same_gradient_up_to_rounding() -> None:
    model = make_model()
    wake_adapter(model)
    together = gradients(model, [collate(make_records())])
    apart = gradients(model, [collate([record]) for record in make_records()])
    distance = torch.stack([(a.float() - b.float()).norm() for a, b in zip(together, apart, strict=True)]).norm()
    size = torch.stack([gradient.float().norm() for gradient in together]).norm()
    assert 0 < distance < 0.02 * size


# --- traps


def test_gradients_after_an_evaluation_are_those_before_it_bit_for_bit() -> None:
    model = make_model(dropout="0.1")
    wake_adapter(model)
    batch = collate(make_records())
    before = gradients(model, [batch])
    model.eval()
    with torch.no_grad():
        model.loss(batch, divisor=1.0)
    assert equal(gradients(model, [batch]), before)
    assert all(gradient.any() for gradient in before)


@pytest.mark.parametrize("recompute_layers", [1, 2])
def test_recomputing_layers_changes_no_bit_even_with_dropout_and_noise(recompute_layers: int) -> None:
    batch = collate(make_records())
    kept = make_model(dropout="0.2", neftune_alpha=5.0)
    recomputed = make_model(dropout="0.2", neftune_alpha=5.0, recompute_layers=recompute_layers)
    for model in (kept, recomputed):
        wake_adapter(model)
    assert equal(gradients(recomputed, [batch]), gradients(kept, [batch]))


def test_recomputing_keeps_fewer_tensors() -> None:
    def kept_bytes(model: TrainingModel) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.loss(collate(make_records()), divisor=1.0)
        return sum(kept.values())

    sizes = [kept_bytes(make_model(recompute_layers=layers)) for layers in (0, 1, 2)]
    assert sizes[0] > 1.2 * sizes[1] > 1.4 * sizes[2]


def test_layers_that_nobody_took_over_recompute_too(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "olmo", "olmo")
    batch = collate(make_records())
    kept, recomputed = (make_model(folder, dropout="0.2", recompute_layers=layers) for layers in (0, 1))
    for model in (kept, recomputed):
        wake_adapter(model)
    layers = [module for module in recomputed.base.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert equal(gradients(recomputed, [batch]), gradients(kept, [batch]))


def test_noise_on_the_embeddings_has_the_published_size_and_is_off_in_evaluation() -> None:
    model = make_model(neftune_alpha=5.0)
    batch = collate(make_records())
    embedded = model.base.get_input_embeddings()(batch.input_ids)
    torch.manual_seed(0)
    noise = (model._with_noise(embedded, batch) - embedded).float()[0]
    start = 0
    for length in LENGTHS:  # alpha / sqrt(length x width), uniform
        limit = 5.0 / math.sqrt(length * embedded.shape[-1])
        part = noise[start : start + length]
        assert part.abs().max() <= limit * 1.02
        assert part.std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        start += length
    model.eval()
    with torch.no_grad():
        assert model.loss(batch, divisor=1.0) == model.loss(batch, divisor=1.0)


# --- random weights


def write_random_model(folder: Path) -> Path:
    save_tokenizer(folder)
    config = json.loads((tiny_model() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "random_weights.json").write_text('{"seed": 3}')
    return folder


def test_random_weights_are_refused_unless_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="QLORA_ALLOW_RANDOM_WEIGHTS=1"):
        load_base(write_random_model(tmp_path), CPU, PackedAttention())


def test_random_weights_take_the_memory_of_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    folder = write_random_model(tmp_path)
    random, again, real = make_model(folder), make_model(folder), make_model()

    def layout(model: TrainingModel) -> dict[str, tuple[Any, ...]]:
        # Without the quantization's description, whose text has the digits of a mean in it.
        tensors = {name: t for name, t in model.base.state_dict().items() if not name.endswith("bitsandbytes__nf4")}
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    assert layout(random) == layout(real)
    random.check()
    batch = collate(make_records())
    with torch.no_grad():
        loss = random.loss(batch, divisor=float(sum(LENGTHS) - len(LENGTHS)))
        assert loss == again.loss(batch, divisor=float(sum(LENGTHS) - len(LENGTHS)))
    assert loss.item() == pytest.approx(math.log(AutoConfig.from_pretrained(folder).vocab_size), rel=0.1)
    assert gradients(random, [batch])


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(tmp_path: Path, name: str, odd: float) -> None:
    folder = build_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = odd
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=f"LlamaForCausalLM has weights that are not finite .* in 1 tensors, .* {name};"
    ):
        load_base(folder, CPU, PackedAttention())
