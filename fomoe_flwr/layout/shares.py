"""Shares: how many experts of a layer each worker holds, evenly or by what it has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fomoe_flwr.config import LayoutSettings, SettingsError
from fomoe_flwr.layout.context import LayoutContext


def share_out(total: int, room: Sequence[float], most: int, order: Sequence[int]) -> list[int]:
    """Divide `total` experts over workers in proportion to their room; return counts by worker.

    Only the workers in `order` take part; each gets at least one if there are enough, at most
    `most` and at most its room. What cannot be divided goes to those that stand first in `order`
    (Sainte-Lague). Raises ValueError if the room is too small.
    """
    limits = {worker: min(most, math.floor(room[worker])) for worker in order}
    if sum(limits.values()) < total:
        raise ValueError(f"room for {sum(limits.values())} of {total} experts")
    counts = [0] * len(room)
    for given in range(total):
        open_to = [worker for worker in order if counts[worker] < limits[worker]]
        if given < len(order):
            open_to = [worker for worker in open_to if not counts[worker]] or open_to
        counts[max(open_to, key=lambda worker: room[worker] / (2 * counts[worker] + 1))] += 1
    return counts


def unequal_shares(
    settings: LayoutSettings, num_experts: int, context: LayoutContext
) -> list[int] | None:
    """Return how many experts of a layer each worker holds, or None if all hold the same number.

    Raises SettingsError, one line, for numbers from which no layout can be drawn.
    """
    if settings.residents:
        _check_residents(settings, num_experts)
        return list(settings.residents)
    if settings.capacity_reported and not context.room:
        # Before nodes have reported: the cost model, and the checks before a run.
        return None
    if settings.capacity_gib or context.room:
        return _shares_of_room(settings, num_experts, context)
    if settings.kind == "weighted":
        even = _nearest([0] * settings.num_workers, num_experts * settings.overlap, num_experts)
        raise SettingsError(
            f"layout.kind=weighted needs layout.residents, the experts of a layer for each worker "
            f"(e.g. {_listed(even)}), or layout.capacity_gib, the memory of each worker, or "
            "layout.capacity_reported=true"
        )
    return None


def check_even_shares(settings: LayoutSettings, num_experts: int) -> None:
    """Refuse numbers that do not load all workers alike, unless `layout.allow_uneven`."""
    workers, overlap = settings.num_workers, settings.overlap
    residencies = num_experts * overlap
    if residencies % workers == 0 or settings.allow_uneven:
        return
    overlaps = _around(overlap, range(1, workers + 1), lambda o: num_experts * o % workers == 0)
    experts = _around(
        num_experts, range(1, num_experts + workers + 1), lambda e: e * overlap % workers == 0
    )
    counts = _around(workers, range(overlap, residencies + 1), lambda w: residencies % w == 0)
    low = residencies // workers
    raise SettingsError(
        f"model.num_experts={num_experts}, layout.overlap={overlap} and "
        f"layout.num_workers={workers} cannot load the workers evenly: {num_experts} * {overlap} / "
        f"{workers} = {residencies / workers:.4g} experts a worker; use layout.overlap={overlaps}, "
        f"model.num_experts={experts}, layout.num_workers={counts} or "
        f"layout.allow_uneven=true ({low} or {low + 1} experts a worker)"
    )


def _check_residents(settings: LayoutSettings, num_experts: int) -> None:
    given, workers, overlap = settings.residents, settings.num_workers, settings.overlap
    text = f"layout.residents={_listed(given)}"
    padded = (list(given) + [given[-1]] * workers)[:workers]
    nearest = _listed(_nearest(padded, num_experts * overlap, num_experts))
    if len(given) != workers:
        raise SettingsError(
            f"{text} has {len(given)} entries, layout.num_workers={workers} needs {workers}, "
            f"e.g. {nearest}"
        )
    if not all(1 <= count <= num_experts for count in given):
        raise SettingsError(
            f"{text} is out of range: a worker holds 1 to model.num_experts={num_experts} experts "
            f"of a layer; the nearest list that works is {nearest}"
        )
    total = sum(given)
    if total != num_experts * overlap:
        other = total // num_experts
        fits = total % num_experts == 0 and other <= workers
        raise SettingsError(
            f"{text} adds up to {total}, model.num_experts={num_experts} * layout.overlap="
            f"{overlap} = {num_experts * overlap} is needed; the nearest list that works is "
            f"{nearest}" + (f", or use layout.overlap={other}" if fits else "")
        )


def _shares_of_room(
    settings: LayoutSettings, num_experts: int, context: LayoutContext
) -> list[int]:
    given, workers, room = settings.capacity_gib, settings.num_workers, context.room
    if given and len(given) != workers:
        raise SettingsError(
            f"layout.capacity_gib={_listed(given)} has {len(given)} entries, "
            f"layout.num_workers={workers} needs {workers}"
        )
    if len(room) != workers:
        # The layout knows no bytes.
        raise ValueError("layout.capacity_gib needs a context with room: costs.layout_context()")
    for worker, most in enumerate(room):
        if most < 1:
            raise SettingsError(
                f"worker {worker} has no room for one expert of each layer beside the shared "
                f"parameters: raise {_capacity_key(settings, worker)} or leave the worker out"
            )
    limits = [min(most, num_experts) for most in room]
    needed = num_experts * settings.overlap
    if sum(limits) < needed:
        most = sum(limits) // num_experts
        advice = f"use layout.overlap={most} or raise" if most else "raise"
        raise SettingsError(
            f"the workers have room for {_listed(limits)} experts of a layer, {sum(limits)} "
            f"together; model.num_experts={num_experts} * layout.overlap={settings.overlap} = "
            f"{needed} are needed: {advice} {_capacity_key(settings)}"
        )
    return share_out(needed, room, num_experts, range(workers))


def _capacity_key(settings: LayoutSettings, worker: int | None = None) -> str:
    """Name what to change: a setting, or what nodes report."""
    if settings.capacity_reported:
        return "the capacity-gib of its node" if worker is not None else "capacity-gib of nodes"
    return "layout.capacity_gib" + ("" if worker is None else f"[{worker}]")


def _nearest(wanted: Sequence[int], total: int, most: int) -> list[int]:
    """Return the list of numbers from 1 to `most` nearest to `wanted` that adds up to `total`."""
    counts = [min(max(count, 1), most) for count in wanted]
    clamped = list(counts)
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i, count in enumerate(counts) if 1 <= count + step <= most]
        counts[min(movable, key=lambda i: abs(counts[i] + step - clamped[i]))] += step
    return counts


def _listed(values: Sequence[float]) -> str:
    """Write a list as it is typed on a command line."""
    return f"[{','.join(f'{value:g}' for value in values)}]"


def _around(value: int, candidates: range, works: Callable[[int], bool]) -> str:
    """Name the nearest candidates below and above a value that work: "2 or 4"."""
    below = [c for c in candidates if c < value and works(c)][-1:]
    above = [c for c in candidates if c > value and works(c)][:1]
    return " or ".join(map(str, below + above))
