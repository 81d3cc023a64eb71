"""The operations of `ops` in plain torch: for the CPU, and the reference for the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor

FLOAT_BYTES = 4
SCORES_BYTES = 2 << 20
"""The size of a tile of attention's scores: small tiles see fewer masked keys, and stay in a processor's cache."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """See `ops.rms_norm`."""
    normalized = _normalized(x, epsilon)[0]
    if rounds:
        normalized = normalized.to(x.dtype)
    return ((weight.float() + offset) * normalized.float()).to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, offset: float = 0.0
) -> Tensor:
    """See `ops.rms_norm_backward`."""
    normalized, inverse = _normalized(x, epsilon)
    normalized_grad = grad.float() * (weight.float() + offset)
    x_grad = inverse * (normalized_grad - normalized * (normalized_grad * normalized).mean(-1, keepdim=True))
    return (x_grad if residual is None else x_grad + residual.float()).to(x.dtype)


def _normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return exact * inverse, inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """See `ops.rotate`."""
    half = x.shape[-1] // 2
    cosine, sine = (part[:, None, :half].float() for part in (cos, -sin if back else sin))
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    out.copy_(rotated)


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


def geglu(gate_up: Tensor) -> Tensor:
    """See `ops.geglu`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def geglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """See `ops.geglu_backward_`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    above = grad.float()
    gate_grad = torch.ops.aten.gelu_backward(above * up, gate, approximate="tanh")
    activated = torch.nn.functional.gelu(gate, approximate="tanh")
    gate_up.copy_(torch.cat([gate_grad, above * activated], dim=1))
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
    softcapped = logits.float() * scale
    softcap_grad = None
    if softcap is not None:
        tanh = torch.tanh(softcapped / softcap)
        softcapped, softcap_grad = softcap * tanh, 1 - tanh.square()
    log_normalizer = softcapped.logsumexp(dim=1, keepdim=True)
    counts = (targets >= 0).unsqueeze(1)
    wanted = targets.clamp(min=0).unsqueeze(1)
    losses = ((log_normalizer - softcapped.gather(1, wanted)) * counts).squeeze(1)
    if gradient_scale is not None:
        gradient = softcapped.sub_(log_normalizer).exp_()
        gradient.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=gradient.dtype))
        if softcap_grad is not None:
            gradient *= softcap_grad
        # Scaled while it is float32: a factor of 1/tokens rounded to bfloat16 would bend every gradient.
        logits.copy_(gradient.mul_(scale * gradient_scale * counts))
    return losses


def attention(
    query: Tensor, key: Tensor, value: Tensor, spans: tuple[Tensor, Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """See `ops.attention`."""
    keys, values = (part.float().transpose(0, 1).contiguous() for part in (key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
    for rows, seen in _score_tiles(query, spans[0]):
        scores = _scores(_by_key_head(query[rows], key), keys, spans[0], rows, seen, scaling)
        normalizer = scores.logsumexp(-1, keepdim=True)
        probabilities = scores.sub_(normalizer).exp_()
        output[rows] = _by_token(torch.bmm(probabilities, values[:, seen]), query.shape[1])
        logsumexp[:, rows] = normalizer.view(query.shape[1], -1)
    return output, logsumexp


def attention_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    logsumexp: Tensor,
    spans: tuple[Tensor, Tensor],
    scaling: float,
    out_grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """See `ops.attention_backward`."""
    query, key, value = inputs
    heads = query.shape[1]
    keys, values = (part.float().transpose(0, 1).contiguous() for part in (key, value))
    key_grad_sum, value_grad_sum = torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _score_tiles(query, spans[0]):
        q, g, o = (_by_key_head(part[rows], key) for part in (query, grad, output))
        normalizer = logsumexp[:, rows].reshape(len(keys), -1, 1)
        probabilities = _scores(q, keys, spans[0], rows, seen, scaling).sub_(normalizer).exp_()
        value_grad_sum[:, seen].baddbmm_(probabilities.transpose(1, 2), g)
        scores_grad = torch.bmm(g, values[:, seen].transpose(1, 2)).sub_((g * o).sum(-1, keepdim=True))
        scores_grad.mul_(probabilities).mul_(scaling)
        out_grads[0][rows] = _by_token(torch.bmm(scores_grad, keys[:, seen]), heads)
        key_grad_sum[:, seen].baddbmm_(scores_grad.transpose(1, 2), q)
    for part, total in zip(out_grads[1:], (key_grad_sum, value_grad_sum), strict=True):
        part.copy_(total.transpose(0, 1))


def _score_tiles(query: Tensor, first: Tensor) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they see; a tile's scores take at most `SCORES_BYTES` in float32."""
    tokens, heads, _ = query.shape
    step = max(1, SCORES_BYTES // (FLOAT_BYTES * heads * tokens))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        yield slice(start, stop), slice(int(first[start]), stop)


def _scores(q: Tensor, keys: Tensor, first: Tensor, rows: slice, seen: slice, scaling: float) -> Tensor:
    """A tile's scores [key heads, heads that share one x queries, keys], -inf where a query does not look."""
    scores = torch.bmm(q, keys[:, seen].transpose(1, 2)).mul_(scaling)
    at, place = (torch.arange(part.start, part.stop, device=q.device) for part in (rows, seen))
    hidden = (place > at[:, None]) | (place < first[rows, None])
    scores.view(len(keys), -1, *hidden.shape).masked_fill_(hidden, -torch.inf)
    return scores


def _by_key_head(heads: Tensor, key: Tensor) -> Tensor:
    """[tokens, heads, size] as float32 [key heads, heads that share one x tokens, size]."""
    apart = heads.float().view(len(heads), key.shape[1], -1, heads.shape[-1])
    return apart.permute(1, 2, 0, 3).reshape(key.shape[1], -1, heads.shape[-1])


def _by_token(parts: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_key_head`: [tokens, heads, size]."""
    apart = parts.view(heads, -1, parts.shape[-1])
    return apart.transpose(0, 1)


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> None:
    """See `ops.dequantize`."""
    out.copy_(dequantize_4bit(packed, state).view(out.shape))


def expert_products(
    x: Tensor, source: Tensor | None, weights: Tensor, offsets: Tensor, out: Tensor, back: bool
) -> None:
    """See `ops.expert_products`."""
    for dense, (begin, end) in zip(weights, pairwise(offsets.tolist()), strict=False):
        rows = x[begin:end] if source is None else x[source[begin:end]]
        if len(rows):
            out[begin:end] = rows.float() @ (dense if back else dense.t()).float()


def expert_outer_products(
    left: Tensor, left_source: Tensor | None, right: Tensor, right_source: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """See `ops.expert_outer_products`."""
    for total, (begin, end) in zip(out, pairwise(offsets.tolist()), strict=True):
        one = left[begin:end] if left_source is None else left[left_source[begin:end]]
        other = right[begin:end] if right_source is None else right[right_source[begin:end]]
        total += one.float().t() @ other.float()


def sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """See `ops.sum_rows`."""
    chosen = rows[places].float()
    out.copy_((chosen if weights is None else chosen * weights.unsqueeze(-1)).sum(1))
