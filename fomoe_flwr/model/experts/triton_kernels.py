"""What the fused core needs besides matrix products, on a GPU.

Everything here is bound by memory traffic, so each kernel reads and writes each number once, and
what belongs to a ghost not at all: rows from `count_1` on are neither read nor written, and a
masked load moves no bytes. Sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fomoe_flwr.model.experts.dispatch import Dispatch

_TILE_ELEMENTS = 4096
"""Elements that one program holds: 32 for each thread of four warps."""


@triton.jit
def _gather_kernel(x, token, count, out, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < tl.load(count)
    source = tl.load(token + row, mask=is_row, other=0).to(tl.int64)
    mask = is_row[:, None] & (column < num_columns)[None, :]
    value = tl.load(x + source[:, None] * num_columns + column[None, :], mask=mask)
    tl.store(out + row.to(tl.int64)[:, None] * num_columns + column[None, :], value, mask=mask)


@triton.jit
def _combine_kernel(
    y,
    row_of_choice,
    weight,
    count,
    out,
    num_columns,
    CHOICES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    num_rows = tl.load(count)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_of_choice + token * CHOICES + choice).to(tl.int64)
        mask = is_column & (row < num_rows)
        value = tl.load(y + row * num_columns + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value *= tl.load(weight + token * CHOICES + choice).to(tl.float32)
        total += value
    tl.store(out + token * num_columns + column, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _activate_kernel(
    inner, count, act, width, HAS_GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < tl.load(count)) & (column < width)
    stride = 2 * width if HAS_GATE else width
    gate = tl.load(inner + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate)
    if HAS_GATE:
        value *= tl.load(inner + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(act + row * width + column, value.to(act.dtype.element_ty), mask=mask)


@triton.jit
def _activate_backward_kernel(
    back,
    inner,
    weight,
    assignment,
    count,
    inner_grad,
    act,
    weight_grad,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < tl.load(count)
    place_R = tl.load(assignment + row_R, mask=is_row_R, other=0)
    weight_R = tl.load(weight + place_R, mask=is_row_R, other=0.0).to(tl.float32)
    row = row_R.to(tl.int64)[:, None]
    stride = 2 * WIDTH if HAS_GATE else WIDTH
    product_R = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = is_row_R[:, None] & (column < WIDTH)
        at = row * stride + column
        gradient = tl.load(back + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(inner + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        value = silu
        if HAS_GATE:
            up = tl.load(inner + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
            value = silu * up
            slope *= up
        product_R += tl.sum(gradient * value, 1)
        gradient *= weight_R[:, None]
        value *= weight_R[:, None]
        tl.store(act + row * WIDTH + column, value.to(act.dtype.element_ty), mask=mask)
        kind = inner_grad.dtype.element_ty
        tl.store(inner_grad + at, (gradient * slope).to(kind), mask=mask)
        if HAS_GATE:
            tl.store(inner_grad + at + WIDTH, (gradient * silu).to(kind), mask=mask)
    tl.store(weight_grad + place_R, product_R.to(weight_grad.dtype.element_ty), mask=is_row_R)


def gather(x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy every row's token: [N, D]."""
    num_rows, num_columns = dispatch.num_rows, x_TD.shape[1]
    out_ND = x_TD.new_empty(num_rows, num_columns)
    rows, columns = _tile(num_columns)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns))
    _gather_kernel[grid](
        x_TD.contiguous(), dispatch.token_N, dispatch.count_1, out_ND, num_columns, rows, columns
    )
    return out_ND


def activate(inner_NF: Tensor, dispatch: Dispatch, has_gate: bool) -> Tensor:
    """Return silu(gate) * up, or silu(inner) without a gate."""
    num_rows, width = len(inner_NF), inner_NF.shape[1] // (2 if has_gate else 1)
    act_NF = inner_NF.new_empty(num_rows, width)
    rows, columns = _tile(width)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, columns))
    _activate_kernel[grid](inner_NF, dispatch.count_1, act_NF, width, has_gate, rows, columns)
    return act_NF


def activate_backward(
    back_NF: Tensor, inner_NF: Tensor, weight_TK: Tensor, dispatch: Dispatch, has_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of inner, the weighted activation, and the gradient of the gate weights.

    back_NF is W2^T times the gradient of the token's sum, without the gate weight.
    """
    num_rows, width = back_NF.shape
    grad_NF, act_NF = torch.empty_like(inner_NF), torch.empty_like(back_NF)
    weight_grad_TK = torch.zeros_like(weight_TK)
    rows, columns = _tile(width, 1024)
    _activate_backward_kernel[(triton.cdiv(num_rows, rows),)](
        back_NF,
        inner_NF,
        weight_TK.contiguous(),
        dispatch.order_N,
        dispatch.count_1,
        grad_NF,
        act_NF,
        weight_grad_TK,
        width,
        has_gate,
        rows,
        columns,
    )
    return grad_NF, act_NF, weight_grad_TK


def combine(y_ND: Tensor, dispatch: Dispatch, weight_TK: Tensor | None) -> Tensor:
    """Sum each token's rows, with weights if there are any: [T, D]."""
    num_tokens, top_k = dispatch.row_TK.shape
    num_columns = y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, num_columns)
    columns = min(1024, triton.next_power_of_2(num_columns))
    grid = (num_tokens, triton.cdiv(num_columns, columns))
    _combine_kernel[grid](
        y_ND,
        dispatch.row_TK,
        dispatch.row_TK if weight_TK is None else weight_TK.contiguous(),
        dispatch.count_1,
        out_TD,
        num_columns,
        top_k,
        weight_TK is not None,
        columns,
    )
    return out_TD


def _tile(num_columns: int, most_columns: int = 512) -> tuple[int, int]:
    """Return rows and columns of a program's tile."""
    columns = min(most_columns, triton.next_power_of_2(num_columns))
    return max(1, _TILE_ELEMENTS // columns), columns
