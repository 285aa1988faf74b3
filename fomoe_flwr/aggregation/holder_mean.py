"""Averaging over holders: each reply is folded into running means and can be dropped at once.

Shared keys are averaged over all workers, each expert over the workers that hold it (paper section
3.3). The mean is kept by Welford's update, so memory is one model whatever the number of workers,
a single reply comes through unchanged, and equal replies give exactly themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_flwr.codecs.slabs import SLAB, slabs
from fomoe_flwr.model.homes import MEMORY, Home
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.parameters.keys import is_router_key


class HolderMean:
    """Running weighted mean of what workers return, per key over its holders.

    With `router_rows="holders"` a row of a shared router is averaged over its expert's holders
    only: no task gradient reaches it elsewhere, and the mean over all would shrink its update.
    The means lie in `home`; where nobody returned anything they have any value.
    """

    def __init__(self, spec: StateSpec, router_rows: str = "all", home: Home = MEMORY) -> None:
        self.spec = spec
        self.shared = home.scratch(spec.shared_size)
        self.shared_weight = 0.0
        self.shared_count = 0
        self._routers = tuple(
            entry
            for entry in spec.shared
            if router_rows == "holders"
            and is_router_key(entry.key)
            # Some routers have more than rows of experts: all average those.
            and entry.shape[:1] == (spec.num_experts,)
        )
        self.rows = {entry.key: home.scratch(*entry.shape) for entry in self.row_entries}
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
        routers = self.spec.split_shared(shared)
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
        if self.shared_count == 1:
            self.shared.copy_(shared)
        else:  # In one pass; nobody asks how far apart shared copies lie.
            self.shared.lerp_(shared, weight / self.shared_weight)
        apart = torch.zeros_like(self._spread)
        shares = torch.zeros_like(self._spread)
        for layer, (held, added) in enumerate(zip(residents, weights, strict=True)):
            experts_of_layer = list(held)
            self.expert_weight[layer, experts_of_layer] += added
            self.expert_count[layer, experts_of_layer] += (added > 0).long()
            total = self.expert_weight[layer, experts_of_layer]
            shares[layer, experts_of_layer] = added / total.masked_fill(total == 0, 1)
        for entry in self.row_entries:
            layer = self.spec.layer_of(entry.key)
            mean, is_expert = self.rows[entry.key], entry.layer is not None
            if is_expert and bool((shares[layer, list(residents[layer])] == 1).all()):
                _take_first(mean, pieces[entry.key], residents[layer])
                continue
            for place, expert in enumerate(residents[layer]):
                if share := float(shares[layer, expert].float()):
                    source = pieces[entry.key][place] if is_expert else routers[entry.key][expert]
                    squares = _draw_near(mean[expert].view(-1), source.view(-1), share)
                    if is_expert:
                        apart[layer, expert] += squares
        self._spread += shares * apart
        self._spread *= 1 - shares

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
        layers = sorted({self.spec.layer_of(entry.key) for entry in self.spec.expert})
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


def _take_first(mean: Tensor, rows: Tensor, experts: Sequence[int]) -> None:
    """Copy first copies to their experts' places, experts that follow each other in one go."""
    start = 0
    for stop in range(1, len(experts) + 1):
        if stop == len(experts) or experts[stop] != experts[stop - 1] + 1:
            mean[experts[start] : experts[stop - 1] + 1].copy_(rows[start:stop])
            start = stop


def _draw_near(mean: Tensor, new: Tensor, share: float) -> float:
    """Move a flat mean by a share of its distance to a new vector; return the squared distance.

    The first copy (share 1) takes the mean's place, which had no value: its distance counts as 0.
    Otherwise in slabs that stay in cache, so that memory is read twice and written once.
    """
    if share == 1.0:
        mean.copy_(new)
        return 0.0
    squares = 0.0
    buffer = torch.empty(min(SLAB, mean.numel()))
    for part in slabs(mean.numel()):
        old, other = mean[part], new[part]
        difference = torch.sub(other, old, out=buffer[: len(old)])
        squares += float(torch.dot(difference, difference))
        old.lerp_(other, share)
    return squares
