"""Seats: which Flower node plays which worker.

Node ids are random and the server sees no node's configuration, so a node is asked (a query) which
worker it plays. The query also hands it the run's tokenizer and lets it prepare its text. In the
middle of a run the server waits for no answer: it collects those that have come.

A node that comes back is asked again. It works on one message after another, so its answer also
says that it is not at an earlier task any more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log

from fomoe_flwr import __version__
from fomoe_flwr.config import Settings
from fomoe_flwr.errors import one_line
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.node_grid import NodeGrid
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.model.state import StateSpec

POLL_SECONDS = 0.1
_MOST_GIB = 2.0**40


@dataclass(frozen=True)
class RunIdentity:
    """What ties messages and node-local files to this run."""

    key: str
    tokenizer_json: str
    tokenizer_digest: str


class Seats:
    """The workers of a layout and the nodes that play them."""

    def __init__(self, settings: Settings, spec: StateSpec, identity: RunIdentity) -> None:
        self.settings = settings
        self.spec = spec
        self.identity = identity
        self.worker_of_node: dict[int, int] = {}
        self.capacity_gib: dict[int, float] = {}
        """Memory of every worker as its node last reported it, with `layout.capacity_reported`."""
        self._refused: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._activations: dict[int, str] = {}

    def node_of_worker(self) -> dict[int, int]:
        """Return {worker: node} for every worker that has one."""
        return {worker: node for node, worker in self.worker_of_node.items()}

    def gather(self, grid: NodeGrid) -> None:
        """Seat nodes until every worker has one, or no further answer is to be expected."""
        limits = self.settings.federation
        started = time.monotonic()
        while True:
            self.meet(grid)
            waited = time.monotonic() - started
            # A node that was asked may be tokenising its text, which may take long.
            limit = limits.round_timeout_seconds if self._asked else limits.node_wait_seconds
            answered = len(self.worker_of_node) + len(self._refused)
            enough = not self._asked and answered >= self.settings.layout.num_workers
            if not self.missing_workers() or enough or waited >= limit:
                return
            time.sleep(POLL_SECONDS)

    def meet(self, grid: NodeGrid) -> list[int]:
        """Ask new nodes which worker they play; seat those that have answered, and return them."""
        before, self._activations = self._activations, grid.activations()
        alive = {n for n, since in self._activations.items() if before.get(n, since) == since}
        if {*self.worker_of_node, *self._refused} - alive:
            # A node left: its seat is free for one that was refused, or it may return repaired.
            self._refused.clear()
        self.worker_of_node = {n: w for n, w in self.worker_of_node.items() if n in alive}
        self._asked = {i: n for i, n in self._asked.items() if n in alive}
        known = {*self.worker_of_node, *self._refused, *self._asked.values()}
        strangers = sorted(set(self._activations) - known)
        if strangers and self.missing_workers():
            self._asked |= self._query(grid, strangers)
        seated = []
        for message_id, node in list(self._asked.items()):
            for reply in grid.pull_messages([message_id]):
                del self._asked[message_id]
                try:
                    self._seat(node, reply)
                    seated.append(node)
                except WireError as error:
                    self._refused[node] = one_line(error)
                    log(WARNING, "node %s cannot take part: %s", node, self._refused[node])
        return seated

    def _query(self, grid: NodeGrid, nodes: list[int]) -> dict[str, int]:
        setup = {
            "version": __version__,
            "settings": self.settings.to_dict(),
            "tokenizer": self.identity.tokenizer_json,
            "spec_digest": self.spec.digest(),
        }
        content = RecordDict({wire.SETUP: wire.json_record(setup)})
        ttl = self.settings.federation.round_timeout_seconds
        return push(grid, [Message(content, n, MessageType.QUERY, ttl=ttl) for n in nodes])

    def _seat(self, node: int, reply: Message) -> None:
        if reply.has_error():
            raise wire.error_in(reply)
        answer = wire.json_in(reply.content, wire.SETUP)
        wanted: Any = answer.get("worker")
        gib: Any = answer.get("capacity_gib")
        missing = self.missing_workers()
        if not isinstance(wanted, int) or wanted < 0:
            if not missing:
                raise WireError("all workers have nodes already")
            wanted = missing[0]
        if wanted not in missing:
            raise WireError(
                f"asks for worker {wanted}, which is taken or outside "
                f"layout.num_workers={self.settings.layout.num_workers}"
            )
        if self.settings.layout.capacity_reported:
            is_number = isinstance(gib, int | float) and not isinstance(gib, bool)
            if not (is_number and 0 < gib < _MOST_GIB):
                raise WireError(f"reports capacity_gib={gib}, a number > 0 is needed")
            self.capacity_gib[wanted] = float(gib)
        self.worker_of_node[node] = wanted

    def missing_workers(self) -> list[int]:
        """List the workers that no node plays."""
        taken = set(self.worker_of_node.values())
        return [w for w in range(self.settings.layout.num_workers) if w not in taken]

    def explain_missing(self, missing: list[int]) -> str:
        """Say in one line why these workers have no node and what to do."""
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


def push(grid: NodeGrid, messages: list[Message]) -> dict[str, int]:
    """Push messages and return {message id: node}, without those that the grid did not take."""
    taken = set(grid.push_messages(messages))
    nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    return {message_id: node for message_id, node in nodes.items() if message_id in taken}
