"""Models whose layers are not alike: heads of several sizes, keys and values of an earlier layer, inputs of their own.

The judge is `benchmarks.models`: plain transformers and PEFT, one record after the other.
"""

# pyright: reportPrivateUsage=false
# Why: how a trial fares that is not of transformers' own defaults.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.arithmetic import arithmetic
from qlora_trainer.model.layer_inputs import keep_layer_inputs_on_host, layer_inputs_table
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.rehearsal import small_copies
from qlora_trainer.model.source import describe_model, read_facts
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from tiny_model import build_tiny_model
from torch import Tensor
from transformers import AutoConfig

from benchmarks import models
from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import AdapterSpec, ModelSource
from orchestrator.api.plan import MemoryPlan
from orchestrator.errors import InvalidObject

SLIDING, FULL = "sliding_attention", "full_attention"
ADAPTER = AdapterSpec(rank=4, dropout="0")
SHARED: dict[str, Any] = {
    "num_hidden_layers": 10,
    "layer_types": [SLIDING, FULL] * 5,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": True,
    "num_key_value_heads": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "shared keys and values, inputs of each layer": SHARED,
    "keys that are values": {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
    },
    "experts beside a dense layer": {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 4,
        "moe_intermediate_size": 256,
    },
}


def gemma4(folder: Path, fields: dict[str, Any]) -> Path:
    """A tiny model of that shape."""
    config = AutoConfig.for_model("gemma4_text", **fields)
    config.architectures = ["Gemma4ForCausalLM"]
    assert models.make(config, folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's, of transformers
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_as_transformers_and_peft_do(tmp_path: Path, shape: str) -> None:
    folder = gemma4(tmp_path / "model", SHAPES[shape])
    source = f"file://{folder}"
    description = describe_model(source, "main")
    read_facts(description, source)
    assert check_architecture(description, source, ADAPTER).separate_because is None
    row = models._trained(folder, tmp_path)
    assert row["verdict"] == "trained", row
    assert row["mode"] == "packed"


def test_operations_count_every_layers_own_heads(tmp_path: Path) -> None:
    """What is told of a step's speed; the loop asks before the first one."""
    folder = gemma4(tmp_path / "model", {**SHARED, "num_attention_heads": 2, "head_dim": 16, "global_head_dim": 32})
    attention = PackedAttention()
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=16)
    base = load_base(folder, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, ADAPTER, seed=0), plan, attention, 0.0)
    heads = [layer.self_attn.q_proj.out_features for layer in base.model.layers]
    assert len(set(heads)) == 2
    assert arithmetic(model).attention_width == sum(heads)


def gradients(folder: Path, recompute_layers: int, neftune_alpha: float = 0.0) -> dict[str, Tensor]:
    """Of a step, with an adapter whose B is not zero."""
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=recompute_layers, loss_chunk_tokens=16)
    model = TrainingModel(add_adapter(base, ADAPTER, seed=0), plan, attention, neftune_alpha)
    models._wake(model)
    model.train()
    torch.manual_seed(0)
    model.accumulate(models.records(), divisor=1.0)
    return {name: parameter.grad for name, parameter in model.trainable() if parameter.grad is not None}


def test_shared_keys_and_values_have_the_same_gradients_where_layers_recompute(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "model", SHARED)
    layers: int = AutoConfig.from_pretrained(folder).num_hidden_layers
    kept = gradients(folder, 0)
    for recompute in (1, layers - 1, layers):
        recomputed = gradients(folder, recompute)
        assert kept.keys() == recomputed.keys()
        assert not [name for name, each in kept.items() if not torch.equal(each, recomputed[name])]
    makers = {name.split(".layers.")[1].split(".")[0] for name in kept if "k_proj" in name}
    assert makers == {"0", "1"}, "the layers behind have no keys of their own"


def test_layers_behind_are_where_keys_and_values_get_gradients_from(tmp_path: Path) -> None:
    """Without what comes from there, the gradients of the projections that made them would be others."""
    folder = gemma4(tmp_path / "model", SHARED)
    with_them = gradients(folder, 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    attention = PackedAttention()
    base: Any = load_base(folder, torch.device("cpu"), attention)
    for layer in base.model.layers:
        if layer.self_attn.is_kv_shared_layer:
            layer.self_attn.register_forward_pre_hook(_detached, with_kwargs=True)
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=16)
    model = TrainingModel(add_adapter(base, ADAPTER, seed=0), plan, attention, 0.0)
    models._wake(model)
    model.train()
    model.accumulate(models.records(), divisor=1.0)
    without = {name: each.grad for name, each in model.trainable() if each.grad is not None}
    makers = [name for name in with_them if "k_proj" in name or "v_proj" in name]
    assert makers
    assert not [name for name in makers if torch.equal(with_them[name], without[name])]


def _detached(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    shared = {name: tuple(part.detach() for part in parts) for name, parts in kwargs["shared_kv_states"].items()}
    return args, {**kwargs, "shared_kv_states": shared}


# --- inputs of each layer


def test_inputs_of_layers_stay_on_the_host_and_their_rows_travel(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "model", SHARED)
    source = f"file://{folder}"
    base: Any = load_base(folder, torch.device("cpu"), PackedAttention())
    table = layer_inputs_table(base)
    assert table is not None
    assert read_facts(describe_model(source, "main"), source).layer_inputs == table.weight.numel()
    ids = models.records().input_ids
    plain = torch.nn.functional.embedding(ids, table.weight) * base.config.hidden_size_per_layer_input**0.5
    assert torch.equal(table(ids), plain)
    keep_layer_inputs_on_host(base, torch.device("meta"))  # stands in for a card: what is there has no values here
    rows = table(ids)
    assert (rows.device.type, rows.shape) == ("meta", plain.shape)
    assert table.weight.device.type == "cpu"


def test_noise_on_embeddings_leaves_the_inputs_of_layers_alone(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "model", SHARED)
    plain, silent, noisy = (gradients(folder, 0, neftune_alpha=alpha) for alpha in (0.0, 1e-30, 5.0))
    assert not [name for name, each in plain.items() if not torch.equal(each, silent[name])]
    assert all(bool(each.isfinite().all()) for each in noisy.values())
    assert [name for name, each in plain.items() if not torch.equal(each, noisy[name])]


# --- what is refused, and what a copy must have


def test_a_small_copy_has_a_layer_of_each_kind_and_their_proportions() -> None:
    types = [*[SLIDING] * 4, FULL] * 7
    config: Any = AutoConfig.for_model("gemma4_text", num_hidden_layers=35, layer_types=types, num_kv_shared_layers=20)
    copy = next(small_copies(config))
    assert copy.layer_types == [SLIDING, SLIDING, FULL, SLIDING, FULL]
    assert copy.kv_sharing_modes == [None, "store", "store", "reuse", "reuse"]
    assert [copy.per_layer_config[layer].head_dim for layer in range(5)] == [16, 16, 32, 16, 32]
    without: Any = AutoConfig.for_model("gemma4_text", hidden_size_per_layer_input=0)
    assert next(small_copies(without)).hidden_size_per_layer_input == 0


def test_sizes_of_their_own_are_refused_where_the_class_makes_no_such_layers(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "per_layer_config": {"1": {"intermediate_size": 64}}}))
    source = f"file://{folder}"
    with pytest.raises(UserError, match="whose layers have sizes of their own"):
        read_facts(describe_model(source, "main"), source)
    with pytest.raises(InvalidObject, match="whose layers have sizes of their own"):
        model_config.read_facts(ModelSource(source=source))


@pytest.mark.parametrize(("value", "refused"), [("all", True), (True, True), ("vision", False), (None, False)])
def test_text_that_is_seen_on_both_sides_is_refused_and_images_that_are_do_not_matter(
    tmp_path: Path, value: object, refused: bool
) -> None:
    config = {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "hidden_size": 1536}
    sizes = {"intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8, "vocab_size": 262144}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes, "use_bidirectional_attention": value}))
    if refused:
        with pytest.raises(InvalidObject, match="sees the text on both sides"):
            model_config.read_facts(ModelSource(source=f"file://{tmp_path}"))
    else:
        assert model_config.read_facts(ModelSource(source=f"file://{tmp_path}")).model_type == "gemma4_text"
