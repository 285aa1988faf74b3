"""The pseudo-gradient: received minus trained weights of the part that a round synchronises."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoe_flwr.model.device_copy import copy, host_empty
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.worker.error_feedback import Vectors


def pack(part: StateSpec, state: State) -> Vectors:
    """Pack a worker's part of a state into two flat vectors."""
    return part.pack_shared(state), part.pack_experts(state)


def gather(part: StateSpec, state: State) -> Vectors:
    """Take part in gathering what the first process packs; keep nothing of it."""
    for entry in (*part.shared, *part.expert):
        state[entry.key]
    return torch.empty(0), torch.empty(0)


def difference(part: StateSpec, received: State, trained: State, residents: Residents) -> Vectors:
    """Return received minus trained weights."""
    shared = host_empty(part.shared_size)
    experts = host_empty(part.experts_size(residents))
    pieces = part.split_shared(shared) | part.split_experts(experts, residents)
    for entry in (*part.shared, *part.expert):
        _subtract(pieces[entry.key], entry.of(received), entry.of(trained))
    return shared, experts


def _subtract(target: Tensor, received: Tensor, trained: Tensor) -> None:
    """Write received minus trained, computed where the trained weights lie."""
    if trained.is_cuda and not received.is_cuda:
        there = torch.empty(received.shape, dtype=received.dtype, device=trained.device)
        copy(there, received)
        received = there
    if trained.dtype != received.dtype:
        # What was received was rounded before training began; that is no step of training.
        received = received.to(trained.dtype).to(received.dtype)
    if trained.is_cuda:
        copy(target, received - trained)
    else:
        torch.sub(received, trained, out=target)
