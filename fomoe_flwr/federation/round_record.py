"""The round's record: who got what, who answered, what it cost and how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.aggregation.round_means import Reply
from fomoe_flwr.federation.out_task import OutTask
from fomoe_flwr.federation.wire import Traffic
from fomoe_flwr.layout import Layout, Rehomed
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.run.evaluation import EvalReport


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
    steps: Mapping[int, int] = field(default_factory=dict)
    """The most steps that a worker's reply may report."""
    rehomed: Rehomed | None = None
    """How experts moved because workers left or came back."""
    started: float = field(default_factory=time.monotonic)
    """When the server began to draw the layout."""
    counts: dict[int, RoutingCounts] = field(default_factory=dict)
    """Routing counts of every worker whose reply was folded."""
    disagreement: Tensor | None = None
    """[num_layers, num_experts] distance of an expert's copies from their mean before averaging."""
    copies: Tensor | None = None
    """[num_layers, num_experts] number of replies that carried the expert."""
    choices: dict[int, Tensor] = field(default_factory=dict)
    """[num_layers, tokens, top_k] choices on the probe of every worker whose reply was folded."""
    replies: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of every worker whose reply was folded."""
    failures: dict[int, str] = field(default_factory=dict)
    """Reason for every worker whose reply was not folded."""
    up: Traffic = field(default_factory=Traffic)
    down: Traffic = field(default_factory=Traffic)
    missing_experts: int = 0
    """(layer, expert) pairs that nobody returned: value and outer state kept."""
    late_replies: int = 0
    """Replies to tasks of earlier rounds that came since the round before."""
    used_late: list[tuple[int, int, float]] = field(default_factory=list)
    """Worker, age in rounds and tokens of every late reply that was folded."""
    clipped: set[int] = field(default_factory=set)
    """Workers whose reply was scaled down to what the others' allow."""
    rejoined: set[int] = field(default_factory=set)
    """Workers whose reply counts in this round but did not in the one before."""
    configure_seconds: float = 0.0
    """To draw the layout."""
    send_seconds: float = 0.0
    """To write the tasks and hand them to the SuperLink."""
    train_seconds: float = 0.0
    """From the last message sent to the last reply folded."""
    receive_seconds: float = 0.0
    """Part of `train_seconds`: to take replies from the SuperLink. In one process also to train."""
    fold_seconds: float = 0.0
    """Part of `train_seconds`: to decode, check and fold replies."""
    outer_seconds: float = 0.0
    epsilon: float | None = None
    """Privacy that the run has spent by the end of the round; None without noise."""

    def task_of(self, worker: int, node: int) -> OutTask:
        """Return a worker's task of this round."""
        return OutTask(worker, node, self.server_round, self.layout, self.steps[worker])

    def take(self, worker: int, reply: Reply) -> None:
        """Note what a folded reply reports; its vectors are not kept."""
        self.replies[worker] = reply.metrics
        self.counts[worker] = reply.counts
        if reply.choices is not None:
            self.choices[worker] = reply.choices

    def take_late(self, worker: int, age: int, reply: Reply) -> None:
        """Note a late reply that was folded: its tokens count, its measurements are old."""
        self.used_late.append((worker, age, reply.metrics["tokens"]))

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

    @property
    def wait_seconds(self) -> float:
        """Part of `train_seconds`: nothing came."""
        return max(0.0, self.train_seconds - self.receive_seconds - self.fold_seconds)

    def phases(self) -> Iterator[tuple[str, float]]:
        """Yield the round's phases so far, and when each was over (monotonic seconds)."""
        at = self.started
        yield "gather", at
        for phase in ("configure", "send", "wait", "receive", "fold", "outer"):
            at += float(getattr(self, f"{phase}_seconds"))
            yield phase, at

    @property
    def awaited(self) -> dict[int, float]:
        """Workers that have a task and have not answered, and since when (monotonic seconds)."""
        since = self.started + self.configure_seconds + self.send_seconds
        done = {*self.replies, *self.failures}
        return dict.fromkeys(sorted(self.sent - done), since)

    def metrics_row(self) -> dict[str, Any]:
        """Return the round's row of `metrics.jsonl`: sums over workers, and means by tokens."""
        replies = list(self.replies.values())
        tokens = sum(reply["tokens"] for reply in replies)

        def mean(key: str) -> float:
            return sum(reply.get(key, math.nan) * reply["tokens"] for reply in replies) / tokens

        return {
            "round": self.server_round,
            "train/loss": mean("loss"),
            "train/last_loss": mean("last_loss"),
            "train/balance_loss": mean("balance_loss"),
            "train/grad_norm": mean("grad_norm"),
            "train/lr": mean("lr"),
            "train/tokens": int(tokens + sum(late for _, _, late in self.used_late)),
            "train/tokens_per_second": tokens / max(self.train_seconds, 1e-9),
            "moe/ghost_fraction": mean("ghost_fraction"),
            "moe/all_ghost_fraction": mean("all_ghost_fraction"),
            "moe/fresh_experts": int(sum(reply.get("fresh_experts", 0) for reply in replies)),
            "moe/missing_experts": self.missing_experts,
            **({} if self.epsilon is None else {"privacy/epsilon": self.epsilon}),
            "comm/bytes_up": self.bytes_up,
            "comm/bytes_down": self.bytes_down,
            **{f"comm/bytes_up/{kind}": count for kind, count in self.up.by_kind.items()},
            **{f"comm/bytes_down/{kind}": count for kind, count in self.down.by_kind.items()},
            "round/workers_ok": len(self.replies),
            "round/workers_failed": len(self.failures),
            "round/failures": {str(w): reason for w, reason in sorted(self.failures.items())},
            "round/fresh_inner_states": int(sum(reply.get("fresh_state", 0) for reply in replies)),
            "round/participants": sorted(self.replies),
            "round/late_replies": self.late_replies,
            "round/late_used": [[worker, age] for worker, age, _ in self.used_late],
            "round/clipped": sorted(self.clipped),
            "round/rejoined": sorted(self.rejoined),
            "round/rejoined_fresh": sum(
                bool(self.replies[worker].get("fresh_state", 0)) for worker in self.rejoined
            ),
            "round/train_seconds": self.train_seconds,
            "round/worker_seconds": {
                str(worker): reply["seconds"] for worker, reply in sorted(self.replies.items())
            },
            "round/worker_tokens": {
                str(worker): int(reply["tokens"]) for worker, reply in sorted(self.replies.items())
            },
            "round/slowest_worker_seconds": max(reply["seconds"] for reply in replies),
            # Sums over workers: of their local steps, and of the rest of their task.
            "round/local_seconds": sum(reply["seconds"] for reply in replies),
            "round/overhead_seconds": sum(reply.get("overhead_seconds", 0.0) for reply in replies),
            "layout/digest": self.layout.digest(),
            "layout/absent_workers": list(self.absent),
            "layout/moved_experts": self.moved_experts,
            "layout/rehomed_experts": self.rehomed.moved if self.rehomed else 0,
            "layout/rehomed_lower_bound": self.rehomed.lower_bound if self.rehomed else 0,
        }


def evaluation_row(result: EvalReport) -> dict[str, Any]:
    """Return what an evaluation adds to the round's row."""
    return {
        "eval/loss": result.loss,
        "eval/perplexity": result.perplexity,
        "eval/bits_per_byte": result.bits_per_byte,
        "eval/tokens": result.tokens,
        **{f"eval/bits_per_byte/{k}": v for k, v in result.domain_bits_per_byte.items()},
    }
