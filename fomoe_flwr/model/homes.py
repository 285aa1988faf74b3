"""Homes: where the server's tensors live, in memory or in mapped files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fomoe_flwr.files import renew_folder
from fomoe_flwr.model.device_copy import host_empty
from fomoe_flwr.model.slab import Slab, give_name, scratch

WEIGHTS = "weights"
"""Kind of the global weights; the kinds of outer state are those of `OuterStep.tensors`."""


class Home:
    """Memory: the plain home, which needs no care."""

    def make(self, name: str, like: Tensor) -> Tensor:
        """Return zeros of the shape and type of `like`, to be kept under a name."""
        del name
        return host_empty(*like.shape, dtype=like.dtype).zero_()

    def before_write(self, name: str) -> None:
        """Get ready to write to what is kept under a name; to be called before."""

    def scratch(self, *shape: int) -> Tensor:
        """Return fp32 numbers of any value, to be filled, that nobody keeps."""
        return host_empty(*shape)

    def take(self, name: str, value: Tensor, source: Path | None = None) -> Tensor:
        """Keep a value of a checkpoint under a name; it may be kept in that checkpoint's folder."""
        del source
        kept = self.make(name, value)
        kept.copy_(value)
        return kept


MEMORY = Home()


class SlabHome(Home):
    """A folder of mapped files, one for each tensor; the folder is this run's alone.

    What an earlier process left there is removed: a run goes on from its checkpoint. Raises
    InputError for a folder that holds something else.
    """

    def __init__(self, folder: Path) -> None:
        renew_folder(folder)
        self.folder = folder
        self._slabs: dict[str, Slab] = {}

    def make(self, name: str, like: Tensor) -> Tensor:
        """Return mapped zeros; of a parameter, a parameter."""
        slab = Slab(slab_path(self.folder, name), stored_name(name), like)
        tensor = slab.create()
        self._slabs[name] = slab
        return tensor

    def take(self, name: str, value: Tensor, source: Path | None = None) -> Tensor:
        """Keep a value of a checkpoint: its own file if it has one in the folder `source`."""
        if source is None:
            return super().take(name, value)
        slab = Slab(slab_path(self.folder, name), stored_name(name), value)
        tensor = slab.adopt(slab_path(source, name))
        self._slabs[name] = slab
        return tensor

    def before_write(self, name: str) -> None:
        """Move to a copy where a checkpoint names the file."""
        self._slabs[name].before_write()

    def scratch(self, *shape: int) -> Tensor:
        """Return mapped numbers in a file without a name."""
        return scratch(self.folder, torch.Size(shape))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by the name of what it keeps."""
        return {name: slab.num_bytes for name, slab in self._slabs.items()}

    def name_in(self, folder: Path) -> None:
        """Give every file a second name in a folder of a checkpoint."""
        for name, slab in self._slabs.items():
            target = slab_path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            give_name(slab.path, target)


def slab_path(folder: Path, name: str) -> Path:
    """Return the file that keeps what has a name, `kind/state key`."""
    return folder / f"{name}.safetensors"


def stored_name(name: str) -> str:
    """Return a tensor's name inside its file: that of `weights` is the state key alone."""
    return name.removeprefix(f"{WEIGHTS}/")
