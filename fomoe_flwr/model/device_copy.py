"""Copies between pageable host memory and a GPU, through two small pinned buffers.

A copy from or to pageable memory runs at a fraction of the link's speed, and pinning a whole model
takes longer than copying it. Here one buffer is filled by all cores while the other one travels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

BUFFER_BYTES = 2**26
"""Of each of a thread's two pinned buffers."""
_WORTH_BYTES = 2**20
"""Below this a plain copy costs no more."""


def host_empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of any value in host memory.

    NumPy asks the system for large pages: a new tensor is filled several times as fast.
    """
    size = prod(shape)
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8))
    return memory.view(dtype).view(tuple(shape))


def copy(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target` of the same shape, on any devices and of any types.

    The call returns when host memory has been read or written. Work on the device may go on.
    """
    is_up = target.is_cuda and not source.is_cuda and not source.is_pinned()
    is_down = source.is_cuda and not target.is_cuda
    device = target.device if is_up else source.device
    if (
        not (is_up or is_down)
        or source.nbytes < _WORTH_BYTES
        or not (target.is_contiguous() and source.is_contiguous())
    ):
        target.copy_(source)
        return
    target, source = target.detach().view(-1), source.detach().view(-1)
    buffers = _buffers(device)
    if is_up:
        _upload(target, source, buffers)
    else:
        _download(target, source, buffers)


class _Buffer:
    """A pinned buffer and the moment at which the device is done with it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self.is_free = torch.cuda.Event()

    def of(self, like: Tensor, count: int) -> Tensor:
        """View the first `count` numbers of a type."""
        return self.bytes[: count * like.element_size()].view(like.dtype)


_own = threading.local()


def _buffers(device: torch.device) -> tuple[_Buffer, _Buffer]:
    """Return this thread's buffers for a device."""
    kept = _own.__dict__.setdefault("buffers", {})
    if device not in kept:
        kept[device] = (_Buffer(), _Buffer())
    found: tuple[_Buffer, _Buffer] = kept[device]
    return found


def _upload(target: Tensor, source: Tensor, buffers: tuple[_Buffer, _Buffer]) -> None:
    step = BUFFER_BYTES // source.element_size()
    with torch.cuda.device(target.device):
        for index, start in enumerate(range(0, len(source), step)):
            piece, buffer = source[start : start + step], buffers[index % 2]
            buffer.is_free.synchronize()
            staged = buffer.of(source, len(piece))
            staged.copy_(piece)
            here = target[start : start + step]
            if here.dtype == staged.dtype:
                here.copy_(staged, non_blocking=True)
            else:  # The device casts faster than the host.
                here.copy_(staged.to(here.device, non_blocking=True))
            buffer.is_free.record()


def _download(target: Tensor, source: Tensor, buffers: tuple[_Buffer, _Buffer]) -> None:
    step = BUFFER_BYTES // max(source.element_size(), target.element_size())
    arriving: list[tuple[Tensor, Tensor, _Buffer]] = []
    with torch.cuda.device(source.device):
        for index, start in enumerate(range(0, len(source), step)):
            buffer, piece = buffers[index % 2], source[start : start + step]
            if len(arriving) == 2:
                _take(*arriving.pop(0))
            buffer.is_free.synchronize()
            staged = buffer.of(target, len(piece))
            # Cast on the device where types differ.
            staged.copy_(piece.to(target.dtype), non_blocking=True)
            buffer.is_free.record()
            arriving.append((target[start : start + step], staged, buffer))
        for each in arriving:
            _take(*each)


def _take(target: Tensor, staged: Tensor, buffer: _Buffer) -> None:
    buffer.is_free.synchronize()
    target.copy_(staged)
