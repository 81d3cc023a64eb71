"""The chunked loss is torch's cross-entropy on full logits, to the last digits that its types carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.model.loss import Head, cross_entropy, record_log_probabilities
from torch import Tensor
from torch.nn import functional

TOKENS, WIDTH, VOCABULARY = 37, 24, 61


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[torch.rand(TOKENS, generator=generator) < 0.4] = IGNORED_LABEL
    return hidden, weight, bias, targets


def reference(hidden: Tensor, targets: Tensor, head: Head, divisor: float) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    logits = functional.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum") / divisor
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize(
    ("scale", "softcap", "biased"), [(1.0, None, False), (0.25, None, True), (1.0, 3.0, False), (2.0, 5.0, True)]
)
def test_loss_and_gradient_are_those_of_full_logits(
    chunk_tokens: int, scale: float, softcap: float | None, biased: bool
) -> None:
    hidden, weight, bias, targets = make_inputs()
    head = Head(weight=weight, bias=bias if biased else None, scale=scale, softcap=softcap)
    expected_loss, expected_gradient = reference(hidden, targets, head, divisor=11.0)
    hidden.requires_grad_()
    loss = cross_entropy(hidden, targets, head, chunk_tokens=chunk_tokens, scale=torch.tensor(1 / 11))
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(hidden.grad, expected_gradient)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.0, 5.0)])
def test_records_sums_and_whatever_comes_of_them_are_those_of_full_logits(
    chunk_tokens: int, scale: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets = make_inputs()
    head = Head(weight=weight, bias=bias, scale=scale, softcap=softcap)
    ends = (0, 9, 9, 20, TOKENS)  # one of the records has nothing
    parts = [slice(start, end) for start, end in pairwise(ends)]

    def combined(sums: Tensor) -> Tensor:
        return functional.logsigmoid(0.1 * (sums[0] - sums[2])) + 0.01 * (sums[1] + sums[3]) ** 2

    dense = hidden.clone().requires_grad_()
    logits = head.logits(dense)
    losses = functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    expected = torch.stack([-losses[part].sum() for part in parts])
    combined(expected).backward()
    hidden.requires_grad_()
    positions = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    found = record_log_probabilities(
        hidden,
        targets,
        head,
        chunk_tokens=chunk_tokens,
        positions=positions,
        lengths=[int((targets[part] != IGNORED_LABEL).sum()) for part in parts],
    )
    torch.testing.assert_close(found, expected)
    combined(found).backward()
    torch.testing.assert_close(hidden.grad, dense.grad)


def test_bfloat16_states_lose_no_more_than_their_own_rounding() -> None:
    hidden, weight, _, targets = make_inputs(torch.bfloat16)
    head = Head(weight=weight)
    expected_loss, expected_gradient = reference(hidden.float(), targets, Head(weight=weight.float()), divisor=1000.0)
    hidden.requires_grad_()
    loss = cross_entropy(hidden, targets, head, chunk_tokens=8, scale=torch.tensor(1 / 1000))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=5e-3, atol=0)
    assert hidden.grad is not None
    assert (hidden.grad.float() - expected_gradient).norm() < 1e-2 * expected_gradient.norm()


def test_the_gradient_that_comes_from_above_is_passed_on() -> None:
    hidden, weight, _, targets = make_inputs()
    _, expected = reference(hidden, targets, Head(weight=weight), divisor=1.0)
    hidden.requires_grad_()
    (0.5 * cross_entropy(hidden, targets, Head(weight=weight), chunk_tokens=5, scale=torch.tensor(1.0))).backward()
    torch.testing.assert_close(hidden.grad, 0.5 * expected)


@dataclass(frozen=True, kw_only=True)
class WatchedHead(Head):
    """A head that notes of how many tokens it was asked to make logits."""

    asked: list[int] = field(default_factory=list)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        self.asked.append(len(hidden))
        return super().raw_logits(hidden)


def test_logits_exist_for_one_chunk_of_supervised_tokens_at_a_time() -> None:
    hidden, weight, _, targets = make_inputs()
    head = WatchedHead(weight=weight)
    cross_entropy(hidden, targets, head, chunk_tokens=8, scale=torch.tensor(1.0))
    assert max(head.asked) == 8
    assert sum(head.asked) == int((targets != IGNORED_LABEL).sum()) < TOKENS


def test_a_micro_batch_without_targets_costs_nothing_and_moves_nothing() -> None:
    hidden, weight, _, targets = make_inputs()
    hidden.requires_grad_()
    loss = cross_entropy(
        hidden, torch.full_like(targets, IGNORED_LABEL), Head(weight=weight), chunk_tokens=8, scale=torch.tensor(1 / 5)
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
