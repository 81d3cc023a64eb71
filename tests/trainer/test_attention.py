"""Attention that is computed tile by tile or over a packed row, against all scores at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import torch_ops
from qlora_trainer.kernels.packed_attention import PackedAttention, UnknownAttention
from qlora_trainer.kernels.tiled_attention import ScoreOptions, tiled_attention
from torch import Tensor


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same in one piece, by autograd."""
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, dim=0), value.repeat_interleave(shared, dim=0)
    scores = scaling * query @ key.transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(query.shape[1])
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (window or len(place)))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1) @ value
    beside = sinks[:, None, None].expand(*scores.shape[:2], 1)
    return torch.cat([scores, beside], dim=-1).softmax(dim=-1)[..., :-1] @ value


@pytest.mark.parametrize(
    ("tokens", "key_heads", "window", "softcap"),
    [
        pytest.param(37, 4, None, 2.0, id="softcapped"),
        pytest.param(37, 2, 7, None, id="window, shared keys"),
        pytest.param(64, 1, 50, 1.5, id="softcapped, window, one key head"),
        pytest.param(5, 2, 64, 1.5, id="a record shorter than the window"),
    ],
)
@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_tiles_give_the_output_and_the_gradients_of_all_scores_at_once(
    tokens: int,
    key_heads: int,
    window: int | None,
    softcap: float | None,
    rows_at_once: int,
) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, tokens, 8, requires_grad=True)
    key, value = (torch.randn(key_heads, tokens, 8, requires_grad=True) for _ in range(2))
    weights = torch.randn(4, tokens, 8)
    options = ScoreOptions(0.6, window, softcap, tile_bytes=4 * 4 * tokens * rows_at_once)
    found = tiled_attention(query, key, value, options)
    expected = dense(query, key, value, 0.6, window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
    right = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    torch.testing.assert_close(gradients, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("boundaries", [[0, 13, 14, 40], [0, 130, 131, 380]], ids=["one tile", "several tiles"])
def test_a_packed_row_by_hand_gives_what_its_records_give_alone(window: int | None, boundaries: list[int]) -> None:
    tokens = boundaries[-1]
    assert (4 * 4 * tokens**2 > torch_ops.SCORES_BYTES) == (tokens == 380)
    torch.manual_seed(0)
    query, key, value = torch.randn(tokens, 8, 16).split((4, 2, 2), dim=1)
    grad = torch.randn(tokens, 4, 16)
    packed = PackedAttention()
    ids = [np.arange(end - start, dtype=np.int32) for start, end in pairwise(boundaries)]
    batch = collate([(each, each, each) for each in ids])
    packed.expect(batch, batch.record_starts)
    output, logsumexp = packed.forward(query, key, value, 0.6, window)
    out_grads = tuple(torch.full_like(part, torch.nan) for part in (query, key, value))
    packed.backward(grad, (query, key, value), output, logsumexp, 0.6, window, out_grads=out_grads)
    for start, end in pairwise(boundaries):
        own = [part[start:end].transpose(0, 1).clone().requires_grad_() for part in (query, key, value)]
        expected = dense(*own, 0.6, window, None)
        torch.testing.assert_close(output[start:end].transpose(0, 1), expected.detach(), rtol=1e-5, atol=1e-6)
        right = torch.autograd.grad((expected * grad[start:end].transpose(0, 1)).sum(), own)
        for found, gradient in zip(out_grads, right, strict=True):
            torch.testing.assert_close(found[start:end].transpose(0, 1), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("size", [16, 160], ids=["heads of any size", "heads of a size for flash attention alone"])
def test_heads_with_sinks_give_the_output_and_the_gradients_of_a_score_more(window: int | None, size: int) -> None:
    torch.manual_seed(0)
    boundaries = [0, 1, 14, 40]
    tensors = [torch.randn(1, heads, 40, size) for heads in (4, 2, 2)]
    sinks, grad = torch.tensor([-30.0, 0.0, 1.5, 30.0]), torch.randn(1, 40, 4, size)
    packed = PackedAttention()
    ids = [np.arange(end - start, dtype=np.int32) for start, end in pairwise(boundaries)]
    batch = collate([(each, each, each) for each in ids])
    packed.expect(batch, batch.record_starts)
    ours = [part.clone().requires_grad_() for part in tensors]
    output, _ = packed(torch.nn.Module(), *ours, None, scaling=0.3, sliding_window=window, s_aux=sinks)
    found = torch.autograd.grad((output * grad).sum(), ours)
    for start, end in pairwise(boundaries):
        own = [part[0, :, start:end].clone().requires_grad_() for part in tensors]
        expected = dense(own[0], own[1], own[2], 0.3, window, None, sinks)
        torch.testing.assert_close(output[0, start:end].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
        right = torch.autograd.grad((expected * grad[0, start:end].transpose(0, 1)).sum(), own)
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one[0, :, start:end], other, rtol=1e-4, atol=1e-4)


def test_sinks_are_refused_where_no_kernel_knows_them() -> None:
    packed = PackedAttention()
    each = np.arange(5, dtype=np.int32)
    batch = collate([(each, each, each)])
    packed.expect(batch, batch.record_starts)
    query, key, value = torch.randn(3, 1, 4, 5, 16)
    for odd in ({"dropout": 0.1}, {"softcap": 2.0}, {"value": value[..., :8]}):
        with pytest.raises(UnknownAttention, match="its sinks come with"):
            packed(
                torch.nn.Module(), query, key, odd.pop("value", value), None, scaling=0.3, s_aux=torch.zeros(4), **odd
            )
