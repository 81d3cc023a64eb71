"""`adapter.experts`: LoRA on routed experts, as PEFT computes it on the plain model.

The judge is plain transformers in float32 over the weights that NF4 stands for, with the adapter that PEFT reads.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Why: torch, transformers and PEFT declare some of these functions only in part.

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import ADAPTER_NAME, add_adapter
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.layer_trace import trace_layers, traced_facts
from qlora_trainer.model.loading import load_base, weightless_base
from qlora_trainer.model.source import describe_model, known_config, read_facts
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from benchmarks import models
from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import AdapterSpec, ModelSource
from orchestrator.api.plan import MemoryPlan
from orchestrator.errors import InvalidObject
from tests.trainer.tiny_model import tiny_model

SPEC = AdapterSpec(rank=4, alpha=8, dropout="0", experts=True)
PLAN = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=1, loss_chunk_tokens=16)
TYPES = ("qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "deepseek_v3")
"""Gated in halves and in turns, with biases and without, matrices that lie either way, shared experts."""


def small(model_type: str, folder: Path) -> Path:
    """A tiny model, all of whose experts are chosen: a rounding must not send a token elsewhere."""
    models.make(models.default_config(model_type), folder)
    return folder


def trainer_of(folder: Path, *, tile_tokens: int) -> TrainingModel:
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, SPEC, seed=0), PLAN, attention, 0.0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.trainable():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    for module in model.base.modules():
        if isinstance(module, NF4Experts):
            module.tile_tokens = tile_tokens
    return model


def on_plain_model(folder: Path, model: TrainingModel, saved: Path, dtype: torch.dtype) -> Any:
    """Plain transformers with the adapter as PEFT reads it from the folder."""
    saved.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.adapter().items()}
    save_file(tensors, saved / "adapter_model.safetensors")
    model.peft_model.peft_config[ADAPTER_NAME].save_pretrained(str(saved))
    base = models.dense(folder, model, dtype)
    return PeftModel.from_pretrained(base, str(saved), is_trainable=True, autocast_adapter_dtype=False)


def judged(whole: Any) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    batch = models.records()
    records = [batch.input_ids[:, a:b] for a, b in pairwise(batch.record_starts.tolist())]
    logits = [whole(input_ids=each, use_cache=False).logits[0].float() for each in records]
    losses = [
        cross_entropy(found[:-1], ids[0, 1:], reduction="sum") for found, ids in zip(logits, records, strict=True)
    ]
    loss = torch.stack(losses).sum() / batch.supervised.numel()
    loss.backward()
    gradients = {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter.grad.float()
        for name, parameter in whole.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), torch.cat(logits).detach(), gradients


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("model_type", TYPES)
def test_loss_logits_and_gradients_are_pefts_on_the_plain_model(model_type: str, tmp_path: Path) -> None:
    folder = small(model_type, tmp_path / "model")
    model = trainer_of(folder, tile_tokens=20)
    batch = models.records()
    model.train()
    loss = float(model.accumulate(batch, divisor=float(batch.supervised.numel())))
    ours = {name: each.grad.float() for name, each in model.trainable() if each.grad is not None}
    with torch.no_grad():
        logits = model.logits(batch)
    truth = judged(on_plain_model(folder, model, tmp_path / "adapter", torch.float32))
    rounded = judged(on_plain_model(folder, model, tmp_path / "adapter", torch.bfloat16))
    off = models.differences(truth, rounded, (loss, logits, ours))
    assert not models.faults(off), off
    assert [name for name in ours if ".experts." in name and "shared" not in name]
    assert len(ours) == len(dict(model.trainable()))


def test_a_trace_counts_the_experts_adapters(tmp_path: Path) -> None:
    folder = small("qwen3_moe", tmp_path / "model")
    source = f"file://{folder}"
    facts = read_facts(describe_model(source, "main"), source)
    traced = traced_facts(facts, known_config(folder, source), SPEC, packs=True, record_tokens=2048)
    assert traced.trace is not None
    model = trainer_of(folder, tile_tokens=20)
    assert traced.trace.adapter_parameters == sum(parameter.numel() for _, parameter in model.trainable())
    base, _ = weightless_base(known_config(folder, source), torch.device("cpu"))
    without = trace_layers(base, SPEC.model_copy(update={"experts": False}))
    own = sum(each.numel() for name, each in model.trainable() if ".experts." in name) // facts.num_layers
    more, less = traced.trace.kinds[0], without.kinds[0]
    assert more.gradient_bytes - less.gradient_bytes == 2 * own
    at_work, before = (each.whole.experts_backward[0][0] for each in (more, less))
    assert at_work - before >= 4 * own, "gradients are summed in float32, over the whole pass"


def test_prepare_takes_it_for_a_mixture_and_refuses_it_elsewhere(tmp_path: Path) -> None:
    folder = small("qwen3_moe", tmp_path / "model")
    source = f"file://{folder}"
    check_architecture(describe_model(source, "main"), source, SPEC)
    assert model_config.read_facts(ModelSource(source=source), SPEC).mixture is not None
    dense = f"file://{tiny_model('qwen3')}"
    with pytest.raises(UserError, match=r"spec\.adapter\.experts: the model has no routed experts"):
        check_architecture(describe_model(dense, "main"), dense, SPEC)
    with pytest.raises(InvalidObject, match=r"spec\.adapter\.experts: the model has no routed experts"):
        model_config.read_facts(ModelSource(source=dense), SPEC)


def test_what_peft_tells_other_layouts_of_is_refused(tmp_path: Path) -> None:
    folder = small("llama4_text", tmp_path / "model")
    source = f"file://{folder}"
    with pytest.raises(UserError, match=r"spec\.adapter\.experts: PEFT takes the matrices"):
        check_architecture(describe_model(source, "main"), source, SPEC)


@pytest.mark.parametrize("fields", [{"dropout": "0.1"}, {"dropout": "0", "use_dora": True}, {}])
def test_dropout_and_dora_are_refused_in_words(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"experts have no (DoRA|dropout)"):
        AdapterSpec(experts=True, **fields)


def test_no_layer_is_left_without_its_adapter(tmp_path: Path) -> None:
    model = trainer_of(small("qwen3_moe", tmp_path / "model"), tile_tokens=20)
    experts = [module for module in model.base.modules() if isinstance(module, NF4Experts)]
    assert all(set(module.adapters) == set(module.matrices) for module in experts)
    assert experts
