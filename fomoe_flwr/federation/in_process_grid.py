"""The in-process grid: the same two apps, no Ray, no SuperLink, no other process.

A node's ClientApp is called when its reply is pulled, so one reply is in memory at a time and a run
is deterministic to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fomoe_flwr.errors import reason_of
from fomoe_flwr.federation.node_grid import NodeGrid
from fomoe_flwr.federation.warm.handover import CLIENT_APP_RAISED, IN_PROCESS

_SERVER_NODE_ID = 1
_RUN_ID = 1


class InProcessGrid(NodeGrid):
    """Drive a ClientApp directly, with one Flower Context per node."""

    works_when_asked = True

    def __init__(self, client_app: ClientApp, num_nodes: int, state_dir: Path) -> None:
        TaskIdentity.run_id = _RUN_ID
        TaskIdentity.task_id = _RUN_ID
        TaskIdentity.node_id = _SERVER_NODE_ID
        self._client_app = client_app
        self._run = Run.create_empty(_RUN_ID)
        self._waiting: dict[str, Message] = {}
        self._contexts = {
            node: Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config={
                    "partition-id": index,
                    "num-partitions": num_nodes,
                    "state-dir": str(state_dir),
                    IN_PROCESS: True,
                },
                state=RecordDict(),
                run_config={},
            )
            for index, node in enumerate(range(2, num_nodes + 2))
        }

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; their apps run when the replies are pulled."""
        ids = []
        for message in messages:
            message_id = str(uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the apps of these messages and return their replies."""
        return [
            self._answer(self._waiting.pop(message_id))
            for message_id in message_ids
            if message_id in self._waiting
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return all replies."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except OSError:
            raise  # This is the server's machine too: it cannot go on either.
        except Exception as error:  # an app may raise anything; Flower turns it into a reply too
            return Message(Error(CLIENT_APP_RAISED, reason_of(error)), reply_to=message)
