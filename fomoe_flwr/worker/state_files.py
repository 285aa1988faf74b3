"""The files that a worker keeps from round to round: their names, and the weights in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

INNER, FEEDBACK = "round", "feedback"
"""What the files' names begin with: the inner optimizer's state; what lossy codecs left behind."""

WEIGHTS = "weights/"
"""What the names of weights begin with inside a file of inner state."""
_RECEIVED, _TRAINED = "received/", "trained/"


def state_file(folder: Path, server_round: int, kind: str = INNER) -> Path:
    """Return the path of what a worker stores at the end of a round."""
    return folder / f"{kind}-{server_round:06d}.safetensors"


def newest_before(folder: Path, server_round: int, kind: str = INNER) -> Path | None:
    """Return what this worker stored last: in the round before, unless it missed that one."""
    limit = state_file(folder, server_round, kind).name
    names = sorted(item.name for item in folder.glob(f"{kind}-*.safetensors"))
    earlier = [name for name in names if name < limit]
    return folder / earlier[-1] if earlier else None


def forget_rounds(folder: Path, keep: Collection[int]) -> None:
    """Remove the files of all rounds but these."""
    for kind in (INNER, FEEDBACK):
        kept = {state_file(folder, server_round, kind).name for server_round in keep}
        for stored in folder.glob(f"{kind}-*.safetensors"):
            if stored.name not in kept:
                stored.unlink(missing_ok=True)


def named_weights(
    received: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the weights last received and those trained since under names of one mapping."""
    named = {f"{_RECEIVED}{key}": value for key, value in received.items()}
    return named | {f"{_TRAINED}{key}": value for key, value in trained.items()}


def stored_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the weights received and trained that were saved with an inner state.

    Raises OSError or SafetensorError if they cannot be read.
    """
    with safe_open(path, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(WEIGHTS)]  # noqa: SIM118
        kept = {name.removeprefix(WEIGHTS): stored.get_tensor(name) for name in names}
    received, trained = (
        {key.removeprefix(kind): value for key, value in kept.items() if key.startswith(kind)}
        for kind in (_RECEIVED, _TRAINED)
    )
    return received, trained
