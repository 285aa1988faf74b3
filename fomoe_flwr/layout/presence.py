"""Presence: the layout of those who are there, from the one drawn for all seats.

Every kind of layout draws for all workers; what falls to those who are away finds other homes with
as few moves as possible, and those who return take their share. So a kind that moves goes on moving
as its seed says, and one that stays keeps what it has.
"""

from __future__ import annotations

from collections.abc import Collection

from fomoe_flwr.config import LayoutSettings
from fomoe_flwr.layout.context import LayoutContext
from fomoe_flwr.layout.rehoming import Rehomed, rehome
from fomoe_flwr.layout.table import Layout


def settle(
    drawn: Layout,
    present: Collection[int],
    settings: LayoutSettings,
    context: LayoutContext,
    overlap: int | None = None,
) -> Rehomed:
    """Give the experts of absent workers to present ones, and returned workers their share.

    Experts get `overlap` holders, by default `layout.overlap`, as far as there are as many workers;
    in an `explicit` layout they keep the number that they have. Nobody holds more than it has room
    for; workers of a `layout.residents` list hold in proportion to it. Raises ValueError if those
    present have no room for one copy of every expert.
    """
    holding = {worker for worker in range(drawn.num_workers) if any(drawn.of_worker(worker))}
    if holding == set(present):
        return Rehomed(drawn, moved=0, lower_bound=0, short=0)
    if overlap is None and settings.kind != "explicit":
        overlap = settings.overlap
    room = context.room
    if settings.residents:
        # Proportions, not limits: their sum is just what all workers together hold.
        room = tuple(count * drawn.num_experts for count in settings.residents)
    return rehome(drawn, present, overlap, room or None)
