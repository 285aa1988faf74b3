"""Tracking: `metrics.jsonl` always, TensorBoard events beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fomoe_flwr.run_directory import RunDirectory


class Tracker:
    """Write every round's metrics where people look for them."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._events = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one round; `row["round"]` is its step."""
        self._run.append_metrics(row)
        for key, value in row.items():
            if isinstance(value, int | float) and key != "round":
                self._events.add_scalar(key, value, row["round"])
        self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        self._events.close()
