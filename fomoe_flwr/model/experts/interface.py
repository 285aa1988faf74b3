"""The experts implementation that transformers dispatches to, and the choice of its core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface

from fomoe_flwr.model.experts.autograd_core import autograd_experts
from fomoe_flwr.model.experts.dispatch import make_dispatch
from fomoe_flwr.model.experts.fused_core import fused_experts, is_supported

IMPLEMENTATION = "fomoe"
"""Name under which `experts_implementation=` selects this computation."""

CORES = ("auto", "autograd", "fused", "static")
"""`auto`: `fused` wherever it has kernels, else `autograd`. `static` is `fused` without a host
sync: it allocates rows for ghosts, but a CUDA graph can capture it."""


def resident_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up_RFD: Tensor,
    down_RDF: Tensor,
    act: Callable[[Tensor], Tensor] = F.silu,
    has_gate: bool = True,
    has_ghosts: bool = True,
    core: str = "auto",
) -> Tensor:
    """Sum the chosen residents' outputs, weighted by the gate.

    slot_TK counts residents from 0; the value R marks a ghost, which adds nothing (paper
    section 3.2). With `has_gate` up_RFD is [R, 2F, D], the gate's rows first, and an expert is
    W2 (act(Wg x) * Wu x); without it is [R, F, D] and an expert is W2 act(W1 x). `core` is one of
    `CORES`; where the fused core has no kernels (another activation, a device or type of its own)
    the plain one takes its place. Returns [T, D].
    """
    is_fused = core != "autograd" and _is_silu(act) and is_supported(x_TD, up_RFD)
    # On a CPU there is nobody to wait for.
    is_static = is_fused and core == "static" and x_TD.is_cuda
    dispatch = make_dispatch(slot_TK, up_RFD.shape[0], has_ghosts, host_sync=not is_static)
    if dispatch.num_rows == 0:
        # Keeps the graph connected, so that backward gives zero gradients and not None.
        nothing = (up_RFD.sum() + down_RDF.sum() + weight_TK.sum()) * 0.0
        return torch.zeros_like(x_TD) + nothing.to(x_TD.dtype) + x_TD * 0.0
    if is_fused:
        return fused_experts(x_TD, weight_TK, up_RFD, down_RDF, dispatch, has_gate)
    return autograd_experts(
        x_TD, weight_TK.to(x_TD.dtype), up_RFD, down_RDF, dispatch, act, has_gate
    )


def set_core(model: nn.Module, core: str) -> None:
    """Choose the core of every experts module of a model, by a name of `CORES`."""
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "down_proj"):
            module.experts_core = core  # type: ignore[assignment]


def _is_silu(act: Callable[[Tensor], Tensor]) -> bool:
    return act is F.silu or isinstance(act, nn.SiLU | SiLUActivation)


def _forward(module: Any, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    slot_of_expert = getattr(module, "slot_of_expert", None)
    slot_TK = top_k_index if slot_of_expert is None else slot_of_expert[top_k_index]
    up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        # grouped_mm is not autocast-aware: without these casts the experts would run in fp32.
        dtype = torch.get_autocast_dtype(device)
        x_TD, up, down = x_TD.to(dtype), up.to(dtype), down.to(dtype)
    return resident_experts(
        x_TD,
        slot_TK,
        top_k_weights,
        up,
        down,
        module.act_fn,
        module.has_gate,
        has_ghosts=slot_of_expert is not None and len(up) < len(slot_of_expert),
        core=getattr(module, "experts_core", "auto"),
    )


def register() -> None:
    """Make `experts_implementation="fomoe"` known to transformers; harmless when repeated."""
    # Data-dependent sizes: a user's `model.compile()` must not trace into this.
    ExpertsInterface.register(IMPLEMENTATION, torch.compiler.disable(_forward))
