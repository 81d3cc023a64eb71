"""Causal attention over one record that computes its scores tile by tile, with windows and softcapped scores.

Flash attention knows neither softcapping nor, on a CPU, windows. Rules: the scores of a few queries exist at a time, in
float32, and the backward pass computes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator.api import trainer_facts


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How scores are computed: `softcap * tanh(scaling * q k' / softcap)`, over the `window` newest tokens."""

    scaling: float
    window: int | None
    softcap: float | None
    """Gemma 2's bound on attention scores (Gemma Team, 2024, section 2)."""
    tile_bytes: int = field(default_factory=lambda: trainer_facts.SCORES_BYTES)
    """The size of a tile of scores; a few such tensors are alive at once."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    """Causal attention over one record, [heads, tokens, size] each; key and value may have fewer heads."""
    return _TiledAttention.apply(query, key, value, options)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        output = torch.empty_like(query)
        for rows, seen in _score_tiles(query, options):
            probabilities, _ = _probabilities(query, key, rows, seen, options)
            output[:, rows] = torch.bmm(probabilities.to(value.dtype), value[:, seen]).view(output[:, rows].shape)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        options: ScoreOptions = ctx.options
        query_grad = torch.empty_like(query)
        key_grad_sum, value_grad_sum = (
            torch.zeros(part.shape, dtype=torch.float32, device=part.device) for part in (key, value)
        )
        for rows, seen in _score_tiles(query, options):
            probabilities, softcap_grad = _probabilities(query, key, rows, seen, options)
            grad = _by_key_head(grads[0][:, rows], key)
            value_grad_sum[:, seen] += torch.bmm(probabilities.to(grad.dtype).transpose(1, 2), grad)
            scores_grad = torch.bmm(grad, value[:, seen].transpose(1, 2)).float()
            scores_grad -= (scores_grad * probabilities).sum(dim=-1, keepdim=True)
            scores_grad *= probabilities
            del probabilities
            if softcap_grad is not None:
                scores_grad *= softcap_grad
            scores_grad *= options.scaling
            scores_grad_low = scores_grad.to(query.dtype)
            del scores_grad, softcap_grad
            query_grad[:, rows] = torch.bmm(scores_grad_low, key[:, seen]).view(query[:, rows].shape)
            key_grad_sum[:, seen] += torch.bmm(scores_grad_low.transpose(1, 2), _by_key_head(query[:, rows], key))
        return query_grad, key_grad_sum.to(key.dtype), value_grad_sum.to(value.dtype), None


def _score_tiles(query: Tensor, options: ScoreOptions) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they see; a tile's scores take at most `options.tile_bytes` in float32."""
    heads, tokens, _ = query.shape
    window = options.window
    row_bytes = 4 * heads * tokens if window is None else 4 * heads * min(tokens, 2 * window)
    step = max(1, min(options.tile_bytes // row_bytes, tokens if window is None else window))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _by_key_head(queries: Tensor, key: Tensor) -> Tensor:
    """[heads, rows, size] as [key heads, heads that share one x rows, size]."""
    return queries.reshape(key.shape[0], -1, queries.shape[-1])


def _probabilities(
    query: Tensor, key: Tensor, rows: slice, seen: slice, options: ScoreOptions
) -> tuple[Tensor, Tensor | None]:
    """The softmax of a tile's scores [key heads, heads that share one x rows, seen], float32; softcap's gradient."""
    scores = torch.bmm(_by_key_head(query[:, rows], key), key[:, seen].transpose(1, 2)).float()
    scores *= options.scaling
    softcap_grad = None
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_()
        softcap_grad = 1 - scores.square()
        scores *= options.softcap
    place = torch.arange(seen.start, rows.stop, device=query.device)
    distance = place[rows.start - seen.start :, None] - place
    window = options.window
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    shared = query.shape[0] // key.shape[0]
    scores.view(key.shape[0], shared, *distance.shape).masked_fill_(hidden, -torch.inf)
    return scores.softmax(dim=-1), softcap_grad
