"""The round's record: who got what, who answered, what it cost and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fomoe_flwr.aggregation.round_means import Reply
from fomoe_flwr.federation.wire import Traffic
from fomoe_flwr.layout import Layout, Rehomed
from fomoe_flwr.model.router_probe import RoutingCounts


@dataclass
class RoundRecord:
    """What happened in one round."""

    server_round: int
    layout: Layout
    played: frozenset[int] = frozenset()
    """Workers that had a node."""
    sent: frozenset[int] = frozenset()
    """Workers that were to get a task."""
    absent: tuple[int, ...] = ()
    """Workers that are away and hold nothing."""
    moved_experts: int = 0
    """(layer, worker, expert) residencies that the round before did not have."""
    rehomed: Rehomed | None = None
    """What it took to make do without those away, or to give those back their share."""
    started: float = field(default_factory=time.monotonic)
    counts: dict[int, RoutingCounts] = field(default_factory=dict)
    """Routing counts of every worker whose reply was folded."""
    disagreement: Tensor | None = None
    """[num_layers, num_experts] distance of an expert's copies from their mean before averaging."""
    copies: Tensor | None = None
    """[num_layers, num_experts] number of replies that spoke for an expert."""
    choices: dict[int, Tensor] = field(default_factory=dict)
    """[num_layers, tokens, top_k] choices on the probe of every worker whose reply was folded."""
    replies: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of every worker whose reply was folded."""
    failures: dict[int, str] = field(default_factory=dict)
    """Reason for every worker whose reply was not."""
    up: Traffic = field(default_factory=Traffic)
    down: Traffic = field(default_factory=Traffic)
    missing_experts: int = 0
    """(layer, expert) pairs that nobody returned: value and outer state kept."""
    late_replies: int = 0
    """Replies to tasks of earlier rounds that came, and were dropped, during this one."""
    clipped: set[int] = field(default_factory=set)
    """Workers whose reply was scaled down to what the others' allow."""
    rejoined: set[int] = field(default_factory=set)
    """Workers whose reply counts in this round but did not in the one before."""
    configure_seconds: float = 0.0
    """To meet nodes and draw the layout."""
    send_seconds: float = 0.0
    """To write the tasks and hand them to the SuperLink."""
    train_seconds: float = 0.0
    """From the last message sent to the last reply folded."""
    receive_seconds: float = 0.0
    """Of these, to take replies from the SuperLink; in this process, to train too."""
    fold_seconds: float = 0.0
    """Of these, to decode, check and fold replies."""
    outer_seconds: float = 0.0
    epsilon: float | None = None
    """Privacy that the run has spent by the end of the round; None without noise."""

    def take(self, worker: int, reply: Reply) -> None:
        """Note what a folded reply reports; its vectors are not kept."""
        self.replies[worker] = reply.metrics
        self.counts[worker] = reply.counts
        if reply.choices is not None:
            self.choices[worker] = reply.choices

    @property
    def bytes_up(self) -> int:
        """Payload bytes of all replies."""
        return self.up.payload

    @property
    def bytes_down(self) -> int:
        """Payload bytes of all tasks."""
        return self.down.payload

    @property
    def load(self) -> Tensor:
        """[num_layers, num_experts] assignments of all workers, ghosts included."""
        return torch.stack([counts.load for counts in self.counts.values()]).sum(0)
