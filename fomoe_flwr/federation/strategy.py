"""The strategy: what happens in a round, from the choice of its layout to the outer step.

In every round the server

1. chooses a layout: which worker holds which experts (`layouts`),
2. sends every worker its own slice: the shared parameters and its residents (`tasks`),
3. takes the replies one by one, checks each (`replies`) and folds it into running means,
4. takes the outer step with these means.

Nothing is evaluated, saved or printed here. The server does that in `on_round`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from logging import INFO
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
from fomoe_flwr.errors import RunError
from fomoe_flwr.federation.accounting import open_ledger
from fomoe_flwr.federation.beside import Beside, one_ahead
from fomoe_flwr.federation.intake import Intake
from fomoe_flwr.federation.layouts import Layouts
from fomoe_flwr.federation.node_grid import NodeGrid, PatientGrid, node_grid
from fomoe_flwr.federation.out_task import OutTask
from fomoe_flwr.federation.replies import ReplyReader
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.round_state import RoundState
from fomoe_flwr.federation.seats import POLL_SECONDS, RunIdentity, Seats, push
from fomoe_flwr.federation.tasks import TaskWriter
from fomoe_flwr.federation.waiting import Waiting
from fomoe_flwr.model.homes import MEMORY
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.worker.device import pick_device


class FederationError(RunError):
    """A federation that cannot begin or go on; the text says who is missing and why."""


class FoMoEStrategy(Strategy):
    """Federated training of one MoE model of which each worker holds a part.

    Parameters
    ----------
    settings, spec
        The run's settings, and which part of the state is shared and which belongs to experts.
    state
        Global weights by state key, fp32; updated in place.
    identity
        The run's key and tokenizer, which every node gets when it joins.
    on_round
        Called after every round with its record.
    first_round
        The round to begin with; in a resumed run the one after the checkpoint.
    keep_rounds
        Asked before every round: the rounds whose inner state workers must keep.
    probe
        [windows, tokens] ids. Every worker returns which experts it chooses for them. May be None.
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
        self._reader = ReplyReader(settings, spec, probe, outer.home)
        self._ledger = open_ledger(settings)
        self._limits = NormLimits(settings.outer.clip_to_median)
        self._waiting = Waiting(settings.federation, settings.outer.late_replies == "use")
        self._adopt(RoundState.at_start(settings))
        self._round: RoundRecord
        self._beside = Beside(is_on=False)
        self._closed: dict[str, Any] = {}
        """The state after the last round, which the opening of the next one changes."""

    @property
    def record(self) -> RoundRecord | None:
        """The record of the newest round; None before the first."""
        return getattr(self, "_round", None)

    def summary(self) -> None:
        """Log what this strategy is about to do."""
        layout, outer = self.settings.layout, self.settings.outer
        shape = layout.num_workers, layout.overlap, layout.kind
        log(INFO, "\t├──> workers: %s, overlap: %s (%s)", *shape)
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
        """Run the rounds. The weights given at construction are updated in place.

        Flower's own loop holds all replies in memory and sends all workers one ArrayRecord. This
        one pulls replies one at a time and sends each worker its own slice. It does not use
        `initial_arrays` and the config records.
        """
        del initial_arrays, train_config, evaluate_config, evaluate_fn
        result = Result()
        log(INFO, "Starting the rounds:")
        self.summary()
        last = self.settings.rounds if num_rounds is None else num_rounds
        nodes = node_grid(grid)
        if self.settings.federation.late_script and not nodes.works_when_asked:
            raise FederationError(
                "federation.late_script is for a run in one process: leave it out"
            )
        self.seats.gather(nodes)
        self._begin()
        tasks: Iterable[Message] | None = None
        for server_round in range(self.first_round, last + 1):
            if tasks is None:
                tasks = self._open(server_round, nodes)
            record = self._run_round(server_round, nodes, timeout, tasks)
            tasks = None
            if server_round < last and self._may_open_early(nodes):
                self._send(self._open(server_round + 1, nodes), nodes)
                tasks = ()
            with self._meeting(nodes):
                metrics = self.on_round(record)
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        return result

    def _begin(self) -> None:
        """Check that the run can begin with the workers that have a node."""
        attendance = self.round_state.attendance
        expected = attendance.expected()
        missing = [worker for worker in self.seats.missing_workers() if worker in expected]
        needed = self.settings.federation.start_workers
        may_join = 0 < needed <= len(self.seats.worker_of_node) and self.first_round == 1
        if missing and not may_join:
            raise FederationError(self.seats.explain_missing(missing))
        attendance.leave(missing)
        self.layouts.learn_room()

    def _may_open_early(self, grid: NodeGrid) -> bool:
        """Whether the next round's tasks go out before this one is evaluated and written down.

        Workers that train on meanwhile wait for them.
        """
        return bool(self.settings.outer.delay_steps) and not grid.works_when_asked

    def _open(self, server_round: int, grid: NodeGrid) -> Iterable[Message]:
        self._waiting.begin()
        return self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)

    def _run_round(
        self, server_round: int, grid: NodeGrid, timeout: float | None, tasks: Iterable[Message]
    ) -> RoundRecord:
        patience = timeout or self.settings.federation.round_timeout_seconds
        started, record = time.monotonic(), self._round
        is_on = grid.works_when_asked and self._has_idle_cores()
        with Beside(is_on) as self._beside:
            tasks = one_ahead(tasks, is_on)
            self.aggregate_train(server_round, self._replies(tasks, grid, started + patience))
        return record

    def _has_idle_cores(self) -> bool:
        """Tell whether workers of this process compute on a GPU, and all is held in memory."""
        is_on_gpu = pick_device(self.settings.local.device).type == "cuda"
        return is_on_gpu and self.outer.home is MEMORY

    def _replies(
        self, tasks: Iterable[Message], grid: NodeGrid, deadline: float
    ) -> Iterator[Message]:
        """Send the tasks and yield the replies; one after the other where nodes work when asked."""
        meet = partial(self._meet, grid)
        if not grid.works_when_asked:
            self._send(tasks, grid)
            yield from self._waiting.replies(grid, self._round, deadline, meet)
        else:
            for task in tasks:
                self._send([task], grid)
                del task
                yield from self._waiting.replies(grid, self._round, deadline, meet)
        yield from self._waiting.late_replies(grid, self._round.server_round)

    @contextmanager
    def _meeting(self, grid: NodeGrid) -> Iterator[None]:
        """Meet nodes beside other work, so that a new one takes part in the next round."""
        if not isinstance(grid, PatientGrid):
            yield  # Its nodes work in this process, when they are asked.
            return
        is_done = threading.Event()

        def meet() -> None:
            while not is_done.wait(POLL_SECONDS):
                self._meet(grid)

        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(meet)
            try:
                yield
            finally:
                is_done.set()
        beside.result()

    def _meet(self, grid: NodeGrid) -> None:
        """Look who is there; give up tasks that nobody works on any more."""
        back = set(self.seats.meet(grid))
        limit = self.settings.federation.offline_seconds

        def why(task: OutTask) -> str:
            if task.node in back:
                return "its node came back without this task"
            if grid.silent_seconds(task.node) > limit:
                return f"its node is out of touch for federation.offline_seconds={limit:g}"
            return ""

        self._waiting.give_up(why)
        self._waiting.forget(self.seats.node_of_worker())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's layout; write a task for every worker that takes part.

        A worker that is still at a task of an earlier round gets none: it would begin this one
        late and return it late, too.
        """
        del arrays, config
        nodes = self._gather_free(node_grid(grid))
        started = time.monotonic()
        seated = self.seats.node_of_worker()
        busy, latecomers = self._waiting.busy(), self._waiting.take_latecomers()
        attendance = self.round_state.attendance
        attendance.welcome(latecomers)
        attendance.ensure_quorum(
            server_round,
            nodes.keys(),
            seated.keys() & busy.keys(),
            self.settings.federation.min_workers,
        )
        record = self._round = self.layouts.open_round(server_round, seated.keys())
        record.started = started
        record.late_replies = len(latecomers)
        for worker in record.absent:
            record.failures[worker] = "away after too many missed rounds"
        for worker in range(self.settings.layout.num_workers):
            if worker in busy and worker in seated:
                record.failures[worker] = f"still at its task of round {busy[worker]}"
            elif worker in busy:
                record.failures[worker] = f"out of touch since its task of round {busy[worker]}"
            elif worker not in nodes:
                record.failures[worker] = "no node plays this worker"
        tasks = self._tasks.write(
            server_round,
            record.layout,
            {worker: node for worker, node in nodes.items() if worker in record.sent},
            self.round_state,
            self.keep_rounds(),
        )
        record.configure_seconds = time.monotonic() - started
        return tasks

    def _gather_free(self, grid: NodeGrid) -> dict[int, int]:
        """Return {worker: node} of the workers without a task; wait until they are enough."""
        limits = self.settings.federation
        deadline = time.monotonic() + limits.round_timeout_seconds
        while True:
            self._meet(grid)
            self._waiting.take_late(grid)
            busy = self._waiting.busy()
            free = {w: n for w, n in self.seats.node_of_worker().items() if w not in busy}
            if len(free) >= limits.min_workers or time.monotonic() >= deadline:
                return free
            time.sleep(POLL_SECONDS)

    def _send(self, tasks: Iterable[Message], grid: NodeGrid) -> None:
        started, record = time.monotonic(), self._round
        sent: dict[str, int] = {}
        # One at a time, so that the experts of two workers are never in memory together.
        for task in tasks:
            record.down.add(task.content)
            sent |= push(grid, [task])
            del task
        worker_of = self.seats.worker_of_node
        self._waiting.add({i: record.task_of(worker_of[node], node) for i, node in sent.items()})
        record.send_seconds += time.monotonic() - started

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come, then take the outer step.

        Raises FederationError when fewer than `federation.min_workers` replies can be used.
        """
        means = RoundMeans(self.settings, self.spec, server_round, self._limits, self.outer.home)
        Intake(self._reader, self._waiting, self._round, means).take_all(replies, self._beside)
        self._require_quorum()
        self._step(means)
        return None, None

    def _require_quorum(self) -> None:
        record, needed = self._round, self.settings.federation.min_workers
        if len(record.replies) < needed:
            reasons = "; ".join(f"worker {w}: {why}" for w, why in sorted(record.failures.items()))
            raise FederationError(
                f"round {record.server_round}: {len(record.replies)} of "
                f"{self.settings.layout.num_workers} workers replied, "
                f"federation.min_workers={needed} are needed ({reasons})"
            )

    def _step(self, means: RoundMeans) -> None:
        """Take the outer step and note what the next round depends on."""
        started, record = time.monotonic(), self._round
        record.missing_experts = len(means.gradient.missing_experts())
        record.disagreement = means.gradient.disagreement()
        record.copies = means.gradient.expert_count
        means.step(self.outer, self.state)
        self._limits.close_round()
        if record.server_round > 1:
            record.rejoined = set(record.replies) - self.round_state.current
        if self._ledger is not None:
            record.epsilon = self._ledger.spend()
        self.round_state.note(self.settings, record)
        self._closed = self._state()
        record.outer_seconds = time.monotonic() - started

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the server evaluates the assembled model itself."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: workers do not evaluate."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round depends on besides tensors, JSON-able, for a checkpoint."""
        return self._closed or self._state()

    def _state(self) -> dict[str, Any]:
        ledger = None if self._ledger is None else self._ledger.to_json()
        limits = self._limits.to_json()
        return {**self.round_state.to_json(), "privacy": ledger, "norm_limits": limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._adopt(RoundState.from_json(state, self.settings.layout))
        self._limits.restore(state["norm_limits"])
        if self._ledger is not None:
            self._ledger.restore(state["privacy"])

    def _adopt(self, round_state: RoundState) -> None:
        self.round_state = round_state
        self.layouts = Layouts(self.settings, round_state, self.seats.capacity_gib)
