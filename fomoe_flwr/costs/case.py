"""A run and its assumptions, with everything that the lines of its cost sheet have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from fomoe_flwr.config import Settings
from fomoe_flwr.costs.counts import ParameterCounts, parameter_counts, resident_counts
from fomoe_flwr.costs.duration import RoundSeconds, ring_seconds, site_of, star_seconds
from fomoe_flwr.costs.flops import TokenFlops, executed_experts, token_flops
from fomoe_flwr.costs.memory import layout_context, state_bytes
from fomoe_flwr.costs.topology import ring_factor
from fomoe_flwr.costs.traffic import (
    RoundBytes,
    as_diloco,
    diloco_bytes,
    full_replica_bytes,
    kind_bytes,
    num_buffers,
    predict_bytes,
    ring_bytes,
)
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.parameters.shapes import num_sparse_layers


@dataclass(frozen=True)
class Case:
    """One run under the costs' assumptions: each part is worked out once, when it is asked for."""

    settings: Settings
    _flops: dict[float, TokenFlops] = field(default_factory=dict, repr=False)

    @cached_property
    def layout(self) -> Layout:
        """The layout of the first round after warm-up."""
        settings = self.settings
        shape = num_sparse_layers(settings.model), settings.model.num_experts
        return draw_layout(settings.layout, *shape, settings.seed, 1, layout_context(settings))

    @cached_property
    def counts(self) -> ParameterCounts:
        """Parameters by kind."""
        return parameter_counts(self.settings.model)

    @cached_property
    def resident(self) -> list[int]:
        """Parameters that each worker holds."""
        return resident_counts(self.settings.model, self.layout)

    @cached_property
    def is_ring(self) -> bool:
        """Whether sites average among themselves, without a server."""
        return self.settings.costs.topology == "ring"

    @cached_property
    def full_layout(self) -> Layout:
        """The layout of full replicas."""
        shape = self.layout.num_layers, self.layout.num_experts, self.layout.num_workers
        return Layout.full(*shape)

    @cached_property
    def sent(self) -> RoundBytes:
        """Bytes of a round."""
        if self.is_ring:
            return self._around(ring_bytes(self.settings, self.layout))
        return predict_bytes(self.settings, self.layout)

    @cached_property
    def full_replica(self) -> RoundBytes:
        """Bytes of a round of full replicas, all else alike."""
        if self.is_ring:
            return self._around(ring_bytes(self.settings, self.full_layout))
        return full_replica_bytes(self.settings)

    @cached_property
    def diloco(self) -> RoundBytes:
        """Bytes of a round of DiLoCo or Photon, or of one step of data-parallel training."""
        if not self.is_ring:
            is_alike = as_diloco(self.settings) == self.settings
            return self.full_replica if is_alike else diloco_bytes(self.settings)
        element = self.settings.wire.codecs_up.shared.bytes_per_element
        buffers = num_buffers(self.settings.model) * element
        once = sum(kind_bytes(self.settings)) + buffers
        return self._around(ring_factor(self.layout.num_workers) * once)

    def _around(self, num_bytes: float) -> RoundBytes:
        per_worker = [round(num_bytes)] * self.layout.num_workers
        return RoundBytes(per_worker, per_worker)

    @cached_property
    def executed(self) -> list[float]:
        """Experts that run for a token in a layer, by worker: measured, or at uniform routing."""
        model, measured = self.settings.model, self.settings.costs.resident_share
        if measured and model.routing == "skip_token":
            return [model.top_k * measured] * self.layout.num_workers
        return executed_experts(model, self.layout)

    @cached_property
    def mean_executed(self) -> float:
        """Mean of `executed` over workers."""
        return sum(self.executed) / len(self.executed)

    def flops(self, executed: float) -> TokenFlops:
        """Return the FLOPs of a token for which so many experts run."""
        if executed not in self._flops:
            length = self.settings.data.sequence_length
            self._flops[executed] = token_flops(self.settings.model, length, executed)
        return self._flops[executed]

    @cached_property
    def whole_flops(self) -> TokenFlops:
        """FLOPs of a token in the whole model."""
        return self.flops(self.settings.model.top_k)

    @cached_property
    def round_tokens(self) -> int:
        """Tokens of a round on all workers."""
        return self.layout.num_workers * self.settings.tokens_per_worker_round

    @cached_property
    def budget(self) -> float:
        """Tokens to train on: `costs.tokens`, or the run's own."""
        return self.settings.costs.tokens or self.settings.rounds * self.round_tokens

    def ring_stages(self, is_full: bool) -> int:
        """Count the messages that follow one another: around all, then around the holders."""
        holders = self.layout.overlaps[1]
        # Experts that everybody holds go around with the rest.
        is_one_ring = is_full or holders == self.layout.num_workers
        around_holders = 0 if is_one_ring else 2 * (holders - 1)
        return 2 * (self.layout.num_workers - 1) + around_holders

    def step_seconds(self, worker: int, is_full: bool = False) -> float:
        """Return the time of an optimizer step on a worker, or on a full replica."""
        executed = self.settings.model.top_k if is_full else self.executed[worker]
        held = self.counts.total if is_full else self.resident[worker]
        return site_of(self.settings.costs).step_seconds(
            self.settings.tokens_per_worker_step * self.flops(executed).train,
            held * state_bytes(self.settings),
        )

    def seconds(self, sent: RoundBytes, steps: int, is_full: bool) -> RoundSeconds:
        """Return the time of one synchronisation after so many steps."""
        costs, workers = self.settings.costs, range(self.layout.num_workers)
        sites = [site_of(costs)] * len(workers)
        alike = self.step_seconds(0, is_full=True) if is_full else 0.0
        compute = [steps * (alike or self.step_seconds(worker)) for worker in workers]
        if self.is_ring:
            stages = self.ring_stages(is_full)
            return ring_seconds(sites, max(sent.up_per_worker), stages, compute, costs.hidden_share)
        return star_seconds(
            sites,
            sent.down_per_worker,
            sent.up_per_worker,
            compute,
            costs.server_mbps * 1e6 or math.inf,
            costs.hidden_share,
        )
