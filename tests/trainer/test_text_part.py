"""Models of images and text are trained as text: without their images' part, and as PEFT sees the whole model.

The judge is the whole model, as transformers loads it by the class that config.json names, with the adapter on it that
PEFT reads from the folder.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Why: torch, transformers and PEFT declare some of these functions only in part.

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from plain_base import nf4
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import ADAPTER_NAME, add_adapter
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.layer_trace import traced_facts
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.source import describe_model, known_config, load_tokenizer, read_facts, resolve_model
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import models
from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import AdapterSpec, ModelSource
from orchestrator.api.plan import MemoryPlan
from orchestrator.errors import InvalidObject
from orchestrator.sdk.planning import plan_job
from tests.builders import make_job
from tests.trainer.tiny_model import save_tokenizer

TYPES = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl")
CHAOS = {"qwen3_5": 10, "qwen3_5_moe": 10, "gemma4": 2}
"""How much more they make of a rounding: random gates of delta nets, and scores of heads that are not scaled."""
IMAGES = ("vision", "visual", "projector", "merger")
CLOSE = 0.02
"""Largest relative difference between logits of two ways in bfloat16; the base alone is off by far more."""


def whole_model(model_type: str, folder: Path) -> Path:
    """A tiny random one, images' part and all, with a tokenizer."""
    models.make(models.default_config(model_type), folder)
    save_tokenizer(folder, vocab_size=300)
    return folder


def trained(folder: Path) -> TrainingModel:
    """After a step, with an adapter that is not zero."""
    torch.manual_seed(0)
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=16)
    model = TrainingModel(add_adapter(base, AdapterSpec(rank=4, dropout="0"), seed=0), plan, attention, 0.0)
    model.check()
    for name, parameter in model.trainable():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    model.train()
    model.accumulate(models.records(), divisor=1.0)
    for _, parameter in model.trainable():
        if parameter.grad is not None:
            parameter.data -= 0.01 * parameter.grad / parameter.grad.norm().clamp(min=1e-3)
    model.eval()
    return model


def save_adapter(model: TrainingModel, folder: Path) -> Path:
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.adapter().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    model.peft_model.peft_config[ADAPTER_NAME].save_pretrained(str(folder))
    return folder


def loaded_by_name(folder: Path) -> Any:
    """The whole model in NF4, by the class that config.json names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    architecture: Any = getattr(transformers, name)
    base = architecture.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=nf4(), attn_implementation="eager"
    )
    return models.as_trained(base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's, of transformers
@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")  # Llama 4's rotary embeddings
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_the_whole_model_says_with_the_adapter_what_training_said(model_type: str, tmp_path: Path) -> None:
    folder = whole_model(model_type, tmp_path / "model")
    with torch.enable_grad():
        model = trained(folder)
    base = loaded_by_name(folder)
    models.fill_experts(base, model)
    whole: Any = PeftModel.from_pretrained(base, str(save_adapter(model, tmp_path / "adapter"))).eval()

    batch = models.records()
    starts = list(pairwise(batch.record_starts.tolist()))
    theirs = torch.cat([whole(input_ids=batch.input_ids[:, a:b], use_cache=False).logits[0] for a, b in starts]).float()
    ours = model.logits(batch)
    with whole.disable_adapter():
        bare = torch.cat([whole(input_ids=batch.input_ids[:, a:b], use_cache=False).logits[0] for a, b in starts])
    assert float((ours - theirs).norm() / theirs.norm()) <= CLOSE * CHAOS.get(model_type, 1)
    assert float((bare.float() - theirs).norm() / theirs.norm()) > 10 * CLOSE

    has = {name for name, _ in whole.named_parameters() if any(part in name for part in IMAGES)}
    # Gemma 4's own defaults have no tower.
    assert bool(has) == (getattr(base.config, "vision_config", None) is not None), (
        "the whole model has a part for images"
    )
    assert not [name for name, _ in model.base.named_parameters() if any(part in name for part in IMAGES)]


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_prepare_takes_a_whole_model_and_counts_its_text_part(model_type: str, tmp_path: Path) -> None:
    folder = whole_model(model_type, tmp_path / "model")
    source = f"file://{folder}"
    description = describe_model(source, "main")
    facts = read_facts(description, source)
    assert (facts.part_of, facts.model_type) == (model_type, f"{model_type}_text")
    assert check_architecture(description, source, AdapterSpec()).separate_because is None
    planned = model_config.read_facts(ModelSource(source=source))
    assert planned.model_copy(update={"revision": facts.revision}) == facts
    told, *_ = plan_job(make_job(), planned, ()).notes
    assert told == f"text part of {model_type}: the image tower is not loaded, and the records are of text alone"


def test_layers_are_traced_of_the_text_part_alone(tmp_path: Path) -> None:
    folder = whole_model("qwen3_vl", tmp_path / "model")
    source = f"file://{folder}"
    facts = read_facts(describe_model(source, "main"), source)
    spec = AdapterSpec(rank=4, dropout="0")
    trace = traced_facts(facts, known_config(folder, source), spec, packs=True, record_tokens=2048).trace
    assert trace is not None
    model = trained(folder)
    parameters = dict(model.base.named_parameters())
    assert trace.adapter_parameters == sum(parameter.numel() for _, parameter in model.trainable())
    assert len(trace.layers) == facts.num_layers
    outside = sum(each.nbytes for name, each in parameters.items() if name.endswith("language_model.norm.weight"))
    tables = [each.nbytes for name, each in model.base.named_buffers() if "language_model.rotary_emb" in name]
    assert trace.other_bytes == sum(-(-each // 512) * 512 for each in (outside, *tables))


def test_a_file_of_images_weights_alone_is_not_fetched(tmp_path: Path) -> None:
    folder = whole_model("qwen3_vl", tmp_path / "model")
    split_by(folder, lambda name: "model.visual." in name)
    resolved = resolve_model(f"file://{folder}", "main")
    assert sorted(path.name for path in resolved.glob("*.safetensors")) == ["text.safetensors"]
    (folder / "images.safetensors").unlink()
    assert describe_model(f"file://{folder}", "main").tensors
    load_base(resolve_model(f"file://{folder}", "main"), torch.device("cpu"), PackedAttention())


def test_weights_of_the_text_part_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = whole_model("qwen3_vl", tmp_path / "model")
    split_by(folder, lambda name: "model.visual." in name)
    with safe_open(folder / "text.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if "layers.1." not in name}  # noqa: SIM118
    save_file(kept, folder / "text.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(kept, "text.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = f"file://{folder}"
    with pytest.raises(UserError, match=r"lack 11 of the model's tensors .*language_model\.layers\.1\."):
        check_architecture(describe_model(source, "main"), source, AdapterSpec())


def test_published_configs_are_planned_that_leave_out_sizes_or_keep_them_outside(tmp_path: Path) -> None:
    gemma = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    qwen = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280},
    }
    for config, heads, key_heads, head_dim, tied in ((gemma, 8, 4, 256, True), (qwen, 28, 4, 128, False)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        source = f"file://{tmp_path}"
        facts = model_config.read_facts(ModelSource(source=source))
        assert (facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim) == (heads, key_heads, head_dim)
        assert (facts.part_of, facts.tied_embeddings) == (config["model_type"], tied)
        resolved = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
        assert (facts.num_layers, facts.vocab_size) == (resolved.num_hidden_layers, resolved.vocab_size)


def test_a_config_of_a_whole_model_with_another_class_is_refused(tmp_path: Path) -> None:
    config = models.default_config("qwen3_5")
    config.architectures = ["Qwen3_5ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidObject, match="its config is that of a Qwen3_5ForConditionalGeneration"):
        model_config.read_facts(ModelSource(source=f"file://{tmp_path}"))


def test_a_processors_template_of_chats_is_the_tokenizers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    assert load_tokenizer(tmp_path, "m", None).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path, "m", None).chat_template == "{{ messages }}"


def split_by(folder: Path, is_images: Any) -> None:
    """Into a file of the images' weights and one of the others."""
    whole = folder / "model.safetensors"
    with safe_open(whole, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whole.unlink()
    weight_map = {name: "images.safetensors" if is_images(name) else "text.safetensors" for name in tensors}
    for path in set(weight_map.values()):
        save_file({name: each for name, each in tensors.items() if weight_map[name] == path}, folder / path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
