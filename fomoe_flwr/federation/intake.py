"""The intake of a round: its replies, checked and folded one by one as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from logging import WARNING

from flwr.app import Message
from flwr.common.logger import log

from fomoe_flwr.aggregation.round_means import Reply, RoundMeans
from fomoe_flwr.errors import one_line
from fomoe_flwr.federation.beside import Beside
from fomoe_flwr.federation.out_task import OutTask
from fomoe_flwr.federation.replies import ReplyReader
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.waiting import Waiting
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.model.homes import MEMORY
from fomoe_flwr.worker.heap import release_heap


class Intake:
    """Takes the replies of one round into its means and notes them in its record."""

    def __init__(
        self, reader: ReplyReader, waiting: Waiting, record: RoundRecord, means: RoundMeans
    ) -> None:
        self._reader, self._waiting, self._record, self._means = reader, waiting, record, means

    def take_all(self, replies: Iterable[Message], beside: Beside) -> None:
        """Fold every reply that can be used; note for all other workers why theirs is left out.

        A reply is folded `beside` the next worker's steps. The order is that of the replies.
        """
        started, record = time.monotonic(), self._record
        for message in replies:
            self._wait(beside)
            message_id = message.metadata.reply_to_message_id
            if late := self._waiting.late_tasks.pop(message_id, None):
                self._take_late(message, late)
                continue
            task = self._waiting.sent.get(message_id)
            if task is None or task.worker in record.replies:
                continue
            taken = [message]
            del message
            at = time.monotonic()
            beside.do(partial(self._take, taken, task))
            record.fold_seconds += time.monotonic() - at
        self._wait(beside)
        for worker in range(record.layout.num_workers):
            if worker not in record.replies:
                record.failures.setdefault(worker, "no reply before the round's deadline")
        for worker, reason in sorted(record.failures.items()):
            log(WARNING, "round %s: worker %s left out: %s", record.server_round, worker, reason)
        record.train_seconds = time.monotonic() - started - record.send_seconds

    def _wait(self, beside: Beside) -> None:
        at = time.monotonic()
        beside.wait()
        self._record.fold_seconds += time.monotonic() - at

    def _take(self, taken: list[Message], task: OutTask) -> None:
        """Fold the one reply of a list, and drop it."""
        try:
            self._fold(taken.pop(), task)
        except WireError as error:
            self._record.failures[task.worker] = one_line(error)
        if self._means.home is not MEMORY:
            release_heap()  # Flower's threads leave the chunks of a reply in heaps of theirs.

    def _fold(self, message: Message, task: OutTask) -> None:
        """Check a whole reply, then fold it. Raises WireError before anything is changed."""
        record = self._record
        if message.has_content():
            record.up.add(message.content)
        reply = self._reader.read(message, task, self._means)
        self._add(reply, task.worker)
        record.take(task.worker, reply)

    def _take_late(self, message: Message, task: OutTask) -> None:
        """Fold a reply to a task of an earlier round, which is checked against that round."""
        record = self._record
        try:
            record.up.add(message.content)
            reply = self._reader.read(message, task, self._means)
        except WireError as error:
            why = one_line(error)
            log(
                WARNING,
                "worker %s, late: %s is left out: %s",
                task.worker,
                record.server_round,
                why,
            )
            return
        age = record.server_round - task.server_round
        self._add(reply, task.worker, age)
        record.take_late(task.worker, age, reply)

    def _add(self, reply: Reply, worker: int, age: int = 0) -> None:
        if self._means.fold(reply, age):
            self._record.clipped.add(worker)
            said = self._record.server_round, worker
            log(WARNING, "round %s: worker %s is too large and scaled", *said)
