"""The strategy: who gets what, what comes back, and what the server makes of it.

A round sends every worker its own slice (shared parameters plus its residents), pulls the replies
one by one in worker order, folds each into running means over holders and drops it, and takes the
outer step. It evaluates, saves and prints nothing: the server hangs that on `on_round`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fomoe_flwr import __version__
from fomoe_flwr.aggregation import HolderMean
from fomoe_flwr.config import Settings, one_line
from fomoe_flwr.errors import RunError
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.wire import TaskHeader, WireError
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.outer import OuterStep

_POLL_SECONDS = 0.1
REPORTED = ("loss", "tokens", "seconds", "ghost_fraction", "all_ghost_fraction", "grad_norm", "lr")
"""Metrics that a reply must carry; `balance_loss` and the fresh-state counts are welcome."""


class FederationError(RunError):
    """A federation that cannot begin or go on; the text says who is missing and why."""


@dataclass(frozen=True)
class RunIdentity:
    """What ties messages and node-local files to this run."""

    key: str
    tokenizer_json: str
    tokenizer_digest: str


@dataclass
class RoundRecord:
    """What happened in one round."""

    server_round: int
    layout: Layout
    started: float = field(default_factory=time.monotonic)
    replies: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of every worker whose reply was folded."""
    failures: dict[int, str] = field(default_factory=dict)
    """Reason for every worker whose reply was not."""
    bytes_up: int = 0
    bytes_down: int = 0
    missing_experts: int = 0
    """(layer, expert) pairs that nobody returned: value and outer state kept."""
    send_seconds: float = 0.0
    train_seconds: float = 0.0
    """From the last message sent to the last reply folded."""
    outer_seconds: float = 0.0


class FoMoEStrategy(Strategy):
    """Federated training of one MoE model of which each worker holds a part.

    Parameters
    ----------
    settings, spec
        The run's settings and the state's layout.
    state
        Global weights by state key, fp32; updated in place.
    identity
        Run key and tokenizer, handed to nodes when they are met.
    on_round
        Called after every round with its record.
    first_round
        The round to begin with (resume: the checkpoint's plus one).
    keep_rounds
        Rounds whose inner state workers must keep, asked before every round.
    """

    def __init__(
        self,
        settings: Settings,
        spec: StateSpec,
        state: Mapping[str, Tensor],
        outer: OuterStep,
        identity: RunIdentity,
        on_round: Callable[[RoundRecord], MetricRecord | None],
        first_round: int = 1,
        keep_rounds: Callable[[], list[int]] = list,
    ) -> None:
        self.settings = settings
        self.spec = spec
        self.state = state
        self.outer = outer
        self.identity = identity
        self.on_round = on_round
        self.first_round = first_round
        self.keep_rounds = keep_rounds
        self.worker_of_node: dict[int, int] = {}
        self._refused: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._round = RoundRecord(0, self.layout(max(1, first_round)))
        self._sent: dict[str, int] = {}

    def layout(self, server_round: int) -> Layout:
        """Return the layout of a round: a function of settings, seed and round alone."""
        model = self.settings.model
        return draw_layout(
            self.settings.layout,
            model.num_layers,
            model.num_experts,
            self.settings.seed,
            server_round,
        )

    def summary(self) -> None:
        """Log what this strategy is about to do."""
        layout, outer = self.settings.layout, self.settings.outer
        log(
            INFO,
            "\t├──> workers: %s, overlap: %s (%s)",
            layout.num_workers,
            layout.overlap,
            layout.kind,
        )
        log(INFO, "\t├──> routing: %s", self.settings.model.routing)
        log(
            INFO, "\t└──> outer step: %s (lr=%s, momentum=%s)", outer.name, outer.lr, outer.momentum
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds; the weights are those given at construction, updated in place.

        Flower's own loop keeps every reply in memory and knows one ArrayRecord for all; this one
        pulls replies singly. `initial_arrays` and the config records are not used.
        """
        del initial_arrays, train_config, evaluate_config, evaluate_fn
        result = Result()
        log(INFO, "Starting %s:", type(self).__name__)
        self.summary()
        last = self.settings.rounds if num_rounds is None else num_rounds
        self._gather(grid)
        if missing := self._missing_workers():
            raise FederationError(self._explain_missing(missing))
        for server_round in range(self.first_round, last + 1):
            metrics = self._run_round(server_round, grid, timeout)
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        return result

    def _run_round(
        self, server_round: int, grid: Grid, timeout: float | None
    ) -> MetricRecord | None:
        patience = timeout or self.settings.federation.round_timeout_seconds
        started = time.monotonic()
        messages = list(self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid))
        self._round.bytes_down = sum(wire.payload_bytes(m.content) for m in messages)
        sent = _push(grid, messages)
        del messages
        self._sent = {i: self.worker_of_node[node] for i, node in sent.items()}
        self._round.send_seconds = time.monotonic() - started
        self.aggregate_train(server_round, self._replies(grid, started + patience))
        return self.on_round(self._round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make one message per worker that has a node: shared parameters plus its residents."""
        del arrays, config
        self._meet(grid)
        layout = self.layout(server_round)
        self._round = RoundRecord(server_round, layout)
        nodes = {worker: node for node, worker in self.worker_of_node.items()}
        shared = wire.encode(self.spec.pack_shared(self.state), self.settings.wire.down)
        messages = []
        for worker in range(self.settings.layout.num_workers):
            if worker not in nodes:
                self._round.failures[worker] = "no node plays this worker"
                continue
            residents = layout.of_worker(worker)
            experts = self.spec.pack_experts(self.state, residents)
            header = TaskHeader(
                settings=self.settings.to_dict(),
                spec_digest=self.spec.digest(),
                tokenizer_digest=self.identity.tokenizer_digest,
                run_key=self.identity.key,
                worker=worker,
                server_round=server_round,
                layout_digest=layout.digest(),
                residents=residents,
                keep_rounds=self.keep_rounds(),
            )
            content = RecordDict(
                {
                    wire.WEIGHTS: wire.arrays_of(
                        shared, wire.encode(experts, self.settings.wire.down)
                    ),
                    wire.TASK: header.record(),
                }
            )
            messages.append(
                Message(
                    content,
                    nodes[worker],
                    MessageType.TRAIN,
                    ttl=self.settings.federation.round_timeout_seconds,
                )
            )
        # A list, not a generator: Flower's HTTP grid walks it twice.
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies over holders as they come and take the outer step.

        Raises FederationError when fewer than `federation.min_workers` replies can be used.
        """
        started = time.monotonic()
        mean = HolderMean(self.spec)
        record = self._round
        for reply in replies:
            worker = self._sent.get(reply.metadata.reply_to_message_id, -1)
            if worker in record.replies or worker < 0:
                continue
            try:
                record.replies[worker] = self._fold(reply, worker, mean)
            except WireError as error:
                record.failures[worker] = one_line(error)
        for worker in range(self.settings.layout.num_workers):
            if worker not in record.replies:
                record.failures.setdefault(worker, "no reply before the round's deadline")
        for worker, reason in sorted(record.failures.items()):
            log(WARNING, "round %s: worker %s left out: %s", server_round, worker, reason)
        record.train_seconds = time.monotonic() - started
        needed = self.settings.federation.min_workers
        if len(record.replies) < needed:
            reasons = "; ".join(f"worker {w}: {why}" for w, why in sorted(record.failures.items()))
            raise FederationError(
                f"round {server_round}: {len(record.replies)} of "
                f"{self.settings.layout.num_workers} workers replied, "
                f"federation.min_workers={needed} are needed ({reasons})"
            )
        started = time.monotonic()
        record.missing_experts = len(mean.missing_experts())
        self.outer.apply(self.state, mean)
        record.outer_seconds = time.monotonic() - started
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send nothing: the assembled global model is evaluated where it is, on the server."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: workers do not evaluate."""
        return None

    def _fold(self, reply: Message, worker: int, mean: HolderMean) -> dict[str, float]:
        if reply.has_error():
            raise WireError(f"{reply.error.reason} (Flower error {reply.error.code})")
        content = reply.content
        self._round.bytes_up += wire.payload_bytes(content)
        answered = wire.json_in(content, wire.TASK)
        expected = {
            "server_round": self._round.server_round,
            "worker": worker,
            "layout_digest": self._round.layout.digest(),
        }
        for key, value in expected.items():
            if answered.get(key) != value:
                raise WireError(f"answers {key}={answered.get(key)}, this round is {key}={value}")
        metrics = wire.metrics_in(content, REPORTED)
        residents = self._round.layout.of_worker(worker)
        shared, experts = wire.vectors_in(
            content,
            wire.PSEUDO_GRADIENT,
            self.settings.wire.up,
            (self.spec.shared_size, self.spec.experts_size(residents)),
        )
        if not metrics["tokens"] > 0:
            raise WireError(f"metric tokens={metrics['tokens']} must be > 0")
        weight = metrics["tokens"] if self.settings.outer.weighting == "tokens" else 1.0
        mean.fold(shared, experts, residents, weight)
        return metrics

    def _replies(self, grid: Grid, deadline: float) -> Iterator[Message]:
        """Yield replies in worker order, one in memory at a time, until the deadline."""
        for message_id, _ in sorted(self._sent.items(), key=lambda item: item[1]):
            reply = _wait(grid, message_id, deadline)
            if reply is not None:
                yield reply

    def _gather(self, grid: Grid) -> None:
        """Meet nodes until every worker has one, or those that are there have all answered."""
        limits = self.settings.federation
        started = time.monotonic()
        while True:
            self._meet(grid)
            waited = time.monotonic() - started
            # A node that was asked may be tokenising its text: that takes what it takes.
            limit = limits.round_timeout_seconds if self._asked else limits.node_wait_seconds
            if not self._missing_workers() or waited >= limit:
                return
            time.sleep(_POLL_SECONDS)

    def _meet(self, grid: Grid) -> None:
        """Ask new nodes which worker they play, and seat those that have answered."""
        alive = set(grid.get_node_ids())
        if {*self.worker_of_node, *self._refused} - alive:
            # A seat is free for a node that found it taken, or a node may come back mended.
            self._refused.clear()
        self.worker_of_node = {n: w for n, w in self.worker_of_node.items() if n in alive}
        self._asked = {i: n for i, n in self._asked.items() if n in alive}
        known = {*self.worker_of_node, *self._refused, *self._asked.values()}
        strangers = sorted(alive - known)
        if strangers and self._missing_workers():
            self._asked |= self._query(grid, strangers)
        for message_id, node in list(self._asked.items()):
            for reply in grid.pull_messages([message_id]):
                del self._asked[message_id]
                try:
                    self._seat(node, reply)
                except WireError as error:
                    self._refused[node] = one_line(error)
                    log(WARNING, "node %s cannot take part: %s", node, self._refused[node])

    def _query(self, grid: Grid, nodes: list[int]) -> dict[str, int]:
        setup = {
            "version": __version__,
            "settings": self.settings.to_dict(),
            "tokenizer": self.identity.tokenizer_json,
            "spec_digest": self.spec.digest(),
        }
        content = RecordDict({wire.SETUP: wire.json_record(setup)})
        ttl = self.settings.federation.round_timeout_seconds
        return _push(grid, [Message(content, n, MessageType.QUERY, ttl=ttl) for n in nodes])

    def _seat(self, node: int, reply: Message) -> None:
        if reply.has_error():
            raise WireError(f"{reply.error.reason} (Flower error {reply.error.code})")
        wanted = wire.json_in(reply.content, wire.SETUP).get("worker")
        missing = self._missing_workers()
        if not isinstance(wanted, int) or wanted < 0:
            if not missing:
                raise WireError("all workers have nodes already")
            wanted = missing[0]
        if wanted not in missing:
            raise WireError(
                f"asks for worker {wanted}, which is taken or outside "
                f"layout.num_workers={self.settings.layout.num_workers}"
            )
        self.worker_of_node[node] = wanted

    def _missing_workers(self) -> list[int]:
        taken = set(self.worker_of_node.values())
        return [w for w in range(self.settings.layout.num_workers) if w not in taken]

    def _explain_missing(self, missing: list[int]) -> str:
        workers = self.settings.layout.num_workers
        if self._refused:
            reasons = "; ".join(sorted(set(self._refused.values())))
            return f"{len(missing)} of {workers} workers cannot start: {reasons}"
        return (
            f"layout.num_workers={workers} but the federation has {workers - len(missing)} usable "
            f"nodes: start more nodes, or give `flwr run` --federation-config "
            f'"num-supernodes={workers}"; waited federation.node_wait_seconds='
            f"{self.settings.federation.node_wait_seconds:g}"
        )


def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Push messages and return {message id: node}, without those that the grid did not take."""
    taken = set(grid.push_messages(messages))
    nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    return {message_id: node for message_id, node in nodes.items() if message_id in taken}


def _wait(grid: Grid, message_id: str, deadline: float) -> Message | None:
    while True:
        for reply in grid.pull_messages([message_id]):
            return reply
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)
