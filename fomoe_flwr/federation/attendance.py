"""Attendance: which workers a round can count on, from what happened in the rounds before.

A worker is away once it has missed `layout.rehome_after` rounds in a row. If it has no node, it is
back as soon as a node plays it. If it has a node but its replies could not be used, it rests for as
many rounds as it missed, and is then tried for one round. It rests because experts would otherwise
move away from it and back again and again, which costs more than a failing worker contributes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Attendance:
    """Rounds that workers missed; a checkpoint keeps it as `to_json` has it."""

    num_workers: int
    patience: int
    """Missed rounds in a row after which a worker is away; 0 means never."""
    missed: dict[int, int] = field(default_factory=dict)
    """Rounds in a row without a reply that counted, or without a node."""
    resting: dict[int, int] = field(default_factory=dict)
    """The round in which a worker that failed is tried again."""

    def expected(self) -> list[int]:
        """List the workers that are not away."""
        return [
            worker
            for worker in range(self.num_workers)
            if not self.patience or self.missed.get(worker, 0) < self.patience
        ]

    def present(self, server_round: int, played: Collection[int]) -> list[int]:
        """List the workers that hold experts in a round; `played` are those that have a node."""
        expected = self.expected()
        back = [w for w in played if server_round >= self.resting.get(w, 0)]
        return sorted({*expected, *back})

    def welcome(self, workers: Collection[int]) -> None:
        """Count on workers again: they answered too late, or there is no quorum without them."""
        for worker in workers:
            self.missed.pop(worker, None)
            self.resting.pop(worker, None)

    def ensure_quorum(
        self, server_round: int, free: Collection[int], busy: Collection[int], needed: int
    ) -> None:
        """Count on all free workers if fewer than `needed` of those present are free.

        So workers that failed and rest are called back when there is no quorum without them.
        """
        present = set(self.present(server_round, {*free, *busy}))
        if len(present.intersection(free)) < needed:
            self.welcome(set(free) - present)

    def leave(self, workers: Collection[int]) -> None:
        """Note that workers are away when the run begins."""
        self.missed |= dict.fromkeys(workers, self.patience)

    def note(
        self,
        server_round: int,
        played: Collection[int],
        sent: Collection[int],
        replied: Collection[int],
    ) -> None:
        """Take in a round: who had a node, who got a task, and whose reply counted."""
        for worker in range(self.num_workers):
            if worker in replied:
                self.missed.pop(worker, None)
                self.resting.pop(worker, None)
            elif worker not in played:
                self.missed[worker] = self.missed.get(worker, 0) + 1
                self.resting.pop(worker, None)
            elif worker in sent:
                missed = self.missed[worker] = self.missed.get(worker, 0) + 1
                if self.patience and missed >= self.patience:
                    self.resting[worker] = server_round + 1 + missed

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dictionaries."""
        return {
            "missed": [self.missed.get(w, 0) for w in range(self.num_workers)],
            "resting": [self.resting.get(w, 0) for w in range(self.num_workers)],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], num_workers: int, patience: int) -> Attendance:
        """Read what `to_json` wrote."""
        missed, resting = (
            {worker: value for worker, value in enumerate(data[key]) if value}
            for key in ("missed", "resting")
        )
        return cls(num_workers, patience, missed, resting)
