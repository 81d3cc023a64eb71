"""The memory model of hand-written layers against the trainer's own code: every tensor that a training step makes.

The step runs on the CPU with tiny widths, where kernels and flash attention are replaced by what they allocate on a
GPU. What is compared is the highest sum of bytes alive, and the difference must be rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peaks import (
    CONFIG,
    SCALARS_BYTES,
    TOKENS,
    Traced,
    passing_bytes,
    peak_of_a_step,
    peak_of_traced_layers,
    predicted,
    run_as_on_a_gpu,
    step_plan,
    write_random_model,
)
from qlora_trainer.data.micro_batch import PreparedRows, collate, micro_batches
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model import recorded_step
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.cuda_graphs import CudaGraphs
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.objectives.objective import objective_of
from qlora_trainer.training.optimizer import AdapterOptimizer
from tiny_model import EXPERTS, tiny_model
from torch import Tensor
from torch.nn import functional
from toy_job import write_rows

from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec, ObjectiveSpec
from orchestrator.api.model_facts import Mixture, ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import footprint
from orchestrator.sizing.footprint import Footprint
from orchestrator.sizing.memory import experts as core_experts
from orchestrator.sizing.memory.cuda_allocator import LARGEST_SMALL, Block, Pool
from orchestrator.sizing.memory.fragmentation import MICRO_BATCHES, Rehearsed, TrainStage
from orchestrator.sizing.memory.timeline import allocated
from tests.builders import make_spec

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
SLIDING, FULL = "sliding_attention", "full_attention"
TWO_KINDS: dict[str, Any] = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 64}
FIELDS = {"olmo3": TWO_KINDS, "gemma3_text": TWO_KINDS}
"""Of types whose layers are of two kinds, where few layers would be of one."""
TILE_TOKENS = 128


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_on_a_gpu(monkeypatch)


def peak_of_two_micro_batches(folder: Path, adapter: AdapterSpec, plan: MemoryPlan) -> int:
    """Bytes at the highest point of a step with the trainer's own code, weights and adapter not counted."""
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    assert model.fused is not None
    AdapterOptimizer(model.trainable(), make_spec().training)
    model.train()
    return peak_of_a_step(model, plan)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("model_type", "dropout", "recompute", "accumulation", "tile_tokens", "captured"),
    [
        pytest.param("llama", "0", 0, 1, 8192, False, id="nothing recomputed"),
        pytest.param("llama", "0.05", 2, 2, 8192, False, id="some layers recomputed, dropout, accumulated"),
        pytest.param("llama", "0.05", 3, 1, 8192, False, id="all layers recomputed, dropout"),
        pytest.param("llama", "0", 3, 1, TILE_TOKENS, False, id="MLP in tiles"),
        pytest.param("qwen3", "0.05", 2, 1, 8192, False, id="normalized heads, dropout"),
        pytest.param("qwen3", "0", 3, 2, TILE_TOKENS, False, id="normalized heads, MLP in tiles, accumulated"),
        pytest.param("phi3", "0.05", 1, 1, 8192, False, id="fewer and larger matrices, dropout"),
        pytest.param("smollm3", "0.05", 1, 2, 8192, False, id="no positions in some layers, dropout, accumulated"),
        pytest.param("olmo2", "0.05", 0, 1, 8192, False, id="norms at the ends, dropout"),
        pytest.param("olmo2", "0", 2, 2, TILE_TOKENS, False, id="norms at the ends, MLP in tiles, accumulated"),
        pytest.param("olmo3", "0.05", 3, 1, 8192, True, id="norms at the ends, dropout, as with CUDA graphs"),
        pytest.param("gemma3_text", "0", 0, 1, 8192, False, id="norms at both ends"),
        pytest.param("gemma3_text", "0.05", 2, 2, 8192, False, id="norms at both ends, dropout, accumulated"),
        pytest.param("gemma3_text", "0", 3, 1, TILE_TOKENS, False, id="norms at both ends, MLP in tiles"),
        pytest.param("granite", "0", 2, 1, TILE_TOKENS, False, id="multiplied residuals, MLP in tiles"),
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
    captured: bool,
) -> None:
    plan = step_plan(accumulation, recompute, loss_chunk_tokens=128)
    assert_all_is_counted(tmp_path, monkeypatch, model_type, dropout, plan, tile_tokens, captured=captured)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("offload", [(), ("activations",)])
@pytest.mark.parametrize("recompute", [2, 3])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "gemma3_text"])
def test_what_attention_gave_is_counted_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, recompute: int, offload: tuple[Any, ...]
) -> None:
    plan = step_plan(2, recompute, loss_chunk_tokens=128, keep_attention=True, offload=offload)
    assert_all_is_counted(tmp_path, monkeypatch, model_type, "0.05", plan, TILE_TOKENS, captured=False)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("model_type", "layers", "recompute", "offloaded"),
    [("llama", 5, 0, 3), ("qwen3", 4, 1, 1), ("olmo2", 5, 0, 2), ("gemma3_text", 3, 0, 1), ("gemma3_text", 3, 1, 3)],
)
def test_what_layers_keep_is_counted_where_it_waits_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, layers: int, recompute: int, offloaded: int
) -> None:
    offload: tuple[Any, ...] = ("activations",) if recompute else ()
    plan = step_plan(2, recompute, loss_chunk_tokens=128, offload=offload, offloaded_layers=offloaded)
    monkeypatch.setitem(CONFIG, "num_hidden_layers", layers)
    assert_all_is_counted(tmp_path, monkeypatch, model_type, "0.05", plan, TILE_TOKENS, captured=False)


def assert_all_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    dropout: str,
    plan: MemoryPlan,
    tile_tokens: int,
    *,
    captured: bool,
) -> None:
    """The peak of a step is what the plan's tensors add up to, to the byte."""
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(trainer_facts, "MLP_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(ops, "can_be_captured", lambda _: captured)
    monkeypatch.setattr(CudaGraphs, "_graph", lambda *_: None)  # what runs before a graph is made
    monkeypatch.setattr(trainer_facts, "CUDA_GRAPH_TOKENS", trainer_facts.CUDA_GRAPH_TOKENS if captured else 0)
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 0)
    config = {**CONFIG, "model_type": model_type, "architectures": [CLASSES[model_type]], **FIELDS.get(model_type, {})}
    write_random_model(tmp_path, config)
    adapter = AdapterSpec(rank=16, dropout=dropout)
    facts = ModelFacts.from_config(config, "main")
    measured = peak_of_two_micro_batches(tmp_path, adapter, plan)
    expected = predicted(facts, adapter, plan)
    # On the CPU a micro-batch is not copied; padded it is, and outlives the forward pass.
    batch_bytes = 4 * 8 * TOKENS if captured else 0
    scalars = SCALARS_BYTES + (12 if captured else 0)
    assert measured == expected + batch_bytes + scalars


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("model_type", "dropout", "recompute", "accumulation", "tile_tokens"),
    [
        pytest.param("llama", "0", 0, 1, 8192, id="nothing recomputed"),
        pytest.param("llama", "0.05", 2, 2, 8192, id="some layers recomputed, dropout, accumulated"),
        pytest.param("llama", "0", 3, 2, TILE_TOKENS, id="MLP in tiles, accumulated"),
        pytest.param("gemma3_text", "0.05", 3, 2, 8192, id="norms at both ends, dropout, accumulated"),
    ],
)
@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_every_tensor_of_a_step_on_preferences_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Literal["dpo", "orpo"],
    model_type: str,
    dropout: str,
    recompute: int,
    accumulation: int,
    tile_tokens: int,
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(trainer_facts, "MLP_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 0)
    config = {**CONFIG, "model_type": model_type, "architectures": [CLASSES[model_type]], **FIELDS.get(model_type, {})}
    write_random_model(tmp_path, config)
    adapter, plan = AdapterSpec(rank=16, dropout=dropout), step_plan(accumulation, recompute, loss_chunk_tokens=128)
    attention = PackedAttention()
    base = load_base(tmp_path, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    AdapterOptimizer(model.trainable(), make_spec().training)
    model.train()
    half = list(range(TOKENS // 2))
    row = {name: [*half, *half] for name in ("input_ids", "labels", "position_ids")}
    rows = PreparedRows(write_rows([row] * accumulation, tmp_path / "train.parquet"))
    objective = ObjectiveSpec(type=kind)
    preferences = objective_of(objective, model, rows, None, None)
    batches = list(micro_batches(rows, range(accumulation), 1))
    model.loss(batches[0], divisor=1.0).detach()  # the adapters' stacked matrices are found once
    with Traced() as traced:  # each pair is new, so that the reference is asked as well
        for batch in batches:
            preferences.accumulate(batch, divisor=1.0, between=lambda: None)
    spec = make_spec(sequence_length=TOKENS, packing=False)
    training = spec.training.model_copy(update={"objective": objective})
    spec = spec.model_copy(update={"adapter": adapter, "training": training})
    expected = passing_bytes(spec, ModelFacts.from_config(config, "main"), plan)
    assert traced.peak <= expected + 1024, "figures of pairs hide in the allocator's rounding"
    assert expected < 1.01 * traced.peak


# --- what the allocator reserves

WIDE = {**CONFIG, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
EVERYTHING = ("activations", "embeddings")
LONG_ROW, WIDE_TILE_TOKENS = 9216, 4096
"""Two tiles of the MLP, and a shorter one."""


def without_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made and not computed; the first one on the way back makes cuBLAS take a workspace."""
    workspaces: list[Tensor] = []

    def product(one: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
        found = one.new_empty(len(one), other.shape[1]) if out is None else out
        if torch._C._current_graph_task_id() >= 0 and not workspaces:
            workspaces.append(torch.empty(trainer_facts.CUBLAS_WORKSPACE_BYTES, dtype=torch.uint8))
        return found

    def affine(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return product(x, weight.t())

    monkeypatch.setattr(ops, "product", product)
    monkeypatch.setattr(ops, "affine", affine)
    monkeypatch.setattr(ops, "add_product_", lambda *_, **__: None)


def large(events: Iterable[int]) -> list[tuple[list[int], int]]:
    """Allocations that have pages of their own, each with what was freed since the one before, in whatever order."""
    found, freed = [], []
    for size in events:
        if size > LARGEST_SMALL:
            found.append((sorted(freed), allocated(size)))
            freed = []
        elif -size > LARGEST_SMALL:
            freed.append(allocated(-size))
    return found


class RecordingPool(Pool):
    """A pool of the allocator that writes down what it gives and takes back, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []

    def take(self, size_bytes: float) -> Block:
        self.events.append(allocated(size_bytes))
        return super().take(size_bytes)

    def drop(self, block: Block) -> None:
        self.events.append(-block.size)
        super().drop(block)


def rehearsed_step(job: Rehearsed) -> list[int]:
    """What comes and goes in the micro-batches of the second step."""
    pool = RecordingPool()
    stage = TrainStage(job, pool)
    stage.set_up()
    stage.micro_batches()
    stage.update()
    pool.events.clear()
    stage.micro_batches()
    return pool.events


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite", "smollm3", "olmo2", "olmo3", "gemma3_text"])
@pytest.mark.parametrize(
    ("fields", "recompute", "more"),
    [
        pytest.param({"dropout": "0"}, 0, {}, id="nothing recomputed"),
        pytest.param({"dropout": "0.05"}, 1, {}, id="a layer recomputed, dropout"),
        pytest.param({"dropout": "0"}, 3, {}, id="all layers recomputed"),
        pytest.param({"dropout": "0"}, 2, {"keep_attention": True}, id="two layers recomputed, attention kept"),
        pytest.param({"dropout": "0.05"}, 3, {"offload": EVERYTHING}, id="everything in host memory, dropout"),
        pytest.param(
            {"dropout": "0.05"},
            3,
            {"offload": EVERYTHING, "keep_attention": True},
            id="everything in host memory but what attention gave",
        ),
        pytest.param({"target_modules": ("q_proj", "v_proj")}, 1, {}, id="few adapters"),
    ],
)
def test_large_tensors_come_and_go_in_the_order_that_is_rehearsed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    fields: dict[str, Any],
    recompute: int,
    more: dict[str, Any],
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(trainer_facts, "MLP_TILE_TOKENS", WIDE_TILE_TOKENS)
    without_arithmetic(monkeypatch)
    config = {**WIDE, "model_type": model_type, "architectures": [CLASSES[model_type]], **FIELDS.get(model_type, {})}
    write_random_model(tmp_path, config)
    adapter, facts = AdapterSpec(rank=64, **fields), ModelFacts.from_config(config, "main")
    plan = step_plan(MICRO_BATCHES, recompute, loss_chunk_tokens=1024, **more)
    attention = PackedAttention()
    base = load_base(tmp_path, torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    optimizer = AdapterOptimizer(model.trainable(), make_spec().training)
    model.train()
    places = np.arange(LONG_ROW, dtype=np.int32)
    batch = collate([(places % 700, places % 700, places)])
    with Traced() as traced:
        for _ in range(2):  # the first step leaves host memory, gradients and rotary tables behind
            optimizer.drop_gradients()
            traced.events.clear()
            for _ in range(MICRO_BATCHES):
                model.accumulate(batch, divisor=1.0)
    spec = make_spec(sequence_length=LONG_ROW, packing=False).model_copy(update={"adapter": adapter})
    job = Footprint(spec, facts, plan, records=1).rehearsed(recompute)
    assert large(traced.events) == large(rehearsed_step(job))


# --- mixtures of experts

EXPERTS_TILE_TOKENS = 96


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(("tile_tokens", "dense_bytes"), [(4096, 1 << 19), (EXPERTS_TILE_TOKENS, 1)])
@pytest.mark.parametrize("routing", ["even", "everything to the same experts"])
def test_every_tensor_of_routed_experts_is_counted_whatever_the_routing(
    monkeypatch: pytest.MonkeyPatch, routing: str, tile_tokens: int, dense_bytes: int
) -> None:
    monkeypatch.setattr(trainer_facts, "EXPERT_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(trainer_facts, "EXPERT_DENSE_BYTES", dense_bytes)
    mixture = Mixture(experts=8, experts_per_token=2, expert_size=256)
    hidden, number = 192, mixture.experts
    shapes = (number, 2 * mixture.expert_size, hidden), (number, hidden, mixture.expert_size)
    gate_up, down = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    experts = NF4Experts((gate_up, down)).to("cpu")
    shift = torch.arange(TOKENS) if routing == "even" else torch.zeros(TOKENS, dtype=torch.int64)
    index = torch.stack([shift % number, (shift + 3) % number], dim=1)
    x, grad = torch.randn(2, TOKENS, hidden, dtype=torch.bfloat16)
    weights = torch.rand(TOKENS, 2)
    experts.mix(x[:8], index[:8], weights[:8])  # parts are found once
    walk = core_experts.Experts(tokens=TOKENS, hidden=hidden, mixture=mixture)
    boundaries = 4 * (number + 1)  # on a card they hide in the allocator's rounding
    assert peak_of(lambda: experts.mix(x, index, weights)) == walk.forward_bytes() + boundaries
    assert peak_of(lambda: experts.mix_backward(grad, x, index, weights)) == walk.backward_bytes() + boundaries


def peak_of(work: Callable[[], object]) -> int:
    with Traced() as traced:
        work()
    return traced.peak


@pytest.mark.parametrize("family", EXPERTS)
def test_the_weights_of_a_mixture_are_counted_to_the_byte(family: str) -> None:
    folder = tiny_model(family)
    base = load_base(folder, torch.device("cpu"), PackedAttention())
    facts = ModelFacts.from_config(json.loads((folder / "config.json").read_text()), "main")
    packed = 0
    for parameter in base.parameters():
        if isinstance(parameter, Params4bit):
            state = parameter.quant_state
            tensors = (parameter, state.absmax, state.state2.absmax, state.code, state.offset)
            packed += sum(allocated(tensor.nbytes) for tensor in tensors)
    biases = sum(allocated(p.nbytes) for name, p in base.named_parameters() if name.endswith(".bias"))
    assert footprint._weight_bytes(facts) == packed + biases


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("family", sorted(EXPERTS.keys() & trainer_facts.HANDWRITTEN_TYPES))
@pytest.mark.parametrize(
    ("dropout", "recompute", "accumulation"),
    [
        pytest.param("0", 0, 1, id="nothing recomputed"),
        pytest.param("0.05", 2, 2, id="some layers recomputed, dropout, accumulated"),
        pytest.param("0", 3, 1, id="all layers recomputed"),
    ],
)
def test_every_tensor_of_a_training_step_of_a_mixture_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dropout: str, recompute: int, accumulation: int
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(ops, "can_be_captured", lambda _: False)
    monkeypatch.setattr(trainer_facts, "CUDA_GRAPH_TOKENS", 0)
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 0)
    config = {**CONFIG, **EXPERTS[family], "model_type": family, "architectures": ["ForCausalLM"]}
    write_random_model(tmp_path, config)
    adapter = AdapterSpec(rank=16, dropout=dropout)
    plan = step_plan(accumulation, recompute, loss_chunk_tokens=128)
    facts = ModelFacts.from_config(config, "main")
    assert facts.mixture is not None
    measured = peak_of_two_micro_batches(tmp_path, adapter, plan)
    expected = predicted(facts, adapter, plan) + SCALARS_BYTES + 4 * (facts.mixture.experts + 1)
    unsure = 4 * TOKENS * facts.mixture.experts_per_token  # some routers give their weights in bfloat16
    assert expected - unsure - SCALARS_BYTES <= measured <= expected


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("family", sorted(EXPERTS.keys() - trainer_facts.HANDWRITTEN_TYPES))
@pytest.mark.parametrize(
    ("fields", "recompute", "accumulation"),
    [
        pytest.param({"dropout": "0"}, 0, 1, id="nothing recomputed"),
        pytest.param({"dropout": "0.05"}, 2, 2, id="some layers recomputed, dropout, accumulated"),
        pytest.param({"dropout": "0", "target_modules": ("q_proj", "v_proj")}, 3, 1, id="few adapters, all recomputed"),
    ],
)
def test_a_training_step_of_a_mixture_takes_what_its_layer_table_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    fields: dict[str, Any],
    recompute: int,
    accumulation: int,
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(functional, "dropout", recorded_step.TracedDropout.apply_to)
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 0)
    config = {**CONFIG, **EXPERTS[family], "model_type": family, "architectures": ["ForCausalLM"]}
    write_random_model(tmp_path, config)
    adapter = AdapterSpec(rank=16, **fields)
    plan = step_plan(accumulation, recompute, loss_chunk_tokens=128)
    facts = ModelFacts.from_config(config, "main")
    assert facts.mixture is not None
    measured = peak_of_traced_layers(tmp_path, adapter, plan)
    expected = predicted(facts, adapter, plan) + SCALARS_BYTES + 4 * (facts.mixture.experts + 1)
    # The first layer's input, of which the walk does not know when it goes; and the batch, which is not copied, but
    # counted where it has not gone before the peak; and the numbers by which experts' outputs are weighted, which some
    # routers give in bfloat16.
    unsure = TOKENS * facts.hidden_size * 2 + 4 * 8 * TOKENS + 4 * TOKENS * EXPERTS[family]["num_experts_per_tok"]
    assert expected - unsure - SCALARS_BYTES <= measured <= expected
