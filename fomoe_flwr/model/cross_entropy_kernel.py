"""Cross entropy and its gradient over rows of logits, on a GPU: one read, one read and write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096


@triton.jit
def _rows_kernel(
    logits,
    target,
    losses,
    num_columns,
    row_stride,
    multiplier,
    grad_scale,
    HAS_GRADIENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * row_stride
    goal = tl.load(target + row)
    highest = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for block in range(BLOCKS):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        value = tl.load(first + column, mask=column < num_columns, other=float("-inf"))
        value = value.to(tl.float32) * multiplier
        # Each lane keeps its own maximum: lanes meet once, after the last block. The first block
        # has a number in every lane that is ever used.
        new = tl.maximum(highest, value)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - base) + tl.exp(value - base)
        highest = new
    top = tl.max(highest, 0)
    log_total = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    chosen = tl.load(first + goal).to(tl.float32) * multiplier
    tl.store(losses + row, log_total - chosen)
    if HAS_GRADIENT:
        # Backwards, since the cache has the end of the row.
        for back in range(BLOCKS):
            column = (BLOCKS - 1 - back) * COLUMNS + tl.arange(0, COLUMNS)
            mask = column < num_columns
            value = tl.load(first + column, mask=mask, other=0.0).to(tl.float32) * multiplier
            gradient = tl.exp(value - log_total)
            gradient = tl.where(column == goal, gradient - 1.0, gradient) * grad_scale
            tl.store(first + column, gradient.to(logits.dtype.element_ty), mask=mask)


def cross_entropy_rows(
    logits_CV: Tensor, target_C: Tensor, multiplier: float, grad_scale: float, in_place: bool
) -> Tensor:
    """Return each row's loss in fp32; with `in_place` overwrite the logits by their gradient.

    Rows may lie further apart than they are long.
    """
    num_rows, num_columns = logits_CV.shape
    losses_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    columns = min(_COLUMNS, triton.next_power_of_2(num_columns))
    _rows_kernel[(num_rows,)](
        logits_CV,
        target_C.contiguous(),
        losses_C,
        num_columns,
        logits_CV.stride(0),
        multiplier,
        grad_scale,
        in_place,
        triton.cdiv(num_columns, columns),
        columns,
        num_warps=max(1, columns // 128),
    )
    return losses_C
