"""The memory model of hand-written layers against the trainer's own code: every tensor that a training step makes.

The step runs on the CPU with tiny widths, where kernels and flash attention are replaced by what they allocate on a
GPU. What is compared is the highest sum of bytes alive, and the difference must be rounding.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qlora_trainer import attention as packed
from qlora_trainer.batches import collate
from qlora_trainer.kernels import layer as layer_module
from qlora_trainer.kernels import ops
from qlora_trainer.model import TrainingModel, add_adapter, load_base
from qlora_trainer.optimizer import AdapterOptimizer
from qlora_trainer.replay import LARGEST_TOKENS, Replay
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.api.job import AdapterSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import ModelFacts
from orchestrator.core import fused, sizing
from orchestrator.core.flash import Attention
from tests.core.builders import make_spec

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
    "eos_token_id": 1,
}
TOKENS, TILE_TOKENS = 512, 128


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made under this mode and are still there, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, found)):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def gpu_kernels() -> SimpleNamespace:
    """The operations of `kernels.ops`: no arithmetic, only the tensors that Triton's versions make."""

    def cross_entropy_(logits: Tensor, *_: Any) -> Tensor:
        return torch.zeros(len(logits))

    return SimpleNamespace(
        rms_norm=lambda x, *_: torch.zeros(x.shape, dtype=x.dtype),
        rms_norm_backward=lambda grad, x, *_: torch.zeros(x.shape, dtype=x.dtype),
        rotate=lambda *_: None,
        swiglu=lambda x: torch.zeros(len(x), x.shape[1] // 2, dtype=x.dtype),
        swiglu_backward_=lambda *_: None,
        dropout=lambda x, *_: torch.zeros(x.shape, dtype=x.dtype),
        add_dropout_=lambda *_: None,
        dequantize=lambda *_: None,
        cross_entropy_=cross_entropy_,
    )


class GpuAttention(packed.PackedAttention):
    """Flash attention's tensors, and a workspace of the size that `core/flash` gives."""

    workspace_bytes = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Any:
        return torch.zeros(query.shape, dtype=query.dtype), torch.zeros(query.shape[1], len(query))

    def backward(self, grad: Tensor, inputs: Any, *_: Any, **__: Any) -> Any:
        found = tuple(torch.zeros(part.shape, dtype=part.dtype) for part in inputs)
        torch.zeros(self.workspace_bytes, dtype=torch.uint8)
        return found


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = gpu_kernels()
    monkeypatch.setattr(ops, "_of", lambda _: kernels)
    monkeypatch.setattr(ops, "dequantize", lambda *_: None)
    monkeypatch.setattr(ops, "product", torch.mm)
    monkeypatch.setattr(ops, "affine", affine_on_a_gpu)
    monkeypatch.setattr(ops, "add_product_", lambda y, one, other, factor=1.0: y.addmm_(one, other, alpha=factor))


def affine_on_a_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """As `ops.affine` has it on a card: in one product."""
    return functional.linear(x, weight, bias) if residual is None else torch.addmm(residual, x, weight.t())


def peak_of_two_micro_batches(folder: Path, adapter: AdapterSpec, plan: MemoryPlan, workspace_bytes: int) -> int:
    """Bytes at the highest point of a step with the trainer's own code, weights and adapter not counted."""
    attention = GpuAttention()
    attention.workspace_bytes = workspace_bytes
    base = load_base(folder, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    assert model._fused is not None
    AdapterOptimizer(model.trainable(), make_spec().training)
    model.train()
    places = np.arange(TOKENS, dtype=np.int32)
    batch = collate([(places % 700, places % 700, places)])
    model.loss(batch, divisor=1.0).detach()  # the adapters' stacked matrices are found once
    alive = Alive()
    lasting = list(model.peft_model.parameters())
    with alive:
        for tensor in [*lasting, *(b for b in model.peft_model.buffers())]:
            alive._see(tensor.data.untyped_storage())
        before = alive.now
        alive.peak = before
        for _ in range(plan.accumulation_steps):
            model.accumulate(batch, divisor=1.0)
    return alive.peak - before


def predicted(facts: ModelFacts, adapter: AdapterSpec, plan: MemoryPlan) -> int:
    spec = make_spec(sequence_length=TOKENS, packing=False).model_copy(update={"adapter": adapter})
    items = sizing.footprint(spec, facts, plan, multiprocessors=1, records=1)
    passing = ("adapter gradients", "activations", "working set")
    return sum(item.bytes for item in items if item.name.startswith(passing))


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("model_type", "dropout", "recompute", "accumulation", "tile_tokens", "replayed"),
    [
        pytest.param("llama", "0", 0, 1, 8192, False, id="nothing recomputed"),
        pytest.param("llama", "0.05", 2, 2, 8192, False, id="some layers recomputed, dropout, accumulated"),
        pytest.param("llama", "0.05", 3, 1, 8192, False, id="all layers recomputed, dropout"),
        pytest.param("llama", "0", 3, 1, TILE_TOKENS, False, id="MLP in tiles"),
        pytest.param("qwen3", "0.05", 2, 1, 8192, False, id="normalized heads, dropout"),
        pytest.param("qwen3", "0", 3, 2, TILE_TOKENS, False, id="normalized heads, MLP in tiles, accumulated"),
        pytest.param("llama", "0", 0, 1, 8192, True, id="nothing recomputed, as with CUDA graphs"),
        pytest.param("qwen3", "0.05", 3, 2, 8192, True, id="normalized heads, accumulated, as with CUDA graphs"),
    ],
)
def test_every_tensor_of_a_training_step_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    dropout: str,
    recompute: int,
    accumulation: int,
    tile_tokens: int,
    replayed: bool,
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(layer_module, "MLP_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(fused, "MLP_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(packed, "QUERY_TILE_TOKENS", 1 << 20)
    monkeypatch.setattr(ops, "can_be_captured", lambda _: replayed)
    monkeypatch.setattr(Replay, "_graph", lambda *_: None)  # what runs before a graph is made
    monkeypatch.setattr(sizing, "REPLAY_TOKENS", LARGEST_TOKENS if replayed else 0)
    monkeypatch.setattr(sizing, "CUBLAS_BYTES", 0)
    fused._recomputed_layer.cache_clear()
    fused._kept_layer.cache_clear()
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config = {**CONFIG, "model_type": model_type, "architectures": [names[model_type]]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "random_weights.json").write_text('{"seed": 0}')
    adapter = AdapterSpec(rank=16, dropout=dropout)
    plan = MemoryPlan(
        micro_batch_size=1, accumulation_steps=accumulation, recompute_layers=recompute, loss_chunk_tokens=128
    )
    facts = ModelFacts.from_config(config, "main")
    workspace = Attention(
        tokens=TOKENS,
        records=1,
        most_records=1,
        query_heads=facts.num_attention_heads,
        key_heads=facts.num_key_value_heads,
        head_size=facts.head_dim,
        deterministic=True,
        multiprocessors=1,
    ).whole_workspace_bytes
    measured = peak_of_two_micro_batches(tmp_path, adapter, plan, workspace)
    expected = predicted(facts, adapter, plan)
    # On the CPU a micro-batch is not copied, and so outlives the forward pass; padded it is there twice.
    batch_bytes = (2 if replayed else 1) * 4 * 8 * TOKENS
    # Seed, losses and borders of records; on a card they hide in the allocator's rounding.
    scalars = 28 if replayed else 8
    assert measured == expected + batch_bytes + scalars
