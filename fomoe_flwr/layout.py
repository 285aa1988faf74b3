"""The layout: which worker holds which experts, layer by layer (paper section 3.2, algorithm 1).

A layout is drawn from settings, seed and round alone, so every party that knows those three draws
the same one. Every expert of every layer has exactly `overlap` holders, and every worker holds the
same number of experts in every layer (with `layout.allow_uneven`: the same number up to one).
Standard library only, apart from the settings themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

from fomoe_flwr.config import LayoutSettings, SettingsError

_Item = TypeVar("_Item")

_TRADES_PER_WORKER = 16
"""Trades that make a ring random; measured, four to eight forget the start (128 workers)."""


@dataclass(frozen=True)
class Layout:
    """Who holds which experts.

    `residents[layer][worker]` is the strictly increasing tuple of experts that the worker holds.
    Raises ValueError for anything else, and for an expert without a holder: its weights would be
    nobody's to train.
    """

    num_experts: int
    residents: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if self.num_experts < 1 or not self.residents or not self.residents[0]:
            raise ValueError("a layout needs at least one layer, one worker and one expert")
        for layer, workers in enumerate(self.residents):
            if len(workers) != self.num_workers:
                raise ValueError(
                    f"layer {layer} has {len(workers)} workers, layer 0 has {self.num_workers}"
                )
            for worker, experts in enumerate(workers):
                if any(a >= b for a, b in pairwise(experts)):
                    raise ValueError(
                        f"experts of worker {worker} in layer {layer} must be sorted and distinct"
                    )
            held = {expert for experts in workers for expert in experts}
            if held != set(range(self.num_experts)):
                raise ValueError(
                    f"layer {layer} must give experts 0 to {self.num_experts - 1} a holder each, "
                    f"and no other expert"
                )

    @property
    def num_layers(self) -> int:
        """Number of layers that carry experts."""
        return len(self.residents)

    @property
    def num_workers(self) -> int:
        """Number of workers (the paper's M)."""
        return len(self.residents[0])

    def of_worker(self, worker: int) -> tuple[tuple[int, ...], ...]:
        """Return one worker's resident experts, a sorted tuple for each layer."""
        return tuple(workers[worker] for workers in self.residents)

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the workers that hold an expert, in increasing order."""
        return self._holders[layer][expert]

    @cached_property
    def _holders(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        table = []
        for workers in self.residents:
            holders: list[list[int]] = [[] for _ in range(self.num_experts)]
            for worker, experts in enumerate(workers):
                for expert in experts:
                    holders[expert].append(worker)
            table.append(tuple(map(tuple, holders)))
        return tuple(table)

    def digest(self) -> str:
        """Return 16 hex digits that identify the layout on the wire."""
        text = json.dumps([self.num_experts, self.residents], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> list[list[list[int]]]:
        """Return plain lists: [layer][worker] -> resident experts."""
        return [[list(experts) for experts in workers] for workers in self.residents]

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Read what `to_json` wrote; raise ValueError for anything that is not a layout."""
        try:
            residents = tuple(tuple(tuple(experts) for experts in workers) for workers in data)
        except TypeError as error:
            raise ValueError("a layout is a list of layers of workers of expert ids") from error
        experts = [expert for workers in residents for held in workers for expert in held]
        # bool is an int and 1.0 equals 1: both would pass the checks of the class.
        if any(type(expert) is not int for expert in experts):
            raise ValueError("expert ids in a layout must be integers")
        return cls(max(experts, default=-1) + 1, residents)

    def moved_from(self, previous: Layout) -> int:
        """Count the residencies (layer, worker, expert) that `previous` did not have.

        Each of them is an expert that a worker has to fetch and whose optimizer state starts anew.
        """
        for name in ("num_layers", "num_workers", "num_experts"):
            mine, other = getattr(self, name), getattr(previous, name)
            if mine != other:
                raise ValueError(f"layouts differ in {name}: {mine} and {other}")
        return sum(
            len(set(now).difference(before))
            for now_workers, before_workers in zip(self.residents, previous.residents, strict=True)
            for now, before in zip(now_workers, before_workers, strict=True)
        )


def check_layout(settings: LayoutSettings, num_layers: int, num_experts: int) -> None:
    """Refuse settings from which no layout can be drawn.

    Raises SettingsError, one line, naming the values, what would work and the keys to change.
    """
    workers, overlap = settings.num_workers, settings.overlap
    for key, value in (
        ("layout.num_workers", workers),
        ("layout.overlap", overlap),
        ("model.num_layers", num_layers),
        ("model.num_experts", num_experts),
    ):
        if value < 1:
            raise SettingsError(f"{key}={value} is out of range: it must be >= 1")
    if overlap > workers:
        raise SettingsError(
            f"layout.overlap={overlap} needs layout.num_workers >= {overlap} (got {workers})"
        )
    residencies = num_experts * overlap
    values = (
        f"model.num_experts={num_experts}, layout.overlap={overlap} and "
        f"layout.num_workers={workers}"
    )
    if residencies < workers:
        raise SettingsError(
            f"{values} leave some workers without an expert: model.num_experts * layout.overlap "
            f"(= {residencies}) must be at least layout.num_workers; use layout.overlap >= "
            f"{math.ceil(workers / num_experts)}, model.num_experts >= "
            f"{math.ceil(workers / overlap)} or layout.num_workers <= {residencies}"
        )
    if residencies % workers and not settings.allow_uneven:
        overlaps = _around(overlap, range(1, workers + 1), lambda o: num_experts * o % workers == 0)
        experts = _around(
            num_experts, range(1, num_experts + workers + 1), lambda e: e * overlap % workers == 0
        )
        counts = _around(workers, range(overlap, residencies + 1), lambda w: residencies % w == 0)
        low = residencies // workers
        raise SettingsError(
            f"{values} cannot load the workers evenly: {num_experts} * {overlap} / {workers} = "
            f"{residencies / workers:.4g} experts a worker; use layout.overlap={overlaps}, "
            f"model.num_experts={experts}, layout.num_workers={counts} or "
            f"layout.allow_uneven=true ({low} or {low + 1} experts a worker)"
        )


def draw_layout(
    settings: LayoutSettings, num_layers: int, num_experts: int, seed: int, server_round: int
) -> Layout:
    """Draw the layout of a round (rounds count from 1); the same arguments give the same layout.

    `fixed` is a ring: the experts of a layer form one block for each worker, and the workers that
    hold a block are `overlap` neighbours on a ring. Islands (groups of workers with the same
    residents) would satisfy the constraints too and show every expert as much data, but the experts
    of an island only ever train beside one another: the islands would drift into separate smaller
    models that first meet at evaluation. On a ring every block trains beside other blocks on each
    of its holders, so what experts expect of one another is passed on to all. With
    `layout.draw=per_layer` every layer orders its ring anew, so that over the depth of the model a
    worker has everybody as neighbour; with `same` it has the same few in all layers.

    `random` draws from all layouts that satisfy the constraints, anew every `reshuffle_every`
    rounds. At `overlap == num_workers` everybody holds everything, whatever the kind.
    Raises SettingsError for settings that admit no layout, ValueError for a round below 1.
    """
    check_layout(settings, num_layers, num_experts)
    if server_round < 1:
        raise ValueError(f"server_round={server_round}: rounds count from 1")
    epoch = (server_round - 1) // settings.reshuffle_every if settings.kind == "random" else 0
    # Strings seed through SHA-512 on every platform and Python version.
    rng = Random(f"fomoe layout {settings.kind} seed={seed} epoch={epoch}")
    extras = [0] * settings.num_workers
    layers: list[tuple[tuple[int, ...], ...]] = []
    for _ in range(num_layers if settings.draw == "per_layer" else 1):
        order = _worker_order(extras, num_experts * settings.overlap % settings.num_workers, rng)
        sets = _ring(order, num_experts, settings.overlap)
        if settings.kind == "random" and settings.overlap < settings.num_workers:
            _trade(sets, rng)
        layers.append(tuple(tuple(sorted(experts)) for experts in sets))
    if settings.draw == "same":
        layers *= num_layers
    return Layout(num_experts, tuple(layers))


def _worker_order(extras: list[int], num_extra: int, rng: Random) -> list[int]:
    """Draw the ring order of a layer; its first `num_extra` workers will hold one expert more.

    Those are the workers with the fewest extra experts so far, so over all layers the loads differ
    by at most one as well. `extras` is updated.
    """
    by_extras = sorted(_shuffled(range(len(extras)), rng), key=extras.__getitem__)
    for worker in by_extras[:num_extra]:
        extras[worker] += 1
    return _shuffled(by_extras[:num_extra], rng) + _shuffled(by_extras[num_extra:], rng)


def _ring(order: Sequence[int], num_experts: int, overlap: int) -> list[set[int]]:
    """Place blocks of consecutive experts on `overlap` neighbours each; return [worker] -> experts.

    Experts that fill no block for everybody are dealt from the ring's start, each to the next
    `overlap` workers, so that the loads differ by at most one.
    """
    num_workers = len(order)
    block = num_experts // num_workers
    sets: list[set[int]] = [set() for _ in order]
    for expert in range(num_experts):
        rest = expert - block * num_workers
        start = expert // block if rest < 0 else rest * overlap
        for step in range(overlap):
            sets[order[(start + step) % num_workers]].add(expert)
    return sets


def _trade(sets: list[set[int]], rng: Random) -> None:
    """Turn a layer into a random one with the same number of holders and loads, in place.

    Two workers pool the experts that only one of them holds and deal them out anew. Such trades
    (Curveball, Strona et al. 2014) have the uniform distribution over all such layouts as their
    limit, and reach it far sooner than swaps of single experts.
    """
    for _ in range(_TRADES_PER_WORKER * len(sets)):
        first, second = _shuffled(range(len(sets)), rng, 2)
        both = sets[first] & sets[second]
        # Sorted, because a set's order is no part of the language.
        pool = _shuffled(sorted(sets[first] ^ sets[second]), rng)
        cut = len(sets[first]) - len(both)
        sets[first], sets[second] = both.union(pool[:cut]), both.union(pool[cut:])


def _shuffled(items: Sequence[_Item], rng: Random, count: int | None = None) -> list[_Item]:
    """Return `count` items (default all) in random order.

    Python promises stable sequences across its versions for `random()` only, not for `shuffle`.
    """
    pool = list(items)
    count = len(pool) if count is None else count
    for i in range(count):
        j = i + int(rng.random() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]


def _around(value: int, candidates: range, works: Callable[[int], bool]) -> str:
    """Name the nearest candidates below and above a value that work: "2 or 4"."""
    below = [c for c in candidates if c < value and works(c)][-1:]
    above = [c for c in candidates if c > value and works(c)][:1]
    return " or ".join(map(str, below + above))
