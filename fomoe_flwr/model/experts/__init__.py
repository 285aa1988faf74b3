"""The experts computation that really skips ghosts, registered with transformers.

    dispatch        which assignment goes to which row of which resident
    form            what an expert computes, and how its matrices are stored
    autograd_core   plain PyTorch; what the fused core is checked against
    fused_core      own backward: saves inputs and pre-activations only
    cpu_kernels     what the fused core needs besides matrix products, on a CPU ...
    triton_kernels  ... and on a GPU ...
    any_activation  ... and for any activation but SiLU
    interface       the name under which transformers finds all this

Shape legend: T tokens, K chosen experts per token, R residents, D model width, F expert width,
N rows: resident assignments sorted by resident (N <= T * K).

Assignments to a ghost are dropped before the gather, so a ghost costs no copy, no matrix product
and no activation memory; transformers' own expert-parallel path drops them inside the product only.
"""

from fomoe_flwr.model.experts.interface import (
    CORES,
    IMPLEMENTATION,
    form_of,
    is_experts,
    register,
    resident_experts,
    set_core,
)

__all__ = [
    "CORES",
    "IMPLEMENTATION",
    "form_of",
    "is_experts",
    "register",
    "resident_experts",
    "set_core",
]
