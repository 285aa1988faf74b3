"""Merging: global weights that arrive meet the weights that a worker has trained since."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, State, StateSpec


def merge(current: State, part: StateSpec, pieces: State, own_share: float) -> None:
    """Make a part of the weights alpha * own + (1 - alpha) * given, in place (`outer.merge_alpha`).

    Source: Streaming DiLoCo, arXiv 2501.18512, section 2.3.
    """
    for entry in (*part.shared, *part.expert):
        target = entry.of(current)
        target.copy_(_mix(target, pieces[entry.key], own_share))


def merged(
    own: State,
    held: Residents,
    spec: StateSpec,
    pieces: State,
    residents: Residents,
    own_share: float,
) -> dict[str, Tensor]:
    """Return a whole slice merged; experts that are new on the worker are as given.

    `own` has the experts `held`, `pieces` those of `residents`.
    """
    found = {key: value.clone() for key, value in pieces.items()}
    for entry in (*spec.shared, *spec.expert):
        value, target = own[entry.key], found[entry.key]
        if entry.layer is None or tuple(held[entry.layer]) == tuple(residents[entry.layer]):
            target.copy_(_mix(value, target, own_share))
            continue
        to, source = _common(entry, residents, held)
        target[to] = _mix(value[source], target[to], own_share)
    return found


def _mix(own: Tensor, given: Tensor, own_share: float) -> Tensor:
    """Return the mixture in the type that is given; what is no fraction is taken as given."""
    if not own_share or not given.is_floating_point():
        return given
    return own.to(given.dtype).mul(own_share).add_(given.to(own.device), alpha=1 - own_share)


def _common(entry: Entry, residents: Residents, held: Residents) -> tuple[Tensor, Tensor]:
    """Return the rows of the experts that are in both, in the first and in the second."""
    assert entry.layer is not None
    place = {expert: row for row, expert in enumerate(held[entry.layer])}
    now: Sequence[int] = residents[entry.layer]
    pairs = [(row, place[expert]) for row, expert in enumerate(now) if expert in place]
    to, source = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    return to, source
