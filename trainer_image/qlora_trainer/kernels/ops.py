"""The operations between matrix products, by name: Triton kernels on a GPU, plain torch elsewhere.

Both implementations have the same signatures and are held against each other on the GPU by `benchmarks/kernels.py`, and
on the CPU, through Triton's interpreter, by tests. Tensors are 2-D [tokens, width] in the model's type with rows that
may be further apart than they are wide; sums are taken in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor
from torch.nn.functional import linear

from orchestrator.api import trainer_facts
from qlora_trainer.kernels import torch_ops

log = logging.getLogger(__name__)


class NormScale(NamedTuple):
    """What a normalization does with its weight."""

    offset: float
    """Added to the weight."""
    rounds: bool
    """Whether the normalized row is rounded before it is multiplied with that, or only the product."""


ROUNDED, EXACT, AROUND_ONE = NormScale(0.0, rounds=True), NormScale(0.0, rounds=False), NormScale(1.0, rounds=False)
"""As most families have it, as OLMo has it, and as Gemma has it."""


def product(one: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix product, into `out` if there is one; in float32 where the processor has no arithmetic for its type."""
    if _multiplies(one):
        return torch.mm(one, other, out=out)
    exact = one.float() @ other.float()
    return exact.to(one.dtype) if out is None else out.copy_(exact)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """`x @ weight.T + bias`, or `residual + factor * (x @ weight.T + bias)`; see `product`."""
    if not _multiplies(x):
        exact = linear(x.float(), weight.float(), None if bias is None else bias.float())
        return (exact if residual is None else exact.mul_(factor).add_(residual)).to(x.dtype)
    if residual is None:
        return linear(x, weight, bias)
    y = torch.addmm(residual, x, weight.t(), alpha=factor)
    return y if bias is None else y.add_(bias, alpha=factor)


def add_product_(target: Tensor, one: Tensor, other: Tensor, factor: float = 1.0) -> None:
    """`target += factor * one @ other`; see `product`."""
    if _multiplies(target):
        target.addmm_(one, other, alpha=factor)
    else:
        target.copy_(torch.addmm(target.float(), one.float(), other.float(), alpha=factor))


def _multiplies(x: Tensor) -> bool:
    """Whether torch's own product of this type is the fast one here.

    Of bfloat16 matrices it takes half the time of float32's on processors that can, and fifty times as long on others.
    """
    return x.is_cuda or (x.dtype == torch.bfloat16 and _processor_multiplies_bfloat16())


@cache
def _processor_multiplies_bfloat16() -> bool:
    # Older releases of torch do not tell: their products are in float32, which is slower and never wrong.
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict[str, object])()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, scale: NormScale = ROUNDED) -> Tensor:
    """Rows scaled to a root mean square of 1, times the weight (Zhang and Sennrich, 2019)."""
    return _of(x).rms_norm(x, weight, epsilon, *scale)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, scale: NormScale = ROUNDED
) -> Tensor:
    """The gradient to `x`, plus that of the residual stream; the weight is frozen."""
    return _of(x).rms_norm_backward(grad, x, weight, epsilon, residual, scale.offset)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Rotary position embedding (Su et al., 2021) of heads [tokens, heads, size] into `out`, which may be `x`.

    `cos` and `sin` are [tokens, size], the halves alike; `back` rotates the other way, as the gradient does.
    """
    _of(x).rotate(x, cos, sin, out, back)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020) of [tokens, 2 x width]: the gates, then the ups."""
    return _of(gate_up).swiglu(gate_up)


def swiglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """Turn `gate_up` into its gradient, and `grad` into what the forward pass gave, which the adapter needs."""
    _of(grad).swiglu_backward_(grad, gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up (Shazeer, 2020), as `swiglu`; of gelu the approximation by tanh (Hendrycks and Gimpel, 2016)."""
    return _of(gate_up).geglu(gate_up)


def geglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """See `swiglu_backward_`."""
    _of(grad).geglu_backward_(grad, gate_up)


def dropout(x: Tensor, probability: float, seed: Tensor, number: int) -> Tensor:
    """`x` with elements zeroed and the rest scaled up; which ones depends on `seed + number` and place alone.

    The seed is an int64 number on the device of `x`, so that a CUDA graph can be replayed with another.
    """
    return _of(x).dropout(x, probability, seed, number)


def add_dropout_(target: Tensor, x: Tensor, probability: float, seed: Tensor, number: int) -> None:
    """`target += dropout(x)`: the backward pass of `dropout`."""
    _of(x).add_dropout_(target, x, probability, seed, number)


def cross_entropy_(
    logits: Tensor, targets: Tensor, *, scale: float, softcap: float | None, gradient_scale: Tensor | None
) -> Tensor:
    """Cross-entropy of each row; with a `gradient_scale`, a number on the card, `logits` become the gradient times it.

    A row with a negative target has no loss, and its gradient is zero.

    The loss is of `softcap * tanh(scale * logits / softcap)`; the gradient is to `logits` as they came.
    """
    return _of(logits).cross_entropy_(logits, targets, scale, softcap, gradient_scale)


def attention(
    query: Tensor, key: Tensor, value: Tensor, spans: tuple[Tensor, Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention over one packed row of heads [tokens, heads, size], of which keys and values may have fewer.

    `spans` says of each token, in int32, the first key that it sees as a query, and the first query behind it that
    does not see it any more as a key; neither falls along the row. The output comes with the log of each query's
    normalizer [heads, tokens].
    """
    return _of(query).attention(query, key, value, spans, scaling)


def attention_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    logsumexp: Tensor,
    spans: tuple[Tensor, Tensor],
    scaling: float,
    out_grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The gradients to query, key and value of `attention`, into `out_grads`."""
    _of(grad).attention_backward(grad, inputs, output, logsumexp, spans, scaling, out_grads)


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> None:
    """NF4 weights (Dettmers et al., 2023) into `out`, bit for bit what bitsandbytes gives."""
    of = _of(packed) if state.nested and state.quant_type == "nf4" else torch_ops
    of.dequantize(packed, state, out)


def expert_products(
    x: Tensor, source: Tensor | None, weights: Tensor, offsets: Tensor, out: Tensor, back: bool
) -> None:
    """Multiply rows with their experts' weights into `out`: with the transposed ones, or going `back` as they lie.

    Rows are sorted by expert: those of number e of `weights` [experts, outputs, inputs] are from `offsets[e]`, int32,
    to before `offsets[e + 1]`. All others stay as they are. Row i is `x[source[i]]`, or `x[i]` without a source.
    """
    _of(x).expert_products(x, source, weights, offsets, out, back)


def expert_outer_products(
    left: Tensor, left_source: Tensor | None, right: Tensor, right_source: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """Add each expert's sum of its rows' outer products to `out` [experts, width of left, width of right], float32.

    Rows are sorted by expert, and taken from a source, as those of `expert_products`.
    """
    _of(left).expert_outer_products(left, left_source, right, right_source, offsets, out)


def sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """Sum `rows[places[i]]`, each times its weight if there are any, into row i of `out`; in float32."""
    _of(rows).sum_rows(rows, places, weights, out)


def attends(query: Tensor) -> bool:
    """Whether `attention` is the way to compute these heads; a card has flash attention for what Triton is not for."""
    return not query.is_cuda or (query.shape[-1] <= trainer_facts.LARGEST_TRITON_HEAD and _triton() is not None)


def can_be_captured(device: torch.device) -> bool:
    """Whether these operations run on the card without asking the host for anything."""
    return device.type == "cuda" and _triton() is not None


def _of(tensor: Tensor) -> ModuleType:
    return (_triton() or torch_ops) if tensor.is_cuda else torch_ops


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, if they can be built here: that takes Triton, and a C compiler for its launchers."""
    try:
        from qlora_trainer.kernels import triton_ops

        ones = torch.ones(1, 8, device="cuda", dtype=torch.bfloat16)
        triton_ops.dropout(ones, 0.5, torch.zeros((), dtype=torch.int64, device="cuda"), 0)
    except Exception as error:  # noqa: BLE001 - no compiler, no cache folder, an unknown card: torch does the work
        log.warning("training without Triton kernels, which is slower: %s", error)
        return None
    return triton_ops
