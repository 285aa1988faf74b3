"""Settings of the cost model."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_flwr.config.fields import choice, number


@dataclass
class CostSettings:
    """What the cost model assumes of the sites, all alike; no run depends on it."""

    topology: str = choice("star", "star", "ring")
    """star: through a server, as Flower does; ring: all-reduce among the sites, as in the paper."""
    tokens: float = number(0.0, at_least=0)
    """Token budget of the projected run; 0 means what `rounds` and `local` come to."""
    site_teraflops: float = number(100.0, above=0)
    """Peak of all accelerators of a site together, in 10^12 FLOP/s."""
    mfu: float = number(0.4, above=0, at_most=1)
    """Share of that peak that training reaches."""
    state_gb_per_second: float = number(0.0, at_least=0)
    """How fast the optimizer passes over the training state, 10^9 B/s; 0 means in no time."""
    up_mbps: float = number(1000.0, above=0)
    """A site's link to the others, in 10^6 bit/s."""
    down_mbps: float = number(1000.0, above=0)
    server_mbps: float = number(0.0, at_least=0)
    """The server's link, each way; 0 means as fast as those of all sites together."""
    latency_seconds: float = number(0.05, at_least=0)
    """From a site to the server, or to the next site of the ring."""
    hidden_share: float = number(0.0, at_least=0, at_most=1)
    """Share of communication that runs beside computation (the paper's alpha)."""
    resident_share: float = number(0.0, at_least=0, at_most=1)
    """Measured share of assignments that go to residents; 0 means at uniform routing."""
    bytes_per_parameter: float = number(0.0, at_least=0)
    """Training state; 0 means that of `local.optimizer` (the paper counts 18)."""
