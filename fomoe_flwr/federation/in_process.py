"""Run the same two apps in this process: no Ray, no SuperLink."""

from __future__ import annotations

from fomoe_flwr.config import Settings
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.server import serve
from fomoe_flwr.worker.state_store import STATES


def run_in_process(settings: Settings, began: float | None = None) -> bool:
    """Train all rounds; return True, or raise what stopped them. `began` as in `serve`."""
    workers = settings.layout.num_workers
    with STATES.in_memory():
        return serve(settings, lambda run: InProcessGrid(client_app, workers, run.workers), began)
