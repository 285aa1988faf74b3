"""Host memory that travels well, and copies between it and a GPU.

What is pinned travels directly, everything else through two small pinned buffers. A plain copy from
or to pageable memory runs at a fraction of the link's speed, and pinning a whole model
takes longer than copying it. Here one buffer is filled by all cores while the other one travels.
"""

from __future__ import annotations

import threading
from math import prod

import numpy as np
import psutil
import torch
from torch import Tensor

BUFFER_BYTES = 2**26
"""Of each of a thread's two pinned buffers."""
_WORTH_BYTES = 2**20
"""Below this a plain copy costs no more."""
_MOST_OF_FREE = 0.25
"""Share of the free memory that one pinned tensor may take."""
_SPARE = 0.9
"""Share of a GPU's free memory that may be used."""
_is_pinning = _is_sparing = False


def pin_host_memory() -> None:
    """Pin what `host_empty` returns from now on, while there is plenty of memory.

    For a process that computes on a GPU. Pinned memory travels several times as fast, and torch
    keeps what is freed for the next tensor of its size.
    """
    global _is_pinning
    _is_pinning = torch.cuda.is_available() and not _is_sparing


def spare_host_memory(is_sparing: bool = True) -> None:
    """Pin nothing in this process: torch would keep what is freed, where memory is short."""
    global _is_pinning, _is_sparing
    _is_sparing = is_sparing
    _is_pinning = _is_pinning and not is_sparing


def host_empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of any value in host memory."""
    num_bytes = prod(shape) * dtype.itemsize
    is_worth = _is_pinning and num_bytes >= _WORTH_BYTES
    if is_worth and num_bytes <= _MOST_OF_FREE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    # NumPy asks the system for large pages: a new tensor is filled several times as fast.
    memory = torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
    return memory.view(dtype).view(shape)


def has_room(device: torch.device, num_bytes: int, share: float = _SPARE) -> bool:
    """Tell whether so many bytes are at most a share of what a GPU has to give."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return num_bytes <= share * (torch.cuda.mem_get_info(device)[0] + unused)


def copy(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target` of the same shape, on any devices and of any types.

    The call returns when host memory has been read or written. Work on the device may go on.
    """
    target, source = target.detach(), source.detach()
    is_contiguous = target.is_contiguous() and source.is_contiguous()
    if target.is_cuda == source.is_cuda or source.nbytes < _WORTH_BYTES or not is_contiguous:
        target.copy_(source)
    elif target.is_cuda:
        _travel_up(target.view(-1), source.view(-1))
    else:
        _travel_down(target.view(-1), source.view(-1))


def _travel_up(target: Tensor, source: Tensor) -> None:
    if not source.is_pinned():
        _upload(target, source, _buffers(target.device))
        return
    step = BUFFER_BYTES // source.element_size()
    for start in range(0, len(source), step):
        here, piece = target[start : start + step], source[start : start + step]
        # The device casts faster than the host.
        is_same = here.dtype == piece.dtype
        here.copy_(piece if is_same else piece.to(here.device, non_blocking=True), is_same)
    torch.cuda.current_stream(target.device).synchronize()


def _travel_down(target: Tensor, source: Tensor) -> None:
    if not target.is_pinned():
        _download(target, source, _buffers(source.device))
        return
    step = BUFFER_BYTES // target.element_size()
    for start in range(0, len(source), step):
        here, piece = target[start : start + step], source[start : start + step]
        here.copy_(piece.to(here.dtype), non_blocking=True)
    torch.cuda.current_stream(source.device).synchronize()


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
