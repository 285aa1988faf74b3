"""The two Flower apps; `server_app.py` and `client_app.py` at the top hand them to Flower.

Flower starts a process for every message to a node. So this module imports only what a ClientApp
with a warm worker needs, and no torch.
"""

from __future__ import annotations

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fomoe_flwr.federation.warm.handover import reply

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config -> settings -> checks -> server."""
    from fomoe_flwr.worker.heap import prefer_large_pages

    prefer_large_pages()
    from fomoe_flwr import events
    from fomoe_flwr.federation.run_config import settings_of
    from fomoe_flwr.federation.server import serve
    from fomoe_flwr.run.phases import process_began
    from fomoe_flwr.run.preflight import preflight

    if os.environ.get(events.VARIABLE) == "json":
        events.use_format("json")
    settings = settings_of(context.run_config)
    preflight(settings)
    serve(settings, lambda run: grid, process_began())


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Get ready for a run and say which worker this node plays."""
    return reply("query", message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return reply("train", message, context)
