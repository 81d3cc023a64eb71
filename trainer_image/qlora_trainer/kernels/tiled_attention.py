"""Attention over one record in plain sight, tile by tile: for windows and soft-capped scores, which flash attention
does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orchestrator.api import trainer_facts

# --- tile by tile


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention over one record, [heads, tokens, size] each, that holds the scores of a few queries at a time.

    Key and value may have fewer heads. A token sees `window` tokens, itself counted; `softcap` squashes the scores to
    (-softcap, softcap) before the softmax, as Gemma 2 does. The backward pass computes the scores anew.
    """
    return _TiledAttention.apply(query, key, value, scaling, window, softcap)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = (scaling, window, softcap)
        answer = torch.empty_like(query)
        for rows, seen in _score_tiles(query, window):
            chances, _ = _chances(query, key, rows, seen, *ctx.options)
            answer[:, rows] = torch.bmm(chances.to(value.dtype), value[:, seen]).view(answer[:, rows].shape)
        return answer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaling, window, softcap = ctx.options
        query_grad = torch.empty_like(query)
        key_sum, value_sum = (torch.zeros(part.shape, dtype=torch.float32, device=part.device) for part in (key, value))
        for rows, seen in _score_tiles(query, window):
            chances, slope = _chances(query, key, rows, seen, scaling, window, softcap)
            grad = _by_key_head(grads[0][:, rows], key)
            value_sum[:, seen] += torch.bmm(chances.to(grad.dtype).transpose(1, 2), grad)
            scores_grad = torch.bmm(grad, value[:, seen].transpose(1, 2)).float()
            scores_grad -= (scores_grad * chances).sum(dim=-1, keepdim=True)
            scores_grad *= chances
            del chances
            if slope is not None:
                scores_grad *= slope
            scores_grad *= scaling
            low = scores_grad.to(query.dtype)
            del scores_grad, slope
            query_grad[:, rows] = torch.bmm(low, key[:, seen]).view(query[:, rows].shape)
            key_sum[:, seen] += torch.bmm(low.transpose(1, 2), _by_key_head(query[:, rows], key))
        return query_grad, key_sum.to(key.dtype), value_sum.to(value.dtype), None, None, None


def _score_tiles(query: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they see; a tile's scores take at most `trainer_facts.SCORES_BYTES`."""
    heads, tokens, _ = query.shape
    row_bytes = 4 * heads * tokens if window is None else 4 * heads * min(tokens, 2 * window)
    step = max(1, min(trainer_facts.SCORES_BYTES // row_bytes, tokens if window is None else window))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _by_key_head(queries: Tensor, key: Tensor) -> Tensor:
    """[heads, rows, size] as [key heads, heads that share one x rows, size]."""
    return queries.reshape(key.shape[0], -1, queries.shape[-1])


def _chances(
    query: Tensor, key: Tensor, rows: slice, seen: slice, scaling: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """The softmax of a tile's scores [key heads, heads that share one x rows, seen], float32, and squashing's slope."""
    scores = torch.bmm(_by_key_head(query[:, rows], key), key[:, seen].transpose(1, 2)).float()
    scores *= scaling
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores *= softcap
    place = torch.arange(seen.start, rows.stop, device=query.device)
    distance = place[rows.start - seen.start :, None] - place
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    shared = query.shape[0] // key.shape[0]
    scores.view(key.shape[0], shared, *distance.shape).masked_fill_(hidden, -torch.inf)
    return scores.softmax(dim=-1), slope
