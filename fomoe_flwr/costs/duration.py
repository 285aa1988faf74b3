"""Seconds of a round: down, compute and up at every site, and the slowest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_flwr.config import CostSettings


@dataclass(frozen=True)
class Site:
    """What a site computes and what its link carries.

    `flops_per_second` is what training reaches, not the peak; `state_bytes_per_second` how fast the
    optimizer passes over the training state, which it does once a step whatever the batch.
    """

    flops_per_second: float
    up_bits_per_second: float
    down_bits_per_second: float
    latency_seconds: float = 0.0
    state_bytes_per_second: float = math.inf

    def step_seconds(self, flops: float, state_bytes: float) -> float:
        """Return the time of one optimizer step."""
        return flops / self.flops_per_second + state_bytes / self.state_bytes_per_second


@dataclass(frozen=True)
class RoundSeconds:
    """Where the time of a round goes at the site that ends last."""

    down: float
    compute: float
    up: float
    hidden: float = 0.0
    """What of the communication runs beside computation."""
    site: int = 0
    """Which site ends last."""

    @property
    def total(self) -> float:
        """Seconds from the beginning of the round to its end."""
        return self.down + self.compute + self.up - self.hidden


def site_of(costs: CostSettings) -> Site:
    """Return the site that the settings describe; they describe all sites alike."""
    return Site(
        costs.site_teraflops * 1e12 * costs.mfu,
        costs.up_mbps * 1e6,
        costs.down_mbps * 1e6,
        costs.latency_seconds,
        costs.state_gb_per_second * 1e9 or math.inf,
    )


def transfer_seconds(num_bytes: float, bits_per_second: float, latency_seconds: float) -> float:
    """Return how long bytes take over a link; nothing takes no time."""
    return latency_seconds + 8 * num_bytes / bits_per_second if num_bytes else 0.0


def star_seconds(
    sites: Sequence[Site],
    down_bytes: Sequence[float],
    up_bytes: Sequence[float],
    compute_seconds: Sequence[float],
    server_bits_per_second: float = math.inf,
    hidden_share: float = 0.0,
) -> RoundSeconds:
    """Return the round of a synchronous star, of the site that ends last.

    All sites talk to the server at once. A site's transfer takes as long as its own link needs, or
    as long as the server needs for everybody's bytes, whichever is longer. `hidden_share` of the
    communication runs beside computation, but no more than there is computation.
    """
    all_down, all_up = (8 * sum(sent) / server_bits_per_second for sent in (down_bytes, up_bytes))
    rounds = []
    for index, site in enumerate(sites):
        down, up = down_bytes[index], up_bytes[index]
        latency = site.latency_seconds
        down_seconds = transfer_seconds(down, site.down_bits_per_second, latency)
        up_seconds = transfer_seconds(up, site.up_bits_per_second, latency)
        rounds.append(
            _round(
                max(down_seconds, latency + all_down if down else 0.0),
                compute_seconds[index],
                max(up_seconds, latency + all_up if up else 0.0),
                hidden_share,
                index,
            )
        )
    return max(rounds, key=lambda each: each.total)


def ring_seconds(
    sites: Sequence[Site],
    sent_bytes: float,
    num_stages: int,
    compute_seconds: Sequence[float],
    hidden_share: float = 0.0,
) -> RoundSeconds:
    """Return the round of a ring all-reduce, paced by its slowest link and its slowest site.

    `num_stages` messages follow one another: 2 (members - 1) for each all-reduce.
    """
    slowest = min(min(site.up_bits_per_second, site.down_bits_per_second) for site in sites)
    latency = num_stages * max(site.latency_seconds for site in sites)
    compute = max(compute_seconds)
    return _round(0.0, compute, transfer_seconds(sent_bytes, slowest, latency), hidden_share)


def _round(
    down: float, compute: float, up: float, hidden_share: float, site: int = 0
) -> RoundSeconds:
    return RoundSeconds(down, compute, up, min(hidden_share * (down + up), compute), site)
