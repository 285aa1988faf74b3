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
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.routing import is_router_key, layer_of


class HolderMean:
    """Running weighted mean of what workers return, per key over its holders.

    With `router_rows="holders"` a row of a shared router is averaged over its expert's holders
    only: no task gradient reaches it elsewhere, and the mean over all would shrink its update.
    """

    def __init__(self, spec: StateSpec, router_rows: str = "all") -> None:
        self.spec = spec
        self.shared = torch.zeros(spec.shared_size)
        self.shared_weight = 0.0
        self.shared_count = 0
        self._routers = tuple(
            entry for entry in spec.shared if router_rows == "holders" and is_router_key(entry.key)
        )
        self.rows = {entry.key: torch.zeros(entry.shape) for entry in self.row_entries}
        """Means of the keys that are averaged expert by expert, `[num_experts, ...]`."""
        shape = (spec.num_layers, spec.num_experts)
        self.expert_weight = torch.zeros(shape, dtype=torch.float64)
        """[num_layers, num_experts] summed weight of the replies that held the expert."""
        self.expert_count = torch.zeros(shape, dtype=torch.long)
        """[num_layers, num_experts] number of those replies."""
        self._spread = torch.zeros(shape, dtype=torch.float64)
        """Weighted mean squared distance of an expert's copies from their mean, by Welford too."""

    @property
    def row_entries(self) -> tuple[Entry, ...]:
        """Keys that are averaged expert by expert."""
        return (*self.spec.expert, *self._routers)

    def fold(
        self,
        shared: Tensor,
        experts: Tensor,
        residents: Residents,
        weight: float,
        expert_weights: Sequence[Tensor] | None = None,
    ) -> None:
        """Add one worker's flat fp32 vectors with a positive weight.

        `expert_weights[layer]`, one number >= 0 a resident, replaces `weight` for experts; a reply
        with weight 0 says nothing about that expert. Raises ValueError, before anything changes,
        for other weights and for a wrong size.
        """
        if not weight > 0:
            raise ValueError(f"a reply's weight must be > 0 (got {weight})")
        pieces = self.spec.split_experts(experts, residents)
        shared_pieces = self.spec.split_shared(shared)
        weights = [
            torch.full((len(held),), weight, dtype=torch.float64)
            if expert_weights is None
            else expert_weights[layer].double()
            for layer, held in enumerate(residents)
        ]
        if any(
            len(w) != len(held) or not bool((w >= 0).all())
            for w, held in zip(weights, residents, strict=True)
        ):
            raise ValueError("a reply's expert weights must be >= 0, one for each resident")
        self.shared_weight += weight
        self.shared_count += 1
        self.shared += (shared - self.shared) * (weight / self.shared_weight)
        rows = [
            torch.tensor(held, dtype=torch.long)[w > 0]
            for held, w in zip(residents, weights, strict=True)
        ]
        shares = []
        for layer, held in enumerate(rows):
            added = weights[layer][weights[layer] > 0]
            self.expert_weight[layer, held] += added
            self.expert_count[layer, held] += 1
            shares.append(added / self.expert_weight[layer, held])
        apart = torch.zeros_like(self._spread)
        for entry in self.row_entries:
            layer = layer_of(entry.key)
            held, heard = rows[layer], weights[layer] > 0
            if entry.layer is None:
                piece = shared_pieces[entry.key][held]
            else:
                piece = pieces[entry.key] if bool(heard.all()) else pieces[entry.key][heard]
            mean = self.rows[entry.key]
            old = mean[held]
            difference = piece - old
            if entry.layer is not None:
                squares = difference.reshape(len(held), entry.row_size).square()
                apart[layer, held] += squares.sum(1).double()
            share = shares[layer].float().view(-1, *(1 for _ in entry.shape[1:]))
            mean[held] = old + difference * share
        for layer, held in enumerate(rows):
            share = shares[layer]
            spread = self._spread[layer, held] + share * apart[layer, held]
            self._spread[layer, held] = (1 - share) * spread

    def shared_means(self) -> dict[str, Tensor]:
        """Return the mean of every key that is averaged over all; empty if nobody replied."""
        if not self.shared_weight > 0:
            return {}
        apart = {entry.key for entry in self._routers}
        means = self.spec.split_shared(self.shared)
        return {key: value for key, value in means.items() if key not in apart}

    def returned(self, layer: int) -> Tensor:
        """Return the ids of the layer's experts that at least one reply spoke for."""
        return (self.expert_weight[layer] > 0).nonzero().flatten()

    def missing_experts(self) -> Sequence[tuple[int, int]]:
        """List the (layer, expert) pairs of this spec that nobody returned."""
        layers = sorted({layer_of(entry.key) for entry in self.spec.expert})
        return [
            (layer, int(expert))
            for layer in layers
            for expert in (self.expert_weight[layer] == 0).nonzero().flatten()
        ]

    def disagreement(self) -> Tensor:
        """Return how far an expert's copies lay apart, [num_layers, num_experts].

        Root of the weighted mean squared distance of the copies from their mean; 0 with one copy.
        """
        return self._spread.sqrt()
