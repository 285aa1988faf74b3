"""The fast core: experts with a backward pass of their own.

Saved for backward are the inputs and the pre-activations `inner_NF`: no gathered x, no activation,
no output. The gradient of a gate weight needs no output either: with g the gradient of the token's
sum, w' = g . (W2 a + b2) = (W2^T g) . a + g . b2, and W2^T g is needed anyway. SiLU has kernels;
any other activation is computed by PyTorch, and again in backward.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fomoe_flwr.model.experts import any_activation, cpu_kernels
from fomoe_flwr.model.experts.dispatch import Dispatch
from fomoe_flwr.model.experts.form import Form, rows_of, sum_rows

try:
    from fomoe_flwr.model.experts import triton_kernels
except ImportError:  # torch for a CPU comes without Triton
    triton_kernels = None  # type: ignore[assignment]


def is_supported(x_TD: Tensor, weight: Tensor) -> bool:
    """Tell whether the fused core has kernels for these tensors."""
    if x_TD.dtype != weight.dtype:
        return False
    if x_TD.is_cuda:
        return triton_kernels is not None
    return x_TD.device.type == "cpu" and x_TD.dtype is torch.float32


def _kernels(tensor: Tensor) -> ModuleType:
    return triton_kernels if tensor.is_cuda else cpu_kernels


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias_RF: Tensor | None,
        down_bias_RD: Tensor | None,
        dispatch: Dispatch,
        form: Form,
    ) -> Tensor:
        kernels, ends = _kernels(x_TD), dispatch.ends_R
        has_bias = up_bias_RF is not None or down_bias_RD is not None
        resident_N = dispatch.resident_of_row if has_bias else dispatch.ends_R
        x_ND = kernels.gather(x_TD, dispatch)
        inner_NF = F.grouped_mm(x_ND, form.up(up), offs=ends)
        del x_ND
        if up_bias_RF is not None:
            inner_NF += rows_of(up_bias_RF, resident_N)
        if form.activate is None:
            act_NF = kernels.activate(inner_NF, dispatch, form.has_gate)
        else:
            act_NF = form.activate(inner_NF)
        y_ND = F.grouped_mm(act_NF, form.down(down), offs=ends)
        if down_bias_RD is not None:
            y_ND += rows_of(down_bias_RD, resident_N)
        ctx.save_for_backward(x_TD, weight_TK, up, down, inner_NF, down_bias_RD, resident_N)
        ctx.dispatch, ctx.form, ctx.has_up_bias = dispatch, form, up_bias_RF is not None
        out_TD: Tensor = kernels.combine(y_ND, dispatch, weight_TK)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, up, down, inner_NF, down_bias_RD, resident_N = ctx.saved_tensors
        dispatch, form, ends = ctx.dispatch, ctx.form, ctx.dispatch.ends_R
        kernels = _kernels(x_TD)
        up_bias_grad = down_bias_grad = None
        grad_ND = kernels.gather(gradients[0].contiguous(), dispatch)
        back_NF = F.grouped_mm(grad_ND, form.down(down).transpose(-2, -1), offs=ends)
        if form.activate is None:
            inner_grad_NF, act_NF, weight_grad_TK = kernels.activate_backward(
                back_NF, inner_NF, weight_TK, dispatch, form.has_gate
            )
        else:
            inner_grad_NF, act_NF, weight_grad_TK = any_activation.activate_backward(
                form.activate, back_NF, inner_NF, weight_TK, dispatch
            )
        del back_NF
        if down_bias_RD is not None:
            product_N = (grad_ND * rows_of(down_bias_RD, resident_N)).sum(-1)
            weight_grad_TK += dispatch.to_assignments(product_N, weight_TK)
            weight_N = dispatch.to_rows(weight_TK).to(grad_ND.dtype)
            down_bias_grad = sum_rows(grad_ND * weight_N[:, None], ends)
        down_grad = form.gradient(act_NF, grad_ND, ends)
        del act_NF, grad_ND
        x_ND = kernels.gather(x_TD, dispatch)
        up_grad = form.gradient(x_ND, inner_grad_NF, ends)
        del x_ND
        if ctx.has_up_bias:
            up_bias_grad = sum_rows(inner_grad_NF, ends)
        x_grad_ND = F.grouped_mm(inner_grad_NF, form.up(up).transpose(-2, -1), offs=ends)
        x_grad_TD = kernels.combine(x_grad_ND, dispatch, None)
        grads = (x_grad_TD, weight_grad_TK, up_grad, down_grad, up_bias_grad, down_bias_grad)
        return (*grads, None, None)


def fused_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias_RF: Tensor | None,
    down_bias_RD: Tensor | None,
    dispatch: Dispatch,
    form: Form,
) -> Tensor:
    """Sum the residents' outputs, weighted by the gate; see `resident_experts`."""
    out_TD: Tensor = _FusedExperts.apply(
        x_TD, weight_TK, up, down, up_bias_RF, down_bias_RD, dispatch, form
    )
    return out_TD
