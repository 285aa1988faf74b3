"""A grid that treats replies as Flower's does, over workers in this process.

It waits for the objects of a reply that is announced. It answers for a node that is out of touch,
and then drops what the node may still send. A node works on one message after another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from federated import CountingGrid
from flwr.app import Error, Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.run import Run

NODE_UNAVAILABLE = 3
HEARTBEAT_SECONDS = 0.5
FIRST_NODE = 2


@dataclass
class Node:
    """What the SuperLink knows of a node, and how the node works."""

    activation: str = "first"
    silent_since: float | None = None
    """When its heartbeats ended; it stays listed until two are missing."""
    lost: set[str] = field(default_factory=set)
    """Messages that it will never answer."""
    work_seconds: float = 0.0
    upload_seconds: float = 0.0
    busy_until: float = 0.0

    @property
    def online_until(self) -> float:
        """Wall-clock time until which the SuperLink takes it for online."""
        last = time.time() if self.silent_since is None else self.silent_since
        return last - last % HEARTBEAT_SECONDS + 2 * HEARTBEAT_SECONDS

    @property
    def is_listed(self) -> bool:
        """Whether the SuperLink takes it for online."""
        return time.time() < self.online_until


class FlowerGrid(Grid):
    """Flower's way with replies."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.inner = CountingGrid(folder, num_nodes)
        self.nodes = {node: Node() for node in self.inner.get_node_ids()}
        self.tasks: list[int] = []
        """Nodes, in the order in which they were given tasks."""
        self.on_task: Callable[[int, int], None] = lambda node, number: None
        """Called with a node and how many tasks it was given, before it begins."""
        self._due: dict[str, float] = {}
        self._sent: dict[str, Message] = {}
        self._lock = threading.Lock()

    def worker(self, worker: int) -> Node:
        """Return the node that plays a worker."""
        return self.nodes[FIRST_NODE + worker]

    @property
    def run(self) -> Run:
        return self.inner.run

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    def create_message(self, *args: object, **named: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, known in self.nodes.items() if known.is_listed]

    def get_nodes(self) -> Iterable[object]:
        return [
            SimpleNamespace(
                node_id=node,
                last_activated_at=self.nodes[node].activation,
                online_until=self.nodes[node].online_until,
                heartbeat_interval=HEARTBEAT_SECONDS,
            )
            for node in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(self.inner.push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            number = message.metadata.dst_node_id
            node = self.nodes[number]
            begins, seconds = max(node.busy_until, time.monotonic()), 0.0
            if message.metadata.message_type == MessageType.TRAIN:
                self.tasks.append(number)
                self.on_task(number, self.tasks.count(number))
                seconds = node.work_seconds
                if node.silent_since is not None:
                    node.lost.add(message_id)
            self._sent[message_id] = message
            self._due[message_id] = node.busy_until = begins + seconds
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self._sent.get(message_id)
            if message is None:
                continue
            node = self.nodes[message.metadata.dst_node_id]
            if not node.is_listed:
                del self._sent[message_id]
                replies.append(Message(Error(NODE_UNAVAILABLE, "unavailable"), reply_to=message))
            elif node.silent_since is None and self._is_ready(message_id, node):
                del self._sent[message_id]
                if message.metadata.message_type == MessageType.TRAIN:
                    time.sleep(node.upload_seconds)
                with self._lock:
                    replies += self.inner.pull_messages([message_id])
        return replies

    def _is_ready(self, message_id: str, node: Node) -> bool:
        return message_id not in node.lost and time.monotonic() >= self._due[message_id]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def kill(self, worker: int) -> None:
        """End a node; what it was asked is lost."""
        node = self.worker(worker)
        self.silence(worker)
        node.lost |= {
            i for i, m in self._sent.items() if m.metadata.dst_node_id == FIRST_NODE + worker
        }

    def start(self, worker: int) -> None:
        """Start a node anew."""
        node = self.worker(worker)
        node.silent_since, node.activation, node.busy_until = None, str(time.monotonic()), 0.0

    def silence(self, worker: int, ago: float = 0.0) -> None:
        """Cut a node's network; it works on."""
        self.worker(worker).silent_since = time.time() - ago

    def hear(self, worker: int) -> None:
        """Let a node be heard again."""
        node = self.worker(worker)
        if not node.is_listed:
            node.activation = str(time.monotonic())
        node.silent_since = None
