"""The names of what a worker keeps from round to round, and of the weights in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

INNER, FEEDBACK, AHEAD = "round", "feedback", "ahead"
"""What the files' names begin with: the inner optimizer's state; what lossy codecs left behind; the
inner optimizer's state after the steps of a delay."""

PLACE = "place"
"""Name of the metadata that say at which step of the run a state is."""

WEIGHTS = "weights/"
"""What the names of weights begin with inside a file of inner state."""
_RECEIVED, _TRAINED = "received/", "trained/"


class Tensors(Protocol):
    """Tensors by name, which nobody may change."""

    def keys(self) -> Iterable[str]:
        """List the names."""

    def get_tensor(self, name: str) -> Tensor:
        """Return one tensor."""


def state_file(folder: Path, server_round: int, kind: str = INNER) -> Path:
    """Return the path of what a worker stores at the end of a round."""
    return folder / f"{kind}-{server_round:06d}.safetensors"


def named_weights(
    received: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the weights last received and those trained since under names of one mapping."""
    named = {f"{_RECEIVED}{key}": value for key, value in received.items()}
    return named | {f"{_TRAINED}{key}": value for key, value in trained.items()}


def kept_weights(stored: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights last received and those trained since, which nobody may change."""

    def named(kind: str) -> dict[str, Tensor]:
        prefix = WEIGHTS + kind
        names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): stored.get_tensor(name) for name in names}

    return named(_RECEIVED), named(_TRAINED)


def resident_name(layer: int) -> str:
    """Return the name of the experts whose rows a state has in a sparse layer."""
    return f"resident/{layer}"


def residents_in(stored: Tensors) -> tuple[tuple[int, ...], ...]:
    """Return the experts whose rows a state has, layer by layer."""
    count = sum(name.startswith("resident/") for name in stored.keys())  # noqa: SIM118
    return tuple(tuple(stored.get_tensor(resident_name(layer)).tolist()) for layer in range(count))
