"""The strategy: who gets what, what comes back, and what the server makes of it.

A round sends every worker its own slice (shared parameters plus its residents), pulls the replies
one by one in worker order, folds each into running means over holders and drops it, and takes the
outer step. It evaluates, saves and prints nothing: the server hangs that on `on_round`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fomoe_flwr.aggregation import HolderMean
from fomoe_flwr.config import Settings
from fomoe_flwr.costs import layout_context
from fomoe_flwr.errors import RunError, one_line
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.seats import RunIdentity, Seats, push, wait
from fomoe_flwr.federation.wire import TaskHeader, WireError
from fomoe_flwr.layout import Layout, LayoutContext, draw_layout
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.outer import OuterStep
from fomoe_flwr.synchronisation import fragment_of_round, moments_of_round

REPORTED = ("loss", "tokens", "seconds", "ghost_fraction", "all_ghost_fraction", "grad_norm", "lr")
"""Metrics that a reply must carry; `balance_loss` and the fresh-state counts are welcome."""


class FederationError(RunError):
    """A federation that cannot begin or go on; the text says who is missing and why."""


@dataclass
class RoundRecord:
    """What happened in one round."""

    server_round: int
    layout: Layout
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
    bytes_up: int = 0
    bytes_down: int = 0
    missing_experts: int = 0
    """(layer, expert) pairs that nobody returned: value and outer state kept."""
    send_seconds: float = 0.0
    train_seconds: float = 0.0
    """From the last message sent to the last reply folded."""
    outer_seconds: float = 0.0

    @property
    def load(self) -> Tensor:
        """[num_layers, num_experts] assignments of all workers, ghosts included."""
        return torch.stack([counts.load for counts in self.counts.values()]).sum(0)


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
    probe
        [windows, tokens] ids for which every worker shall return its choices; None for none.
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
        probe: Tensor | None = None,
    ) -> None:
        self.settings = settings
        self.spec = spec
        self.state = state
        self.outer = outer
        self.seats = Seats(settings, spec, identity)
        self.on_round = on_round
        self.first_round = first_round
        self.keep_rounds = keep_rounds
        self.probe = probe
        self._current: set[int] = set()
        self._load: Tensor | None = None
        self._context = layout_context(settings)
        self._round = RoundRecord(0, self.layout(max(1, first_round)))
        self._sent: dict[str, int] = {}

    def layout(self, server_round: int) -> Layout:
        """Return the layout of the round to come.

        A function of settings, seed, round and, where the kind of layout asks for it, of what was
        measured before.
        """
        settings, model = self.settings, self.settings.model
        if server_round <= settings.layout.warm_rounds:
            return Layout.full(model.num_layers, model.num_experts, settings.layout.num_workers)
        context = self._context
        if server_round == settings.layout.warm_rounds + 1:
            # Where experts lay in full replicas is nothing to stay close to.
            context = replace(context, previous=None)
        return draw_layout(
            settings.layout,
            model.num_layers,
            model.num_experts,
            settings.seed,
            server_round,
            context,
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
        self.seats.gather(grid)
        if missing := self.seats.missing_workers():
            raise FederationError(self.seats.explain_missing(missing))
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
        sent = push(grid, messages)
        del messages
        self._sent = {i: self.seats.worker_of_node[node] for i, node in sent.items()}
        self._round.send_seconds = time.monotonic() - started
        self.aggregate_train(server_round, self._replies(grid, started + patience))
        return self.on_round(self._round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make one message per worker that has a node: shared parameters plus its residents."""
        del arrays, config
        self.seats.meet(grid)
        layout = self.layout(server_round)
        self._round = RoundRecord(server_round, layout)
        nodes = self.seats.node_of_worker()
        # One encoded vector for all workers that get the same part: it is uploaded once.
        shared: dict[tuple[int, str], Array] = {}
        messages = []
        for worker in range(self.settings.layout.num_workers):
            if worker not in nodes:
                self._round.failures[worker] = "no node plays this worker"
                continue
            residents = layout.of_worker(worker)
            fragment = self._fragment_for(worker, server_round)
            carried = self._moments_for(fragment, server_round)
            header = TaskHeader(
                settings=self.settings.to_dict(),
                spec_digest=self.spec.digest(),
                tokenizer_digest=self.seats.identity.tokenizer_digest,
                run_key=self.seats.identity.key,
                worker=worker,
                server_round=server_round,
                layout_digest=layout.digest(),
                residents=residents,
                keep_rounds=self.keep_rounds(),
                fragment=fragment,
                moments=list(carried),
                pooled_share=self._pooled_share(),
                probe=[] if self.probe is None else self.probe.tolist(),
            )
            content = RecordDict({wire.TASK: header.record()})
            part = self.spec if fragment < 0 else self._part(fragment)
            for name, values in {wire.WEIGHTS: self.state, **carried}.items():
                spec = part if name == wire.WEIGHTS else part.parameters()
                if (fragment, name) not in shared:
                    shared[fragment, name] = wire.encode(
                        spec.pack_shared(values), self.settings.wire.down
                    )
                experts = wire.encode(spec.pack_experts(values, residents), self.settings.wire.down)
                content[name] = wire.arrays_of(shared[fragment, name], experts)
            ttl = self.settings.federation.round_timeout_seconds
            messages.append(Message(content, nodes[worker], MessageType.TRAIN, ttl=ttl))
        # A list, not a generator: Flower's HTTP grid walks it twice.
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies over holders as they come and take the outer step.

        Raises FederationError when fewer than `federation.min_workers` replies can be used.
        """
        started = time.monotonic()
        outer, record = self.settings.outer, self._round
        part = self._part(fragment_of_round(outer, server_round))
        means = {wire.PSEUDO_GRADIENT: HolderMean(part, outer.router_rows)}
        for name in moments_of_round(outer, server_round):
            means[name] = HolderMean(part.parameters(), outer.router_rows)
        for reply in replies:
            worker = self._sent.get(reply.metadata.reply_to_message_id, -1)
            if worker in record.replies or worker < 0:
                continue
            try:
                record.replies[worker] = self._fold(reply, worker, means)
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
        gradient = means.pop(wire.PSEUDO_GRADIENT)
        record.missing_experts = len(gradient.missing_experts())
        record.disagreement = gradient.disagreement()
        record.copies = gradient.expert_count
        self.outer.apply(self.state, gradient)
        for name, mean in means.items():
            self.outer.average_moment(name, mean, self.state)
        self._current = set(record.replies)
        self._load = record.load
        self._context = self._context.after(
            self.settings.layout, server_round, record.layout, record.load.tolist()
        )
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

    def memory(self) -> dict[str, Any]:
        """Return what the strategy remembers between rounds, JSON-able, for a checkpoint."""
        load = None if self._load is None else self._load.tolist()
        return {
            "current_workers": sorted(self._current),
            "load": load,
            "layout_context": self._context.to_json(),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Take the memory of a checkpoint."""
        self._current = set(memory["current_workers"])
        self._load = None if memory["load"] is None else torch.tensor(memory["load"])
        self._context = LayoutContext.from_json(memory["layout_context"])

    def _round_tokens(self) -> int:
        local = self.settings.local
        batch = local.batch_size * local.accumulate * self.settings.data.sequence_length
        return local.steps * batch

    def _part(self, fragment: int) -> StateSpec:
        return self.spec.fragment(fragment, self.settings.outer.fragments)

    def _fragment_for(self, worker: int, server_round: int) -> int:
        """Return the fragment that a worker lacks, or -1 where it needs its whole slice.

        A worker whose reply counted has the rest on its disk, as long as its residents stay.
        """
        outer = self.settings.outer
        if outer.fragments == 1 or server_round == 1 or worker not in self._current:
            return -1
        before = self._context.previous
        if before is None or before.of_worker(worker) != self._round.layout.of_worker(worker):
            return -1
        return fragment_of_round(outer, server_round - 1)

    def _moments_for(self, fragment: int, server_round: int) -> dict[str, State]:
        """Return the moments that were averaged at the end of the round before."""
        if server_round == 1:
            return {}
        names = moments_of_round(self.settings.outer, server_round - 1)
        part = self.spec if fragment < 0 else self._part(fragment)
        wanted = [entry.key for entry in (*part.shared, *part.expert) if entry.is_parameter]
        return {
            name: self.outer.moments[name]
            for name in names
            if all(key in self.outer.moments[name] for key in wanted)
        }

    def _pooled_share(self) -> list[list[float]] | None:
        if self.settings.balance.form != "global" or self._load is None:
            return None
        total = self._load.sum(1, keepdim=True).clamp(min=1)
        shares: list[list[float]] = (self._load.double() / total).tolist()
        return shares

    def _fold(
        self, reply: Message, worker: int, means: Mapping[str, HolderMean]
    ) -> dict[str, float]:
        if reply.has_error():
            raise WireError(f"{reply.error.reason} (Flower error {reply.error.code})")
        content, record = reply.content, self._round
        record.bytes_up += wire.payload_bytes(content)
        answered = wire.json_in(content, wire.TASK)
        expected = {
            "server_round": record.server_round,
            "worker": worker,
            "layout_digest": record.layout.digest(),
        }
        for key, value in expected.items():
            if answered.get(key) != value:
                raise WireError(f"answers {key}={answered.get(key)}, this round is {key}={value}")
        metrics = wire.metrics_in(content, REPORTED)
        if not 0 < metrics["tokens"] <= self._round_tokens():
            raise WireError(
                f"metric tokens={metrics['tokens']:g} must be > 0 and <= {self._round_tokens()}, "
                "what the settings give a worker in a round"
            )
        counts = wire.counts_in(answered, self.spec.num_layers, self.spec.num_experts)
        most = self._round_tokens() * self.settings.model.top_k
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
        residents = record.layout.of_worker(worker)
        # All is read before anything is folded: a reply counts whole or not at all.
        vectors = {
            name: wire.vectors_in(
                content,
                name,
                self.settings.wire.up,
                (mean.spec.shared_size, mean.spec.experts_size(residents)),
            )
            for name, mean in means.items()
        }
        weighting = self.settings.outer.weighting
        weight = 1.0 if weighting == "uniform" else metrics["tokens"]
        expert_weights = None
        if weighting == "routed":
            expert_weights = [
                counts.load[layer][list(held)] for layer, held in enumerate(residents)
            ]
        for name, mean in means.items():
            mean.fold(*vectors[name], residents, weight, expert_weights)
        record.counts[worker] = counts
        if choices is not None:
            record.choices[worker] = choices
        return metrics

    def _replies(self, grid: Grid, deadline: float) -> Iterator[Message]:
        """Yield replies in worker order, one in memory at a time, until the deadline."""
        for message_id, _ in sorted(self._sent.items(), key=lambda item: item[1]):
            reply = wait(grid, message_id, deadline)
            if reply is not None:
                yield reply
