# ruff: noqa: N803 - Triton's constants are written in capitals
# Kernels are in Triton's language: a parameter is a pointer or a number, which a launch decides, so they have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportArgumentType=false, reportCallIssue=false
"""Flash attention (Dao, 2023) over a packed row, both passes in a fixed order and in hardly any memory.

The usual backward pass lets programs add to the queries' gradients as they come, and to be deterministic keeps a sum
for each multiprocessor. Here one kernel goes through the keys and one through the queries, and each writes what nobody
else does: the scores are computed twice, 7 products instead of 5, and nothing is summed across programs. On an H100
that takes half the time of the sums, and none of their memory (`benchmarks/results/kernels.json`, ADR 9). The rules of
`triton_ops` hold.

A query `q` sees the keys from `first[q]` to itself, and a key `k` is seen by the queries from itself to before
`last[k]`: that is all that is known of records and windows, and neither number falls along the row. Between the tiles
on the diagonal and those at a record's boundary nothing is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_trainer.kernels.device_generation import is_hopper

LOG2_E = tl.constexpr(1.4426950408889634)
WHOLE = tl.constexpr(1)
"""The middle one of a program's three parts: between the record's boundary and the diagonal, nothing masked."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program of a kernel holds, and what it steps through."""

    own: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """The tiles of all kernels."""

    forward: Tiles
    key_value_backward: Tiles
    query_backward: Tiles


HOPPER = Launch(
    forward=Tiles(128, 128, 8, 3), key_value_backward=Tiles(128, 32, 8, 3), query_backward=Tiles(128, 64, 8, 3)
)
"""The fastest of those tried on an H100."""
OTHERS = Launch(
    forward=Tiles(64, 64, 4, 2), key_value_backward=Tiles(128, 32, 8, 2), query_backward=Tiles(128, 32, 8, 2)
)
"""For the 99 KiB of shared memory that a block has on the smallest cards, and next to no register is spilled there."""
DELTA_ROWS = 64


@triton.jit
def _rows(pointer, start, stride, place, size, tokens, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """A tile [len(place), len(size)] of one head, from row `start`; rows and columns beyond the end are zero."""
    tile = pointer + tl.cast(start, tl.int64) * stride + place[:, None] * stride + size[None, :]
    if MASKED:
        return tl.load(tile, mask=(start + place < tokens)[:, None] & (size < SIZE)[None, :], other=0.0)
    if size.shape[0] != SIZE:
        return tl.load(tile, mask=(size < SIZE)[None, :], other=0.0)
    return tl.load(tile)


@triton.jit
def _store_rows(pointer, start, stride, place, size, tokens, value, SIZE: tl.constexpr):
    tile = pointer + tl.cast(start, tl.int64) * stride + place[:, None] * stride + size[None, :]
    inside = (start + place < tokens)[:, None] & (size < SIZE)[None, :]
    tl.store(tile, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _bounds(first, earliest, start, tokens, OWN: tl.constexpr, STEP: tl.constexpr):
    """Where the three parts of the keys that a tile's queries see begin and end; all queries see the `WHOLE` one."""
    begin = tl.load(first + start) // STEP * STEP
    end = tl.minimum(start + OWN, tokens)
    whole = tl.minimum(tl.cdiv(tl.max(earliest, 0), STEP) * STEP, end)
    whole_end = tl.maximum(whole, start // STEP * STEP)
    return begin, whole, whole_end, end


# --- forward


@triton.jit
def _forward_step(
    total, largest, weight, q, query_place, earliest, key, key_token, value, value_token, start, tokens, scale,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place, size = tl.arange(0, STEP), tl.arange(0, SIZE_BLOCK)
    k = _rows(key, start, key_token, place, size, tokens, SIZE, MASKED)
    v = _rows(value, start, value_token, place, size, tokens, SIZE, MASKED)
    scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
    if MASKED:
        at = (start + place)[None, :]
        scores = tl.where((at <= query_place[:, None]) & (at >= earliest[:, None]), scores, -float("inf"))
    # A query that has seen nothing yet is at -inf, and is told apart from one whose scores are.
    peak = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(peak == -float("inf"), 0.0, peak)
    probabilities = tl.math.exp2(scores - base[:, None])
    shrink = tl.math.exp2(largest - base)
    weight = weight * shrink + tl.sum(probabilities, 1)
    total = tl.dot(probabilities.to(v.dtype), v, total * shrink[:, None])
    return total, peak, weight


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    query, query_token, query_head, key, key_token, key_head, value, value_token, value_head,
    first, tokens, scale, output, output_token, output_head, logsumexp,
    SHARE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN  # those with most to do begin
    head = tl.program_id(1)
    place, size = tl.arange(0, OWN), tl.arange(0, SIZE_BLOCK)
    query_place = start + place
    there = query_place < tokens
    q = _rows(query + head * query_head, start, query_token, place, size, tokens, SIZE, True)
    earliest = tl.load(first + query_place, mask=there, other=0)
    keys, values = key + head // SHARE * key_head, value + head // SHARE * value_head
    bounds = _bounds(first, earliest, start, tokens, OWN, STEP)
    total = tl.zeros([OWN, SIZE_BLOCK], dtype=tl.float32)
    largest = tl.full([OWN], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([OWN], dtype=tl.float32)
    for part in tl.static_range(3):
        for at in range(bounds[part], bounds[part + 1], STEP):
            total, largest, weight = _forward_step(
                total, largest, weight, q, query_place, earliest, keys, key_token, values, value_token, at, tokens,
                scale, SIZE, SIZE_BLOCK, STEP, part != WHOLE,
            )  # fmt: skip
    weight = tl.where(there, weight, 1.0)
    _store_rows(output + head * output_head, start, output_token, place, size, tokens, total / weight[:, None], SIZE)
    natural = (largest + tl.math.log2(weight)) / LOG2_E
    tl.store(logsumexp + head.to(tl.int64) * tokens + query_place, natural, mask=there)


# --- backward


@triton.jit(do_not_specialize=["tokens"])
def _delta(
    grad, grad_token, grad_head, output, output_token, output_head, delta, tokens,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * ROWS, tl.program_id(1)
    place, size = tl.arange(0, ROWS), tl.arange(0, SIZE_BLOCK)
    one = _rows(grad + head * grad_head, start, grad_token, place, size, tokens, SIZE, True)
    other = _rows(output + head * output_head, start, output_token, place, size, tokens, SIZE, True)
    total = tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * tokens + start + place, total, mask=start + place < tokens)


@triton.jit
def _key_value_step(
    key_grad_sum, value_grad_sum, k, v, key_place, limit, query, query_token, grad, grad_token, logsumexp, delta,
    start, tokens, scale, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place, size = tl.arange(0, STEP), tl.arange(0, SIZE_BLOCK)
    q = _rows(query, start, query_token, place, size, tokens, SIZE, MASKED)
    g = _rows(grad, start, grad_token, place, size, tokens, SIZE, MASKED)
    there = start + place < tokens
    normalizer = tl.load(logsumexp + start + place, mask=there, other=0.0) * LOG2_E
    beside = tl.load(delta + start + place, mask=there, other=0.0)
    probabilities = tl.math.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) - normalizer[None, :])
    if MASKED:
        at = (start + place)[None, :]
        probabilities = tl.where((at >= key_place[:, None]) & (at < limit[:, None]), probabilities, 0.0)
    value_grad_sum = tl.dot(probabilities.to(g.dtype), g, value_grad_sum)
    scores_grad = probabilities * (tl.dot(v, tl.trans(g)) - beside[None, :])
    key_grad_sum = tl.dot(scores_grad.to(q.dtype), q, key_grad_sum)
    return key_grad_sum, value_grad_sum


@triton.jit(do_not_specialize=["tokens"])
def _key_value_backward(
    query, query_token, query_head, key, key_token, key_head, value, value_token, value_head,
    grad, grad_token, grad_head, logsumexp, delta, last, tokens, scale,
    key_grad, key_grad_token, key_grad_head, value_grad, value_grad_token, value_grad_head,
    SHARE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # The keys and values that this program owns.
    start, head = tl.program_id(0) * OWN, tl.program_id(1)
    place, size = tl.arange(0, OWN), tl.arange(0, SIZE_BLOCK)
    key_place = start + place
    k = _rows(key + head * key_head, start, key_token, place, size, tokens, SIZE, True)
    v = _rows(value + head * value_head, start, value_token, place, size, tokens, SIZE, True)
    # The queries that see them: those on the diagonal, those that see all, and those at the record's boundary.
    limit = tl.load(last + key_place, mask=key_place < tokens, other=0)
    end = tl.max(limit, 0)
    whole = start + OWN  # from here on a query is behind every key, and up to the first key's limit it sees all
    whole_end = tl.maximum(whole, tl.load(last + start) // STEP * STEP)
    key_grad_sum = tl.zeros([OWN, SIZE_BLOCK], dtype=tl.float32)
    value_grad_sum = tl.zeros([OWN, SIZE_BLOCK], dtype=tl.float32)
    # Summed over every query head that shares them.
    for number in range(SHARE):
        of = head * SHARE + number
        queries, grads = query + of * query_head, grad + of * grad_head
        normalizers, besides = logsumexp + of.to(tl.int64) * tokens, delta + of.to(tl.int64) * tokens
        lows, highs = (start, whole, whole_end), (tl.minimum(whole, end), whole_end, end)
        for part in tl.static_range(3):
            for at in range(lows[part], highs[part], STEP):
                key_grad_sum, value_grad_sum = _key_value_step(
                    key_grad_sum, value_grad_sum, k, v, key_place, limit, queries, query_token, grads, grad_token,
                    normalizers, besides, at, tokens, scale, SIZE, SIZE_BLOCK, STEP, part != WHOLE,
                )  # fmt: skip
    _store_rows(key_grad + head * key_grad_head, start, key_grad_token, place, size, tokens, key_grad_sum * scale, SIZE)
    _store_rows(value_grad + head * value_grad_head, start, value_grad_token, place, size, tokens, value_grad_sum, SIZE)


@triton.jit
def _query_step(
    query_grad_sum, q, g, normalizer, beside, query_place, earliest, key, key_token, value, value_token, start, tokens,
    scale, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place, size = tl.arange(0, STEP), tl.arange(0, SIZE_BLOCK)
    k = _rows(key, start, key_token, place, size, tokens, SIZE, MASKED)
    v = _rows(value, start, value_token, place, size, tokens, SIZE, MASKED)
    probabilities = tl.math.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - normalizer[:, None])
    if MASKED:
        at = (start + place)[None, :]
        probabilities = tl.where((at <= query_place[:, None]) & (at >= earliest[:, None]), probabilities, 0.0)
    scores_grad = probabilities * (tl.dot(g, tl.trans(v)) - beside[:, None])
    return tl.dot(scores_grad.to(k.dtype), k, query_grad_sum)


@triton.jit(do_not_specialize=["tokens"])
def _query_backward(
    query, query_token, query_head, key, key_token, key_head, value, value_token, value_head,
    grad, grad_token, grad_head, logsumexp, delta, first, tokens, scale, query_grad, query_grad_token, query_grad_head,
    SHARE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN  # those with most to do begin
    head = tl.program_id(1)
    place, size = tl.arange(0, OWN), tl.arange(0, SIZE_BLOCK)
    query_place = start + place
    there = query_place < tokens
    q = _rows(query + head * query_head, start, query_token, place, size, tokens, SIZE, True)
    g = _rows(grad + head * grad_head, start, grad_token, place, size, tokens, SIZE, True)
    normalizer = tl.load(logsumexp + head.to(tl.int64) * tokens + query_place, mask=there, other=0.0) * LOG2_E
    beside = tl.load(delta + head.to(tl.int64) * tokens + query_place, mask=there, other=0.0)
    earliest = tl.load(first + query_place, mask=there, other=0)
    keys, values = key + head // SHARE * key_head, value + head // SHARE * value_head
    bounds = _bounds(first, earliest, start, tokens, OWN, STEP)
    query_grad_sum = tl.zeros([OWN, SIZE_BLOCK], dtype=tl.float32)
    for part in tl.static_range(3):
        for at in range(bounds[part], bounds[part + 1], STEP):
            query_grad_sum = _query_step(
                query_grad_sum, q, g, normalizer, beside, query_place, earliest, keys, key_token, values, value_token,
                at, tokens, scale, SIZE, SIZE_BLOCK, STEP, part != WHOLE,
            )  # fmt: skip
    _store_rows(
        query_grad + head * query_grad_head, start, query_grad_token, place, size, tokens, query_grad_sum * scale, SIZE
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, spans: tuple[Tensor, Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """See `ops.attention`."""
    tokens, heads, size = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    tiles = _launch(query.device).forward
    _forward[(triton.cdiv(tokens, tiles.own), heads)](
        *_by_head(query), *_by_head(key), *_by_head(value), spans[0], tokens, scaling, *_by_head(output), logsumexp,
        SHARE=heads // key.shape[1], SIZE=size, SIZE_BLOCK=triton.next_power_of_2(size), **_options(tiles),
    )  # fmt: skip
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
    (query, key, value), (first, last) = inputs, spans
    tokens, heads, size = query.shape
    key_heads = key.shape[1]
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=grad.device)
    block = triton.next_power_of_2(size)
    _delta[(triton.cdiv(tokens, DELTA_ROWS), heads)](
        *_by_head(grad), *_by_head(output), delta, tokens, SIZE=size, SIZE_BLOCK=block, ROWS=DELTA_ROWS
    )
    read = (*_by_head(query), *_by_head(key), *_by_head(value), *_by_head(grad), logsumexp, delta)
    shape = {"SHARE": heads // key_heads, "SIZE": size, "SIZE_BLOCK": block}
    launch = _launch(grad.device)
    _key_value_backward[(triton.cdiv(tokens, launch.key_value_backward.own), key_heads)](
        *read,
        last,
        tokens,
        scaling,
        *_by_head(out_grads[1]),
        *_by_head(out_grads[2]),
        **shape,
        **_options(launch.key_value_backward),
    )
    _query_backward[(triton.cdiv(tokens, launch.query_backward.own), heads)](
        *read, first, tokens, scaling, *_by_head(out_grads[0]), **shape, **_options(launch.query_backward)
    )


def _by_head(part: Tensor) -> tuple[Tensor, int, int]:
    """A tensor [tokens, heads, size], and how far its tokens and heads are apart."""
    assert part.stride(2) == 1, "a head's values lie side by side"
    return part, part.stride(0), part.stride(1)


def _launch(device: torch.device) -> Launch:
    return HOPPER if is_hopper(device) else OTHERS


def _options(tiles: Tiles) -> dict[str, int]:
    return {"OWN": tiles.own, "STEP": tiles.step, "num_warps": tiles.warps, "num_stages": tiles.stages}
