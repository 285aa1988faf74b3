"""The pseudo-gradient: received minus trained weights of the part that a round synchronises."""

from __future__ import annotations

import torch

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
    """Return received minus trained weights, without packing the trained ones too."""
    shared, experts = pack(part, received)
    pieces = part.split_shared(shared) | part.split_experts(experts, residents)
    for entry in (*part.shared, *part.expert):
        piece, mine = pieces[entry.key], entry.of(trained)
        if mine.dtype != piece.dtype:
            # What was received was rounded before training began; that is no step of training.
            piece.copy_(piece.to(mine.dtype))
        piece -= mine.to("cpu", piece.dtype)
    return shared, experts
