"""The table of residents: which worker holds which experts, layer by layer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Who holds which experts.

    `residents[layer][worker]` is the strictly increasing tuple of experts that the worker holds.
    Raises ValueError for anything else, and for an expert without a holder: its weights would be
    nobody's to train. A worker may hold nothing, as one does that has left.
    """

    num_experts: int
    residents: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if self.num_experts < 1 or not self.residents or not self.residents[0]:
            raise ValueError("a layout needs at least one layer, one worker and one expert")
        for layer, workers in enumerate(self.residents):
            if len(workers) != self.num_workers:
                raise ValueError(
                    f"layer {layer} has {len(workers)} workers, layer 0 has {self.num_workers}"
                )
            for worker, experts in enumerate(workers):
                if list(experts) != sorted(set(experts)):
                    raise ValueError(
                        f"experts of worker {worker} in layer {layer} must be sorted and distinct"
                    )
            held = {expert for experts in workers for expert in experts}
            if held != set(range(self.num_experts)):
                raise ValueError(
                    f"layer {layer} must give experts 0 to {self.num_experts - 1} a holder each, "
                    f"and no other expert"
                )

    @classmethod
    def full(cls, num_layers: int, num_experts: int, num_workers: int) -> Layout:
        """Return the layout of full replicas: everybody holds everything."""
        everything = tuple(range(num_experts))
        return cls(num_experts, ((everything,) * num_workers,) * num_layers)

    @property
    def num_layers(self) -> int:
        """Number of layers that carry experts."""
        return len(self.residents)

    @property
    def num_workers(self) -> int:
        """Number of workers (the paper's M)."""
        return len(self.residents[0])

    @property
    def overlaps(self) -> tuple[int, int]:
        """Fewest and most holders of an expert; they differ in `explicit` layouts only."""
        counts = [len(holders) for layer in self._holders for holders in layer]
        return min(counts), max(counts)

    def of_worker(self, worker: int) -> tuple[tuple[int, ...], ...]:
        """Return one worker's resident experts, a sorted tuple for each layer."""
        return tuple(workers[worker] for workers in self.residents)

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the workers that hold an expert, in increasing order."""
        return self._holders[layer][expert]

    @cached_property
    def _holders(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        table = []
        for workers in self.residents:
            holders: list[list[int]] = [[] for _ in range(self.num_experts)]
            for worker, experts in enumerate(workers):
                for expert in experts:
                    holders[expert].append(worker)
            table.append(tuple(map(tuple, holders)))
        return tuple(table)

    def digest(self) -> str:
        """Return 16 hex digits that identify the layout on the wire."""
        text = json.dumps([self.num_experts, self.residents], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> list[list[list[int]]]:
        """Return plain lists: [layer][worker] -> resident experts."""
        return [[list(experts) for experts in workers] for workers in self.residents]

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Read what `to_json` wrote; raise ValueError for anything that is not a layout."""
        try:
            residents = tuple(tuple(tuple(experts) for experts in workers) for workers in data)
        except TypeError as error:
            raise ValueError("a layout is a list of layers of workers of expert ids") from error
        experts = [expert for workers in residents for held in workers for expert in held]
        # bool is an int and 1.0 equals 1: both would pass the checks of the class.
        if any(type(expert) is not int for expert in experts):
            raise ValueError("expert ids in a layout must be integers")
        return cls(max(experts, default=-1) + 1, residents)

    def moved_from(self, previous: Layout) -> int:
        """Count the residencies (layer, worker, expert) that `previous` did not have.

        Each of them is an expert that a worker has to fetch and whose optimizer state starts anew.
        """
        for name in ("num_layers", "num_workers", "num_experts"):
            mine, other = getattr(self, name), getattr(previous, name)
            if mine != other:
                raise ValueError(f"layouts differ in {name}: {mine} and {other}")
        return sum(
            len(set(now).difference(before))
            for now_workers, before_workers in zip(self.residents, previous.residents, strict=True)
            for now, before in zip(now_workers, before_workers, strict=True)
        )
