"""Averaging over holders: each reply is folded into running means and can be dropped at once.

Shared keys are averaged over all workers, each expert over the workers that hold it (paper section
3.3). The mean is kept by Welford's update, so memory is one model whatever the number of workers,
a single reply comes through unchanged, and equal replies give exactly themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import StateSpec


class HolderMean:
    """Running weighted mean of pseudo-gradients, per key over its holders."""

    def __init__(self, spec: StateSpec) -> None:
        self.spec = spec
        self.shared = torch.zeros(spec.shared_size)
        self.experts = {entry.key: torch.zeros(entry.shape) for entry in spec.expert}
        self.shared_weight = 0.0
        self.expert_weight = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.float64)
        """[num_layers, num_experts] summed weight of the replies that held the expert."""

    def fold(self, shared: Tensor, experts: Tensor, residents: Residents, weight: float) -> None:
        """Add one worker's pseudo-gradient (flat fp32 vectors) with a positive weight.

        Raises ValueError, before anything changes, for another weight and for a wrong size.
        """
        if not weight > 0:
            raise ValueError(f"a reply's weight must be > 0 (got {weight})")
        rows = [torch.tensor(held, dtype=torch.long) for held in residents]
        pieces = self.spec.split_experts(experts, residents)
        self.spec.split_shared(shared)
        self.shared_weight += weight
        self.shared += (shared - self.shared) * (weight / self.shared_weight)
        for layer, held in enumerate(rows):
            self.expert_weight[layer, held] += weight
        for entry in self.spec.expert:
            held = rows[entry.layer or 0]
            share = (weight / self.expert_weight[entry.layer or 0, held]).float()
            mean = self.experts[entry.key]
            old = mean[held]
            mean[held] = old + (pieces[entry.key] - old) * share.view(
                -1, *(1 for _ in entry.shape[1:])
            )

    def shared_means(self) -> dict[str, Tensor]:
        """Return the mean of every shared key; empty if nobody replied."""
        return self.spec.split_shared(self.shared) if self.shared_weight > 0 else {}

    def returned(self, layer: int) -> Tensor:
        """Return the ids of the layer's experts that at least one reply held."""
        return (self.expert_weight[layer] > 0).nonzero().flatten()

    def missing_experts(self) -> Sequence[tuple[int, int]]:
        """List the (layer, expert) pairs that nobody returned."""
        pairs = (self.expert_weight == 0).nonzero().tolist()
        return [(int(layer), int(expert)) for layer, expert in pairs]
