"""The plain core: PyTorch's own gradients, any activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_flwr.model.experts.dispatch import Dispatch


def autograd_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    up_RFD: Tensor,
    down_RDF: Tensor,
    dispatch: Dispatch,
    act: Callable[[Tensor], Tensor],
    has_gate: bool,
) -> Tensor:
    """Sum the residents' outputs, weighted by the gate; see `resident_experts`."""
    x_ND = x_TD.index_select(0, dispatch.token_N)
    inner_NF = F.grouped_mm(x_ND, up_RFD.transpose(-2, -1), offs=dispatch.ends_R)
    if has_gate:
        gate_NF, up_NF = inner_NF.chunk(2, -1)
        inner_NF = act(gate_NF) * up_NF
    else:
        inner_NF = act(inner_NF)
    y_ND = F.grouped_mm(inner_NF, down_RDF.transpose(-2, -1), offs=dispatch.ends_R)
    y_ND = y_ND * weight_TK.reshape(-1).index_select(0, dispatch.order_N)[:, None]
    return torch.zeros_like(x_TD).index_add(0, dispatch.token_N, y_ND.to(x_TD.dtype))
