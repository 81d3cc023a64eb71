"""The highest point of a training step on the CPU, whose kernels are replaced by what they allocate on a GPU."""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# Why: torch and transformers declare some of these functions only in part, and a storage's identity is private.

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import ops
from qlora_trainer.kernels import packed_attention as packed
from qlora_trainer.model import recorded_step
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.optimizer import AdapterOptimizer
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from orchestrator.api.job import AdapterSpec, QLoRAJobSpec
from orchestrator.api.layer_trace import Heads
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import footprint
from orchestrator.sizing.memory.attention import Attention
from tests.builders import make_spec

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 768,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = 512
SCALARS_BYTES = 16
"""Seed, losses and record boundaries; on a card they hide in the allocator's rounding."""


class Traced(TorchDispatchMode):
    """Storages that are made under this mode, as they come to be (their bytes) and go (less their bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in self._unknown((args, kwargs)):  # made before, though this is the first that is seen of it
            weakref.finalize(storage, self._known.discard, storage._cdata)
        found = func(*args, **kwargs)
        for storage in self._unknown(found):
            self.events.append(storage.nbytes())
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return found

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return max(accumulate(self.events), default=0)

    def _unknown(self, values: Any) -> Iterator[Any]:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._known.add(tensor.untyped_storage()._cdata)
                yield tensor.untyped_storage()

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.events.append(-size)


def write_random_model(folder: Path, config: dict[str, Any]) -> None:
    """A model folder without weights."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "random_weights.json").write_text('{"seed": 0}')


def step_plan(accumulation: int, recompute: int, **fields: Any) -> MemoryPlan:
    """A plan for one row at a time."""
    return MemoryPlan(micro_batch_size=1, accumulation_steps=accumulation, recompute_layers=recompute, **fields)


def gpu_kernels() -> SimpleNamespace:
    """The operations of `kernels.ops`: no arithmetic, only the tensors that Triton's versions make."""

    def cross_entropy_(logits: Tensor, *_: Any) -> Tensor:
        return torch.zeros(len(logits))

    def attention(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(query.shape, dtype=query.dtype), torch.zeros(query.shape[1], len(query))

    def attention_backward(grad: Tensor, *_: Any) -> None:
        torch.zeros(grad.shape[1], len(grad))

    return SimpleNamespace(
        rms_norm=lambda x, *_: torch.zeros(x.shape, dtype=x.dtype),
        rms_norm_backward=lambda grad, x, *_: torch.zeros(x.shape, dtype=x.dtype),
        rotate=lambda *_: None,
        geglu=lambda x: torch.zeros(len(x), x.shape[1] // 2, dtype=x.dtype),
        geglu_backward_=lambda *_: None,
        swiglu=lambda x: torch.zeros(len(x), x.shape[1] // 2, dtype=x.dtype),
        swiglu_backward_=lambda *_: None,
        dropout=lambda x, *_: torch.zeros(x.shape, dtype=x.dtype),
        add_dropout_=lambda *_: None,
        dequantize=lambda *_: None,
        cross_entropy_=cross_entropy_,
        attention=attention,
        attention_backward=attention_backward,
        expert_products=lambda *_: None,
        sum_rows=lambda *_: None,
    )


def run_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the trainer's operations take what they take on a GPU, and compute nothing."""
    kernels = gpu_kernels()
    monkeypatch.setattr(ops, "_of", lambda _: kernels)
    monkeypatch.setattr(ops, "dequantize", lambda *_: None)
    monkeypatch.setattr(ops, "product", torch.mm)
    monkeypatch.setattr(ops, "affine", affine_on_a_gpu)
    monkeypatch.setattr(ops, "add_product_", lambda y, one, other, factor=1.0: y.addmm_(one, other, alpha=factor))


def affine_on_a_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, _factor: float = 1.0
) -> Tensor:
    """`ops.affine` as it is on a card: in one product."""
    return functional.linear(x, weight, bias) if residual is None else torch.addmm(residual, x, weight.t())


def peak_of_a_step(model: TrainingModel, plan: MemoryPlan) -> int:
    """Bytes at the highest point, weights and adapter not counted."""
    places = np.arange(TOKENS, dtype=np.int32)
    batch = collate([(places % 700, places % 700, places)])
    model.loss(batch, divisor=1.0).detach()  # the adapters' stacked matrices are found once
    with Traced() as traced:
        for _ in range(plan.accumulation_steps):
            model.accumulate(batch, divisor=1.0)
    return traced.peak


def attention_workspace_bytes(heads: Heads) -> int:
    """What attention's backward pass takes by the way, where transformers computes the layers."""
    return Attention(
        tokens=TOKENS,
        records=1,
        most_records=1,
        query_heads=heads.query,
        key_heads=heads.key,
        head_size=heads.size,
        deterministic=True,
        multiprocessors=1,
    ).traced_workspace_bytes


def predicted(facts: ModelFacts, adapter: AdapterSpec, plan: MemoryPlan) -> int:
    """What a step takes by our model, beside what lasts."""
    spec = make_spec(sequence_length=TOKENS, packing=False).model_copy(update={"adapter": adapter})
    return passing_bytes(spec, facts, plan)


def passing_bytes(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan) -> int:
    """What comes and goes in a step of a job, by our model."""
    items = footprint.footprint(spec, facts, plan, multiprocessors=1, records=1)
    passing = ("adapter gradients", "activations", "working set")
    return sum(item.bytes for item in items if item.name.startswith(passing))


class TracedAttention(packed.PackedAttention):
    """Attention as the layer tables' trace has it, and a workspace of the size that `sizing/memory/attention` gives."""

    def __init__(self) -> None:
        super().__init__()
        self._attention = recorded_step.TracedAttention(self._at_work)

    def register(self) -> None:
        """Be what transformers calls."""
        AttentionInterface.register(packed.NAME, self._attention)

    def _at_work(self, event: recorded_step.Event) -> None:
        assert event.heads is not None
        torch.zeros(attention_workspace_bytes(event.heads), dtype=torch.uint8)


def peak_of_traced_layers(folder: Path, adapter: AdapterSpec, plan: MemoryPlan) -> int:
    """What `peak_of_two_micro_batches` gives, where transformers and PEFT compute the layers."""
    attention = TracedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.__class__ = recorded_step.TracedLinear
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    assert model.fused is None
    AdapterOptimizer(model.trainable(), make_spec().training)
    model.train()
    return peak_of_a_step(model, plan)
