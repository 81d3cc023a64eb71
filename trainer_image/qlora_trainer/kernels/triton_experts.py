# ruff: noqa: N803 - Triton's constants are written in capitals
# Kernels are in Triton's language: a parameter is a pointer or a number, which a launch decides, so they have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportArgumentType=false, reportCallIssue=false
"""What routed experts compute, as Triton kernels: `ops.expert_products`, `ops.expert_outer_products`, `ops.sum_rows`.

A program makes one tile of the products of one expert's rows. Which expert that is, it finds out itself: the host does
not know how many rows each has, and starts as many programs as there can be tiles. The rules of `triton_ops` hold.

Weights come dense: dequantized where they are multiplied, once for each tile of rows, they take several times as long,
since the table of 16 values is read too often (ADR 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qlora_trainer.kernels.device_generation import is_hopper

SUM_BLOCK = 1024
OUTER, OUTER_STEP = 64, 32


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program makes, rows x columns, and how much of the rows it takes at a time."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


HOPPER, OTHERS = Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 32, 8, 3)
"""The fastest of twelve tried on an H200, and what fits the shared memory of the smallest cards."""


@triton.jit
def _expert_products(
    x, source, weights, offsets, out, experts, outputs, inputs, HAS_SOURCE: tl.constexpr, BACK: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Which expert's rows this program multiplies: the first whose tiles end behind its number.
    tile = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    known = number < experts
    begin = tl.load(offsets + number, mask=known, other=0)
    end = tl.load(offsets + number + 1, mask=known, other=0)
    tiles = tl.where(known, (end - begin + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    if expert < experts:
        # Its rows of `x`, and the columns of `out` that it makes.
        own = number == expert
        row = tl.sum(tl.where(own, begin + (tile - last + tiles) * ROWS, 0), 0) + tl.arange(0, ROWS)
        inside = row < tl.sum(tl.where(own, end, 0), 0)
        taken = tl.load(source + row, mask=inside, other=0) if HAS_SOURCE else row.to(tl.int64)
        width = outputs if BACK else inputs
        columns = inputs if BACK else outputs
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        # The expert's matrix: as it lies going back, transposed going forward.
        place = tl.arange(0, STEP)
        matrix = weights + expert.to(tl.int64) * outputs * inputs
        if BACK:
            parts = matrix + place[:, None] * inputs + column[None, :]
        else:
            parts = matrix + column[None, :] * inputs + place[:, None]
        rows = x + taken[:, None] * width + place[None, :]
        # The product, summed in float32 over the width.
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, width, STEP):
            within = start + place < width
            part = tl.load(rows, mask=inside[:, None] & within[None, :], other=0.0)
            dense = tl.load(parts, mask=within[:, None] & (column < columns)[None, :], other=0.0)
            total = tl.dot(part, dense, total, input_precision="ieee")
            rows += STEP
            parts += STEP * inputs if BACK else STEP
        target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < columns)[None, :])


def expert_products(
    x: Tensor, source: Tensor | None, weights: Tensor, offsets: Tensor, out: Tensor, back: bool
) -> None:
    """See `ops.expert_products`."""
    assert x.is_contiguous(), "rows are one after the other"
    experts, outputs, inputs = weights.shape
    tiles = HOPPER if is_hopper(x.device) else OTHERS
    grid = (len(out) // tiles.rows + min(len(out), experts), triton.cdiv(out.shape[1], tiles.columns))
    _expert_products[grid](
        x, offsets if source is None else source, weights, offsets, out, experts, outputs, inputs,
        HAS_SOURCE=source is not None, BACK=back, EXPERTS=triton.next_power_of_2(experts), ROWS=tiles.rows,
        COLUMNS=tiles.columns, STEP=tiles.step, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _expert_outer_products(
    left, left_source, right, right_source, offsets, out, height, width, LEFT_SOURCE: tl.constexpr,
    RIGHT_SOURCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, STEP):
        place = start + tl.arange(0, STEP)
        inside = place < end
        one = tl.load(left_source + place, mask=inside, other=0) if LEFT_SOURCE else place.to(tl.int64)
        other = tl.load(right_source + place, mask=inside, other=0) if RIGHT_SOURCE else place.to(tl.int64)
        ones = tl.load(
            left + one[None, :] * height + row[:, None], mask=inside[None, :] & (row < height)[:, None], other=0.0
        )
        others = tl.load(
            right + other[:, None] * width + column[None, :],
            mask=inside[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = tl.dot(ones, others, total, input_precision="ieee")
    target = out + expert.to(tl.int64) * height * width + row[:, None] * width + column[None, :]
    known = (row < height)[:, None] & (column < width)[None, :]
    tl.store(target, total + tl.load(target, mask=known, other=0.0), mask=known)


def expert_outer_products(
    left: Tensor, left_source: Tensor | None, right: Tensor, right_source: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """See `ops.expert_outer_products`."""
    assert left.is_contiguous(), "rows are one after the other"
    assert right.is_contiguous(), "rows are one after the other"
    experts, height, width = out.shape
    _expert_outer_products[(experts, triton.cdiv(height, OUTER), triton.cdiv(width, OUTER))](
        left, offsets if left_source is None else left_source, right,
        offsets if right_source is None else right_source, offsets, out, height, width,
        LEFT_SOURCE=left_source is not None, RIGHT_SOURCE=right_source is not None, ROWS=OUTER, COLUMNS=OUTER,
        STEP=OUTER_STEP,
    )  # fmt: skip


@triton.jit
def _sum_rows(rows, places, weights, out, out_stride, width, each, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(each):
        place = tl.load(places + token * each + number)
        value = tl.load(rows + place * width + column, mask=column < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * each + number).to(tl.float32)
        total += value
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < width)


def sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """See `ops.sum_rows`."""
    tokens, each = places.shape
    width = rows.shape[1]
    block = min(SUM_BLOCK, triton.next_power_of_2(width))
    _sum_rows[(tokens, triton.cdiv(width, block))](
        rows, places, places if weights is None else weights.contiguous(), out, out.stride(0), width, each,
        WEIGHTED=weights is not None, BLOCK=block,
    )  # fmt: skip
