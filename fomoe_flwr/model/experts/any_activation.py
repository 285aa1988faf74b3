"""The fused core's activation where there is no kernel for it: any function, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fomoe_flwr.model.experts.dispatch import Dispatch


def activate_backward(
    activate: Callable[[Tensor], Tensor],
    back_NF: Tensor,
    inner_NF: Tensor,
    weight_TK: Tensor,
    dispatch: Dispatch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of inner, the weighted activation, and the gradient of the gate weights.

    back_NF is W2^T times the gradient of the token's sum, without the gate weight. The activation
    is computed again.
    """
    weight_N = weight_TK.reshape(-1).index_select(0, dispatch.order_N).to(inner_NF.dtype)
    with torch.enable_grad():
        inner_NF = inner_NF.detach().requires_grad_()
        act_NF = activate(inner_NF)
    column = weight_N[:, None]
    (grad_NF,) = torch.autograd.grad(act_NF, inner_NF, (back_NF * column).to(act_NF.dtype))
    act_NF = act_NF.detach()
    return grad_NF, act_NF * column, scatter((back_NF * act_NF).sum(-1), weight_TK, dispatch)


def scatter(value_N: Tensor, weight_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """Bring a number of each row to its assignment; ghosts get 0."""
    rows = torch.arange(len(value_N), device=value_N.device)
    value_N = torch.where(rows < dispatch.count_1, value_N, 0)
    out_TK = torch.zeros_like(weight_TK)
    out_TK.view(-1)[dispatch.order_N] = value_N.to(weight_TK.dtype)
    return out_TK
