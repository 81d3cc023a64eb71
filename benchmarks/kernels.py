"""The Triton kernels held against torch on the card, and fused layers against transformers', PEFT's and autograd's own.

    python -m benchmarks.kernels [--save kernels]

The tests do the same on the CPU, where Triton is interpreted; here everything runs as it does in training. Differences
are relative, |ours - theirs| / |theirs|. Exit 1 if one is larger than rounding allows, or if bits differ that must not.
Attention is timed against torch's flash attention, too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.architectures import config
from benchmarks.report import argument_parser, emit
from benchmarks.shapes import write_model

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["QLORA_ALLOW_RANDOM_WEIGHTS"] = "1"

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import MicroBatch, collate
from qlora_trainer.kernels import ops, torch_ops
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.cuda_graphs import CudaGraphs
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.training import runtime
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec
from orchestrator.api.plan import MemoryPlan

KERNEL_TOLERANCE = 0.005
"""One rounding to bfloat16 is off by 0.002 on average."""
LAYER_TOLERANCE = 0.03
"""Two ways through four layers in bfloat16; leaving out any part is off by ten times as much."""
PACKED = (700, 300, 24, 1024)
LONG = (19384, 500)
FAMILIES = ("smollm3-3b", "olmo-2-7b", "olmo-3-7b", "gemma-3-1b", "gemma-3-27b")
"""Models whose layers differ from Llama's in norms, positions, windows, gates or the size of heads."""
FAMILY_LAYERS, FAMILY_LONG = 4, (6000, 500)
FAMILY_TOLERANCE = 0.05
"""Where each half of a layer ends with a norm, more of its own roundings are in the gradients."""
ALL_LAYERS = 1024
ATTENTION = ((32, 8, 128, None), (14, 2, 64, None), (12, 12, 96, None), (32, 8, 128, 500))
"""Heads, those of keys, their size, and how far a token sees."""
SINKS = ((64, 8, 64, None), (64, 8, 64, 128), (16, 8, 192, None))
"""Heads with sinks, in the same order; the last are too large for our kernels."""
TIMED_TOKENS = (2048, 8192, 32768)
TIMED_HEADS, TIMED_KEYS, TIMED_SIZE = 32, 8, 128
TIMES = 5
EXPERTS, EXPERT_HIDDEN, EXPERT_SIZE, EXPERT_TOKENS = 16, 2048, 768, 5000
"""More tokens than a tile has."""
TIMED_EXPERTS = {"Qwen3-30B-A3B": (128, 2048, 768, 8), "Mixtral 8x7B": (8, 4096, 14336, 2)}
"""A layer's experts, the hidden size, theirs, and how many a token has."""


def main() -> None:
    """Compare, print, judge."""
    arguments = argument_parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this compares what runs on a GPU, and there is none; the tests do the same on the CPU")
    device = runtime.set_up(threads=os.cpu_count() or 1, deterministic=True)
    kernels = compare_kernels(device)
    layers = compare_layers(device)
    experts = compare_experts(device)
    families = {name: compare_family(device, name) for name in FAMILIES}
    attention = {
        f"{heads} heads of {size}, {keys} of keys, window {window}": compare_attention(
            device, heads, keys, size, window
        )
        for heads, keys, size, window in ATTENTION
    }
    sinks = {
        f"{heads} heads of {size}, {keys} of keys, window {window}": compare_sinks(device, heads, keys, size, window)
        for heads, keys, size, window in SINKS
    }
    agree = (
        all(difference <= KERNEL_TOLERANCE for difference in kernels.values())
        and max(experts["differences"].values()) <= LAYER_TOLERANCE
        and experts["same_bits"]
        and all(max(found["differences"].values()) <= KERNEL_TOLERANCE for found in attention.values())
        and all(max(found["differences"].values()) <= KERNEL_TOLERANCE for found in sinks.values())
        and all(found["same_bits"] for found in (*attention.values(), *sinks.values()))
        and all(found["largest_gradient_difference"] <= LAYER_TOLERANCE for found in layers["against_the_untouched"])
        and all(layers["same_bits"].values())
        and all(found["largest_gradient_difference"] <= FAMILY_TOLERANCE for found in families.values())
        and all(all(found["same_bits"].values()) for found in families.values())
    )
    found = {
        "agree": agree,
        "kernel_differences": kernels,
        "attention": attention,
        "sinks": sinks,
        "experts": experts,
        "families": families,
        **layers,
    }
    times = {f"{tokens} tokens": time_attention(device, tokens) for tokens in TIMED_TOKENS}
    of_experts = {name: time_experts(device, *shape) for name, shape in TIMED_EXPERTS.items()}
    emit({**found, "attention_milliseconds": times, "experts_milliseconds": of_experts}, save=arguments.save)
    sys.exit(0 if agree else 1)


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return float((one.float() - other.float()).norm() / other.float().norm())


# --- kernels


def compare_kernels(device: torch.device) -> dict[str, float]:
    """Each kernel's largest difference to torch, in shapes of the 8B model and rows that lie apart."""
    from qlora_trainer.kernels import triton_ops

    torch.manual_seed(0)
    found: dict[str, float] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    def both(name: str, *arguments: Any, changed: Sequence[int] = ()) -> None:
        one, other = ([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2))
        results = getattr(triton_ops, name)(*one), getattr(torch_ops, name)(*other)
        pairs = [(one[index], other[index]) for index in changed]
        pairs += [results] if results[1] is not None else []
        found[name] = max([found.get(name, 0.0), *(round(difference(*pair), 6) for pair in pairs)])

    wide = draw(515, 6144)
    for offset, rounds in (ops.ROUNDED, ops.EXACT, ops.AROUND_ONE):
        both("rms_norm", wide[:, :4096], draw(4096), 1e-5, offset, rounds)
        for residual in (None, draw(515, 4096)):
            both("rms_norm_backward", draw(515, 4096), wide[:, :4096], draw(4096), 1e-5, residual, offset)
    angle = torch.randn(515, 64, device=device).repeat(1, 2)
    heads = wide[:, :5120].view(515, 40, 128)
    for back in (False, True):
        both("rotate", heads, angle.cos().bfloat16(), angle.sin().bfloat16(), draw(515, 40, 128), back, changed=(3,))
    for gate in ("swiglu", "geglu"):
        both(gate, draw(515, 28672))
        both(f"{gate}_backward_", draw(515, 14336), draw(515, 28672), changed=(0, 1))
    targets = torch.randint(0, 128256, (515,), device=device)
    targets[100] = IGNORED_LABEL
    for softcap in (None, 30.0):
        for gradient_scale in (None, torch.tensor(0.37, device=device)):
            changed = () if gradient_scale is None else (0,)
            both("cross_entropy_", draw(515, 128256), targets, 1.0, softcap, gradient_scale, changed=changed)
    weight = 0.02 * draw(4096, 14336)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
    ours, theirs = torch.empty_like(weight), torch.empty_like(weight)
    triton_ops.dequantize(packed, state, ours)
    torch_ops.dequantize(packed, state, theirs)
    found["dequantize"] = float(not torch.equal(ours, theirs))
    dense, offsets = 0.02 * draw(3, 1536, 2048), torch.tensor([0, 300, 300, 515], dtype=torch.int32, device=device)
    for back, width in ((False, 2048), (True, 1536)):
        out = draw(515, 3584 - width)
        both("expert_products", draw(515, width), None, dense, offsets, out, back, changed=(4,))
        source = torch.randint(0, 64, (515,), device=device)
        both("expert_products", draw(64, width), source, dense, offsets, out, back, changed=(4,))
    places = torch.randperm(515, device=device).view(103, 5)
    for weights in (None, torch.rand(103, 5, device=device)):
        both("sum_rows", draw(515, 2048), places, weights, draw(103, 2048), changed=(3,))
    return found


# --- experts


def compare_experts(device: torch.device) -> dict[str, Any]:
    """Both passes of experts as wide as Qwen3-30B-A3B's against autograd's, and against themselves."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    gate_up, down = (
        0.02 * draw(EXPERTS, 2 * EXPERT_SIZE, EXPERT_HIDDEN),
        0.02 * draw(EXPERTS, EXPERT_HIDDEN, EXPERT_SIZE),
    )
    experts = NF4Experts((gate_up, down)).to(device)
    x, grad = draw(EXPERT_TOKENS, EXPERT_HIDDEN), draw(EXPERT_TOKENS, EXPERT_HIDDEN)
    weights, index = torch.rand(EXPERT_TOKENS, EXPERTS - 1, device=device).topk(4)  # the last is never chosen

    def both_passes(forward: Any) -> tuple[Any, ...]:
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        output = forward(leaves[0], index, leaves[1])
        output.backward(grad)
        return output.detach(), *(leaf.grad for leaf in leaves)

    ours, again = both_passes(experts), both_passes(experts)
    theirs = both_passes(partial(_experts_in_plain_sight, experts))
    names = ("output", "gradient to x", "gradient to weights")
    return {
        "differences": {name: round(difference(*pair), 6) for name, *pair in zip(names, ours, theirs, strict=True)},
        "same_bits": all(torch.equal(*pair) for pair in zip(ours, again, strict=True)),
    }


def time_experts(device: torch.device, experts: int, hidden: int, inner: int, each: int) -> dict[str, float]:
    """Both passes of a layer's experts over a tile of tokens."""
    shape: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    gate_up, down = torch.randn(experts, 2 * inner, hidden, **shape), torch.randn(experts, hidden, inner, **shape)
    layer = NF4Experts((0.02 * gate_up, 0.02 * down)).to(device)
    tokens = trainer_facts.EXPERT_TILE_TOKENS
    x, grad = torch.randn(tokens, hidden, **shape), torch.randn(tokens, hidden, **shape)
    weights, index = torch.rand(tokens, experts, device=device).topk(each)
    return {
        "forward": milliseconds(partial(layer.mix, x, index, weights)),
        "backward": milliseconds(partial(layer.mix_backward, grad, x, index, weights)),
    }


def _experts_in_plain_sight(experts: NF4Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, in float32."""
    gate_up, down = (experts.dense(name).float() for name in experts.matrices)
    output = torch.zeros(x.shape, device=x.device)
    for number in range(experts.experts):
        gate, up = (x.float() @ gate_up[number].t()).chunk(2, dim=1)
        chosen = (weights * (index == number)).sum(1, keepdim=True)
        output = output + chosen * ((torch.nn.functional.silu(gate) * up) @ down[number].t())
    return output.to(x.dtype)


# --- attention


def compare_attention(device: torch.device, heads: int, keys: int, size: int, window: int | None) -> dict[str, Any]:
    """Our attention over packed records against the same in float32, and against itself."""
    attention = PackedAttention()
    batch = records(PACKED)
    attention.expect(batch, batch.record_starts.to(device))
    inputs, grad = draw_heads(device, batch.tokens, heads, keys, size)
    scaling, spans = size**-0.5, attention.spans(window)

    def both_passes(way: Any) -> list[Tensor]:
        output, logsumexp = way.attention(*inputs, spans, scaling)
        out_grads = [torch.full_like(part, torch.nan) for part in inputs]
        way.attention_backward(grad, inputs, output, logsumexp, spans, scaling, tuple(out_grads))
        return [output, logsumexp, *out_grads]

    ours, again, exact = both_passes(ops), both_passes(ops), both_passes(torch_ops)
    names = ("output", "logsumexp", "query gradient", "key gradient", "value gradient")
    return {
        "differences": {
            name: round(difference(one, other), 5) for name, one, other in zip(names, ours, exact, strict=True)
        },
        "same_bits": all(map(torch.equal, ours, again)),
    }


def compare_sinks(device: torch.device, heads: int, keys: int, size: int, window: int | None) -> dict[str, Any]:
    """Attention of heads with sinks, as transformers asks for it, against all scores at once in float32."""
    attention = PackedAttention()
    batch = records(PACKED)
    attention.expect(batch, batch.record_starts.to(device))
    drawn, grad = draw_heads(device, batch.tokens, heads, keys, size)
    sinks, scaling = torch.linspace(-4, 8, heads, device=device), size**-0.5
    rows = [part.transpose(0, 1).unsqueeze(0) for part in drawn]

    def ours() -> list[Tensor]:
        query, key, value = inputs = [part.contiguous().requires_grad_() for part in rows]
        output, _ = attention(
            torch.nn.Module(), query, key, value, None, scaling=scaling, sliding_window=window, s_aux=sinks
        )
        return [output.detach(), *torch.autograd.grad(output, inputs, grad.unsqueeze(0))]

    def exact() -> list[Tensor]:
        inputs = [part.float().requires_grad_() for part in rows]
        query, key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in inputs)
        outputs = [
            _scores_at_once(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], sinks, scaling, window)
            for a, b in pairwise(batch.record_starts.tolist())
        ]
        output = torch.cat(outputs, dim=2).transpose(1, 2)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad.float().unsqueeze(0))]

    once, again, right = ours(), ours(), exact()
    names = ("output", "query gradient", "key gradient", "value gradient")
    return {
        "differences": {
            name: round(difference(one, other), 5) for name, one, other in zip(names, once, right, strict=True)
        },
        "same_bits": all(map(torch.equal, once, again)),
    }


def _scores_at_once(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scaling: float, window: int | None
) -> Tensor:
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (window or len(place)))
    scores = (scaling * query @ key.transpose(2, 3)).masked_fill(hidden, -torch.inf)
    beside = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, beside], dim=-1).softmax(dim=-1)[..., :-1] @ value


def draw_heads(
    device: torch.device, tokens: int, heads: int, keys: int, size: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Query, key and value side by side, as a layer has them, and a gradient."""
    torch.manual_seed(0)
    side_by_side = torch.randn(tokens, heads + 2 * keys, size, device=device).to(torch.bfloat16)
    query, key, value = side_by_side.split((heads, keys, keys), dim=1)
    return (query, key, value), torch.randn(tokens, heads, size, device=device).to(torch.bfloat16)


def time_attention(device: torch.device, tokens: int) -> dict[str, float]:
    """One record's two passes by our kernels, and by torch's flash attention, deterministic and not."""
    attention = PackedAttention()
    batch = records((tokens,))
    attention.expect(batch, starts := batch.record_starts.to(device))
    inputs, grad = draw_heads(device, tokens, TIMED_HEADS, TIMED_KEYS, TIMED_SIZE)
    scaling, spans = TIMED_SIZE**-0.5, attention.spans(None)
    output, logsumexp = ops.attention(*inputs, spans, scaling)
    out_grads = (torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[2]))
    row = (starts, starts, tokens, tokens, 0.0)
    nothing = torch.empty(2, dtype=torch.uint64, device=device)
    flash: Any = torch.ops.aten
    options = {"is_causal": True, "scale": scaling}
    back = partial(flash._flash_attention_backward, grad, *inputs, output, logsumexp, *row, **options)
    flash_backward = partial(back, rng_state=nothing, unused=nothing)
    forward = partial(flash._flash_attention_forward, *inputs, *row, **options)
    own_backward = partial(ops.attention_backward, grad, inputs, output, logsumexp, spans, scaling, out_grads)
    times = {
        "own forward": milliseconds(partial(ops.attention, *inputs, spans, scaling)),
        "flash forward": milliseconds(partial(forward, return_debug_mask=False)),
        "own backward": milliseconds(own_backward),
        "flash backward, deterministic": milliseconds(flash_backward),
    }
    torch.use_deterministic_algorithms(False)
    times["flash backward"] = milliseconds(flash_backward)
    torch.use_deterministic_algorithms(True)
    return times


def milliseconds(run: Callable[[], object]) -> float:
    """Of one run, once it is warm."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(TIMES):
        run()
    torch.cuda.synchronize()
    return round(1000 * (time.perf_counter() - began) / TIMES, 2)


# --- layers


def compare_layers(device: torch.device) -> dict[str, Any]:
    """Loss and gradients with and without fused layers; and what must not change a bit."""
    attention = PackedAttention()
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(write_model(Path(folder), "small"), device, attention)
    plain = woken(add_adapter(base, AdapterSpec(rank=16, alpha=32, dropout="0"), seed=0))
    against = [
        {"records": list(lengths), "recompute_layers": layers, **against_untouched(plain, attention, lengths, layers)}
        for lengths, layers in ((PACKED, 0), (PACKED, ALL_LAYERS), (LONG, 0), (LONG, ALL_LAYERS))
    ]
    drop(plain)
    same = {f"{len(lengths)} records": same_bits(plain, attention, lengths) for lengths in (PACKED, LONG)}
    return {
        "against_the_untouched": against,
        "same_bits": {f"{name}, {what}": equal for name, found in same.items() for what, equal in found.items()},
    }


def compare_family(device: torch.device, name: str) -> dict[str, Any]:
    """The same for a few layers of a published model; windows are as long as its own, so records are longer."""
    attention = PackedAttention()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), name)
        (Path(folder) / "config.json").write_text(json.dumps(config(name, FAMILY_LAYERS)))
        base = load_base(Path(folder), device, attention)
    for module in base.modules():
        if isinstance(module, Gemma3RMSNorm):  # as new ones are: with twice the scores nothing is left but roundings
            module.weight.data.zero_()
    plain = woken(add_adapter(base, AdapterSpec(rank=16, alpha=32, dropout="0"), seed=0))
    model = training_model(plain, attention, 0)
    model.check()
    assert model.fused is not None, "the layers must be left to us"
    found = [against_untouched(plain, attention, lengths, ALL_LAYERS) for lengths in (PACKED, FAMILY_LONG)]
    worst = {what: max(each[what] for each in found) for what in found[0]}
    drop(plain)
    return {**worst, "same_bits": same_bits(plain, attention, PACKED)}


def drop(model: PeftModel) -> None:
    """Let every adapter drop some of its input from here on."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)


def woken(model: PeftModel) -> PeftModel:
    """With B that is not zero, so that the adapter does something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return model


def against_untouched(
    peft_model: PeftModel, attention: PackedAttention, lengths: Sequence[int], recompute_layers: int
) -> dict[str, float]:
    """How far loss and gradients are from those of layers that nobody took over."""
    model = training_model(peft_model, attention, recompute_layers)
    assert model.fused is not None, "the layers must have been taken over"
    batch = records(lengths)
    loss, ours = loss_and_gradients(model, batch)
    with model.fused.bypassed():
        expected, theirs = loss_and_gradients(model, batch)
    return {
        "loss_difference": round(abs(loss - expected) / expected, 6),
        "largest_gradient_difference": round(max(map(difference, ours, theirs)), 5),
        "mean_gradient_difference": round(sum(map(difference, ours, theirs)) / len(ours), 5),
    }


def same_bits(peft_model: PeftModel, attention: PackedAttention, lengths: Sequence[int]) -> dict[str, bool]:
    """Whether gradients are the same, bit for bit, twice; with and without recomputation where it may be; offloaded."""
    batch = records(lengths)
    full = training_model(peft_model, attention, ALL_LAYERS)
    first, again = loss_and_gradients(full, batch), loss_and_gradients(full, batch)
    offloaded = loss_and_gradients(training_model(peft_model, attention, ALL_LAYERS, offload=("activations",)), batch)
    equal = {"twice": same(first, again), "activations offloaded": same(first, offloaded)}
    return equal | (graph_bits(peft_model, attention, batch) if CudaGraphs.takes(batch) else {})


def graph_bits(peft_model: PeftModel, packed: PackedAttention, batch: MicroBatch, **plan: Any) -> dict[str, bool]:
    """Whether a CUDA graph gives the bits of the padded micro-batch without one, and another seed others."""
    model = training_model(peft_model, packed, 0, **plan)
    model.train()
    found = []
    for seed in (0, 0, 0, 1, 0):
        torch.manual_seed(seed)
        loss = model.accumulate(batch, divisor=float(batch.tokens)).item()
        found.append((loss, [p.grad.clone() for _, p in model.trainable() if p.grad is not None]))
        model.peft_model.zero_grad(set_to_none=True)
    assert model.cuda_graphs is not None, "a card has graphs"
    assert model.cuda_graphs.captured == 1, "the graph must have been made"
    plain, captured, replayed, other, last = found
    return {
        "graph": same(plain, captured) and same(plain, replayed) and same(plain, last),
        "graph draws anew": not same(plain, other),
    }


def training_model(peft_model: PeftModel, packed: PackedAttention, recompute_layers: int, **more: Any) -> TrainingModel:
    """The model under a plan."""
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=recompute_layers, **more)
    return TrainingModel(peft_model, plan, packed, 0.0)


def records(lengths: Sequence[int]) -> MicroBatch:
    """One row of records of random tokens."""
    random = np.random.RandomState(1)
    tokens = [random.randint(5, 32000, size=length).astype(np.int32) for length in lengths]
    return collate([(ids, ids, np.arange(len(ids), dtype=np.int32)) for ids in tokens])


def loss_and_gradients(model: TrainingModel, batch: MicroBatch) -> tuple[float, list[Tensor]]:
    """Of one micro-batch in training."""
    model.train()
    torch.manual_seed(0)
    loss = model.loss(batch, divisor=float(batch.tokens))
    loss.backward()
    found = [parameter.grad for _, parameter in model.trainable() if parameter.grad is not None]
    model.peft_model.zero_grad(set_to_none=True)
    return loss.item(), found


def same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> bool:
    """Bit for bit."""
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


if __name__ == "__main__":
    main()
