"""What the fused core needs besides matrix products, on a CPU in fp32.

Sums over a token's rows go through `F.embedding_bag`: it is vectorised and threaded, and knows bags
of any size, so ghosts are not even read. `index_add` is neither and takes twenty times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_flwr.model.experts.dispatch import Dispatch

_BLOCK_ELEMENTS = 2**17
"""Elements of a block of rows that stays in a core's cache between two passes over it."""


def gather(x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy every row's token: [N, D]."""
    return x_TD.index_select(0, dispatch.token_N)


def activate(inner_NF: Tensor, dispatch: Dispatch, has_gate: bool) -> Tensor:
    """Return silu(gate) * up, or silu(inner) without a gate."""
    del dispatch
    if not has_gate:
        return F.silu(inner_NF)
    act_NF = inner_NF.new_empty(len(inner_NF), inner_NF.shape[1] // 2)
    for inner, act in _blocks(inner_NF, act_NF):
        gate, up = inner.chunk(2, -1)
        torch.mul(F.silu(gate), up, out=act)
    return act_NF


def activate_backward(
    back_NF: Tensor, inner_NF: Tensor, weight_TK: Tensor, dispatch: Dispatch, has_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of inner, the weighted activation, and the gradient of the gate weights.

    back_NF is W2^T times the gradient of the token's sum, without the gate weight.
    """
    weight_N = dispatch.to_rows(weight_TK).to(inner_NF.dtype)
    grad_NF, act_NF = torch.empty_like(inner_NF), torch.empty_like(back_NF)
    weight_grad_N = torch.empty_like(weight_N)
    for back, inner, weight, grad, act, weight_grad in _blocks(
        back_NF, inner_NF, weight_N, grad_NF, act_NF, weight_grad_N
    ):
        column = weight[:, None]
        gate, up = inner.chunk(2, -1) if has_gate else (inner, None)
        silu = F.silu(gate)
        torch.mul(silu, up, out=act) if up is not None else act.copy_(silu)
        torch.sum(back * act, -1, out=weight_grad)
        act.mul_(column)
        scaled = back * column
        if up is None:
            grad.copy_(torch.ops.aten.silu_backward(scaled, gate))
        else:
            gate_grad, up_grad = grad.chunk(2, -1)
            torch.mul(scaled, silu, out=up_grad)
            gate_grad.copy_(torch.ops.aten.silu_backward(scaled.mul_(up), gate))
    return grad_NF, act_NF, dispatch.to_assignments(weight_grad_N, weight_TK)


def combine(y_ND: Tensor, dispatch: Dispatch, weight_TK: Tensor | None) -> Tensor:
    """Sum each token's rows, with weights if there are any: [T, D]."""
    is_row_TK = dispatch.row_TK < len(y_ND)
    counts_T = is_row_TK.sum(-1)
    kept = is_row_TK.view(-1).nonzero().flatten()
    weights = None if weight_TK is None else weight_TK.reshape(-1).index_select(0, kept)
    return F.embedding_bag(
        dispatch.row_TK.view(-1).index_select(0, kept).long(),
        y_ND,
        counts_T.cumsum(0) - counts_T,
        mode="sum",
        per_sample_weights=None if weights is None else weights.to(y_ND.dtype),
    )


def _blocks(*tensors: Tensor):  # type: ignore[no-untyped-def]
    """Walk through tensors of equally many rows, some rows of each at a time."""
    rows = max(1, _BLOCK_ELEMENTS // max(t[0].numel() for t in tensors))
    return zip(*(t.split(rows) for t in tensors), strict=True)
