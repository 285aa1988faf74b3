"""Long vectors a slab at a time, so that what is made on the way is small and stays in cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from fomoe_flwr.codecs.sizes import CHUNK

SLAB = 32 * CHUNK
"""Numbers in a slab: 512 KiB in fp32, a whole number of every codec's blocks."""

_DEVICE_SLAB = 128 * SLAB
"""Numbers in a slab on a GPU, where starting work costs more than memory."""

_WORTH_A_THREAD = 8
"""Slabs from which a second thread saves more than its start costs."""


def blank(num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a flat vector to be filled; numpy asks for huge pages, torch does not."""
    if not num_elements:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.empty(num_elements * dtype.itemsize, np.uint8)).view(dtype)


def slabs(num_elements: int, size: int = SLAB) -> Iterator[slice]:
    """Cut a vector into slabs."""
    for start in range(0, num_elements, size):
        yield slice(start, min(start + size, num_elements))


def spread(vector: Tensor, work: Callable[[Iterator[slice]], None]) -> None:
    """Give the slabs of a flat vector to as many threads as torch has.

    Each thread calls `work` once with an iterator that all of them share, so it can keep scratch
    memory from slab to slab. Slabs come in order.
    """
    if vector.device.type != "cpu":
        return work(slabs(vector.numel(), _DEVICE_SLAB))
    parts = list(slabs(vector.numel()))
    threads = torch.get_num_threads()
    count = min(threads, len(parts) // _WORTH_A_THREAD)
    if count <= 1:
        return work(iter(parts))
    shared = iter(parts)
    # A slab is one thread's work. Else torch would cut each step again and wait after it.
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in [pool.submit(work, shared) for _ in range(count)]:
                done.result()
        finally:
            torch.set_num_threads(threads)  # new threads take the number that was set last


def is_finite(vector: Tensor) -> bool:
    """Tell whether a flat vector holds neither NaN nor infinity; needs no memory of its size."""
    # Either makes a sum infinite or NaN. So can large numbers: only then a closer look is needed.
    return isfinite(float(vector.sum())) or all(
        not part.numel() or -torch.inf < float(part.amin()) <= float(part.amax()) < torch.inf
        for part in (vector[piece] for piece in slabs(vector.numel()))
    )


def squared_norm(vector: Tensor) -> float:
    """Return the sum of squares of a flat vector: float32 in a slab, float64 over slabs."""
    total = 0.0
    for part in slabs(vector.numel()):
        total += float(torch.dot(vector[part], vector[part]))
    return total
