"""The operations of `ops` in plain torch: for the CPU, and the reference for the kernels."""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `ops.rms_norm`."""
    return weight * _normalized(x, epsilon)[0].to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> Tensor:
    """See `ops.rms_norm_backward`."""
    normalized, inverse = _normalized(x, epsilon)
    slope = grad.float() * weight.float()
    answer = inverse * (slope - normalized * (slope * normalized).mean(-1, keepdim=True))
    return (answer if residual is None else answer + residual.float()).to(x.dtype)


def _normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return exact * inverse, inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """See `ops.rotate`."""
    half = x.shape[-1] // 2
    cosine, sine = (part[:, None, :half].float() for part in (cos, -sin if back else sin))
    first, second = x[..., :half].float(), x[..., half:].float()
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    out.copy_(turned)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `ops.swiglu`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """See `ops.swiglu_backward_`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    activated, above = gate * sigmoid, grad.float()
    gate_up.copy_(torch.cat([above * up * (sigmoid + activated * (1 - sigmoid)), above * activated], dim=1))
    grad.copy_(activated * up)


def dropout(x: Tensor, probability: float, seed: Tensor, number: int) -> Tensor:
    """See `ops.dropout`."""
    return x * _kept(x, probability, int(seed) + number)


def add_dropout_(target: Tensor, x: Tensor, probability: float, seed: Tensor, number: int) -> None:
    """See `ops.add_dropout_`."""
    target.add_(dropout(x, probability, seed, number))


def _kept(x: Tensor, probability: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - probability, generator=generator)
    return kept.div_(1 - probability)


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, gradient_scale: Tensor | None
) -> Tensor:
    """See `ops.cross_entropy_`."""
    capped = logits.float() * scale
    slope = None
    if softcap is not None:
        squashed = torch.tanh(capped / softcap)
        capped, slope = softcap * squashed, 1 - squashed.square()
    log_normalizer = capped.logsumexp(dim=1, keepdim=True)
    counts = (targets >= 0).unsqueeze(1)
    wanted = targets.clamp(min=0).unsqueeze(1)
    losses = ((log_normalizer - capped.gather(1, wanted)) * counts).squeeze(1)
    if gradient_scale is not None:
        gradient = capped.sub_(log_normalizer).exp_()
        gradient.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=gradient.dtype))
        if slope is not None:
            gradient *= slope
        # Scaled while it is float32: a factor of 1/tokens rounded to bfloat16 would bend every gradient.
        logits.copy_(gradient.mul_(scale * gradient_scale * counts))
    return losses


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> None:
    """See `ops.dequantize`."""
    out.copy_(dequantize_4bit(packed, state))
