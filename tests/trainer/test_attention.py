"""Attention that is computed tile by tile or over a packed row, against all scores at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import torch_ops
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels.tiled_attention import ScoreOptions, tiled_attention
from torch import Tensor


def dense(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
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
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value


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
