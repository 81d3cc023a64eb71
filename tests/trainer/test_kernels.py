"""Layers with a hand-written backward pass compute what transformers, PEFT and autograd compute: loss and gradients.

On the CPU the operations between matrix products are torch's; the Triton kernels run here through Triton's interpreter,
and on a card in `benchmarks/kernels.py`.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import ops, torch_ops
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels.takeover import draw_seed
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training.optimizer import AdapterOptimizer
from safetensors.torch import load_file, save_file
from test_model import equal, gradients, make_model, make_records, wake_adapter
from tiny_model import build_tiny_model, tiny_model
from torch import Tensor

from orchestrator.api import trainer_facts
from orchestrator.api.job import TrainingSpec
from orchestrator.api.plan import OffloadTarget

ROUNDING = 0.03
"""Relative; between two ways through bfloat16. Leaving out any part is off by ten times as much."""
_ANGLES = {"rope_type": "default", "rope_theta": 10000.0}
TWO_KINDS: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _ANGLES, "full_attention": {**_ANGLES, "rope_theta": 300.0}},
}
"""Layers with and without windows, whose heads turn at different speeds."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with a tied head": {"tied": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "granite": {
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "attention_dropout": 0.0,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "smollm3 with windows": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [0, 1]},
    "olmo2": {"attention_dropout": 0.0},
    "olmo3": {"attention_dropout": 0.0, **TWO_KINDS},
    "gemma3_text": {"attention_dropout": 0.0, **TWO_KINDS},
    "phi3": {"sliding_window": 6},
    "phi3 that rotates a part of each head": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
}
ROUNDINGS = {"olmo2": 0.05, "olmo3": 0.05}
"""Where products take the residual stream as it is, and each half's own roundings are what a norm is given."""
MATRICES = {"phi3": 4}
"""Of a layer, where they are not 7."""


@pytest.mark.parametrize("multiplies_bfloat16", [True, False])
def test_products_are_rounded_once_whether_the_processor_multiplies_bfloat16_or_not(
    multiplies_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_processor_multiplies_bfloat16", lambda: multiplies_bfloat16)
    torch.manual_seed(0)
    x, weight, residual = (torch.randn(shape).bfloat16() for shape in ((33, 48), (20, 48), (33, 20)))
    bias = torch.randn(20).bfloat16()
    exact = x.double() @ weight.double().t()
    wide = torch.zeros(33, 40).bfloat16()
    wide[:, 20:] = residual
    ops.add_product_(wide[:, 20:], x, weight.t(), 0.5)
    filled = torch.zeros(33, 40).bfloat16()
    ops.product(x, weight.t(), out=filled[:, :20])
    found = {
        "product": (ops.product(x, weight.t()), exact),
        "affine": (ops.affine(x, weight, bias), exact + bias),
        "onto a residual": (ops.affine(x, weight, residual=residual, factor=0.5), residual + 0.5 * exact),
        "added in place": (wide[:, 20:], residual + 0.5 * exact),
        "into columns": (filled[:, :20], exact),
    }
    once = 2.0**-8  # half a unit in the last place of bfloat16's eight bits
    for name, (ours, wanted) in found.items():
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - wanted).abs() - 1.01 * once * wanted.abs()
        assert error.max() < 1e-3, (name, error.max())
    assert not wide[:, :20].any()
    assert not filled[:, 20:].any()


def test_a_torch_that_does_not_tell_what_the_processor_can_multiplies_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not ops._processor_multiplies_bfloat16.__wrapped__()  # pyright: ignore[reportPrivateUsage]


def build_model(folder: Path, family: str, **fields: Any) -> TrainingModel:
    base = build_tiny_model(folder, family.partition(" ")[0], **FAMILIES[family])
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, tensor in weights.items():  # ones and zeros would hide what happens to them
        if name.endswith(("norm.weight", "bias")):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model = make_model(base, **fields)
    wake_adapter(model)
    return model


def loss_and_gradients(model: TrainingModel, *, taken_over: bool) -> tuple[Tensor, list[Tensor]]:
    assert model.fused is not None, "the layers must have been taken over"
    with nullcontext() if taken_over else model.fused.bypassed():
        with torch.no_grad():
            loss = model.loss(collate(make_records()), divisor=31.0)
        return loss, gradients(model, [collate(make_records())])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def largest_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of two lists of gradients. What is a hundred times smaller than the largest is what cancellation left of it."""
    floor = 1e-2 * max(float(gradient.float().norm()) for gradient in theirs)
    return max(
        float((one.float() - other.float()).norm() / max(float(other.float().norm()), floor))
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute_layers", [0, 2])
def test_loss_and_every_gradient_are_those_of_the_untouched_layers(
    tmp_path: Path, family: str, recompute_layers: int
) -> None:
    model = build_model(tmp_path / "model", family, recompute_layers=recompute_layers)
    loss, ours = loss_and_gradients(model, taken_over=True)
    expected_loss, theirs = loss_and_gradients(model, taken_over=False)
    model_type = family.partition(" ")[0]
    assert len(ours) == len(theirs) == len(list(model.trainable())) == 2 * MATRICES.get(model_type, 7) * 2
    torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    assert largest_distance(ours, theirs) < ROUNDINGS.get(model_type, ROUNDING)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("k_proj", "o_proj", "up_proj")},
        {"target_modules": ("down_proj",)},
        {"target_modules": ("layers.1.mlp.gate_proj",)},
        {"use_rslora": True, "alpha": 3},
    ],
    ids=str,
)
def test_every_set_of_targets_and_scaling_is_exact(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = build_model(tmp_path / "model", "llama", **fields)
    loss, ours = loss_and_gradients(model, taken_over=True)
    expected_loss, theirs = loss_and_gradients(model, taken_over=False)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    assert len(ours) == len(theirs) == len(list(model.trainable()))
    assert largest_distance(ours, theirs) < ROUNDING


def test_an_adapter_that_is_switched_off_is_left_out(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama")
    batch = collate(make_records())
    assert model.fused is not None
    with torch.no_grad(), model.peft_model.disable_adapter():
        ours = model.loss(batch, divisor=1.0)
        with model.fused.bypassed():
            theirs = model.loss(batch, divisor=1.0)
    with torch.no_grad():
        tuned = model.loss(batch, divisor=1.0)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)
    assert abs(tuned - ours) > 4 * abs(theirs - ours)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"use_dora": True}, "has extras, such as DoRA's"),
        ("olmo", {}, "OlmoDecoderLayer is not one of the known layers"),
        ("internlm3", {}, "layers of type internlm3 are sized as transformers computes them"),
    ],
)
def test_what_is_not_exact_is_left_alone_and_said(
    tmp_path: Path, family: str, fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qlora_trainer.kernels.takeover")
    model = make_model(build_tiny_model(tmp_path / "model", family, attention_dropout=0.0), **fields)
    assert model.fused is None
    assert reason in caplog.text


def test_layers_that_turn_out_to_be_off_are_given_back_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Shortsighted(PackedAttention):
        """Wrong in the layers by hand alone."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
        ) -> tuple[Tensor, Tensor]:
            del window
            return super().forward(query, key, value, scaling, 2)

    folder = build_tiny_model(tmp_path / "model", "llama")
    untouched = make_model(folder, recompute_layers=1)
    wake_adapter(untouched)
    _, expected = loss_and_gradients(untouched, taken_over=False)
    model = make_model(folder, recompute_layers=1, packed_attention=Shortsighted())
    wake_adapter(model)
    assert model.fused is not None
    model.check()
    assert model.fused is None
    assert "layer 0 is off by" in caplog.text
    assert equal(gradients(model, [collate(make_records())]), expected)


@pytest.mark.skipif("QLORA_TEST_MODEL" not in os.environ, reason="needs a real model: QLORA_TEST_MODEL")
def test_the_layers_of_a_real_model_stay_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(Path(os.environ["QLORA_TEST_MODEL"]))
    model.check()
    assert model.fused is not None, caplog.text
    rows = [(ids, ids, np.arange(len(ids), dtype=np.int32)) for ids in (np.arange(200, 260), np.arange(900, 1020))]
    batch = collate([tuple(part.astype(np.int32) for part in row) for row in rows])
    wake_adapter(model)
    ours = gradients(model, [batch])
    with model.fused.bypassed():
        theirs = gradients(model, [batch])
    assert median(distance(*pair) for pair in zip(ours, theirs, strict=True)) < 2 * ROUNDING


# --- dropout


class KnownDropout(torch.nn.Module):
    """In PEFT's layer: drops what the layers that were taken over drop."""

    def __init__(self, probability: float, seed: int, number: int) -> None:
        super().__init__()
        self._how = probability, torch.tensor(seed), number

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return torch_ops.dropout(x.flatten(0, 1), *self._how).view_as(x)


def test_with_dropout_every_gradient_is_that_of_peft_and_the_same_mask(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama", dropout="0.3", recompute_layers=1)
    _, ours = loss_and_gradients(model, taken_over=True)
    torch.manual_seed(0)  # as `gradients` does
    first = draw_seed()
    inputs = (("self_attn", "q_proj k_proj v_proj"), ("self_attn", "o_proj"), ("mlp", "gate_proj up_proj"))
    groups = (*inputs, ("mlp", "down_proj"))
    for number, decoder_layer in enumerate(model.base.get_decoder().layers):
        for group, (part, names) in enumerate(groups):
            for name in names.split():
                module = getattr(getattr(decoder_layer, part), name)
                module.lora_dropout["default"] = KnownDropout(0.3, first, len(groups) * number + group)
    _, theirs = loss_and_gradients(model, taken_over=False)
    assert len(ours) == len(theirs) == len(list(model.trainable()))
    assert largest_distance(ours, theirs) < ROUNDING


def test_dropout_keeps_the_expected_gradient_and_has_the_published_scale() -> None:
    """The mean over many masks is what an adapter without dropout computes."""
    kept = make_model(target_modules=("q_proj",))
    dropped = make_model(target_modules=("q_proj",), dropout="0.5")
    for model in (kept, dropped):
        wake_adapter(model)
    batch = collate(make_records())
    expected = gradients(kept, [batch])
    found = [gradients(dropped, [batch], seed=seed) for seed in range(60)]
    assert not equal(found[0], found[1])
    for index, gradient in enumerate(expected):
        mean = torch.stack([one[index].float() for one in found]).mean(0)
        assert distance(mean, gradient) < 0.5 * distance(found[0][index], gradient)


def test_dropout_depends_on_the_seed_alone_and_is_off_in_evaluation() -> None:
    model = make_model(dropout="0.3")
    wake_adapter(model)
    batch = collate(make_records())
    assert equal(gradients(model, [batch], seed=5), gradients(model, [batch], seed=5))
    assert not equal(gradients(model, [batch], seed=5), gradients(model, [batch], seed=6))
    plain = make_model()
    wake_adapter(plain)
    for one in (model, plain):
        one.eval()
    with torch.no_grad():
        assert torch.equal(model.loss(batch, divisor=1.0), plain.loss(batch, divisor=1.0))


# --- memory


def test_tiles_of_the_mlp_change_a_gradient_by_rounding_alone() -> None:
    """A layer that keeps its activations computes its MLP in one piece, one that recomputes in tiles."""
    ids = np.random.RandomState(6).randint(5, 500, size=400).astype(np.int32)
    record = (ids, ids, np.arange(len(ids), dtype=np.int32))
    long_row = collate([record] * (trainer_facts.MLP_TILE_TOKENS // len(ids) + 2))
    found = []
    for recompute_layers in (0, 2):
        model = make_model(recompute_layers=recompute_layers)
        wake_adapter(model)
        found.append(gradients(model, [long_row]))
    whole, tiled = found
    assert not equal(tiled, whole)
    assert largest_distance(tiled, whole) < ROUNDING


def test_offloading_changes_no_bit() -> None:
    batches = [collate(make_records(seed)) for seed in (6, 7)]
    plain = make_model(dropout="0.2", recompute_layers=2)
    offloaded = make_model(dropout="0.2", recompute_layers=2, offload=("activations", "embeddings"))
    for model in (plain, offloaded):
        wake_adapter(model)
    assert equal(gradients(offloaded, batches), gradients(plain, batches))


@pytest.mark.parametrize("offload", [(), ("activations", "embeddings")])
def test_keeping_what_attention_gave_changes_no_bit_and_attends_once(
    monkeypatch: pytest.MonkeyPatch, offload: tuple[OffloadTarget, ...]
) -> None:
    batches = [collate(make_records(seed)) for seed in (6, 7)]
    plain = make_model(dropout="0.2", recompute_layers=2)
    kept = make_model(dropout="0.2", recompute_layers=1, keep_attention=True, offload=offload)
    for model in (plain, kept):
        wake_adapter(model)
    expected = gradients(plain, batches)
    calls = []
    attend = PackedAttention.forward
    monkeypatch.setattr(PackedAttention, "forward", lambda *args: calls.append(args) or attend(*args))
    assert equal(gradients(kept, batches), expected)
    assert len(calls) == 2 * len(batches), "once a layer and batch"


def test_what_cannot_be_offloaded_stays_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A plan changes bytes and seconds alone: whoever chose it may find the memory full, but the job was no mistake."""
    caplog.set_level(logging.INFO, logger="qlora_trainer.model")
    model = make_model(use_dora=True, offload=("activations",))
    assert "the activations stay on the card" in caplog.text
    assert gradients(model, [collate(make_records())])
    model = make_model(tiny_model(tied=True), offload=("embeddings",))
    assert "the head shares them" in caplog.text
    assert gradients(model, [collate(make_records())])


def test_a_layer_that_keeps_its_activations_keeps_no_input_twice() -> None:
    """Input, middle, query to value, output, gate and up, and what is of the adapters' rank: nothing else."""
    model = make_model()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    model.train()
    batch = collate(make_records())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(batch, divisor=1.0)
    assert loss.requires_grad
    width, heads, inner, rank = 64, 4 + 2 * 2, 128, 4
    logsumexp = 4 * 2  # of each query head, in float32
    elements_a_layer = 3 * width + heads * 16 + logsumexp + 2 * inner + 7 * rank
    last_norm_and_loss = 2 * width
    assert sum(kept.values()) == 2 * batch.tokens * (2 * elements_a_layer + last_norm_and_loss)


def test_the_optimizer_may_move_the_adapter(tmp_path: Path) -> None:
    model = make_model(build_tiny_model(tmp_path / "model", "llama"), rank=64)  # large enough to be moved
    wake_adapter(model)
    before = gradients(model, [collate(make_records())])
    places = [parameter.data_ptr() for _, parameter in model.trainable()]
    optimizer = AdapterOptimizer(model.trainable(), TrainingSpec(weight_decay="0"))
    assert not set(places) & {parameter.data_ptr() for _, parameter in model.trainable()}
    assert equal(gradients(model, [collate(make_records())]), before)
    for (_, parameter), gradient in zip(model.trainable(), before, strict=True):
        parameter.grad = gradient
    optimizer.step(1e-2)
    ours, theirs = (loss_and_gradients(model, taken_over=taken_over) for taken_over in (True, False))
    assert not equal(ours[1], before)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-3, atol=0)
    assert largest_distance(ours[1], theirs[1]) < ROUNDING


# --- the Triton kernels


def test_every_operation_is_there_on_cards_too() -> None:
    """By its source: Triton is not imported where there is no card."""
    kernels = Path(ops.__file__).parent

    def names(module: str) -> set[str]:
        body = ast.parse((kernels / f"{module}.py").read_text()).body
        own = {each.name for each in body if isinstance(each, ast.FunctionDef)}
        return own | {alias.name for each in body if isinstance(each, ast.ImportFrom) for alias in each.names}

    wanted = set(re.findall(r"_of\(\w+\)\.(\w+)\(", Path(ops.__file__).read_text()))
    assert len(wanted) > 10
    assert wanted - names("triton_ops") == set()
    assert wanted - names("torch_ops") == set()


INTERPRETED = """
import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels import ops, torch_ops, triton_attention, triton_experts, triton_ops

torch.manual_seed(0)

def draw(*shape):
    return torch.randn(*shape).to(torch.bfloat16)

def close(name, ours, theirs):
    distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert distance < 0.012, (name, distance)  # the interpreter cuts digits off where a card rounds

def both(name, *arguments, changed=()):
    one, other = ([a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2))
    results = getattr(triton_ops, name)(*one), getattr(torch_ops, name)(*other)
    if results[1] is not None:
        close(name, *results)
    for index in changed:
        close(name, one[index], other[index])

wide = draw(5, 200)
for offset, rounds in (ops.ROUNDED, ops.EXACT, ops.AROUND_ONE):
    both("rms_norm", wide[:, :96], draw(96), 1e-5, offset, rounds)
    for residual in (None, draw(5, 96)):
        both("rms_norm_backward", draw(5, 96), wide[:, :96], draw(96), 1e-5, residual, offset)
angle = torch.randn(5, 16).repeat(1, 2)
for back in (False, True):
    heads = wide[:, :192].view(5, 6, 32)
    both("rotate", heads, angle.cos().bfloat16(), angle.sin().bfloat16(), torch.zeros(5, 6, 32).bfloat16(), back,
         changed=(3,))
for gate in ("swiglu", "geglu"):
    both(gate, draw(5, 140))
    both(f"{gate}_backward_", draw(5, 70), draw(5, 140), changed=(0, 1))
for scale, softcap in ((1.0, None), (0.5, 3.0), (2.0, None)):
    for gradient_scale in (None, torch.tensor(0.37)):
        targets = torch.randint(0, 333, (6,))
        targets[2] = -100
        both("cross_entropy_", draw(6, 333), targets, scale, softcap, gradient_scale, changed=(0,))
weight = 0.02 * draw(128, 1024)
packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
both("dequantize", packed, state, torch.empty_like(weight), changed=(2,))

# Experts in float32, for the reason that attention is below: one has no rows, and no tile is full.
triton_experts.OTHERS = triton_experts.Tiles(16, 64, 32, 4, 1)
weights = 0.02 * torch.randn(4, 72, 96)
offsets = torch.tensor([0, 20, 20, 21, 61, 70], dtype=torch.int32)
for back, width in ((False, 96), (True, 72)):
    room = torch.zeros(70, 168 - width)
    for parts, of in ((weights, offsets), (weights[:2], offsets[2:])):  # the last rows are another part's
        both("expert_products", torch.randn(70, width), None, parts, of, room, back, changed=(4,))
        both("expert_products", torch.randn(9, width), torch.randint(0, 9, (70,)), parts, of, room, back, changed=(4,))
for height, width in ((8, 96), (72, 16)):
    for sources in ((None, torch.randint(0, 9, (70,))), (torch.randint(0, 9, (70,)), None)):
        left, right = (torch.randn(70 if source is None else 9, size) for source, size in zip(sources, (height, width)))
        both("expert_outer_products", left, sources[0], right, sources[1], offsets, torch.randn(5, height, width),
             changed=(5,))
for weights in (None, torch.rand(6, 3)):
    places, room = torch.randperm(18).view(6, 3), torch.zeros(6, 100)
    both("sum_rows", torch.randn(18, 100), places, weights, room, changed=(3,))

ones = torch.ones(100, 333).bfloat16()
seed = torch.tensor(12345678901234560)
dropped = triton_ops.dropout(ones, 0.1, seed, 7)
assert abs((dropped != 0).float().mean() - 0.9) < 0.01
assert set(dropped.unique().tolist()) == {0.0, 1.109375}
assert not torch.equal(dropped, triton_ops.dropout(ones, 0.1, seed, 8))
target = 2 * ones
triton_ops.add_dropout_(target, ones, 0.1, seed, 7)
close("add_dropout_", target, 2 + dropped.float())

# Attention in float32: the interpreter multiplies bfloat16 numbers as if they were integers.
triton_attention.OTHERS = triton_attention.Launch(*[triton_attention.Tiles(32, 16, 4, 1)] * 3)
for heads, keys, size, boundaries, window in (
    (4, 2, 32, [0, 150], None),
    (4, 2, 24, [0, 70, 75, 150], None),
    (2, 2, 16, [0, 40, 131], 20),
    (4, 1, 64, [0, 129], 33),
):
    tokens = boundaries[-1]
    query, key, value = torch.randn(tokens, heads + 2 * keys, size).split((heads, keys, keys), dim=1)
    attention = PackedAttention()
    records = [[np.arange(end - start, dtype=np.int32)] * 3 for start, end in zip(boundaries, boundaries[1:])]
    attention.expect(batch := collate(records), batch.record_starts)
    spans = attention.spans(window)
    grad = torch.randn(tokens, heads, size)
    found = []
    for kernels in (triton_ops, torch_ops):
        output, logsumexp = kernels.attention(query, key, value, spans, 0.3)
        out_grads = [torch.full_like(part, torch.nan) for part in (query, key, value)]
        kernels.attention_backward(grad, (query, key, value), output, logsumexp, spans, 0.3, tuple(out_grads))
        found.append([output, logsumexp, *out_grads])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, (heads, keys, size, boundaries, window)
print("all kernels agree")
"""


def test_the_triton_kernels_compute_what_torch_does() -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.endswith("all kernels agree\n"), done.stderr
