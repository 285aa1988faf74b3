"""Norm limits: a reply much larger than those of the others is scaled down before it is averaged.

What is compared is the root mean square of a vector, so that workers with more residents are not
larger for that; the shared part and the experts' are each held to their own median. Replies are
folded as they come and dropped, so a round's medians are known only at its end: they are the limits
of the next round that carries the same vectors. A minority cannot move a median, whatever it sends.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from fomoe_flwr.codecs.slabs import squared_norm

PARTS = ("shared", "experts")


class NormLimits:
    """The limits of one run; `factor` times the median is allowed, and 0 allows everything."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._medians: dict[str, float] = {}
        self._seen: dict[str, list[float]] = defaultdict(list)

    def fit(self, name: str, vectors: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], bool]:
        """Return a reply's flat vectors within the limits, and whether one had to be scaled.

        The first replies that carry vectors of this name have no limit yet. A vector whose squares
        fp32 cannot add up counts as zeros.
        """
        if not self.factor:
            return vectors, False
        fitted, is_clipped = [], False
        for part, vector in zip(PARTS, vectors, strict=True):
            key, size = f"{name}/{part}", vector.numel()
            rms = math.sqrt(squared_norm(vector) / size) if size else 0.0
            limit = self.factor * self._medians.get(key, math.inf)
            if size:
                self._seen[key].append(rms)
            if rms > limit:
                vector = vector * (limit / rms)
                is_clipped = True
            fitted.append(vector)
        return (fitted[0], fitted[1]), is_clipped

    def close_round(self) -> None:
        """Make the medians of the round's replies, as they came, the next limits."""
        for key, sizes in self._seen.items():
            self._medians[key] = statistics.median(sizes)
        self._seen.clear()

    def to_json(self) -> dict[str, float]:
        """Return what a checkpoint keeps: the medians."""
        return dict(self._medians)

    def restore(self, medians: Mapping[str, float]) -> None:
        """Take the medians of a checkpoint."""
        self._medians = {str(key): float(value) for key, value in medians.items()}
