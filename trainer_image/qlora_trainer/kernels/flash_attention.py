# The package has no types, and the functions that give normalizers and take them are not among its public ones.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateUsage=false
"""Attention by flash-attn-4 (Dao et al.), an optional package: on an H200 twice as fast as our own where heads are
small or records long, in fixed bits, for float32 sums of the gradients in memory.

Rules:

- One release is taken, the one that was measured (`benchmarks/kernels.py`): its functions for both passes are not part
  of its public interface, and its kernels are right for some sizes of heads and wrong for others.
- They are held against our own kernels on the card, with the model's own heads, before they compute anything.
- Where a job's plan asks for them and they do not run, our own compute: right, in less memory, in more time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from orchestrator.api import trainer_facts
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.device_generation import is_hopper

DISTRIBUTION, VERSION = "flash-attn-4", "4.0.0b36"
OF_ITS_COMPILER = "Argument .* cannot be converted to a JitArgument"
"""What its compiler warns of about the package's own arguments, whenever it compiles."""
PROBED_RECORDS = 200, 56, 300
TOLERANCE = 0.02
"""Largest relative difference to our own kernels: both round to bfloat16, which makes up to 0.003."""

log = logging.getLogger(__name__)

Backward = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What attention must know of a packed row."""

    starts: Tensor
    """Where its records start, and where the last one ends: int32, on the card."""
    longest: int
    """Tokens of the longest record, or more."""
    window: int | None
    """How far a token sees, itself included."""


class FlashAttention:
    """The package's kernels, both passes; tensors are [tokens, heads, size]."""

    def __init__(self) -> None:
        """Raises ImportError where the package cannot be loaded."""
        interface: Any = import_module("flash_attn.cute.interface")
        warnings.filterwarnings("ignore", OF_ITS_COMPILER, UserWarning)
        self._forward: Callable[..., Any] = interface._flash_attn_fwd
        self._backward: Callable[..., Any] = interface._flash_attn_bwd

    def forward(self, query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float) -> tuple[Tensor, Tensor]:
        """The output, and the log of each query's normalizer [heads, tokens]."""
        output, logsumexp, *_ = self._forward(
            query, key, value, softmax_scale=scaling, return_lse=True, **_options(row)
        )
        return output, logsumexp

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        logsumexp: Tensor,
        row: Row,
        scaling: float,
        out_grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """The gradients to query, key and value, into `out_grads`."""
        into = dict(zip(("dq", "dk", "dv"), out_grads, strict=True))
        exact = torch.get_deterministic_debug_mode() != 0
        self._backward(
            *inputs, output, grad, logsumexp, softmax_scale=scaling, deterministic=exact, **into, **_options(row)
        )


def takes(tokens: int, records: int) -> bool:
    """Whether a row's records are long enough: each takes rows of its own, which sizing has to count."""
    return records <= max(1, tokens // trainer_facts.FLASH_RECORD_TOKENS)


def has_kernels_for(head_size: int) -> bool:
    """Whether the package is installed, and right for heads of this size."""
    try:
        return version(DISTRIBUTION) == VERSION and head_size in trainer_facts.FLASH_HEADS
    except PackageNotFoundError:
        return False


def usable(device: torch.device, heads: int, keys: int, size: int) -> FlashAttention | None:
    """The kernels for so many heads and those of keys; None, with a line in the log, where our own have to do."""
    if reason := _obstacle(device, size):
        log.warning("attention is computed by our own kernels, not by %s: %s", DISTRIBUTION, reason)
        return None
    try:
        found = FlashAttention()
        difference = _largest_difference(found, device, heads, keys, size)
    except Exception as error:  # noqa: BLE001 - whatever a package, a compiler or a driver may raise
        log.warning("attention is computed by our own kernels: %s says %s", DISTRIBUTION, error)
        return None
    if not difference <= TOLERANCE:
        log.warning(
            "attention is computed by our own kernels: %s is off by %.2g from them, more than rounding; please report "
            "the card and the model",
            DISTRIBUTION,
            difference,
        )
        return None
    log.info("attention is computed by %s %s, off by %.2g from our own kernels", DISTRIBUTION, VERSION, difference)
    return found


def _obstacle(device: torch.device, size: int) -> str | None:
    if not is_hopper(device):
        return "it was measured on Hopper cards alone"
    return None if has_kernels_for(size) else f"release {VERSION} is not installed, or not right for heads of {size}"


def _largest_difference(flash: FlashAttention, device: torch.device, heads: int, keys: int, size: int) -> float:
    """Of output and gradients from our own kernels', over a row of a few records."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(PROBED_RECORDS)
    starts = torch.tensor([0, *accumulate(PROBED_RECORDS)], dtype=torch.int32, device=device)
    by_head = torch.randn(tokens, heads + 2 * keys, size, generator=draw).to(device, torch.bfloat16)
    grad = torch.randn(tokens, heads, size, generator=draw).to(device, torch.bfloat16)
    places = [(start, end) for start, end in pairwise(starts.tolist()) for _ in range(start, end)]
    first, last = torch.tensor(places, dtype=torch.int32, device=device).unbind(1)
    spans, scaling = (first.contiguous(), last.contiguous()), size**-0.5
    row = Row(starts=starts, longest=max(PROBED_RECORDS), window=None)
    inputs, theirs, ours = (_parts(each, heads, keys) for each in (by_head, by_head.clone(), by_head.clone()))
    output, logsumexp = flash.forward(*inputs, row, scaling)
    flash.backward(grad, inputs, output, logsumexp, row, scaling, theirs)
    own_output, own_logsumexp = ops.attention(*inputs, spans, scaling)
    ops.attention_backward(grad, inputs, own_output, own_logsumexp, spans, scaling, ours)
    pairs = zip((output, *theirs), (own_output, *ours), strict=True)
    return max(float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs)


def _parts(by_head: Tensor, heads: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in one tensor [tokens, heads, size], as a layer has them, or their gradients."""
    return by_head[:, :heads], by_head[:, heads : heads + keys], by_head[:, heads + keys :]


def _options(row: Row) -> dict[str, Any]:
    return {
        "cu_seqlens_q": row.starts,
        "cu_seqlens_k": row.starts,
        "max_seqlen_q": row.longest,
        "max_seqlen_k": row.longest,
        "causal": row.window is None,
        "window_size_left": None if row.window is None else row.window - 1,
        "window_size_right": None if row.window is None else 0,
    }
