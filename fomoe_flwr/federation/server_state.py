"""The server's state: global weights and outer state, in memory or in mapped files.

In files mode nothing here is a copy in memory. Initial weights are made in the files, the outer
step works on them, and a checkpoint is a second name of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fomoe_flwr import costs
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import Settings
from fomoe_flwr.errors import InputError
from fomoe_flwr.files import drop_folder, held_bytes
from fomoe_flwr.model.device_copy import pin_host_memory, spare_host_memory
from fomoe_flwr.model.homes import MEMORY, WEIGHTS, Home, SlabHome
from fomoe_flwr.model.pretrained import fill_pretrained
from fomoe_flwr.model.residency import build_model, build_skeleton
from fomoe_flwr.model.state import StateError, StateSpec, check_kind, check_state, hold, state_of
from fomoe_flwr.model.upcycling import fill_upcycled
from fomoe_flwr.report.units import size
from fomoe_flwr.run.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.export import SMALL_SHARD
from fomoe_flwr.run.memory import available_bytes
from fomoe_flwr.worker.device import pick_device

_SHARE = 0.5
"""Share of the free memory that `auto` gives to the state; workers and evaluation need some too."""


class ServerState:
    """What the server keeps of the model.

    Parameters
    ----------
    settings, config, spec
        The run's settings, and the model that they describe.
    run
        Its directory; files lie in `RUN/server`.
    checkpoint
        Where to go on. Without one the weights are new, or those of `model.pretrained`.
    """

    def __init__(
        self,
        settings: Settings,
        config: PreTrainedConfig,
        spec: StateSpec,
        run: RunDirectory,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.settings, self.run = settings, run
        if checkpoint is not None:
            self.model = build_skeleton(settings.model, config, torch.device("cpu"))
            self._check(checkpoint)  # Before a folder of the server that is there goes.
        self.choice, self.home = _choose(settings, run)
        spare_host_memory(self.home is not MEMORY)
        if self.home is MEMORY and pick_device(settings.eval.device).type == "cuda":
            pin_host_memory()
        self.outer = OuterStep(settings.outer, self.home)
        if checkpoint is None:
            kept: dict[str, Tensor] = {}

            def place(key: str, like: Tensor) -> Tensor:
                kept[key] = self.home.make(f"{WEIGHTS}/{key}", like)
                return kept[key]

            self.model = build_model(settings.model, config, seed=settings.seed, place=place)
            self.weights = {key: kept[key] for key in state_of(self.model)}
            if settings.model.pretrained:
                fill_pretrained(settings.model.pretrained, settings.model, spec, self.weights)
            elif settings.model.upcycle:
                fill_upcycled(settings.model, spec, self.weights, settings.seed)
        else:
            self.weights = self._take(checkpoint, spec)

    @property
    def shard(self) -> str:
        """Size of the files of an export; any where the model is in memory anyway."""
        return "" if self.home is MEMORY else SMALL_SHARD

    def save(self, server_round: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint = Checkpoint(server_round, self.weights, self.outer.tensors(), state)
        home = self.home if isinstance(self.home, SlabHome) else None
        save_checkpoint(self.run.checkpoints, checkpoint, self.settings.checkpoint.keep, home)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint whose tensors are not those of the model. Raises CheckpointError."""
        try:
            check_state(self.model, checkpoint.weights)
            for name, value in checkpoint.outer.items():
                check_kind(name, value, checkpoint.weights[name.partition("/")[2]])
        except StateError as error:
            raise CheckpointError(
                f"checkpoint of round {checkpoint.server_round} in {self.run.path}: {error}"
            ) from error

    def _take(self, checkpoint: Checkpoint, spec: StateSpec) -> dict[str, Tensor]:
        """Make the model hold a checkpoint's weights, and take its outer state."""
        entries = {entry.key: entry for entry in (*spec.shared, *spec.expert)}
        weights = {}
        for key in state_of(self.model):
            value = checkpoint.weights[key]
            if entries[key].is_parameter:
                value = torch.nn.Parameter(value, requires_grad=False)
            weights[key] = self.home.take(f"{WEIGHTS}/{key}", value, checkpoint.slabs)
        hold(self.model, weights)
        self.outer.restore(checkpoint.outer, checkpoint.slabs)
        return weights


def _choose(settings: Settings, run: RunDirectory) -> tuple[str, Home]:
    """Return where the state is to live: in words, and the home itself. Raises InputError."""
    mode, needed = settings.checkpoint.server_state, costs.summary(settings)
    memory = int(needed["memory/server_bytes"])
    free = available_bytes()
    if mode == "auto":
        mode = "memory" if memory <= _SHARE * free else "files"
    folder = run.path / "server"
    if mode == "memory":
        # What an earlier process kept in files; a checkpoint has names of its own for them.
        with suppress(InputError, OSError):
            drop_folder(folder)
        return f"in memory: {size(memory)}, {size(free)} are free", MEMORY
    disk = int(needed["disk/server_bytes"])
    room = shutil.disk_usage(run.path).free + held_bytes(run.path)
    if disk > room:
        raise InputError(
            f"checkpoint.server_state=files needs {size(disk)} of disk in {run.path}, "
            f"{size(room)} are free: make room, or lower "
            f"checkpoint.keep={settings.checkpoint.keep}"
        )
    held = int(needed["memory/server_files_bytes"])
    text = f"in files: {size(disk)} of disk in {folder}, {size(held)} of memory"
    return f"{text} instead of {size(memory)}", SlabHome(folder)
