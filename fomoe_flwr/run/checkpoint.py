"""Checkpoints of the server: atomic folders from which a run goes on exactly.

    checkpoints/round-000004/weights.safetensors   global weights, our state keys
    checkpoints/round-000004/outer.safetensors     outer state
    checkpoints/round-000004/state.json            round, spec and layout digests, totals
    checkpoints/latest                             name of the newest folder

A server whose state lies in files (`checkpoint.server_state`) writes instead of the two files

    checkpoints/round-000004/slabs/weights/KEY.safetensors     one file for each tensor
    checkpoints/round-000004/slabs/momentum/KEY.safetensors    its outer state, by kind

which are second names of the files that it works on: no byte is copied. A server of either kind
reads both forms. A folder is filled under a temporary name and renamed, so one that has its name is
whole. The layout and the data order are functions of seed and round and need no storing; workers
keep their inner state themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe_flwr.errors import InputError, one_line
from fomoe_flwr.files import make_folder, remove_drafts, remove_folder, replace_folder, save_text
from fomoe_flwr.model.homes import WEIGHTS, SlabHome, slab_path, stored_name
from fomoe_flwr.model.slab import check_slab
from fomoe_flwr.run.directory import checkpoint_name, stored_rounds

_SLABS = "slabs"
"""Folder of a checkpoint's tensor files, and in `state.json` the bytes of each."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or belongs to something else."""


@dataclass(frozen=True)
class Checkpoint:
    """The server's state at the end of a round."""

    server_round: int
    weights: Mapping[str, Tensor]
    outer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    slabs: Path | None = None
    """Folder of the files of a checkpoint that has one for each tensor."""


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep: int, home: SlabHome | None = None
) -> Path:
    """Write a checkpoint, move `latest` to it and drop all but the newest `keep`.

    With a `home` its files become the checkpoint's: they are named, not copied.
    """
    target = folder / checkpoint_name(checkpoint.server_round)

    def fill(draft: Path) -> None:
        state = {"round": checkpoint.server_round, **checkpoint.state}
        if home is None:
            save_file(dict(checkpoint.weights), draft / "weights.safetensors")
            save_file(dict(checkpoint.outer), draft / "outer.safetensors")
        else:
            state[_SLABS] = home.sizes()
            home.name_in(draft / _SLABS)
        (draft / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    make_folder(folder)
    remove_drafts(folder)
    replace_folder(target, fill)
    save_text(target.name + "\n", folder / "latest")
    for old in stored_rounds(folder)[:-keep]:
        remove_folder(folder / checkpoint_name(old))
    return target


def load_latest(folder: Path) -> Checkpoint:
    """Read the newest checkpoint. Raises CheckpointError, one line, if there is none to read."""
    rounds = stored_rounds(folder)
    if not rounds:
        raise CheckpointError(f"{folder} holds no checkpoint: nothing to resume from")
    source = folder / checkpoint_name(rounds[-1])
    try:
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        slabs = state.pop(_SLABS, None)
        weights, outer = _two_files(source) if slabs is None else _slabs(source / _SLABS, slabs)
        return Checkpoint(
            server_round=int(state["round"]),
            weights=weights,
            outer=outer,
            state=state,
            slabs=None if slabs is None else source / _SLABS,
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {source}: {one_line(error)}") from error


def _two_files(source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for name in ("weights", "outer"):
        # Opened before: safetensors says of a file that it may not read that there is none.
        (source / f"{name}.safetensors").open("rb").close()
    return load_file(source / "weights.safetensors"), load_file(source / "outer.safetensors")


def _slabs(folder: Path, sizes: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """View weights and outer state in one file each, all of which must be there and whole."""
    weights: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for name, num_bytes in sizes.items():
        path, key = slab_path(folder, name), stored_name(name)
        check_slab(path, key, num_bytes)
        into = weights if name.startswith(f"{WEIGHTS}/") else outer
        into[key] = load_file(path)[key]
    return weights, outer
