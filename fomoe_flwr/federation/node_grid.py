"""Grids that know their nodes, and one that never waits for a node.

Flower announces a reply before it has the reply's objects, and its grid then waits for them: for
minutes if the sender died during its upload. It also answers for a node that is out of touch, and
drops the reply that the node may still send. `PatientGrid` does neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run

from fomoe_flwr.errors import RunError

_HEARTBEATS = 2
"""Heartbeats that Flower lets a node miss before it counts as out of touch."""
_MARGIN_SECONDS = 5.0
"""How long before that moment no reply of the node is asked for."""
_LOOK_SECONDS = 1.0
_PULL_SECONDS = 1.0
"""How long a first attempt to pull a reply is waited for; then it goes on in the background."""
_PUSH_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before each further attempt to push messages that the SuperLink did not store whole."""


class NodeGrid(Grid):
    """A grid whose nodes can be told apart from those that were started anew."""

    works_when_asked = False
    """Whether a node works only while its reply is pulled, so that nothing is gained by sending
    all tasks first."""

    def activations(self) -> dict[int, str]:
        """Return {node: when it last came} of the nodes that are in touch."""
        return dict.fromkeys(self.get_node_ids(), "")

    def silent_seconds(self, node: int) -> float:
        """Return for how long a node has been out of touch."""
        del node
        return 0.0

    def is_arriving(self, message_id: str) -> bool:
        """Whether the reply to this message is announced, but not here yet."""
        del message_id
        return False


class PatientGrid(NodeGrid):
    """Flower's grid, without its waiting.

    `pull_messages` returns what is there within about a second. A reply that takes longer is pulled
    in the background. Nothing is pulled of a node that is out of touch, so that its reply counts
    when it comes.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._node_of: dict[str, int] = {}
        self._pulls: dict[str, _Pull] = {}
        self._contacts: dict[int, _Contact] = {}
        self._looked = -_LOOK_SECONDS
        self._lock = threading.Lock()

    @property
    def run(self) -> Run:
        """Run information."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._grid.set_run(run)

    def create_message(self, *args: Any, **named: Any) -> Message:
        """Create a message to a node."""
        return self._grid.create_message(*args, **named)

    def get_nodes(self) -> Iterable[Any]:
        """List the nodes with what the SuperLink knows of them."""
        return self._grid.get_nodes()

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are in touch."""
        return list(self.activations())

    def activations(self) -> dict[int, str]:
        """Return {node: when it last came} of the nodes that are in touch."""
        self._look()
        return {n: c.activation for n, c in self._contacts.items() if c.is_listed}

    def silent_seconds(self, node: int) -> float:
        """Return for how long a node has been out of touch."""
        self._look()
        contact = self._contacts.get(node)
        if contact is None or contact.is_listed:
            return 0.0
        return time.monotonic() - contact.heard

    def is_arriving(self, message_id: str) -> bool:
        """Whether the reply to this message is announced, but not here yet."""
        return message_id in self._pulls

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; note to which node each one goes. Raises RunError if it stays in vain."""
        messages = list(messages)
        ids = self._push(messages)
        for message_id, message in zip(ids, messages, strict=False):
            self._node_of[message_id] = message.metadata.dst_node_id
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are here, and go on pulling those that are on their way."""
        replies: list[Message] = []
        for message_id in message_ids:
            pull = self._pulls.get(message_id)
            if pull is None:
                if not self._is_in_touch(message_id):
                    continue
                pull = self._pulls[message_id] = _Pull(self._grid, message_id)
                pull.join(_PULL_SECONDS)
            if pull.is_alive():
                continue
            del self._pulls[message_id]
            if pull.error is not None:
                raise pull.error
            if pull.replies:
                self._node_of.pop(message_id, None)
            replies += pull.replies
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for their replies."""
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = list(self.pull_messages(sorted(waiting)))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            time.sleep(0 if arrived else _LOOK_SECONDS)
        return replies

    def _push(self, messages: list[Message]) -> list[str]:
        """Push messages, again if an object was refused; only what is missing travels again.

        A SuperLink with a database refuses one when nodes keep the database busy for five seconds.
        """
        for pause in (*_PUSH_PAUSES, None):
            try:
                return list(self._grid.push_messages(messages))
            except ObjectPushError as error:
                refusal = error
            if pause is not None:
                time.sleep(pause)
        raise RunError(
            f"the SuperLink did not store a message in {len(_PUSH_PAUSES) + 1} attempts; its log "
            f"says why, most often a full disk: {refusal}"
        )

    def _is_in_touch(self, message_id: str) -> bool:
        """Whether Flower would not take the node of this message for lost, now or in a moment."""
        node = self._node_of.get(message_id)
        if node is None:
            return True
        self._look()
        contact = self._contacts.get(node)
        return contact is not None and contact.is_listed and not contact.is_due()

    def _look(self) -> None:
        """Ask which nodes are in touch, at most once a second."""
        with self._lock:
            if time.monotonic() - self._looked < _LOOK_SECONDS:
                return
            listed = {info.node_id: info for info in self._grid.get_nodes()}
            self._looked = time.monotonic()
            for node, info in listed.items():
                self._contacts.setdefault(node, _Contact(info)).note(info)
            for node, contact in self._contacts.items():
                contact.is_listed = node in listed


def node_grid(grid: Grid) -> NodeGrid:
    """Return a grid that never waits for a node, made of Flower's where it must be."""
    return grid if isinstance(grid, NodeGrid) else PatientGrid(grid)


class _Contact:
    """When a node was last heard of, on this machine's clock."""

    def __init__(self, info: Any) -> None:
        self.patience = _HEARTBEATS * float(info.heartbeat_interval)
        left = min(max(float(info.online_until) - time.time(), 0.0), self.patience)
        # Later heartbeats are noted when they are seen, so clocks that differ do no harm.
        self.heard = time.monotonic() - (self.patience - left)
        self.online_until = float(info.online_until)
        self.activation = ""
        self.is_listed = True

    def note(self, info: Any) -> None:
        """Take in what the SuperLink says."""
        self.activation = str(info.last_activated_at)
        self.patience = _HEARTBEATS * float(info.heartbeat_interval)
        if float(info.online_until) != self.online_until:
            self.online_until, self.heard = float(info.online_until), time.monotonic()

    def is_due(self) -> bool:
        """Whether the node is about to count as out of touch."""
        margin = min(_MARGIN_SECONDS, self.patience / 4)
        return time.monotonic() - self.heard > self.patience - margin


class _Pull(threading.Thread):
    """One attempt to pull one reply."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(name=f"pull-{message_id[:8]}", daemon=True)
        self._grid, self._message_id = grid, message_id
        self.replies: list[Message] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Pull."""
        try:
            self.replies = list(self._grid.pull_messages([self._message_id]))
        except BaseException as error:  # raised again where the reply is asked for
            self.error = error
