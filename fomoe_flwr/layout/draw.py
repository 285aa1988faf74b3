"""Draws: the layout of a round, by kind."""

from __future__ import annotations

import math
from random import Random

from fomoe_flwr.config import LayoutSettings, SettingsError
from fomoe_flwr.layout.balance import even_out
from fomoe_flwr.layout.context import (
    MOVING_KINDS,
    NO_CONTEXT,
    LayoutContext,
    begins_period,
    check_load,
)
from fomoe_flwr.layout.explicit import read_layout
from fomoe_flwr.layout.ring import arcs, even_ring, trade, worker_order
from fomoe_flwr.layout.shares import check_even_shares, unequal_shares
from fomoe_flwr.layout.table import Layout

_Sets = list[list[set[int]]]
"""[layer][worker] -> experts."""


def check_layout(
    settings: LayoutSettings,
    num_layers: int,
    num_experts: int,
    context: LayoutContext = NO_CONTEXT,
) -> None:
    """Refuse settings from which no layout can be drawn.

    Raises SettingsError, one line, naming the values, what would work and the keys to change.
    """
    for key, value in (
        ("layout.num_workers", settings.num_workers),
        ("layout.overlap", settings.overlap),
        ("model.num_layers", num_layers),
        ("model.num_experts", num_experts),
    ):
        if value < 1:
            raise SettingsError(f"{key}={value} is out of range: it must be >= 1")
    _check_keys(settings)
    if settings.kind == "explicit":
        read_layout(settings, num_layers, num_experts)
    else:
        _check_shares(settings, num_experts, context)


def draw_layout(
    settings: LayoutSettings,
    num_layers: int,
    num_experts: int,
    seed: int,
    server_round: int,
    context: LayoutContext = NO_CONTEXT,
) -> Layout:
    """Draw the layout of a round (rounds count from 1); the same arguments give the same layout.

    - `fixed` is a ring. The experts of a layer form one block for each worker, and `overlap`
      neighbours on the ring hold a block.
    - `weighted` is a ring of unequal arcs.
    - `random` draws from all layouts that satisfy the constraints.
    - `rolling` (FedRolex) advances every arc by `roll_by` experts. After a full turn every worker
      has held every expert equally often.
    - `balanced` begins as a ring. It swaps as few experts as make the workers' loads in
      `context.load` even.
    - `explicit` is read from `layout.path`.

    At `overlap == num_workers` everybody holds everything, whatever the kind.

    Why a ring: islands (groups of workers with the same residents) would satisfy the constraints
    too, and would show every expert as much data. But the experts of an island would train beside
    one another only. The islands would become separate smaller models that first meet at
    evaluation. On a ring every block trains beside other blocks on each of its holders. With
    `layout.draw=per_layer` every layer orders its ring anew, so over the depth of the model a
    worker has everybody as neighbour. With `same` it has the same few in all layers.

    The kinds of `MOVING_KINDS` move every `reshuffle_every` rounds. Between moves
    `context.previous` stays, if it is given: also after `rehome`, and if the file has changed.
    Raises SettingsError for settings that admit no layout, ValueError for a round below 1 and for a
    context of another model.
    """
    if server_round < 1:
        raise ValueError(f"server_round={server_round}: rounds count from 1")
    previous, moves = context.previous, settings.kind in MOVING_KINDS
    if previous and (previous.num_layers, previous.num_experts) != (num_layers, num_experts):
        raise ValueError("the previous layout is one of another model")
    if previous and server_round > 1 and not (moves and begins_period(settings, server_round)):
        return previous
    check_layout(settings, num_layers, num_experts, context)
    if settings.kind == "explicit":
        return read_layout(settings, num_layers, num_experts)
    epoch = (server_round - 1) // settings.reshuffle_every
    if settings.kind == "balanced" and previous and server_round > 1:
        layers: _Sets = [[set(experts) for experts in workers] for workers in previous.residents]
        is_same = len(set(previous.residents)) == 1
    else:
        layers = _rings(settings, num_layers, num_experts, seed, epoch, context)
        is_same = settings.draw == "same"
    if is_same:
        layers = layers[:1]
    if settings.kind == "rolling":
        layers = [
            [{(e + settings.roll_by * epoch) % num_experts for e in held} for held in workers]
            for workers in layers
        ]
    if settings.kind == "balanced" and context.load:
        check_load(context.load, num_layers, num_experts)
        pooled = [tuple(map(sum, zip(*context.load, strict=True)))]
        even_out(layers, pooled if is_same else context.load, settings.tolerance)
    drawn = tuple(tuple(tuple(sorted(held)) for held in workers) for workers in layers)
    return Layout(num_experts, drawn * num_layers if is_same else drawn)


def _rings(
    settings: LayoutSettings,
    num_layers: int,
    num_experts: int,
    seed: int,
    epoch: int,
    context: LayoutContext,
) -> _Sets:
    """Lay a ring for each layer (one for all with `layout.draw=same`); `random` trades on it."""
    workers, overlap = settings.num_workers, settings.overlap
    is_random = settings.kind == "random"
    # Strings seed through SHA-512 on every platform and Python version.
    rng = Random(f"fomoe layout {settings.kind} seed={seed} epoch={epoch if is_random else 0}")
    shares = unequal_shares(settings, num_experts, context)
    low, num_extra = divmod(num_experts * overlap, workers)
    extras = [0] * workers
    layers: _Sets = []
    for _ in range(num_layers if settings.draw == "per_layer" else 1):
        order = worker_order(extras, 0 if shares else num_extra, rng)
        if shares:
            sets = arcs(order, shares, num_experts)
        elif settings.kind == "rolling":
            counts = dict.fromkeys(order, low) | dict.fromkeys(order[:num_extra], low + 1)
            sets = arcs(order, [counts[worker] for worker in range(workers)], num_experts)
        else:
            sets = even_ring(order, num_experts, overlap)
        if is_random and overlap < workers:
            trade(sets, rng)
        layers.append(sets)
    return layers


def _check_keys(settings: LayoutSettings) -> None:
    """Refuse keys that say nothing for the kind, or contradict each other."""
    kind = settings.kind
    for key in ("residents", "capacity_gib", "capacity_reported"):
        if getattr(settings, key) and kind in ("fixed", "explicit"):
            raise SettingsError(
                f"layout.{key} has no meaning for layout.kind={kind}: use layout.kind=weighted "
                f"(or {', '.join(MOVING_KINDS)})"
            )
    given = [
        f"layout.{key}"
        for key in ("residents", "capacity_gib", "capacity_reported")
        if getattr(settings, key)
    ]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} contradict each other: give one of them")
    if settings.path and kind != "explicit":
        raise SettingsError(
            f"layout.path={settings.path} has no meaning for layout.kind={kind}: use "
            "layout.kind=explicit"
        )


def _check_shares(settings: LayoutSettings, num_experts: int, context: LayoutContext) -> None:
    workers, overlap = settings.num_workers, settings.overlap
    if overlap > workers:
        raise SettingsError(
            f"layout.overlap={overlap} needs layout.num_workers >= {overlap} (got {workers})"
        )
    residencies = num_experts * overlap
    if residencies < workers:
        raise SettingsError(
            f"model.num_experts={num_experts}, layout.overlap={overlap} and layout.num_workers="
            f"{workers} leave some workers without an expert: model.num_experts * layout.overlap "
            f"(= {residencies}) must be at least layout.num_workers; use layout.overlap >= "
            f"{math.ceil(workers / num_experts)}, model.num_experts >= "
            f"{math.ceil(workers / overlap)} or layout.num_workers <= {residencies}"
        )
    shares = unequal_shares(settings, num_experts, context)
    if shares is None:
        check_even_shares(settings, num_experts)
    if settings.kind == "rolling":
        _check_turn(settings, num_experts, shares)


def _check_turn(settings: LayoutSettings, num_experts: int, shares: list[int] | None) -> None:
    """Refuse steps after whose full turn a worker has held some experts more often than others."""
    low, num_extra = divmod(num_experts * settings.overlap, settings.num_workers)
    counts = shares or ([low, low + 1] if num_extra else [low])
    fair = math.gcd(num_experts, *counts)
    if fair % math.gcd(settings.roll_by, num_experts):
        steps = [s for s in range(1, num_experts) if fair % math.gcd(s, num_experts) == 0]
        nearest = min(steps, key=lambda s: abs(s - settings.roll_by))
        raise SettingsError(
            f"layout.roll_by={settings.roll_by} would never show a worker all of the "
            f"model.num_experts={num_experts} experts equally often: use layout.roll_by={nearest}"
        )
