"""The names of what a worker keeps from round to round, and of the weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

INNER, FEEDBACK = "round", "feedback"
"""What the files' names begin with: the inner optimizer's state; what lossy codecs left behind."""

WEIGHTS = "weights/"
"""What the names of weights begin with inside a file of inner state."""
_RECEIVED, _TRAINED = "received/", "trained/"


def state_file(folder: Path, server_round: int, kind: str = INNER) -> Path:
    """Return the path of what a worker stores at the end of a round."""
    return folder / f"{kind}-{server_round:06d}.safetensors"


def named_weights(
    received: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the weights last received and those trained since under names of one mapping."""
    named = {f"{_RECEIVED}{key}": value for key, value in received.items()}
    return named | {f"{_TRAINED}{key}": value for key, value in trained.items()}


def received_and_trained(
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part what `named_weights` put together."""
    received, trained = (
        {key.removeprefix(kind): value for key, value in stored.items() if key.startswith(kind)}
        for kind in (_RECEIVED, _TRAINED)
    )
    return received, trained
