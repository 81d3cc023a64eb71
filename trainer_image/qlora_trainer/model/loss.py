"""Cross-entropy that never holds all logits: from the decoder's hidden states straight to loss and gradient.

With a vocabulary of 128k, the logits of 16k tokens and their gradient take 8 GiB; here only `chunk_tokens` rows of them
exist at a time, in training and evaluation alike.
The head is frozen, so the gradient to the hidden states is all that backward needs, and it is computed right in the
forward pass while a chunk's logits exist (Hsu et al., 2024, "Liger Kernel", section 3.2).

Rules: positions without a target (`IGNORED_LABEL`) cost nothing unless the caller lists them, and then they add
nothing; the softmax is taken in float32 whatever the head's type; the sum is scaled by what the caller says, because
only it knows how many tokens of the global batch carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How the model turns a hidden state into logits: `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor
    """[vocabulary, hidden]; frozen."""
    bias: Tensor | None = None
    scale: float = 1.0
    """Granite divides its logits by a constant, Cohere multiplies them."""
    softcap: float | None = None
    """Gemma 2 bounds its logits to (-softcap, softcap) (Gemma Team, 2024)."""

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of hidden states [tokens, hidden], not scaled, not softcapped, in their type."""
        return ops.affine(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [tokens, vocabulary] of hidden states [tokens, hidden]."""
        logits = self.raw_logits(hidden).float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    scale: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of hidden states [tokens, hidden] against targets [tokens], summed, times `scale`; float32.

    `scale` is a float32 number on the hidden states' device. `chunk_tokens` 0 takes all tokens at once. `positions`, of
    all targets that are not IGNORED_LABEL, spares the wait for the GPU that finding them takes.
    """
    assert not head.weight.requires_grad, "the head must be frozen: its gradient is not computed"
    if positions is None:
        positions = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    return _ChunkedCrossEntropy.apply(hidden, targets, positions, head, chunk_tokens, scale)


def record_log_probabilities(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    positions: Tensor,
    lengths: Sequence[int],
) -> Tensor:
    """The log-probability of each record's targets together, [records], float32, of hidden states [tokens, hidden].

    `positions` are those of all targets, record after record; `lengths` says how many of them each record has.
    """
    assert not head.weight.requires_grad, "the head must be frozen: its gradient is not computed"
    return _RecordLogProbabilities.apply(hidden, targets, positions, head, chunk_tokens, tuple(lengths))


def _losses_by_chunk(
    hidden: Tensor,
    targets: Tensor,
    positions: Tensor,
    head: Head,
    chunk_tokens: int,
    *,
    gradient: Tensor | None,
    gradient_scale: Tensor,
) -> Iterator[Tensor]:
    """The losses of some positions at a time, whose gradients to `hidden`, scaled, go into `gradient`."""
    for chunk in positions.split(chunk_tokens or max(1, len(positions))):
        logits = head.raw_logits(hidden[chunk])
        losses = ops.cross_entropy_(
            logits,
            targets[chunk],
            scale=head.scale,
            softcap=head.softcap,
            gradient_scale=None if gradient is None else gradient_scale,
        )
        if gradient is not None:
            gradient[chunk] = ops.product(logits, head.weight)
        del logits  # or it would still be there when the next chunk's are made
        yield losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks of the supervised positions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, positions: Tensor, head: Head, chunk_tokens: int, scale: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for losses in _losses_by_chunk(
            hidden, targets, positions, head, chunk_tokens, gradient=gradient, gradient_scale=scale
        ):
            total += losses.sum()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * scale

    # `once_differentiable` has no types, so pyright no longer sees that this is a static method.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None, None, None, None, None


class _RecordLogProbabilities(torch.autograd.Function):
    """Sums by record, and the gradient of every position's own in the same sweep: backward only weighs it.

    A record's gradient is its positions' own, times the gradient to the record's sum. So what comes of the sums may
    depend on all of them, and no logits are made twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        positions: Tensor,
        head: Head,
        chunk_tokens: int,
        lengths: tuple[int, ...],
    ) -> Tensor:
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        one = torch.ones((), dtype=torch.float32, device=hidden.device)
        chunks = _losses_by_chunk(hidden, targets, positions, head, chunk_tokens, gradient=gradient, gradient_scale=one)
        losses = torch.cat([torch.zeros(0, device=hidden.device), *chunks])
        if gradient is not None:
            ctx.save_for_backward(gradient, positions)
            ctx.lengths = lengths
        # One sum after the other: a sum by index would add in an order of its own on a card.
        return -torch.stack([record.sum() for record in losses.split(list(lengths))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, positions = ctx.saved_tensors
        counts = torch.tensor(ctx.lengths, device=positions.device)
        weights = torch.zeros(len(gradient), dtype=torch.float32, device=gradient.device)
        weights[positions] = -grad_outputs[0].repeat_interleave(counts, output_size=len(positions))
        return gradient.mul_(weights.unsqueeze(1)), None, None, None, None, None
