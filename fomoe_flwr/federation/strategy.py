"""The strategy: who gets what, what comes back, and what the server makes of it.

A round sends every worker its own slice (shared parameters plus its residents), pulls the replies
one by one in worker order, folds each into running means over holders and drops it, and takes the
outer step. It evaluates, saves and prints nothing: the server hangs that on `on_round`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fomoe_flwr.aggregation.norm_limits import NormLimits
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.aggregation.round_means import RoundMeans
from fomoe_flwr.config import Settings
from fomoe_flwr.costs import expert_room, layout_context
from fomoe_flwr.errors import RunError, one_line
from fomoe_flwr.federation.accounting import open_ledger
from fomoe_flwr.federation.attendance import Attendance
from fomoe_flwr.federation.replies import ReplyReader
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.round_state import RoundState
from fomoe_flwr.federation.seats import POLL_SECONDS, RunIdentity, Seats, push
from fomoe_flwr.federation.tasks import TaskWriter
from fomoe_flwr.federation.waiting import Waiting
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.layout import Layout, Rehomed, check_layout, draw_layout, settle
from fomoe_flwr.model.state import StateSpec


class FederationError(RunError):
    """A federation that cannot begin or go on; the text says who is missing and why."""


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
        self._tasks = TaskWriter(settings, spec, state, outer, identity, probe)
        self._reader = ReplyReader(settings, spec, probe)
        self._ledger = open_ledger(settings)
        self._limits = NormLimits(settings.outer.clip_to_median)
        layout = settings.layout
        self.round_state = RoundState(
            layout_context(settings), Attendance(layout.num_workers, layout.rehome_after)
        )
        self._round = RoundRecord(0, self.layout(max(1, first_round)))
        self._waiting = Waiting(settings.federation)

    def layout(self, server_round: int) -> Layout:
        """Return the layout of the round to come, should the workers be there that are expected.

        A function of settings, seed, round, of who was there before and, where the kind of layout
        asks for it, of what was measured.
        """
        return self._settle(server_round, self.round_state.attendance.expected()).layout

    def _settle(self, server_round: int, present: Collection[int]) -> Rehomed:
        settings, context = self.settings.layout, self.round_state.context
        drawn = self._draw(server_round)
        is_full = server_round <= settings.warm_rounds
        try:
            overlap = settings.num_workers if is_full else None
            return settle(drawn, present, settings, context, overlap)
        except ValueError as error:
            # Its experts keep their value here until somebody can train them again.
            log(WARNING, "round %s: experts of absent workers wait: %s", server_round, error)
            return Rehomed(drawn, moved=0, lower_bound=0, short=0)

    def _draw(self, server_round: int) -> Layout:
        settings, model = self.settings, self.settings.model
        if server_round <= settings.layout.warm_rounds:
            return Layout.full(model.num_layers, model.num_experts, settings.layout.num_workers)
        context = self.round_state.context
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
        self._begin()
        for server_round in range(self.first_round, last + 1):
            metrics = self._run_round(server_round, grid, timeout)
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        return result

    def _begin(self) -> None:
        """See that those are there without whom the run cannot begin, and learn what they hold."""
        attendance = self.round_state.attendance
        expected = attendance.expected()
        missing = [worker for worker in self.seats.missing_workers() if worker in expected]
        needed = self.settings.federation.start_workers
        may_join = 0 < needed <= len(self.seats.worker_of_node) and self.first_round == 1
        if missing and not may_join:
            raise FederationError(self.seats.explain_missing(missing))
        attendance.leave(missing)
        layout, model = self.settings.layout, self.settings.model
        if layout.capacity_reported and not self.round_state.context.room:
            gib = [self.seats.capacity_gib[worker] for worker in range(layout.num_workers)]
            context = replace(self.round_state.context, room=expert_room(self.settings, gib))
            check_layout(layout, model.num_layers, model.num_experts, context)
            self.round_state.context = context
            log(INFO, "workers report %s GiB, room for %s experts of a layer", gib, context.room)

    def _run_round(
        self, server_round: int, grid: Grid, timeout: float | None
    ) -> MetricRecord | None:
        patience = timeout or self.settings.federation.round_timeout_seconds
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        started, record = time.monotonic(), self._round
        sent: dict[str, int] = {}
        # One at a time, so that no two workers' experts are here at once.
        for message in messages:
            record.down.add(message.content)
            sent |= push(grid, [message])
            del message
        self._waiting.begin({i: self.seats.worker_of_node[node] for i, node in sent.items()})
        record.send_seconds = time.monotonic() - started
        replies = self._waiting.replies(grid, record, started + patience)
        self.aggregate_train(server_round, replies)
        return self.on_round(record)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make one message per worker that has a node: shared parameters plus its residents.

        A worker that still works on a task of an earlier round is left alone: a task that waits
        behind another one comes back late as well.
        """
        del arrays, config
        nodes = self._gather_free(grid)
        started = time.monotonic()
        busy = self._waiting.busy()
        attendance, latecomers = self.round_state.attendance, self._waiting.take_latecomers()
        attendance.welcome(latecomers)
        present = attendance.present(server_round, {*nodes, *busy})
        if len(nodes.keys() & set(present)) < self.settings.federation.min_workers:
            # No rest for those who failed when there is no quorum without them.
            attendance.welcome(nodes.keys() - set(present))
        record = self._round = self._open_round(server_round, {*nodes, *busy})
        for worker in record.absent:
            record.failures[worker] = "away after too many missed rounds"
        for worker in range(self.settings.layout.num_workers):
            if worker in busy:
                record.failures[worker] = f"still at its task of round {busy[worker]}"
            elif worker not in nodes:
                record.failures[worker] = "no node plays this worker"
        record.late_replies = len(latecomers)
        messages = self._tasks.write(
            server_round,
            record.layout,
            {worker: node for worker, node in nodes.items() if worker in record.sent},
            self.round_state,
            self.keep_rounds(),
        )
        record.configure_seconds = time.monotonic() - started
        return messages

    def _gather_free(self, grid: Grid) -> dict[int, int]:
        """Meet nodes and return {worker: node} of those with no task; wait until they suffice."""
        limits = self.settings.federation
        deadline = time.monotonic() + limits.round_timeout_seconds
        while True:
            before = self.seats.node_of_worker()
            self.seats.meet(grid)
            nodes = self.seats.node_of_worker()
            self._waiting.forget(w for w, node in before.items() if nodes.get(w) != node)
            self._waiting.drop_late(grid)
            free = {w: n for w, n in nodes.items() if w not in self._waiting.busy()}
            if len(free) >= limits.min_workers or time.monotonic() >= deadline:
                return free
            time.sleep(POLL_SECONDS)

    def _open_round(self, server_round: int, played: Collection[int]) -> RoundRecord:
        """Settle who takes part and who holds what; say so where it is not as before."""
        state = self.round_state
        self._refresh_room(played)
        present = state.attendance.present(server_round, played)
        rehomed = self._settle(server_round, present)
        layout, before = rehomed.layout, state.context.previous
        absent = tuple(w for w in range(layout.num_workers) if w not in present)
        if rehomed.moved:
            log(
                INFO,
                "round %s: %s experts re-homed (lower bound %s, no room for %s), workers away: %s",
                server_round,
                rehomed.moved,
                rehomed.lower_bound,
                rehomed.short,
                list(absent),
            )
        return RoundRecord(
            server_round,
            layout,
            played=frozenset(played),
            sent=frozenset(present).intersection(played),
            absent=absent,
            moved_experts=0 if before is None else layout.moved_from(before),
            rehomed=rehomed,
        )

    def _refresh_room(self, played: Collection[int]) -> None:
        """Learn anew what fits a worker that comes back: its node may be another one."""
        context, away = self.round_state.context, self.round_state.attendance.missed
        back = [worker for worker in played if worker in away]
        if not self.settings.layout.capacity_reported or not back:
            return
        room = list(context.room)
        for worker in back:
            (room[worker],) = expert_room(self.settings, [self.seats.capacity_gib[worker]])
        self.round_state.context = replace(context, room=tuple(room))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies over holders as they come and take the outer step.

        Raises FederationError when fewer than `federation.min_workers` replies can be used.
        """
        started = time.monotonic()
        record = self._round
        means = RoundMeans(self.settings, self.spec, server_round, self._limits)
        for message in replies:
            worker = self._waiting.sent.get(message.metadata.reply_to_message_id, -1)
            if worker in record.replies or worker < 0:
                continue
            try:
                self._take(message, worker, means)
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
        record.missing_experts = len(means.gradient.missing_experts())
        record.disagreement = means.gradient.disagreement()
        record.copies = means.gradient.expert_count
        means.step(self.outer, self.state)
        self._limits.close_round()
        if server_round > 1:
            record.rejoined = set(record.replies) - self.round_state.current
        if self._ledger is not None:
            record.epsilon = self._ledger.spend()
        self.round_state.note(self.settings.layout, record)
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

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round depends on besides tensors, JSON-able, for a checkpoint."""
        ledger = None if self._ledger is None else self._ledger.to_json()
        limits = self._limits.to_json()
        return {**self.round_state.to_json(), "privacy": ledger, "norm_limits": limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.round_state = RoundState.from_json(state, self.settings.layout)
        self._limits.restore(state["norm_limits"])
        if self._ledger is not None:
            self._ledger.restore(state["privacy"])

    def _take(self, message: Message, worker: int, means: RoundMeans) -> None:
        """Read a reply, then fold it; what cannot be read changes nothing. Raises WireError."""
        started, record = time.monotonic(), self._round
        if message.has_content():
            record.up.add(message.content)
        reply = self._reader.read(message, worker, record.server_round, record.layout, means)
        if means.fold(reply):
            record.clipped.add(worker)
            log(WARNING, "round %s: worker %s is too large and scaled", record.server_round, worker)
        record.take(worker, reply)
        record.fold_seconds += time.monotonic() - started
