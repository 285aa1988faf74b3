"""Waiting for replies: those of this round, and late ones of rounds before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from fomoe_flwr.config import FederationSettings
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.seats import POLL_SECONDS

_LATE_POLL_SECONDS = 1.0


@dataclass
class Waiting:
    """Tasks that are out: those of this round, and those of rounds that closed without them."""

    limits: FederationSettings
    sent: dict[str, int] = field(default_factory=dict)
    """Message id -> worker, of this round."""
    _late: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Message id -> (worker, round)."""
    _latecomers: list[int] = field(default_factory=list)
    _looked: float = 0.0

    def begin(self, sent: Mapping[str, int]) -> None:
        """Take the tasks of a new round."""
        self.sent = dict(sorted(sent.items(), key=lambda item: item[1]))

    def replies(self, grid: Grid, record: RoundRecord, deadline: float) -> Iterator[Message]:
        """Yield replies, one in memory at a time, until the round closes.

        It closes when everybody has answered, at `deadline` (monotonic seconds), or
        `federation.grace_seconds` after `federation.min_workers` replies were folded. Without a
        grace period replies are yielded in worker order, whoever was first. With one they are
        yielded as they come, so that the server learns when the quorum is there.
        """
        waiting, in_order = dict(self.sent), not self.limits.grace_seconds
        is_over = False
        while waiting and not is_over:
            # At the deadline all are asked once more: the last in order may have answered long ago.
            is_over = time.monotonic() >= deadline
            num_arrived = 0
            for message_id in list(waiting)[: 1 if in_order and not is_over else None]:
                started = time.monotonic()
                for reply in grid.pull_messages([message_id]):
                    record.receive_seconds += time.monotonic() - started
                    del waiting[message_id]
                    num_arrived += 1
                    yield reply
                    break
            if not num_arrived:
                self.drop_late(grid)
                time.sleep(POLL_SECONDS)
            if not in_order and len(record.replies) >= self.limits.min_workers:
                deadline = min(deadline, time.monotonic() + self.limits.grace_seconds)
        self._late |= {i: (worker, record.server_round) for i, worker in waiting.items()}

    def drop_late(self, grid: Grid) -> None:
        """Pull replies to tasks of closed rounds, note whose they are, and drop them."""
        if time.monotonic() - self._looked < _LATE_POLL_SECONDS:
            return
        self._looked = time.monotonic()
        for message_id, (worker, server_round) in list(self._late.items()):
            for reply in grid.pull_messages([message_id]):
                del self._late[message_id]
                if reply.has_content():
                    self._latecomers.append(worker)
                    log(INFO, "worker %s answered round %s too late", worker, server_round)

    def take_latecomers(self) -> list[int]:
        """Return the workers whose late replies came since the last call."""
        latecomers, self._latecomers = self._latecomers, []
        return latecomers

    def busy(self) -> dict[int, int]:
        """Return {worker: round} of the tasks that are still out from rounds before."""
        return dict(self._late.values())

    def forget(self, workers: Iterable[int]) -> None:
        """Stop waiting for late replies of these workers: other nodes play them now."""
        gone = set(workers)
        self._late = {i: late for i, late in self._late.items() if late[0] not in gone}
