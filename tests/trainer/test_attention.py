"""Attention that is computed tile by tile or over a packed row, against all scores at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import packed_attention, tiled_attention, torch_ops
from torch import Tensor

from orchestrator.api import trainer_facts


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
        pytest.param(37, 4, None, 2.0, id="squashed"),
        pytest.param(37, 2, 7, None, id="window, shared keys"),
        pytest.param(64, 1, 50, 1.5, id="squashed, window, one key head"),
        pytest.param(5, 2, 64, 1.5, id="a record shorter than the window"),
    ],
)
@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_tiles_give_the_answer_and_the_gradients_of_all_scores_at_once(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    key_heads: int,
    window: int | None,
    softcap: float | None,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr(trainer_facts, "SCORES_BYTES", 4 * 4 * tokens * rows_at_once)
    torch.manual_seed(0)
    query = torch.randn(4, tokens, 8, requires_grad=True)
    key, value = (torch.randn(key_heads, tokens, 8, requires_grad=True) for _ in range(2))
    weights = torch.randn(4, tokens, 8)
    found = tiled_attention.tiled_attention(query, key, value, 0.6, window, softcap)
    expected = dense(query, key, value, 0.6, window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
    right = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    torch.testing.assert_close(gradients, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
def test_a_packed_row_by_hand_gives_what_its_records_give_alone(
    monkeypatch: pytest.MonkeyPatch, window: int | None, rows_at_once: int
) -> None:
    borders = [0, 13, 14, 40]
    monkeypatch.setattr(torch_ops, "SCORES_BYTES", 4 * 4 * borders[-1] * rows_at_once)
    torch.manual_seed(0)
    query, key, value = torch.randn(40, 8, 16).split((4, 2, 2), dim=1)
    grad = torch.randn(40, 4, 16)
    packed = packed_attention.PackedAttention()
    ids = [np.arange(end - start, dtype=np.int32) for start, end in pairwise(borders)]
    batch = collate([(each, each, each) for each in ids])
    packed.expect(batch, batch.record_starts)
    answer, logsumexp = packed.forward(query, key, value, 0.6, window)
    room = tuple(torch.full_like(part, torch.nan) for part in (query, key, value))
    packed.backward(grad, (query, key, value), answer, logsumexp, 0.6, window, room=room)
    for start, end in pairwise(borders):
        own = [part[start:end].transpose(0, 1).clone().requires_grad_() for part in (query, key, value)]
        expected = dense(*own, 0.6, window, None)
        torch.testing.assert_close(answer[start:end].transpose(0, 1), expected.detach(), rtol=1e-5, atol=1e-6)
        right = torch.autograd.grad((expected * grad[start:end].transpose(0, 1)).sum(), own)
        for found, gradient in zip(room, right, strict=True):
            torch.testing.assert_close(found[start:end].transpose(0, 1), gradient, rtol=1e-4, atol=1e-5)
