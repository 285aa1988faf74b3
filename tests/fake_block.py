"""A MoE block that ends after its router, with what tells routers and experts apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Returns the logits it is given, and chooses by them."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, 1))
        self.top_k = top_k

    def forward(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits_TE, *logits_TE.softmax(-1).topk(self.top_k)


class Experts(nn.Module):
    """Holds the first experts."""

    is_transposed = False

    def __init__(self, num_experts: int, num_residents: int) -> None:
        super().__init__()
        self.num_experts = num_residents
        self.down_proj = nn.Parameter(torch.zeros(num_residents, 1, 1))
        slots = torch.arange(num_experts).clamp(max=num_residents)
        self.register_buffer("slot_of_expert", slots)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        return inner


class OneBlock(nn.Module):
    """A model of one layer."""

    def __init__(self, num_experts: int, num_residents: int, top_k: int) -> None:
        super().__init__()
        block = nn.Module()
        block.gate = Router(num_experts, top_k)
        block.experts = Experts(num_experts, num_residents)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": block})])

    def forward(self, logits_TE: Tensor) -> None:
        self.layers[0]["mlp"].gate(logits_TE)
