"""A task that is out: what its reply is checked against, whenever it comes."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_flwr.layout import Layout


@dataclass(frozen=True)
class OutTask:
    """A task that was sent and not answered."""

    worker: int
    node: int
    server_round: int
    layout: Layout
    """The layout of its round."""
    steps: int
    """The most steps that its reply may report."""
