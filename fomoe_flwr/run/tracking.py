"""Tracking: `metrics.jsonl` always; TensorBoard, W&B or trackio beside it, as `tracker` says.

W&B and trackio are extras (`pip install 'fomoe-flwr[wandb]'`, `[trackio]`), imported only when they
are chosen. They read their own environment variables: with WANDB_MODE=offline nothing is sent.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.run.directory import RunDirectory

PROJECT = "fomoe"
HOSTED = ("wandb", "trackio")


class Sink(Protocol):
    """Where numbers go besides `metrics.jsonl`."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of one round."""

    def close(self) -> None:
        """Take no more."""


class Tracker:
    """Write every round's metrics where people look for them."""

    def __init__(self, run: RunDirectory, settings: Settings) -> None:
        self._run = run
        self._sink = _sink(run, settings)

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one round; `row["round"]` is its step."""
        self._run.append_metrics(row)
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key != "round"
        }
        if self._sink is not None:
            self._sink.log(numbers, row["round"])

    def close(self) -> None:
        """Close what is open."""
        if self._sink is not None:
            self._sink.close()


class _TensorBoard:
    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class _Hosted:
    """W&B and trackio: trackio speaks W&B's language."""

    def __init__(self, module: ModuleType, run: RunDirectory, settings: Settings) -> None:
        # A resumed run goes on in the same place.
        where: dict[str, Any] = {"project": PROJECT, "name": run.path.name, "resume": "allow"}
        if module.__name__ == "wandb":
            where |= {"dir": str(run.path), "id": run.path.name}
        self._module: Any = module
        self._module.init(**where, config=settings.to_dict())

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


def check_tracker(settings: Settings) -> None:
    """Refuse a tracker that is not installed. Raises SettingsError."""
    if settings.tracker in HOSTED:
        _module(settings.tracker)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(
            f"tracker={name} is not installed: pip install 'fomoe-flwr[{name}]', "
            "or tracker=tensorboard"
        ) from error


def _sink(run: RunDirectory, settings: Settings) -> Sink | None:
    if settings.tracker in HOSTED:
        return _Hosted(_module(settings.tracker), run, settings)
    return _TensorBoard(run) if settings.tracker == "tensorboard" else None
