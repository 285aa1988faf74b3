"""Memory of a worker's training state, and how many experts fit into a given memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.costs.counts import parameter_counts
from fomoe_flwr.costs.traffic import RoundBytes, num_buffers, state_factor
from fomoe_flwr.layout import LayoutContext
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.parameters.shapes import num_sparse_layers

STATE_BYTES = {"adamw": 16, "sgd": 8}
"""fp32 training state, bytes a parameter: weight and gradient, and for AdamW its two moments."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 4, "bfloat16_parameters": 2}
"""Bytes of a weight by `local.precision`; its gradient and moments are of the same type."""


def memory_bytes(num_parameters: int, optimizer: str, precision: str = "float32") -> int:
    """Return a worker's training state in bytes; ghosts are not held, so they cost nothing.

    Activations come on top. `optimizer` and `precision` are what `local.optimizer` and
    `local.precision` take.
    """
    if optimizer not in STATE_BYTES:
        raise SettingsError(
            f"local.optimizer={optimizer} has no cost model: it is not one of "
            f"{', '.join(STATE_BYTES)}"
        )
    return num_parameters * STATE_BYTES[optimizer] * WEIGHT_BYTES[precision] // 4


def state_bytes(settings: Settings) -> float:
    """Return the bytes of training state a parameter: `costs.bytes_per_parameter` or our own."""
    local = settings.local
    return settings.costs.bytes_per_parameter or memory_bytes(1, local.optimizer, local.precision)


FILES_BYTES = 2**29
"""What a server whose state lies in files needs beside one reply: slabs, buffers, messages."""


@dataclass(frozen=True)
class ServerMemory:
    """Bytes that the server holds at the end of a round, beside Flower and evaluation."""

    state: int
    """The global weights, fp32."""
    outer_state: int
    """Nesterov's velocity, or the averaged moments."""
    means: int
    """Running means of what workers return."""
    message: int
    """The largest task or reply: they are written and folded one by one."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.outer_state + self.means + self.message

    @property
    def in_files(self) -> int:
        """What is left of it in memory with `checkpoint.server_state=files`, at the most."""
        return self.message + FILES_BYTES


@dataclass(frozen=True)
class ServerDisk:
    """Bytes of the run's directory where the server's state lies in files, at the most."""

    state: int
    """Weights and outer state."""
    checkpoints: int
    """As much for each checkpoint that is kept; right after one is written it takes nothing."""
    means: int
    """Running means of what workers return. An export comes when there are none."""
    messages: int
    """A worker's part in fp32 while it is packed, and a reply as it came and decoded."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.checkpoints + self.means + self.messages


def server_disk(settings: Settings, memory: ServerMemory, num_resident: int) -> ServerDisk:
    """Return what the server of a star has on the disk with `checkpoint.server_state=files`.

    `num_resident` are the parameters of the largest worker.
    """
    state = memory.state + memory.outer_state
    return ServerDisk(
        state=state,
        checkpoints=settings.checkpoint.keep * state,
        means=memory.means,
        messages=math.ceil(2 * 4 * state_factor(settings.outer) * num_resident),
    )


def server_memory(settings: Settings, sent: RoundBytes) -> ServerMemory:
    """Return what the server of a star holds, in bytes."""
    outer, buffers = settings.outer, num_buffers(settings.model)
    total = parameter_counts(settings.model).total
    moments = len(MOMENTS) if outer.name in ("local_adamw", "des_loc") else 0
    velocity = int(outer.name == "nesterov" and outer.momentum > 0)
    return ServerMemory(
        state=4 * (total + buffers),
        outer_state=4 * (velocity * (total + buffers) + moments * total),
        means=4 * math.ceil(((1 + moments) * total + buffers) / outer.fragments),
        message=max(*sent.down_per_worker, *sent.up_per_worker),
    )


def expert_room(settings: Settings, capacity_gib: Sequence[float]) -> tuple[int, ...]:
    """Return how many experts of each layer fit into each worker's memory beside what is shared.

    The memory is what the training state may take, in GiB, as in `layout.capacity_gib`; activations
    come on top.
    """
    for worker, gib in enumerate(capacity_gib):
        if not (math.isfinite(gib) and gib > 0):
            raise SettingsError(
                f"layout.capacity_gib[{worker}]={gib} is out of range: it must be finite and > 0"
            )
    counts, local = parameter_counts(settings.model), settings.local
    per_expert = counts.per_expert_per_layer * num_sparse_layers(settings.model)
    shared_bytes, expert_bytes = (
        memory_bytes(count, local.optimizer, local.precision)
        for count in (counts.shared, per_expert)
    )
    return tuple(math.floor((gib * 2**30 - shared_bytes) / expert_bytes) for gib in capacity_gib)


def layout_context(settings: Settings) -> LayoutContext:
    """Return the context of a run's first layout: the room that `layout.capacity_gib` makes."""
    capacity = settings.layout.capacity_gib
    return LayoutContext(room=expert_room(settings, capacity) if capacity else ())
