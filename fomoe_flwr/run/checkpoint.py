"""Checkpoints of the server: atomic folders from which a run goes on exactly.

    checkpoints/round-000004/weights.safetensors   global weights, our state keys
    checkpoints/round-000004/outer.safetensors     outer state
    checkpoints/round-000004/state.json            round, spec and layout digests, totals
    checkpoints/latest                             name of the newest folder

A folder is filled under a temporary name and renamed, so one that has its name is whole. The layout
and the data order are functions of seed and round and need no storing; workers keep their inner
state themselves.
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
from fomoe_flwr.run.directory import checkpoint_name, stored_rounds


class CheckpointError(InputError):
    """A checkpoint that cannot be read or belongs to something else."""


@dataclass(frozen=True)
class Checkpoint:
    """The server's state at the end of a round."""

    server_round: int
    weights: Mapping[str, Tensor]
    outer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, move `latest` to it and drop all but the newest `keep`."""
    target = folder / checkpoint_name(checkpoint.server_round)

    def fill(draft: Path) -> None:
        save_file(dict(checkpoint.weights), draft / "weights.safetensors")
        save_file(dict(checkpoint.outer), draft / "outer.safetensors")
        state = {"round": checkpoint.server_round, **checkpoint.state}
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
        for name in ("weights", "outer"):
            # Opened before: safetensors says of a file that it may not read that there is none.
            (source / f"{name}.safetensors").open("rb").close()
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(
            server_round=int(state["round"]),
            weights=load_file(source / "weights.safetensors"),
            outer=load_file(source / "outer.safetensors"),
            state=state,
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {source}: {one_line(error)}") from error
