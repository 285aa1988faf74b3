"""Waiting for replies: those of this round, and late ones of rounds before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO

from flwr.app import Message
from flwr.common.logger import log

from fomoe_flwr.config import FederationSettings
from fomoe_flwr.federation.node_grid import NodeGrid
from fomoe_flwr.federation.out_task import OutTask
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.seats import POLL_SECONDS

_LATE_POLL_SECONDS = 1.0
_SWEEP_SECONDS = 10.0
"""Before its deadline a round takes replies as they come: the first in order may be missing."""

_ARRIVAL_SECONDS = 30.0
"""How long a reply that is announced may take once its node works on something else."""


@dataclass
class Waiting:
    """Tasks that are out: those of this round, and those of rounds that closed without them."""

    limits: FederationSettings
    uses_late: bool = False
    """Whether replies to tasks of closed rounds are handed on, not dropped."""
    sent: dict[str, OutTask] = field(default_factory=dict)
    """Message id -> task of this round."""
    _out: dict[str, OutTask] = field(default_factory=dict)
    """Message id -> task of this round, in worker order, until its reply is there."""
    _late: dict[str, OutTask] = field(default_factory=dict)
    """The same of rounds before."""
    _hopeless: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Message id -> why no further part of a reply can come, and since when."""
    _latecomers: list[int] = field(default_factory=list)
    _arrived: list[Message] = field(default_factory=list)
    """Late replies that a round is to fold."""
    late_tasks: dict[str, OutTask] = field(default_factory=dict)
    """Message id -> task that a reply in `_arrived` or yielded since answers."""
    _looked: float = 0.0
    _intake: int = 0
    """The round whose replies are being taken."""

    def __post_init__(self) -> None:
        self._due = {(r, worker): r + late for r, worker, late in self.limits.late_script}
        """(round, worker) -> round in which the reply comes, by the script."""

    def begin(self) -> None:
        """Begin a new round."""
        self.sent = {}

    def add(self, tasks: Mapping[str, OutTask]) -> None:
        """Take tasks of this round."""
        self._out |= dict(sorted(tasks.items(), key=lambda item: item[1].worker))
        self.sent |= tasks

    def replies(
        self, grid: NodeGrid, record: RoundRecord, deadline: float, meet: Callable[[], None]
    ) -> Iterator[Message]:
        """Yield replies, one in memory at a time, until the round closes.

        It closes when everybody has answered, at `deadline` (monotonic seconds), or
        `federation.grace_seconds` after `federation.min_workers` replies were folded. Without a
        grace period replies are yielded in worker order, whoever was first, until shortly before
        the deadline. With one they are yielded as they come, so that the server learns when the
        quorum is there. `meet` is called while nothing arrives: nodes come and go. Late replies
        are yielded in between, if they are used; `late_tasks` knows what they answer.
        """
        self._intake = record.server_round
        in_order = not self.limits.grace_seconds
        sweep = deadline - min(_SWEEP_SECONDS, self.limits.round_timeout_seconds / 10)
        is_over = False
        while self._out and not is_over:
            is_over = time.monotonic() >= deadline
            only_first = in_order and time.monotonic() < sweep
            num_done = 0
            for message_id in list(self._out)[: 1 if only_first else None]:
                if self._is_postponed(self._out[message_id]):
                    task = self._late[message_id] = self._out.pop(message_id)
                    record.failures[task.worker] = "late by federation.late_script"
                    num_done += 1
                    continue
                started = time.monotonic()
                for reply in grid.pull_messages([message_id]):
                    record.receive_seconds += time.monotonic() - started
                    del self._out[message_id]
                    num_done += 1
                    yield reply
                    break
                else:
                    if self._is_hopeless(message_id, grid):
                        worker = self._out.pop(message_id).worker
                        record.failures[worker], _ = self._hopeless.pop(message_id)
                        num_done += 1
            if not num_done:
                meet()
                self.take_late(grid)
                time.sleep(POLL_SECONDS)
            yield from self._handed_on()
            if not in_order and len(record.replies) >= self.limits.min_workers:
                deadline = min(deadline, time.monotonic() + self.limits.grace_seconds)
        self._late |= self._out
        self._out = {}

    def late_replies(self, grid: NodeGrid, server_round: int) -> Iterator[Message]:
        """Yield the late replies that are here when a round closes."""
        self._intake = server_round
        self.take_late(grid, now=True)
        yield from self._handed_on()

    def _handed_on(self) -> Iterator[Message]:
        while self._arrived:
            yield self._arrived.pop(0)

    def _is_postponed(self, task: OutTask) -> bool:
        """Whether the script lets a reply come in a later round than the one that is taken in."""
        return self._due.get((task.server_round, task.worker), 0) > self._intake

    def give_up(self, why: Callable[[OutTask], str]) -> None:
        """Wait no longer for tasks of which `why` gives a reason; an empty one means: wait on."""
        for message_id, task in [*self._out.items(), *self._late.items()]:
            if reason := why(task):
                self._hopeless.setdefault(message_id, (reason, time.monotonic()))

    def _is_hopeless(self, message_id: str, grid: NodeGrid) -> bool:
        """Whether no reply will come; one that is on its way gets time to arrive."""
        _, since = self._hopeless.get(message_id, ("", math.inf))
        patience = _ARRIVAL_SECONDS if grid.is_arriving(message_id) else 0.0
        return time.monotonic() >= since + patience

    def take_late(self, grid: NodeGrid, now: bool = False) -> None:
        """Pull replies to tasks of closed rounds, and note whose they are: to use or to drop them.

        Looks at most once a second, unless it must be `now`.
        """
        if not now and time.monotonic() - self._looked < _LATE_POLL_SECONDS:
            return
        self._looked = time.monotonic()
        for message_id, task in list(self._late.items()):
            if self._is_postponed(task):
                continue
            for reply in grid.pull_messages([message_id]):
                del self._late[message_id]
                if reply.has_content():
                    self._latecomers.append(task.worker)
                    said = task.worker, task.server_round
                    log(INFO, "worker %s answered round %s too late", *said)
                    if self.uses_late:
                        self._arrived.append(reply)
                        self.late_tasks[message_id] = task
                break
            else:
                if self._is_hopeless(message_id, grid):
                    del self._late[message_id]
        still_out = {**self._late, **self._out}
        self._hopeless = {i: why for i, why in self._hopeless.items() if i in still_out}

    def take_latecomers(self) -> list[int]:
        """Return the workers whose late replies came since the last call."""
        latecomers, self._latecomers = self._latecomers, []
        return latecomers

    def busy(self) -> dict[int, int]:
        """Return {worker: round} of the tasks that are still out from rounds before."""
        return {task.worker: task.server_round for task in self._late.values()}

    def forget(self, seated: Mapping[int, int]) -> None:
        """Drop late tasks of workers that other nodes play now; `seated` is {worker: node}."""
        self._late = {
            i: task
            for i, task in self._late.items()
            if seated.get(task.worker, task.node) == task.node
        }
