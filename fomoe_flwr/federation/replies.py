"""Replies: read and checked as a whole, then folded into running means over holders.

A reply counts whole or not at all, so reading comes first and folding cannot fail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.norm_limits import NormLimits
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.aggregation.privacy import NoiseSource, add_noise, clip
from fomoe_flwr.aggregation.robust_mean import RobustMean
from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.layout import Layout
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parameters.fragments import fragment_of_round, moments_of_round

REPORTED = ("loss", "tokens", "seconds", "ghost_fraction", "all_ghost_fraction", "grad_norm", "lr")
"""Metrics that a reply must carry; `balance_loss` and the fresh-state counts are welcome."""


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
    """Running means over holders of all that the replies of one round carry."""

    def __init__(
        self, settings: Settings, spec: StateSpec, server_round: int, limits: NormLimits
    ) -> None:
        outer, self.privacy = settings.outer, settings.privacy
        self.server_round, self.limits = server_round, limits
        self.fragment = fragment_of_round(outer, server_round)
        part = spec.fragment(self.fragment, outer.fragments)
        self.weighting = outer.weighting
        self.gradient = _mean(settings, part)
        self.moments = {
            name: _mean(settings, part.parameters())
            for name in moments_of_round(outer, server_round)
        }

    @property
    def by_name(self) -> dict[str, HolderMean]:
        """Means by the name that their vectors have on the wire."""
        return {wire.PSEUDO_GRADIENT: self.gradient, **self.moments}

    def fold(self, reply: Reply) -> bool:
        """Add a reply with the weight that `outer.weighting` gives it.

        Returns whether it was scaled down to what `outer.clip_to_median` allows.
        """
        weight = 1.0 if self.weighting == "uniform" else reply.metrics["tokens"]
        expert_weights = None
        if self.weighting == "routed":
            expert_weights = [
                reply.counts.load[layer][list(held)] for layer, held in enumerate(reply.residents)
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


def _mean(settings: Settings, spec: StateSpec) -> HolderMean:
    outer = settings.outer
    if outer.robust == "none":
        return HolderMean(spec, outer.router_rows)
    trim = 0.5 if outer.robust == "median" else outer.trim
    return RobustMean(spec, outer.router_rows, trim, Path(settings.output_dir))


class ReplyReader:
    """Reads the replies of a run; knows what the settings allow a worker to say."""

    def __init__(self, settings: Settings, spec: StateSpec, probe: Tensor | None) -> None:
        self.settings = settings
        self.spec = spec
        self.probe = probe

    def read(
        self, message: Message, worker: int, server_round: int, layout: Layout, means: RoundMeans
    ) -> Reply:
        """Read a worker's reply and check it against its round. Raises WireError."""
        if message.has_error():
            raise WireError(f"{message.error.reason} (Flower error {message.error.code})")
        content = message.content
        answered = wire.json_in(content, wire.TASK)
        expected = {
            "server_round": server_round,
            "worker": worker,
            "layout_digest": layout.digest(),
        }
        for key, value in expected.items():
            if answered.get(key) != value:
                raise WireError(f"answers {key}={answered.get(key)}, this round is {key}={value}")
        metrics = wire.metrics_in(content, REPORTED)
        most = self._round_tokens()
        if not 0 < metrics["tokens"] <= most:
            raise WireError(
                f"metric tokens={metrics['tokens']:g} must be > 0 and <= {most}, "
                "what the settings give a worker in a round"
            )
        counts = wire.counts_in(answered, self.spec.num_layers, self.spec.num_experts)
        most *= self.settings.model.top_k
        if bool((counts.load.sum(1) > most).any()):
            raise WireError(
                f"routing counts of a layer add up to more than {most}, what the settings give a "
                "worker in a round"
            )
        choices = None
        if self.probe is not None:
            choices = wire.choices_in(
                answered,
                self.spec.num_layers,
                self.probe.numel(),
                self.settings.model.top_k,
                self.spec.num_experts,
            )
        residents = layout.of_worker(worker)
        vectors = {
            name: wire.vectors_in(
                content,
                name,
                self.settings.wire.codecs_up,
                (mean.spec.shared_size, mean.spec.experts_size(residents)),
            )
            for name, mean in means.by_name.items()
        }
        return Reply(residents, metrics, counts, choices, vectors)

    def _round_tokens(self) -> int:
        local = self.settings.local
        batch = local.batch_size * local.accumulate * self.settings.data.sequence_length
        return local.steps * batch
