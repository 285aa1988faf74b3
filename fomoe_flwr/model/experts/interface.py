"""The experts implementation that transformers dispatches to, and the choice of its core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from fomoe_flwr.errors import InputError
from fomoe_flwr.model.experts.autograd_core import autograd_experts
from fomoe_flwr.model.experts.dispatch import make_dispatch
from fomoe_flwr.model.experts.form import Form
from fomoe_flwr.model.experts.fused_core import fused_experts, is_supported

IMPLEMENTATION = "fomoe"
"""Name under which `experts_implementation=` selects this computation."""

CORES = ("auto", "autograd", "fused", "static")
"""`auto`: `fused` wherever it has kernels, else `autograd`. `static` is `fused` without a host
sync: it allocates rows for ghosts, but a CUDA graph can capture it."""

_SWIGLU = Form()


def resident_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up: Tensor,
    down: Tensor,
    form: Form = _SWIGLU,
    up_bias_RF: Tensor | None = None,
    down_bias_RD: Tensor | None = None,
    has_ghosts: bool = True,
    core: str = "auto",
) -> Tensor:
    """Sum the chosen residents' outputs, weighted by the gate.

    slot_TK counts residents from 0; the value R marks a ghost, which adds nothing (paper
    section 3.2). `form` says what an expert computes and how `up` and `down` are stored; their
    first axis is R, and so is that of the biases. `core` is one of `CORES`; where the fused core
    has no kernels (a device or type of its own) the plain one takes its place. Returns [T, D].
    """
    is_fused = core != "autograd" and is_supported(x_TD, up)
    # On a CPU there is nobody to wait for.
    is_static = is_fused and core == "static" and x_TD.is_cuda
    dispatch = make_dispatch(slot_TK, up.shape[0], has_ghosts, host_sync=not is_static)
    if dispatch.num_rows == 0:
        # Keeps the graph connected, so that backward gives zero gradients and not None.
        parts = (up, down, weight_TK, up_bias_RF, down_bias_RD)
        nothing = sum(part.sum() * 0.0 for part in parts if part is not None)
        return torch.zeros_like(x_TD) + nothing.to(x_TD.dtype) + x_TD * 0.0  # type: ignore[union-attr]
    if not is_fused:
        weight_TK = weight_TK.to(x_TD.dtype)
    experts = fused_experts if is_fused else autograd_experts
    return experts(x_TD, weight_TK, up, down, up_bias_RF, down_bias_RD, dispatch, form)


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module has transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def form_of(module: Any) -> Form:
    """Read the form of the experts off a module. Raises InputError for one that is not known."""
    if getattr(module, "has_post_expert_norm", False):
        raise InputError(f"{type(module).__name__} normalises the output of every expert")
    if not module.has_gate:
        return Form.of(module.act_fn, False, module.is_transposed)
    if type(module)._apply_gate is _default_apply_gate:
        return Form.of(module.act_fn, True, module.is_transposed)
    return Form(module._apply_gate, True, module.is_transposed)


def set_core(model: nn.Module, core: str) -> None:
    """Choose the core of every experts module of a model, by a name of `CORES`."""
    for module in model.modules():
        if is_experts(module):
            module.experts_core = core  # type: ignore[assignment]


def _forward(module: Any, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    slot_of_expert = getattr(module, "slot_of_expert", None)
    slot_TK = top_k_index if slot_of_expert is None else slot_of_expert[top_k_index]
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ()))
    tensors = [getattr(module, name) for name in names]
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        # grouped_mm is not autocast-aware: without these casts the experts would run in fp32.
        dtype = torch.get_autocast_dtype(device)
        x_TD, *tensors = (tensor.to(dtype) for tensor in (x_TD, *tensors))
    return resident_experts(
        x_TD,
        slot_TK,
        top_k_weights,
        tensors[0],
        tensors[1],
        form_of(module),
        *(tensors[2:] or (None, None)),  # type: ignore[misc]
        has_ghosts=slot_of_expert is not None and len(tensors[0]) < len(slot_of_expert),
        core=getattr(module, "experts_core", "auto"),
    )


def register() -> None:
    """Make `experts_implementation="fomoe"` known to transformers; harmless when repeated."""
    # Data-dependent sizes: a user's `model.compile()` must not trace into this.
    ExpertsInterface.register(IMPLEMENTATION, torch.compiler.disable(_forward))
