"""How a step is split: which process computes which part of its micro-batches.

The windows of a step and their order stay those of a single process. As many micro-batches as
possible are computed whole, each by one process: their number has the greatest common divisor g
with the number of processes, so g of them are under way at a time. If there are more processes than
that, those that share a micro-batch part its windows evenly, or nearly so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import LocalSettings, SettingsError


@dataclass(frozen=True)
class BatchSplit:
    """The parts of one step: `accumulate` micro-batches of `batch_size` windows."""

    batch_size: int
    accumulate: int
    num_processes: int

    @classmethod
    def of(cls, local: LocalSettings, num_processes: int) -> BatchSplit:
        """Split a step. Raises SettingsError if some process would get nothing."""
        split = cls(local.batch_size, local.accumulate, num_processes)
        if split.sharing > local.batch_size:
            raise SettingsError(
                f"local.processes={num_processes} cannot share local.batch_size={local.batch_size} "
                f"windows of local.accumulate={local.accumulate} micro-batches: use at most "
                f"{most_processes(local, num_processes)}, or raise local.batch_size to "
                f"{split.sharing} or local.accumulate to {num_processes}"
            )
        return split

    @property
    def together(self) -> int:
        """Micro-batches that are under way at a time."""
        return math.gcd(self.accumulate, self.num_processes)

    @property
    def sharing(self) -> int:
        """Processes that share a micro-batch."""
        return self.num_processes // self.together

    @property
    def passes(self) -> int:
        """Forward and backward passes of every process in a step."""
        return self.accumulate // self.together

    def place(self, rank: int) -> tuple[int, slice]:
        """Tell which of the micro-batches under way a process works on, and on which windows."""
        index, place = divmod(rank, self.sharing)
        each, more = divmod(self.batch_size, self.sharing)
        start = place * each + min(place, more)
        return index, slice(start, start + each + (place < more))

    def share(self, rank: int) -> float:
        """Return the weight of a process's mean loss, so that their plain mean is the step's."""
        rows = self.place(rank)[1]
        return self.sharing * (rows.stop - rows.start) / self.batch_size


def most_processes(local: LocalSettings, limit: int) -> int:
    """Return the largest number of processes up to `limit` that all get something to do."""
    return next(
        count
        for count in range(limit, 0, -1)
        if count // math.gcd(local.accumulate, count) <= local.batch_size
    )
