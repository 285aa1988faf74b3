"""The means of a round: what its replies come to, expert by expert over the holders alone.

A reply is folded into running sums and dropped, so no two replies are in memory at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.norm_limits import NormLimits
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.aggregation.privacy import NoiseSource, add_noise, clip
from fomoe_flwr.aggregation.robust_mean import RobustMean
from fomoe_flwr.config import Settings
from fomoe_flwr.model.homes import MEMORY, Home
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT, fragment_of_round, moments_of_round


@dataclass(frozen=True)
class Reply:
    """One worker's answer to a task, checked."""

    residents: Residents
    metrics: dict[str, float]
    counts: RoutingCounts
    choices: Tensor | None
    """[num_layers, tokens, top_k] choices on the probe, where the round has one."""
    vectors: Mapping[str, tuple[Tensor, Tensor]]
    """Name -> flat fp32 vectors of the shared and of the resident experts' part."""


class RoundMeans:
    """Running means of all vectors that the replies of one round carry.

    Parameters
    ----------
    settings, spec
        The run's settings and the layout of its state.
    server_round
        Decides which fragment and which moments the replies carry.
    limits
        What a reply's norm may be; kept from round to round.
    home
        Where the means lie.
    """

    def __init__(
        self,
        settings: Settings,
        spec: StateSpec,
        server_round: int,
        limits: NormLimits,
        home: Home = MEMORY,
    ) -> None:
        outer, self.privacy = settings.outer, settings.privacy
        self.server_round, self.limits, self.home = server_round, limits, home
        self.fragment = fragment_of_round(outer, server_round)
        part = spec.fragment(self.fragment, outer.fragments)
        self.weighting, self.decay = outer.weighting, outer.staleness_decay
        self.gradient = _mean(settings, part, home)
        self.moments = {
            name: _mean(settings, part.parameters(), home)
            for name in moments_of_round(outer, server_round)
        }

    @property
    def by_name(self) -> dict[str, HolderMean]:
        """Means by the name of the vectors that they take from a reply."""
        return {PSEUDO_GRADIENT: self.gradient, **self.moments}

    def fold(self, reply: Reply, age: int = 0) -> bool:
        """Add a reply with the weight that `outer.weighting` gives it.

        The weight of one that is `age` rounds late is `outer.staleness_decay` ** age of that.
        Returns whether it was scaled down to what `outer.clip_to_median` allows.
        """
        decayed = self.decay**age
        weight = decayed * (1.0 if self.weighting == "uniform" else reply.metrics["tokens"])
        expert_weights = None
        if self.weighting == "routed":
            expert_weights = [
                decayed * reply.counts.load[layer][list(held)]
                for layer, held in enumerate(reply.residents)
            ]
        is_clipped = False
        for name, mean in self.by_name.items():
            vectors, is_too_large = self.limits.fit(f"{name}/{self.fragment}", reply.vectors[name])
            is_clipped |= is_too_large
            if self.privacy.clip_norm:
                vectors = clip(*vectors, self.privacy.clip_norm)
            mean.fold(*vectors, reply.residents, weight, expert_weights)
        return is_clipped

    def step(self, outer: OuterStep, state: State) -> None:
        """Take the outer step with these means; `state` is updated in place."""
        for mean in self.by_name.values():
            if isinstance(mean, RobustMean):
                mean.settle()
        if self.privacy.noise_multiplier:
            std = self.privacy.noise_multiplier * self.privacy.clip_norm
            add_noise(self.gradient, std, self._noise())
        outer.apply(state, self.gradient)
        for name, mean in self.moments.items():
            outer.average_moment(name, mean, state)

    def _noise(self) -> NoiseSource:
        seed = self.privacy.noise_seed
        if seed < 0:
            return NoiseSource()
        return NoiseSource(hashlib.sha256(f"{seed}/{self.server_round}".encode()).digest())


def _mean(settings: Settings, spec: StateSpec, home: Home) -> HolderMean:
    outer = settings.outer
    if outer.robust == "none":
        return HolderMean(spec, outer.router_rows, home)
    trim = 0.5 if outer.robust == "median" else outer.trim
    return RobustMean(spec, outer.router_rows, trim, Path(settings.output_dir), home)
