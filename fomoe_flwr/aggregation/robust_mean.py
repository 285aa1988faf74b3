"""Robust means over holders: number by number a trimmed mean or the median of the copies.

An order statistic needs all copies of a number at once, so replies wait on the disk until the last
one is there and are then read a slab at a time: memory is that of the plain mean, and the disk
holds what workers sent. The files have no name and go with the process, however it ends.

Trimmed mean and median bound what a minority of an expert's holders can do (Yin et al., ICML 2018).
A single copy is taken as it is; of two copies the mean is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.codecs.slabs import slabs
from fomoe_flwr.model.homes import MEMORY, Home
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import StateSpec


@dataclass(frozen=True)
class _Spooled:
    """One reply, its vectors in files."""

    shared: Tensor
    experts: Tensor
    residents: Residents


class RobustMean(HolderMean):
    """A holder mean whose values `settle` replaces by a trimmed mean or the median.

    `trim` is the share of copies that is left out at either end, rounded down; 0.5 is the median.
    Replies weigh alike. Counts and disagreement are those of the plain mean.
    """

    def __init__(
        self, spec: StateSpec, router_rows: str, trim: float, folder: Path, home: Home = MEMORY
    ) -> None:
        super().__init__(spec, router_rows, home)
        self._trim = trim
        self._folder = folder
        self._spooled: list[_Spooled] = []

    def fold(
        self,
        shared: Tensor,
        experts: Tensor,
        residents: Residents,
        weight: float,
        expert_weights: Sequence[Tensor] | None = None,
    ) -> None:
        """Add one worker's flat fp32 vectors; they are kept on the disk until `settle`."""
        super().fold(shared, experts, residents, weight, expert_weights)
        self._spooled.append(_Spooled(self._spool(shared), self._spool(experts), residents))

    def settle(self) -> None:
        """Put the robust means in the place of the plain ones, and let the replies go."""
        if self._spooled:
            self._center([reply.shared for reply in self._spooled], self.shared)
        pieces = [self.spec.split_experts(r.experts, r.residents) for r in self._spooled]
        routers = [self.spec.split_shared(r.shared) for r in self._spooled]
        for entry in self.row_entries:
            layer = self.spec.layer_of(entry.key)
            for expert in self.returned(layer).tolist():
                copies = []
                for reply, experts, shared in zip(self._spooled, pieces, routers, strict=True):
                    held = reply.residents[layer]
                    if expert in held and entry.layer is not None:
                        copies.append(experts[entry.key][held.index(expert)].view(-1))
                    elif expert in held:
                        copies.append(shared[entry.key][expert].view(-1))
                self._center(copies, self.rows[entry.key][expert].view(-1))
        self._spooled.clear()

    def _spool(self, vector: Tensor) -> Tensor:
        if not vector.numel():
            return vector
        with tempfile.TemporaryFile(dir=self._folder) as file:
            vector.numpy().tofile(file)
            file.flush()
            # The mapping keeps the file alive.
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(vector.numel(),)))

    def _center(self, copies: Sequence[Tensor], into: Tensor) -> None:
        count = len(copies)
        cut = min(int(self._trim * count), (count - 1) // 2)
        for part in slabs(into.numel()):
            ordered = torch.stack([copy[part] for copy in copies]).sort(0).values
            torch.mean(ordered[cut : count - cut], 0, out=into[part])
