# ruff: noqa: N803 - Triton's constants are written in capitals
# Kernels are in Triton's language: a parameter is a pointer or a number, which a launch decides, so they have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportArgumentType=false, reportCallIssue=false
"""The operations of `ops` as Triton kernels.

Rules: nothing adds atomically, so the same inputs give the same bits; a kernel compiles once per shape of the model and
never for a number of tokens (`do_not_specialize`), so packed rows of every length run at once; offsets of rows are
64 bits wide, because 131,072 tokens x 28,672 values are more than 32 bits count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_trainer.kernels.triton_attention import attention as attention
from qlora_trainer.kernels.triton_attention import attention_backward as attention_backward
from qlora_trainer.kernels.triton_experts import expert_outer_products as expert_outer_products
from qlora_trainer.kernels.triton_experts import expert_products as expert_products
from qlora_trainer.kernels.triton_experts import sum_rows as sum_rows

MAX_BLOCK = 65536
"""The widest row that a program of the normalization holds."""
HEADS_BLOCK = 16
GATED_BLOCK = 1024
DROPOUT_LANES = 8
DROPOUT_BLOCK = 256
VOCABULARY_BLOCK = 4096
PACKED_BLOCK = 1024


# --- normalization


@triton.jit
def _rms_norm(
    x, x_stride, weight, out, out_stride, width, epsilon,
    OFFSET: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    value = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    exact = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, 0) / width + epsilon)
    normalized = exact * inverse
    if ROUNDS:
        normalized = normalized.to(value.dtype).to(tl.float32)
    scaled = normalized * (tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    tl.store(out + row * out_stride + place, scaled.to(value.dtype), mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, grad_stride, x, x_stride, weight, residual, residual_stride, out, out_stride, width, epsilon,
    OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    value = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    exact = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, 0) / width + epsilon)
    normalized = exact * inverse
    normalized_grad = tl.load(grad + row * grad_stride + place, mask=inside, other=0.0).to(tl.float32)
    normalized_grad *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + OFFSET
    x_grad = inverse * (normalized_grad - normalized * (tl.sum(normalized_grad * normalized, 0) / width))
    if HAS_RESIDUAL:
        x_grad += tl.load(residual + row * residual_stride + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + place, x_grad.to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """See `ops.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = _row_block(x.shape[1])
    _rms_norm[(len(x),)](
        x, x.stride(0), weight, out, out.stride(0), x.shape[1], epsilon,
        OFFSET=offset, ROUNDS=rounds, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, offset: float = 0.0
) -> Tensor:
    """See `ops.rms_norm_backward`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = _row_block(x.shape[1])
    above = grad if residual is None else residual
    _rms_norm_backward[(len(x),)](
        grad, grad.stride(0), x, x.stride(0), weight, above, above.stride(0), out, out.stride(0), x.shape[1], epsilon,
        OFFSET=offset, HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def _row_block(width: int) -> tuple[int, int]:
    block = int(triton.next_power_of_2(width))
    assert block <= MAX_BLOCK, f"rows of {width} values are wider than a program holds"
    return block, min(16, max(4, block // 512))


# --- rotary position embedding


@triton.jit
def _rotate(
    x, x_token, x_head, cos, sin, angle_token, out, out_token, out_head, heads, sign,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < heads) & (half < HALF)
    cosine = tl.load(cos + token * angle_token + half, mask=half < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * angle_token + half, mask=half < HALF, other=0.0).to(tl.float32) * sign
    source = x + token * x_token + head * x_head + half
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    exact = first.to(tl.float32)
    target = out + token * out_token + head * out_head + half
    tl.store(target, (exact * cosine - second * sine).to(first.dtype), mask=inside)
    tl.store(target + HALF, (second * cosine + exact * sine).to(first.dtype), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """See `ops.rotate`."""
    tokens, heads, size = x.shape
    _rotate[(tokens, triton.cdiv(heads, HEADS_BLOCK))](
        x, x.stride(0), x.stride(1), cos, sin, cos.stride(0), out, out.stride(0), out.stride(1), heads,
        -1.0 if back else 1.0, HALF=size // 2, HALF_BLOCK=triton.next_power_of_2(size // 2), HEADS=HEADS_BLOCK,
    )  # fmt: skip


# --- the gated activation


@triton.jit
def _gated(gate_up, stride, out, out_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(gate_up + row * stride + place, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + width + place, mask=inside, other=0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    tl.store(out + row * out_stride + place, (exact * _share(exact, GELU) * up).to(gate.dtype), mask=inside)


@triton.jit
def _share(gate, GELU: tl.constexpr):
    """What part of itself a gate becomes: of gelu's approximation (1 + tanh(u)) / 2, which is the sigmoid of 2 u."""
    if GELU:  # u = sqrt(2 / pi) * (gate + 0.044715 gate^3)
        gate *= 1.5957691216057308 * (1 + 0.044715 * gate * gate)
    return tl.sigmoid(gate)


@triton.jit
def _gated_backward(grad, grad_stride, gate_up, stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gates = gate_up + row * stride + place
    grads = grad + row * grad_stride + place
    gate = tl.load(gates, mask=inside, other=0.0)
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grads, mask=inside, other=0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    share = _share(exact, GELU)
    activated = exact * share
    gate_grad = activated * (1 - share)
    if GELU:
        gate_grad *= 1.5957691216057308 * (1 + 3 * 0.044715 * exact * exact)
    tl.store(gates, (above * up * (share + gate_grad)).to(gate.dtype), mask=inside)
    tl.store(gates + width, (above * activated).to(gate.dtype), mask=inside)
    tl.store(grads, (activated * up).to(gate.dtype), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `ops.swiglu`."""
    return _gate(gate_up, gelu=False)


def swiglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """See `ops.swiglu_backward_`."""
    _gate_backward_(grad, gate_up, gelu=False)


def geglu(gate_up: Tensor) -> Tensor:
    """See `ops.geglu`."""
    return _gate(gate_up, gelu=True)


def geglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """See `ops.geglu_backward_`."""
    _gate_backward_(grad, gate_up, gelu=True)


def _gate(gate_up: Tensor, *, gelu: bool) -> Tensor:
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _gated[(tokens, triton.cdiv(width, GATED_BLOCK))](
        gate_up, gate_up.stride(0), out, out.stride(0), width, GELU=gelu, BLOCK=GATED_BLOCK
    )
    return out


def _gate_backward_(grad: Tensor, gate_up: Tensor, *, gelu: bool) -> None:
    tokens, width = grad.shape
    _gated_backward[(tokens, triton.cdiv(width, GATED_BLOCK))](
        grad, grad.stride(0), gate_up, gate_up.stride(0), width, GELU=gelu, BLOCK=GATED_BLOCK
    )


# --- dropout


@triton.jit(do_not_specialize=["number", "elements"])
def _dropout(
    x, out, elements, seed, number, threshold, scale,
    ADD: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each call of the generator decides over eight elements, with 16 random bits for each."""
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # pyright: ignore on the next line: Triton says that it returns nothing
    first, second, third, fourth = tl.randint4x(tl.load(seed) + number, counter)  # pyright: ignore
    start = tl.program_id(0).to(tl.int64) * BLOCK * LANES + tl.arange(0, BLOCK)
    for lane in tl.static_range(LANES):
        bits = first if lane < 2 else second if lane < 4 else third if lane < 6 else fourth
        bits = (bits >> (16 * (lane % 2))) & 0xFFFF
        place = start + lane * BLOCK
        inside = place < elements
        value = tl.load(x + place, mask=inside, other=0.0)
        kept = tl.where(bits >= threshold, value.to(tl.float32) * scale, 0.0).to(value.dtype)
        if ADD:
            kept = (tl.load(out + place, mask=inside, other=0.0).to(tl.float32) + kept.to(tl.float32)).to(value.dtype)
        tl.store(out + place, kept, mask=inside)


def dropout(x: Tensor, probability: float, seed: Tensor, number: int) -> Tensor:
    """See `ops.dropout`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _drop(x, out, probability, seed, number, add=False)
    return out


def add_dropout_(target: Tensor, x: Tensor, probability: float, seed: Tensor, number: int) -> None:
    """See `ops.add_dropout_`."""
    _drop(x, target, probability, seed, number, add=True)


def _drop(x: Tensor, out: Tensor, probability: float, seed: Tensor, number: int, *, add: bool) -> None:
    assert x.is_contiguous(), "dropout counts elements"
    assert out.is_contiguous(), "dropout counts elements"
    grid = (triton.cdiv(x.numel(), DROPOUT_BLOCK * DROPOUT_LANES),)
    threshold, scale = round(probability * 65536), 1 / (1 - probability)
    _dropout[grid](x, out, x.numel(), seed, number, threshold, scale, ADD=add, LANES=DROPOUT_LANES, BLOCK=DROPOUT_BLOCK)


# --- cross-entropy


@triton.jit
def _cross_entropy(
    logits, stride, targets, losses, width, scale, softcap, gradient_scale,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * stride
    target = tl.load(targets + row)
    counts = target >= 0
    wanted = _softcapped(tl.load(values + target, mask=counts, other=0.0).to(tl.float32) * scale, softcap, SOFTCAP)
    largest, total = -float("inf"), 0.0
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < width, other=-float("inf")).to(tl.float32) * scale
        value = tl.where(place < width, _softcapped(value, softcap, SOFTCAP), -float("inf"))
        peak = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - peak) + tl.sum(tl.exp(value - peak), 0)
        largest = peak
    log_normalizer = largest + tl.log(total)
    tl.store(losses + row, tl.where(counts, log_normalizer - wanted, 0.0))
    if GRADIENT:
        factor = tl.where(counts, tl.load(gradient_scale) * scale, 0.0)
        for start in range(0, width, BLOCK):
            place = start + tl.arange(0, BLOCK)
            raw = tl.load(values + place, mask=place < width, other=0.0)
            value = _softcapped(raw.to(tl.float32) * scale, softcap, SOFTCAP)
            gradient = tl.exp(value - log_normalizer) - tl.where(place == target, 1.0, 0.0)
            if SOFTCAP:
                gradient *= 1 - (value / softcap) * (value / softcap)
            tl.store(values + place, (gradient * factor).to(raw.dtype), mask=place < width)


@triton.jit
def _softcapped(value, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        value = softcap * (2 * tl.sigmoid(2 * value / softcap) - 1)
    return value


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, gradient_scale: Tensor | None
) -> Tensor:
    """See `ops.cross_entropy_`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), targets, losses, logits.shape[1], scale, softcap or 1.0,
        losses if gradient_scale is None else gradient_scale, SOFTCAP=softcap is not None,
        GRADIENT=gradient_scale is not None, BLOCK=VOCABULARY_BLOCK, num_warps=8,
    )  # fmt: skip
    return losses


# --- NF4


@triton.jit
def _dequantize(packed, scales, code, outer_scales, inner_code, offset, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = place // 32
    inner = tl.load(inner_code + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    scale = inner * tl.load(outer_scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    high = tl.load(code + (pair >> 4)) * scale
    low = tl.load(code + (pair & 15)) * scale
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    doubled = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + doubled, values, mask=doubled < 2 * count)


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> None:
    """See `ops.dequantize`."""
    assert state.blocksize == 64, "bitsandbytes' default, which the kernel is written for"
    outer: Any = state.state2
    assert outer.blocksize == 256, "bitsandbytes' default, which the kernel is written for"
    assert out.is_contiguous(), "weights are written in one piece"
    count = packed.numel()
    _dequantize[(triton.cdiv(count, PACKED_BLOCK),)](
        packed, state.absmax, state.code, outer.absmax, outer.code, state.offset, out, count,
        BLOCK=PACKED_BLOCK, enable_fp_fusion=False,  # bitsandbytes rounds between the product and the sum
    )  # fmt: skip
