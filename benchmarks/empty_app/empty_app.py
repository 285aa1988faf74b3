"""Rounds of empty messages, pulled as our strategy pulls them; their seconds go to a file."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with nothing."""
    return Message(RecordDict(), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Time every round from the push to the last reply."""
    nodes: list[int] = []
    while len(nodes) < int(context.run_config["nodes"]):
        nodes = sorted(grid.get_node_ids())
        time.sleep(0.1)
    seconds = []
    for _ in range(int(context.run_config["rounds"])):
        started = time.monotonic()
        missing = set(
            grid.push_messages([Message(RecordDict(), n, MessageType.TRAIN) for n in nodes])
        )
        while missing:
            for reply in grid.pull_messages(missing):
                missing.discard(reply.metadata.reply_to_message_id)
            time.sleep(0.1)
        seconds.append(time.monotonic() - started)
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds), encoding="utf-8")
