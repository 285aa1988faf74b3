"""Long vectors a slab at a time, so that what is made on the way is small and stays in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fomoe_flwr.codecs.sizes import CHUNK

SLAB = 32 * CHUNK
"""Numbers in a slab: 512 KiB in fp32, a whole number of every codec's blocks."""

_READ_SLAB = 32 * SLAB
"""Numbers read at once where nothing is made on the way."""


def slabs(num_elements: int, size: int = SLAB) -> Iterator[slice]:
    """Cut a vector into slabs."""
    for start in range(0, num_elements, size):
        yield slice(start, min(start + size, num_elements))


def is_finite(vector: Tensor) -> bool:
    """Tell whether a flat vector holds neither NaN nor infinity; needs no memory of its size."""
    for part in slabs(vector.numel(), _READ_SLAB):
        low, high = torch.aminmax(vector[part])  # both are NaN where anything is
        if not bool(torch.isfinite(high - low)) and not bool(torch.isfinite(vector[part]).all()):
            return False
    return True


def squared_norm(vector: Tensor) -> float:
    """Return the sum of squares of a flat vector: float32 in a slab, float64 over slabs."""
    total = 0.0
    for part in slabs(vector.numel()):
        total += float(torch.dot(vector[part], vector[part]))
    return total
