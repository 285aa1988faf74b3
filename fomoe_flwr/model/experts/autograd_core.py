"""The plain core: PyTorch's own gradients, any form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_flwr.model.experts.dispatch import Dispatch
from fomoe_flwr.model.experts.form import Form, rows_of


def autograd_experts(
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
    x_ND = x_TD.index_select(0, dispatch.token_N)
    inner_NF = F.grouped_mm(x_ND, form.up(up), offs=dispatch.ends_R)
    if up_bias_RF is not None:
        inner_NF = inner_NF + rows_of(up_bias_RF, dispatch.resident_of_row)
    act_NF = form.function(inner_NF)
    y_ND = F.grouped_mm(act_NF, form.down(down), offs=dispatch.ends_R)
    if down_bias_RD is not None:
        y_ND = y_ND + rows_of(down_bias_RD, dispatch.resident_of_row)
    y_ND = y_ND * dispatch.to_rows(weight_TK)[:, None]
    return torch.zeros_like(x_TD).index_add(0, dispatch.token_N, y_ND.to(x_TD.dtype))
