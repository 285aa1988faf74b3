"""Memory of a worker's training state, and how many experts fit into a given memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.costs.counts import parameter_counts
from fomoe_flwr.layout import LayoutContext

STATE_BYTES = {"adamw": 16, "sgd": 8}
"""fp32 training state, bytes a parameter: weight and gradient, and for AdamW its two moments."""


def memory_bytes(num_parameters: int, optimizer: str) -> int:
    """Return a worker's training state in bytes; ghosts are not held, so they cost nothing.

    Activations come on top. `optimizer` is a name that `local.optimizer` takes.
    """
    if optimizer not in STATE_BYTES:
        raise SettingsError(
            f"local.optimizer={optimizer} has no cost model: it is not one of "
            f"{', '.join(STATE_BYTES)}"
        )
    return num_parameters * STATE_BYTES[optimizer]


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
    counts, optimizer = parameter_counts(settings.model), settings.local.optimizer
    per_expert = counts.per_expert_per_layer * settings.model.num_layers
    return tuple(
        math.floor(
            (gib * 2**30 - memory_bytes(counts.shared, optimizer))
            / memory_bytes(per_expert, optimizer)
        )
        for gib in capacity_gib
    )


def layout_context(settings: Settings) -> LayoutContext:
    """Return the context of a run's first layout: the room that `layout.capacity_gib` makes."""
    capacity = settings.layout.capacity_gib
    return LayoutContext(room=expert_room(settings, capacity) if capacity else ())
