"""The fast core: SiLU experts with a backward pass of their own.

Saved for backward are the inputs and the pre-activations `inner_NF`: no gathered x, no activation,
no output. The gradient of a gate weight needs no output either: with g the gradient of the token's
sum, w' = g . (W2 a) = (W2^T g) . a, and W2^T g is needed anyway.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fomoe_flwr.model.experts import cpu_kernels
from fomoe_flwr.model.experts.dispatch import Dispatch

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
        up_RFD: Tensor,
        down_RDF: Tensor,
        dispatch: Dispatch,
        has_gate: bool,
    ) -> Tensor:
        kernels, ends = _kernels(x_TD), dispatch.ends_R
        x_ND = kernels.gather(x_TD, dispatch)
        inner_NF = F.grouped_mm(x_ND, up_RFD.transpose(-2, -1), offs=ends)
        del x_ND
        act_NF = kernels.activate(inner_NF, dispatch, has_gate)
        y_ND = F.grouped_mm(act_NF, down_RDF.transpose(-2, -1), offs=ends)
        ctx.save_for_backward(x_TD, weight_TK, up_RFD, down_RDF, inner_NF)
        ctx.dispatch, ctx.has_gate = dispatch, has_gate
        out_TD: Tensor = kernels.combine(y_ND, dispatch, weight_TK)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, up_RFD, down_RDF, inner_NF = ctx.saved_tensors
        dispatch, kernels, ends = ctx.dispatch, _kernels(x_TD), ctx.dispatch.ends_R
        grad_ND = kernels.gather(gradients[0].contiguous(), dispatch)
        back_NF = F.grouped_mm(grad_ND, down_RDF, offs=ends)
        inner_grad_NF, act_NF, weight_grad_TK = kernels.activate_backward(
            back_NF, inner_NF, weight_TK, dispatch, ctx.has_gate
        )
        del back_NF
        down_grad_RDF = F.grouped_mm(grad_ND.t(), act_NF, offs=ends)
        del act_NF, grad_ND
        x_ND = kernels.gather(x_TD, dispatch)
        up_grad_RFD = F.grouped_mm(inner_grad_NF.t(), x_ND, offs=ends)
        del x_ND
        x_grad_ND = F.grouped_mm(inner_grad_NF, up_RFD, offs=ends)
        x_grad_TD = kernels.combine(x_grad_ND, dispatch, None)
        return x_grad_TD, weight_grad_TK, up_grad_RFD, down_grad_RDF, None, None


def fused_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    up_RFD: Tensor,
    down_RDF: Tensor,
    dispatch: Dispatch,
    has_gate: bool,
) -> Tensor:
    """Sum the SiLU residents' outputs, weighted by the gate; see `resident_experts`."""
    out_TD: Tensor = _FusedExperts.apply(x_TD, weight_TK, up_RFD, down_RDF, dispatch, has_gate)
    return out_TD
