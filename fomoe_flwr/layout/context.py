"""The context of a layout: what a draw depends on besides settings, seed and round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fomoe_flwr.config import LayoutSettings
from fomoe_flwr.layout.table import Layout

Load = Sequence[Sequence[float]]
"""[layer][expert] -> assignments that the router made, pooled over workers."""


@dataclass(frozen=True)
class LayoutContext:
    """What was measured and reported so far; a checkpoint keeps it as `to_json` has it.

    `load` counts the assignments of the period so far; empty before anything was measured.
    `previous` is the layout of the round before, `room[worker]` the most experts of each layer that
    fit into the worker's memory.
    """

    load: tuple[tuple[float, ...], ...] = ()
    previous: Layout | None = None
    room: tuple[int, ...] = ()

    def after(
        self, settings: LayoutSettings, server_round: int, layout: Layout, load: Load = ()
    ) -> LayoutContext:
        """Return the context once a round is over: its layout, and the load that it measured.

        Loads add up over a period and start anew with it. A round that measured nothing leaves the
        load as it was.
        """
        counts = tuple(tuple(layer) for layer in load)
        check_load(counts, layout.num_layers, layout.num_experts)
        if not counts:
            counts = self.load
        elif self.load and not begins_period(settings, server_round):
            counts = tuple(
                tuple(a + b for a, b in zip(old, new, strict=True))
                for old, new in zip(self.load, counts, strict=True)
            )
        return LayoutContext(counts, layout, self.room)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dictionaries."""
        return {
            "load": [list(layer) for layer in self.load],
            "previous": self.previous and self.previous.to_json(),
            "room": list(self.room),
        }

    @classmethod
    def from_json(cls, data: Any) -> LayoutContext:
        """Read what `to_json` wrote; raise ValueError for anything else."""
        try:
            load = tuple(map(tuple, data["load"]))
            previous = data["previous"] and Layout.from_json(data["previous"])
            room = tuple(data["room"])
        except (KeyError, TypeError) as error:
            raise ValueError("a layout context has load, previous and room") from error
        if load:
            check_load(load, len(load), len(load[0]))
        if any(type(most) is not int for most in room):
            raise ValueError(f"room={list(room)} of a layout context must be integers")
        return cls(load, previous or None, room)


NO_CONTEXT = LayoutContext()
"""Before anything was measured: the first round, and the cost model."""


MOVING_KINDS = ("random", "rolling", "balanced")
"""Values of `layout.kind` that are drawn anew every `layout.reshuffle_every` rounds."""


def begins_period(settings: LayoutSettings, server_round: int) -> bool:
    """Tell whether a round is the first of its `reshuffle_every` rounds."""
    return (server_round - 1) % settings.reshuffle_every == 0


def check_load(load: Load, num_layers: int, num_experts: int) -> None:
    """Raise ValueError unless the load is empty or has one finite count >= 0 for every expert."""
    if not load:
        return
    if len(load) != num_layers or any(len(layer) != num_experts for layer in load):
        raise ValueError(f"a load needs {num_layers} layers of {num_experts} experts")
    for layer in load:
        for count in layer:
            if isinstance(count, bool) or not isinstance(count, int | float):
                raise ValueError(f"a load consists of numbers, not of {count!r}")
            if not (math.isfinite(count) and count >= 0):
                raise ValueError(f"a load consists of finite counts >= 0, not of {count}")
