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
    weight_N = dispatch.to_rows(weight_TK).to(inner_NF.dtype)
    with torch.enable_grad():
        inner_NF = inner_NF.detach().requires_grad_()
        act_NF = activate(inner_NF)
    column = weight_N[:, None]
    (grad_NF,) = torch.autograd.grad(act_NF, inner_NF, (back_NF * column).to(act_NF.dtype))
    act_NF = act_NF.detach()
    weight_grad_N = (back_NF * act_NF).sum(-1)
    return grad_NF, act_NF * column, dispatch.to_assignments(weight_grad_N, weight_TK)
