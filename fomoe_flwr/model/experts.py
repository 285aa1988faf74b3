"""The experts computation that really skips ghosts, registered with transformers.

Shape legend: T tokens, K chosen experts per token, R residents, D model width, F expert width,
N resident assignments (N <= T * K).

Rows that go to a ghost are dropped before the gather, so a ghost costs no copy, no matrix product
and no activation memory; transformers' own expert-parallel path drops them inside the product only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

IMPLEMENTATION = "fomoe"
"""Name under which `experts_implementation=` selects this computation."""


def resident_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up_RFD: Tensor,
    down_RDF: Tensor,
    act: Callable[[Tensor], Tensor] = F.silu,
    has_gate: bool = True,
) -> Tensor:
    """Sum the chosen residents' outputs, weighted by the gate.

    slot_TK counts residents from 0; the value R marks a ghost, which adds nothing (paper
    section 3.2). With `has_gate` up_RFD is [R, 2F, D], the gate's rows first, and an expert is
    W2 (act(Wg x) * Wu x); without it is [R, F, D] and an expert is W2 act(W1 x). Returns [T, D].
    """
    num_residents, top_k = up_RFD.shape[0], slot_TK.shape[-1]
    slot_N, order_N = torch.sort(slot_TK.reshape(-1), stable=True)
    ends_R = torch.searchsorted(
        slot_N, torch.arange(num_residents, device=slot_N.device, dtype=slot_N.dtype), right=True
    ).to(torch.int32)
    num_rows = int(ends_R[-1]) if num_residents else 0
    if num_rows == 0:
        # Keeps the graph connected, so that backward gives zero gradients and not None.
        nothing = (up_RFD.sum() + down_RDF.sum() + weight_TK.sum()) * 0.0
        return torch.zeros_like(x_TD) + nothing.to(x_TD.dtype) + x_TD * 0.0
    order_N = order_N[:num_rows]
    token_N = torch.div(order_N, top_k, rounding_mode="floor")
    x_ND = x_TD.index_select(0, token_N)
    inner_NF = F.grouped_mm(x_ND, up_RFD.transpose(-2, -1), offs=ends_R)
    if has_gate:
        gate_NF, up_NF = inner_NF.chunk(2, -1)
        inner_NF = act(gate_NF) * up_NF
    else:
        inner_NF = act(inner_NF)
    y_ND = F.grouped_mm(inner_NF, down_RDF.transpose(-2, -1), offs=ends_R)
    y_ND = y_ND * weight_TK.reshape(-1).index_select(0, order_N)[:, None]
    return torch.zeros_like(x_TD).index_add(0, token_N, y_ND.to(x_TD.dtype))


def _forward(module: Any, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    slot_of_expert = getattr(module, "slot_of_expert", None)
    slot_TK = top_k_index if slot_of_expert is None else slot_of_expert[top_k_index]
    up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        # grouped_mm is not autocast-aware: without these casts the experts would run in fp32.
        dtype = torch.get_autocast_dtype(device)
        x_TD, up, down = x_TD.to(dtype), up.to(dtype), down.to(dtype)
    weight_TK = top_k_weights.to(x_TD.dtype)
    return resident_experts(x_TD, slot_TK, weight_TK, up, down, module.act_fn, module.has_gate)


def register() -> None:
    """Make `experts_implementation="fomoe"` known to transformers; harmless when repeated."""
    # Data-dependent sizes: a user's `model.compile()` must not trace into this.
    ExpertsInterface.register(IMPLEMENTATION, torch.compiler.disable(_forward))
