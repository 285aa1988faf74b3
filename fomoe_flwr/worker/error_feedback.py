"""Error feedback: what a lossy codec leaves behind goes with the worker's next pseudo-gradient.

A worker sends Q(d + decay * e) and keeps e = (d + decay * e) - Q(d + decay * e) (SparseLoCo, arXiv
2508.15706). Like Adam's moments, what is left of an expert belongs to the expert: it moves with its
place when the layout moves, and an expert that is new on the worker begins with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fomoe_flwr.codecs.sizes import WITH_FEEDBACK, Codec
from fomoe_flwr.codecs.vectors import rounding_error
from fomoe_flwr.config import WireSettings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.worker.state_files import resident_name, residents_in
from fomoe_flwr.worker.state_store import STATES, UNREADABLE, Stored, tell_lost

Vectors = tuple[Tensor, Tensor]
"""Flat fp32 vectors of the shared parameters and of the resident experts."""


class ErrorFeedback:
    """What one worker's codecs left behind, by state key; experts are `[R, ...]`."""

    def __init__(self, wire: WireSettings, spec: StateSpec, residents: Residents) -> None:
        self.wire = wire
        self.residents = residents
        pair = wire.codecs_up
        kept: list[Entry] = []
        kept += spec.shared if self._applies(pair.shared) else ()
        kept += spec.expert if self._applies(pair.experts) else ()
        self._layers = {entry.key: entry.layer for entry in kept}
        self.left = {entry.key: torch.zeros(_shape(entry, residents)) for entry in kept}

    def _applies(self, codec: Codec) -> bool:
        return self.wire.feedback > 0 and codec.name in WITH_FEEDBACK

    def correct(
        self, part: StateSpec, shared: Tensor, experts: Tensor, seed: Callable[[str], int]
    ) -> Vectors:
        """Return what to send in place of a pseudo-gradient, and keep what will not arrive of it.

        `part` is what the vectors carry; the rest is left as it is. `seed` is the one that the
        vectors will be encoded with.
        """
        pair = self.wire.codecs_up
        if self._applies(pair.shared):
            shared = part.pack_shared(self.left).mul_(self.wire.feedback).add_(shared)
            error = rounding_error(shared, pair.shared, seed("shared"))
            self._keep(part.shared, error, part.split_shared(error))
        if self._applies(pair.experts):
            experts = part.pack_experts(self.left).mul_(self.wire.feedback).add_(experts)
            error = rounding_error(experts, pair.experts, seed("experts"))
            self._keep(part.expert, error, part.split_experts(error, self.residents))
        return shared, experts

    def _keep(self, entries: tuple[Entry, ...], error: Tensor, pieces: dict[str, Tensor]) -> None:
        # A pseudo-gradient that is not finite is refused; what was left before stays.
        if not error.numel() or not bool(torch.isfinite(error[0])):
            return
        for entry in entries:
            entry.of(self.left).copy_(pieces[entry.key])

    def save(self, path: Path, on_disk: bool = True) -> None:
        """Store what is left; nothing where no codec leaves anything. See `StateStore.save`."""
        if not self.left:
            return
        tensors = {f"left/{key}": value for key, value in self.left.items()}
        for layer, residents in enumerate(self.residents):
            tensors[resident_name(layer)] = torch.tensor(residents, dtype=torch.long)
        STATES.save(path, tensors, {}, on_disk)

    def restore(self, path: Path) -> None:
        """Take what an earlier round left; start from nothing where there is no such file."""
        if not self.left:
            return
        try:
            with STATES.open(path) as stored:
                self._adopt(stored)
        except UNREADABLE as error:
            tell_lost(path, error)
            for value in self.left.values():
                value.zero_()

    def _adopt(self, stored: Stored) -> None:
        names, residents = set(stored.keys()), residents_in(stored)
        for key, value in self.left.items():
            if f"left/{key}" not in names:
                continue
            found = stored.get_tensor(f"left/{key}")
            layer = self._layers.get(key)
            if layer is None:
                value.copy_(found)
                continue
            before = {expert: i for i, expert in enumerate(residents[layer])}
            for place, expert in enumerate(self.residents[layer]):
                if expert in before:
                    value[place] = found[before[expert]]


def _shape(entry: Entry, residents: Residents) -> tuple[int, ...]:
    if entry.layer is None:
        return entry.shape
    return (len(residents[entry.layer]), *entry.shape[1:])
