"""Shards: the rows of a tensor that this process holds, and the whole tensor again.

FSDP2 cuts every parameter along its first axis into as many parts as there are processes, in order,
the first ones larger (`torch.chunk`). Gradients and moments are cut the same way. A tensor that is
not cut is its own whole, so code that asks here need not know whether there are shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fomoe_flwr.model.device_copy import copy, host_empty


def local(tensor: Tensor) -> Tensor:
    """View the rows that this process holds, outside of autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_here(tensor: Tensor) -> slice:
    """Tell which rows of the whole tensor `local` gives."""
    num_rows = tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return slice(0, num_rows)
    mesh = tensor.device_mesh
    most = -(-num_rows // mesh.size())
    start = min(num_rows, most * mesh.get_local_rank())
    return slice(start, start + tensor.to_local().shape[0])


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from all processes, each of which must ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, value: Tensor) -> None:
    """Copy this process's rows of a whole value into a tensor."""
    copy(local(target), value[rows_here(target)] if isinstance(target, DTensor) else value)


def parted_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Copy a whole value to a tensor's device, cut as the tensor is."""
    if not isinstance(tensor, DTensor):
        is_host = tensor.device.type == "cpu"
        fresh = (
            host_empty(*value.shape, dtype=value.dtype)
            if is_host
            else torch.empty(value.shape, dtype=value.dtype, device=tensor.device)
        )
        copy(fresh, value)
        return fresh
    parted = torch.zeros_like(tensor)
    fill(parted, value)
    return parted


class FullTensors(Mapping[str, Tensor]):
    """A state whose tensors are gathered one by one, when they are asked for.

    All processes must ask for the same keys in the same order.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, key: str) -> Tensor:
        return whole(self._state[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
